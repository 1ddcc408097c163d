"""Reading the files that are published."""

from __future__ import annotations

import hashlib
import os
from pathlib import Path

import pytest

from netota_coap.artefacts import envelope_of
from netota_coap.errors import InvalidDataError
from netota_coap.model import Envelope

CHUNK = 1 << 20


@pytest.mark.parametrize("size", [0, 1, CHUNK - 1, CHUNK, CHUNK + 1, 3 * CHUNK])
def test_envelope_describes_the_file(tmp_path: Path, size: int) -> None:
    """Size and digest are those of all bytes, and the progress adds up to them."""
    data = (b"firmware" * (size // 8 + 1))[:size]
    path = tmp_path / "image.bin"
    path.write_bytes(data)
    seen: list[int] = []
    expected = Envelope(type="a/b", size=size, sha256=hashlib.sha256(data).digest())
    assert expected == envelope_of(path, "a/b", seen.append)
    assert (size, -(-size // CHUNK)) == (sum(seen), len(seen))


def test_envelope_follows_a_symbolic_link(tmp_path: Path) -> None:
    """A link to a file is as good as the file."""
    (tmp_path / "image.bin").write_bytes(b"firmware")
    (tmp_path / "latest.bin").symlink_to("image.bin")
    expected = envelope_of(tmp_path / "image.bin", "a/b")
    assert expected == envelope_of(tmp_path / "latest.bin", "a/b")


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("missing", "cannot be read: No such file or directory"),
        ("directory", "is not a regular file"),
        ("pipe", "is not a regular file"),
        ("file/below", "cannot be read: Not a directory"),
        ("loop", "cannot be read: Too many levels of symbolic links"),
    ],
)
def test_what_cannot_be_read_is_named(tmp_path: Path, name: str, reason: str) -> None:
    """The error says which file and why, and nobody waits for a pipe."""
    (tmp_path / "directory").mkdir()
    (tmp_path / "file").write_bytes(b"")
    (tmp_path / "loop").symlink_to("loop")
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(InvalidDataError) as raised:
        envelope_of(tmp_path / name, "a/b")
    assert f"{tmp_path / name}: {reason}" == raised.value.detail


def test_media_type_is_held_to_its_rule(tmp_path: Path) -> None:
    """A media type that no stream could hold is refused."""
    (tmp_path / "image.bin").write_bytes(b"firmware")
    with pytest.raises(InvalidDataError, match="type: must not be empty"):
        envelope_of(tmp_path / "image.bin", "")
