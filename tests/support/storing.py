"""Blobs, as the tests of them need them."""

from __future__ import annotations

import fcntl
import hashlib
import os
import tempfile
from pathlib import Path

from netota_coap.model.values import Envelope
from netota_coap.repository.blobs import Blob, Blobs, path_of

FIRMWARE = b"firmware"
SHA256 = hashlib.sha256(FIRMWARE).digest()
PLACE = path_of(SHA256)
ENVELOPE = Envelope(type="application/octet-stream", size=len(FIRMWARE), sha256=SHA256)
SHARD = PLACE.rpartition("/")[0]


def content(blobs: Blobs, sha256: bytes = SHA256) -> bytes:
    """Read a blob."""
    with os.fdopen(blobs.open(sha256), "rb") as stream:
        return stream.read()


def digests(found: tuple[Blob, ...]) -> list[tuple[bytes, bool]]:
    return [(blob.sha256, blob.damaged) for blob in found]


def damage(path: Path, data: bytes) -> None:
    """Change what nobody should change."""
    path.chmod(0o644)
    path.write_bytes(data)


def temporaries(root: Path) -> list[Path]:
    return list(root.rglob(".*.tmp"))


def can_clone(directory: Path) -> bool:
    """Tell whether the file system has reflinks."""
    with (
        tempfile.TemporaryFile(dir=directory) as one,
        tempfile.TemporaryFile(dir=directory) as two,
    ):
        one.write(b"x")
        one.flush()
        try:
            fcntl.ioctl(two, 0x40049409, one.fileno())
        except OSError:
            return False
    return True
