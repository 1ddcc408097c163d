"""Compressed files, made by their tools: whole ones are read, others are refused."""

from __future__ import annotations

import random
import tracemalloc
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from netota_coap import files as source_files
from netota_coap.errors import InvalidDataError
from netota_coap.publishing import inspection
from netota_coap.publishing.inspection.artefact import Artefact
from tests.support import artefact_files as files

SUFFIXES = {"gzip": "gz", "xz": "xz", "zstd": "zst"}
MAGICS = {"gzip": b"\x1f\x8b\x08", "xz": b"\xfd7zXZ\0", "zstd": b"\x28\xb5\x2f\xfd"}
NOISE = random.Random(1).randbytes(300_000)
DATA = {
    "empty": b"",
    "a byte": b"x",
    "text": files.BODY,
    "noise": NOISE,
    "zeros": bytes(1 << 20),
    "mixed": NOISE + bytes(300_000) + files.BODY * 100,
}
OPTIONS = [
    ("gzip", "-6"),
    ("gzip", "-9n"),
    ("xz", "-0"),
    ("xz", "-0 --check=none --block-size=100000"),
    ("zstd", "-3"),
    ("zstd", "--no-check"),
    ("zstd", "-19 --long=27"),
    ("zstd", "--fast=5 --no-content-size"),
]


def packed(directory: Path, tool: str, data: bytes = files.BODY, options: str = "") -> bytes:
    path = directory / f"file.{SUFFIXES[tool]}"
    return files.packed(path, data, tool, *options.split()).read_bytes()


def accepted(path: Path, data: bytes | bytearray) -> bool:
    path.write_bytes(data)
    return isinstance(files.outcome(path), Artefact)


