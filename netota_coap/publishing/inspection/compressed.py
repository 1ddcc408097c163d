"""Inspects compressed files (gzip, xz, zstd) and tar archives.

Source: POSIX (ustar), RFC 1952, the .xz file format.
"""

from __future__ import annotations

import lzma
import struct
import zlib
from collections.abc import Callable
from typing import Any

import attrs

from netota_coap.files import File
from netota_coap.model.values import Content, Envelope
from netota_coap.publishing.inspection import filesystems, zstd
from netota_coap.publishing.inspection.artefact import Artefact

_PEEK = 64 << 10  # bytes of an xz file that are unpacked to learn what is inside
# Bytes of gzip unpacked in one step; deflate can expand them 1,032 times.
_STEP = 4 << 10
# The dictionary of `xz -9` takes 64 MiB.
_MOST_MEMORY = 80 << 20


def describe(file: File) -> Artefact | None:
    """Inspect a tar archive or compressed file; None if it is neither."""
    if _is_tar(file.at(0, 512)):
        if file.size % 512 or file.size < 1536 or any(file.at(file.size - 1024, 1024)):
            raise file.wrong("is truncated: a tar archive ends with two blocks of zeros")
        return Artefact(envelope=file.envelope("application/x-tar"), facts={"format": "tar"})
    magic = file.at(0, 6)
    kind = next((kind for kind in _COMPRESSIONS if magic.startswith(kind.magic)), None)
    if kind is None:
        return None
    envelope, head = kind.read(file, kind.media_type)
    inside = filesystems.superblock(head)
    filesystem = inside.filesystem if inside else None
    facts: dict[str, Any] = {"format": kind.name}
    if filesystem or _is_tar(head[:512]):
        facts["inside"] = filesystem or "tar"
    stated = {"compression"} | ({"filesystem"} if filesystem else set())
    return Artefact(
        envelope=envelope,
        content=Content(compression=kind.name, filesystem=filesystem),
        stated=frozenset(stated),
        facts=facts,
    )


def _is_tar(block: bytes) -> bool:
    if block[257:262] != b"ustar":
        return False
    # The checksum is the sum of all bytes, with its own field as blanks.
    total = sum(block) - sum(block[148:156]) + 8 * ord(" ")
    try:
        return int(block[148:156].strip(b" \0"), 8) == total
    except ValueError:
        return False


class _Members:
    """A sink that unpacks gzip to check that all members are whole and match their checksums.

    Attributes:
        head: The first unpacked bytes, at most `filesystems.HEAD`.
        whole: Whether the last member has ended.
    """

    def __init__(self, file: File) -> None:
        self.head = b""
        self.whole = False
        self._file = file
        self._member = zlib.decompressobj(wbits=31)

    def update(self, data: memoryview) -> None:
        for start in range(0, len(data), _STEP):
            step: bytes | memoryview = data[start : start + _STEP]
            while step:
                step = self._unpack(step)

    def _unpack(self, data: bytes | memoryview) -> bytes:
        """Unpack to the end of a member; return the bytes after it."""
        if self.whole:
            # Zeros may follow the last member.
            data = bytes(data).lstrip(b"\0")
            if not data:
                return b""
            self._member = zlib.decompressobj(wbits=31)
        try:
            unpacked = self._member.decompress(data)
        except zlib.error as error:
            raise self._file.wrong(f"is not sound gzip: {error}") from error
        self.head += unpacked[: filesystems.HEAD - len(self.head)]
        self.whole = self._member.eof
        return self._member.unused_data


def _read_gzip(file: File, media_type: str) -> tuple[Envelope, bytes]:
    members = _Members(file)
    envelope = file.envelope(media_type, members)
    if not members.whole:
        raise file.wrong("is truncated: its last gzip member does not end")
    return envelope, members.head


# CRC-32 of the two fields after it, size of the index in words of 4 bytes less one, flags, magic
_XZ_FOOTER = struct.Struct("<II2s2s")


def _read_xz(file: File, media_type: str) -> tuple[Envelope, bytes]:
    # Padding of zeros may follow the stream; 512 bytes cover a tape's block.
    last = file.at(max(0, file.size - 512), 512)
    end = file.size - len(last) + len(last.rstrip(b"\0"))
    footer = file.at(max(0, end - _XZ_FOOTER.size), _XZ_FOOTER.size)
    if file.size % 4 or end < 32 or not footer.endswith(b"YZ"):
        raise file.wrong("is truncated: an xz file ends with a footer")
    checksum, index_size, _, _ = _XZ_FOOTER.unpack(footer)
    index = end - _XZ_FOOTER.size - 4 * (index_size + 1)
    if checksum != zlib.crc32(footer[4:10]) or index < 12 or file.at(index, 1) != b"\0":
        raise file.wrong("is not sound xz: its footer is damaged")
    unpacker = lzma.LZMADecompressor(lzma.FORMAT_XZ, memlimit=_MOST_MEMORY)
    try:
        head = unpacker.decompress(file.at(0, _PEEK), filesystems.HEAD)
    except lzma.LZMAError as error:
        # Only the message tells a lack of memory from a damaged file.
        if "limit exceeded" not in str(error):
            raise file.wrong(f"is not sound xz: {error}") from error
        head = b""
    return file.envelope(media_type), head


def _read_zstd(file: File, media_type: str) -> tuple[Envelope, bytes]:
    frames = zstd.Frames(file)
    envelope = file.envelope(media_type, frames)
    if not frames.whole:
        raise file.wrong("is truncated: its last zstd frame does not end")
    # The standard library of the oldest supported Python cannot unpack zstd.
    return envelope, b""


@attrs.frozen
class _Compression:
    """A compression; `read` returns the envelope and the first unpacked bytes."""

    name: str
    media_type: str
    magic: bytes
    read: Callable[[File, str], tuple[Envelope, bytes]]


_COMPRESSIONS = (
    _Compression("gzip", "application/gzip", b"\x1f\x8b\x08", _read_gzip),
    _Compression("xz", "application/x-xz", b"\xfd7zXZ\0", _read_xz),
    _Compression("zstd", "application/zstd", b"\x28\xb5\x2f\xfd", _read_zstd),
)
