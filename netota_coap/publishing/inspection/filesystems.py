"""Inspects file systems by their superblocks: SquashFS, ext2, ext3 and ext4.

Source: the Linux kernel's documentation of SquashFS and ext4.
"""

from __future__ import annotations

import struct
from collections.abc import Mapping
from typing import Any

import attrs

from netota_coap.files import File
from netota_coap.model.values import Content
from netota_coap.publishing.inspection.artefact import Artefact

HEAD = 2048
"""How many bytes at the start of a file identify its file system."""


@attrs.frozen
class Superblock:
    """What a superblock says; `size` is that of the file system in bytes."""

    filesystem: str
    media_type: str
    size: int
    compression: str | None
    facts: Mapping[str, Any]


def describe(file: File) -> Artefact | None:
    """Inspect a file system; None if the file is none."""
    head = file.at(0, HEAD)
    if head[:4] == _SQUASHFS_MAGIC:
        file.require(_SQUASHFS.size, "its superblock ends")
    block = superblock(head)
    if block is None:
        return None
    file.require(block.size, f"its {block.filesystem} ends")
    if block.filesystem == "squashfs":
        _require_known_end(file, block.size)
    stated = {"filesystem"} | ({"compression"} if block.compression else set())
    return Artefact(
        envelope=file.envelope(block.media_type),
        content=Content(filesystem=block.filesystem, compression=block.compression),
        stated=frozenset(stated),
        facts={
            "format": "squashfs" if block.filesystem == "squashfs" else "ext4",
            "filesystem": block.filesystem,
            "filesystem_size": block.size,
            **block.facts,
            **({"trailing_bytes": rest} if (rest := file.size - block.size) else {}),
        },
    )


def superblock(head: bytes) -> Superblock | None:
    """Read the superblock in the first `HEAD` bytes; None if there is none."""
    return _squashfs(head) or _ext(head)


_SQUASHFS_MAGIC = b"hsqs"
# magic, inodes, time, block size, fragments, compressor, log2 of block size, flags, ids, version,
# root inode, size
_SQUASHFS = struct.Struct("<4sIIIIHHHHHHQQ")
_COMPRESSORS: Mapping[int, str] = {
    1: "gzip",
    2: "lzma",
    3: "lzo",
    4: "xz",
    5: "lz4",
    6: "zstd",
}


def _squashfs(head: bytes) -> Superblock | None:
    if head[:4] != _SQUASHFS_MAGIC or len(head) < _SQUASHFS.size:
        return None
    _, _, _, block_size, _, compressor, log, _, _, major, minor, _, size = _SQUASHFS.unpack_from(
        head
    )
    if (major, minor) != (4, 0) or block_size != 1 << min(log, 20):
        return None
    compression = _COMPRESSORS.get(compressor)
    facts = {"block_size": block_size} | ({"compression": compression} if compression else {})
    # IANA has no media type for SquashFS; this is the one of freedesktop.org.
    return Superblock("squashfs", "application/vnd.squashfs", size, compression, facts)


# Two things may follow the padding of a SquashFS: the hash tree of `veritysetup`, and OpenWrt's
# mark at the start of a JFFS2.
_FOLLOWERS = (b"verity\0\0", b"\xde\xad\xc0\xde")


def _require_known_end(file: File, end: int) -> None:
    # mksquashfs pads to 4 KiB, other tools to the size of a partition.
    stop = file.padding_end(end)
    if stop < file.size and not file.at(stop, 8).startswith(_FOLLOWERS):
        reason = f"bytes at {stop} follow the end of its SquashFS: a RAUC bundle without its end?"
        raise file.wrong(reason)


# From byte 1024: blocks, first data block, log2 of the sizes of blocks and clusters in KiB, magic,
# features (compatible, incompatible, compatible for reading), label, high half of blocks.
_EXT = struct.Struct("<4xI12xIII24xH34xIII16x16s200xI")
_HAS_JOURNAL, _WIDE = 0x4, 0x80
# The features of both kinds that ext3 supports; a file system with more is ext4.
_EXT3_INCOMPATIBLE, _EXT3_READ_ONLY = 0x16, 0x7


def _ext(head: bytes) -> Superblock | None:
    if len(head) < 1024 + _EXT.size:
        return None
    low, first, log, cluster, magic, *features, label, high = _EXT.unpack_from(head, 1024)
    # The magic has only two bytes, so other files have it by chance.
    if magic != 0xEF53 or log > 6 or first != (cluster == 0) or low == 0:
        return None
    compatible, incompatible, read_only = features
    if incompatible & ~_EXT3_INCOMPATIBLE or read_only & ~_EXT3_READ_ONLY:
        filesystem = "ext4"
    else:
        filesystem = "ext3" if compatible & _HAS_JOURNAL else "ext2"
    block_size = 1024 << log
    blocks = low + (high << 32 if incompatible & _WIDE else 0)
    facts: dict[str, Any] = {"block_size": block_size}
    if text := label.partition(b"\0")[0].decode(errors="replace"):
        facts["label"] = text
    return Superblock(filesystem, "application/octet-stream", blocks * block_size, None, facts)