@pytest.mark.parametrize(("tool", "options"), OPTIONS)
@pytest.mark.parametrize("name", DATA)
def test_whole_files(name: str, tool: str, options: str, tmp_path: Path) -> None:
    """A file of any size and any options is read; what is cut off is missed."""
    data = packed(tmp_path, tool, DATA[name], options)
    path = tmp_path / "update"
    assert accepted(path, data)
    size = len(data)
    for end in {*range(size - 9, size), *(size * n // 8 for n in range(8))}:
        assert end < 6 or not accepted(path, data[:end]), end


@pytest.mark.parametrize("tool", SUFFIXES)
def test_cut_anywhere(tool: str, tmp_path: Path) -> None:
    """Wherever a small file of two parts is cut, it is refused, but between the parts."""
    part = packed(tmp_path, tool, b"firmware" * 9)
    path = tmp_path / "update"
    ends = [end for end in range(6, 2 * len(part) + 1) if accepted(path, (part * 2)[:end])]
    assert [len(part), 2 * len(part)] == ends


FLIPS = (1, 2, 4, 8, 16, 32, 64, 128, 255)


@pytest.mark.parametrize(
    ("tool", "options", "noticed"),
    [
        ("gzip", "", {*range(3, 20), *range(-12, 0)}),
        ("xz", "", {*range(6, 12), *range(-12, 0)}),
        # Descriptor and size of the frame are of 3 bytes; the first block's header follows.
        ("zstd", "", {4, 8, 9}),
        ("zstd", "-19 --no-check", {4, 8, 9}),
    ],
)
def test_flipped_bits(tool: str, options: str, noticed: set[int], tmp_path: Path) -> None:
    """What is refused its tool refuses; in headers, or where it is unpacked, that is all."""
    data = packed(tmp_path, tool, files.BODY, options)
    ours: set[Path] = set()
    must: dict[Path, bool] = {}
    for place in (*range(len(MAGICS[tool]), 20), *range(-12, 0)):
        for flip in FLIPS:
            path = tmp_path / f"{place}-{flip}.{SUFFIXES[tool]}"
            changed = bytearray(data)
            changed[place] ^= flip
            must[path] = place in noticed
            if not accepted(path, changed):
                ours.add(path)
    refused = files.refused(tool, must)
    assert set() == ours - refused
    assert set() == {path for path in refused - ours if must[path]}


@pytest.mark.parametrize(
    ("tool", "after", "reason"),
    [
        ("gzip", bytes(1), None),
        ("gzip", bytes(70_000), None),
        ("gzip", b"\x1f", "is truncated: its last gzip member does not end"),
        ("gzip", b"more", "is not sound gzip: Error"),
        ("gzip", bytes(5000) + b"more", "is not sound gzip: Error"),
        ("xz", bytes(4), None),
        ("xz", bytes(508), None),
        ("xz", bytes(3), "is truncated: an xz file ends with a footer"),
        ("xz", b"more", "is truncated: an xz file ends with a footer"),
        ("xz", b"moreYZ" * 2, "is not sound xz: its footer is damaged"),
        ("zstd", b"\x5f\x2a\x4d\x18\3\0\0\0abc", None),
        ("zstd", b"\x50\x2a\x4d\x18\0\0\0\0", None),
        ("zstd", b"\x50\x2a\x4d\x18\3\0\0\0ab", "is truncated: its last zstd frame does not end"),
        ("zstd", b"\x50\x2a\x4d\x18\0\0\0", "is truncated: its last zstd frame does not end"),
        ("zstd", bytes(3), "is truncated: its last zstd frame does not end"),
        ("zstd", bytes(4), "is not sound zstd: what follows a frame is none"),
        ("zstd", b"\x28\xb5\x2f\xfd\x28", "is not sound zstd: a frame has a reserved bit"),
        (
            "zstd", b"\x28\xb5\x2f\xfd\x00\x00\x07\0\0",
            "is not sound zstd: a block is of kind 3 and 0 bytes",
        ),
        (
            "zstd", b"\x28\xb5\x2f\xfd\x20\x01\x11\0\0",
            "is not sound zstd: a block is of kind 0 and 2 bytes",
        ),
    ],
)  # fmt: skip
def test_what_follows(tool: str, after: bytes, reason: str | None, tmp_path: Path) -> None:
    """Zeros may follow gzip and xz, frames to be skipped zstd; the rest is refused, in words."""
    path = tmp_path / "update"
    path.write_bytes(packed(tmp_path, tool) + after)
    found = files.outcome(path)
    assert (reason is not None) is isinstance(found, InvalidDataError)
    assert not isinstance(found, InvalidDataError) or (reason or "") in found.detail


def test_frames_of_pzstd(tmp_path: Path) -> None:
    """Each frame of pzstd comes after one to be skipped."""
    source = tmp_path / "source"
    source.write_bytes(DATA["mixed"])
    files.run("pzstd", "-q", source)
    parallel = source.with_name("source.zst").read_bytes()
    assert accepted(tmp_path / "update", packed(tmp_path, "zstd") + parallel)
    assert not accepted(tmp_path / "update", packed(tmp_path, "zstd") + parallel[:-1])


@pytest.mark.parametrize("chunk", [1, 2, 3, 7, 64])
@pytest.mark.parametrize("tool", ["gzip", "zstd"])
def test_headers_across_pieces(
    tool: str, chunk: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Wherever a piece of a file ends, its headers are understood."""
    monkeypatch.setattr(source_files, "CHUNK", chunk)
    data = packed(tmp_path, tool) * 3
    assert accepted(tmp_path / "update", data)
    assert not accepted(tmp_path / "update", data[:-1])


def test_a_bomb_takes_no_memory(tmp_path: Path) -> None:
    """What unpacks to a thousand times its size is unpacked in constant memory."""
    path = tmp_path / "bomb"
    path.write_bytes(packed(tmp_path, "gzip", bytes(32 << 20)))
    tracemalloc.start()
    try:
        assert inspection.read(path).facts == {"format": "gzip"}
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert peak < 16 << 20


@given(data=st.data())
def test_any_frame(data: st.DataObject, tmp_path: Path) -> None:
    """Whatever follows the magic number of zstd, it is read or refused."""
    path = tmp_path / "update"
    path.write_bytes(b"\x28\xb5\x2f\xfd" + data.draw(st.binary(max_size=40)))
    files.outcome(path)
