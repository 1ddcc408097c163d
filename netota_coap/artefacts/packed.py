"""Packed files: tar, gzip, xz, zstd.

Source: POSIX (ustar), RFC 1952, the .xz file format, RFC 8878.
"""

from __future__ import annotations

import lzma
import zlib
from collections.abc import Callable
from typing import Any

import attrs

from netota_coap.artefacts import filesystems
from netota_coap.artefacts.file import Artefact, File
from netota_coap.model import Content

# What is looked at of a compressed file, to learn what is in it.
_PEEK = 64 << 10
# What unpacking may take: the dictionary of `xz -9` is of 64 MiB.
_MOST_MEMORY = 80 << 20


def describe(file: File) -> Artefact | None:
    """Read a tar archive or a compressed file; None if it is none.

    Raises:
        InvalidDataError: It is truncated or damaged.
    """
    if _is_tar(file.at(0, 512)):
        # Two blocks of zeros end it.
        if file.size % 512 or file.size < 1536 or any(file.at(file.size - 1024, 1024)):
            raise file.wrong("is truncated: a tar archive ends with two blocks of zeros")
        return Artefact(envelope=file.envelope("application/x-tar"), facts={"format": "tar"})
    magic = file.at(0, 6)
    kind = next((kind for kind in _COMPRESSIONS if magic.startswith(kind.magic)), None)
    if kind is None:
        return None
    file.require(kind.least, "the least of its kind ends")
    if kind.name == "xz":
        _require_footer(file)
    try:
        head = kind.head(file.at(0, _PEEK))
    except (zlib.error, lzma.LZMAError) as error:
        raise file.wrong(f"is not sound {kind.name}: {error}") from error
    inside = filesystems.superblock(head)
    filesystem = inside.filesystem if inside else None
    facts: dict[str, Any] = {"format": kind.name}
    if filesystem or _is_tar(head[:512]):
        facts["inside"] = filesystem or "tar"
    stated = {"compression"} | ({"filesystem"} if filesystem else set())
    return Artefact(
        envelope=file.envelope(kind.media_type),
        content=Content(compression=kind.name, filesystem=filesystem),
        stated=frozenset(stated),
        facts=facts,
    )


def _is_tar(block: bytes) -> bool:
    if block[257:262] != b"ustar":
        return False
    # The sum of all bytes, its own taken as blanks.
    total = sum(block) - sum(block[148:156]) + 8 * ord(" ")
    try:
        return int(block[148:156].strip(b" \0"), 8) == total
    except ValueError:
        return False


def _require_footer(file: File) -> None:
    # Zeros, in fours, may follow the stream; more than a tape's block of them are not looked at.
    if not file.at(max(0, file.size - 512), 512).rstrip(b"\0").endswith(b"YZ"):
        raise file.wrong("is truncated: an xz file ends with a footer")


def _gzip_head(data: bytes) -> bytes:
    return zlib.decompressobj(wbits=31).decompress(data, filesystems.HEAD)


def _xz_head(data: bytes) -> bytes:
    unpacker = lzma.LZMADecompressor(lzma.FORMAT_XZ, memlimit=_MOST_MEMORY)
    try:
        return unpacker.decompress(data, filesystems.HEAD)
    except lzma.LZMAError as error:
        # The library tells this from a damaged file in words only.
        if "limit exceeded" in str(error):
            return b""
        raise


@attrs.frozen
class _Compression:
    """A row: name, media type, magic number, least size in bytes, how to get the first bytes."""

    name: str
    media_type: str
    magic: bytes
    least: int
    head: Callable[[bytes], bytes]


_COMPRESSIONS = (
    _Compression("gzip", "application/gzip", b"\x1f\x8b\x08", 18, _gzip_head),
    _Compression("xz", "application/x-xz", b"\xfd7zXZ\0", 32, _xz_head),
    # The standard library of today's oldest Python cannot unpack it.
    _Compression("zstd", "application/zstd", b"\x28\xb5\x2f\xfd", 9, lambda _: b""),
)
