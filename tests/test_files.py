"""Files and directories that are written to stay."""

from __future__ import annotations

import os
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from netota_coap.files import make_directory, write

THREADS, ROUNDS = 4, 20


def test_directories_are_made_by_several_at_once(tmp_path: Path) -> None:
    """Each finds them made, whoever was faster, and can write there."""
    together = threading.Barrier(THREADS)

    def make(number: int) -> None:
        for turn in range(ROUNDS):
            together.wait(10)
            write(tmp_path / f"{turn}/a/b/c/{number}", b"there")

    with ThreadPoolExecutor(THREADS) as pool:
        assert list(pool.map(make, range(THREADS))) == [None] * THREADS
    for turn in range(ROUNDS):
        found = {path.name: path.read_bytes() for path in (tmp_path / f"{turn}/a/b/c").iterdir()}
        assert found == {str(number): b"there" for number in range(THREADS)}


def test_whoever_was_slower_syncs_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A directory that another made meanwhile is there to stay before anything is put into it."""
    mkdir, fsync = os.mkdir, os.fsync
    synced: list[Path] = []

    def overtaken(path: Path, mode: int = 0o777) -> None:
        mkdir(path, mode)
        mkdir(path, mode)  # the slower one's

    def noted(descriptor: int) -> None:
        synced.append(Path(f"/proc/self/fd/{descriptor}").readlink())
        fsync(descriptor)

    monkeypatch.setattr(os, "mkdir", overtaken)
    monkeypatch.setattr(os, "fsync", noted)
    make_directory(tmp_path / "a" / "b")
    assert [tmp_path, tmp_path / "a"] == synced


def test_a_file_in_the_place_of_a_directory(tmp_path: Path) -> None:
    """It stays, and is told."""
    (tmp_path / "a").write_bytes(b"")
    for path in (tmp_path / "a", tmp_path / "a" / "b"):
        with pytest.raises(FileExistsError):
            make_directory(path)
    assert (tmp_path / "a").is_file()
