"""Reads and writes the files of the blob store, by the descriptors of their directories."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import secrets
import stat
from pathlib import Path

import attrs

from netota_coap.files import File, Progress
from netota_coap.model.values import Envelope

_READ_ONLY = 0o444
_READING = os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC
_CREATING = os.O_RDWR | os.O_NOFOLLOW | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC
_FICLONE = 0x40049409  # ioctl of Linux: share the extents of another file
ANY_TYPE = "application/octet-stream"


def exists(directory: int, name: str) -> bool:
    """Tell whether a directory has an entry of this name, a dangling link included."""
    try:
        os.lstat(name, dir_fd=directory)
    except FileNotFoundError:
        return False
    return True


def open_regular(directory: int, name: str) -> tuple[int, os.stat_result]:
    """Open a regular file; anything else raises a `FileNotFoundError`."""
    descriptor = os.open(name, _READING, dir_fd=directory)
    status = os.fstat(descriptor)
    if not stat.S_ISREG(status.st_mode):
        os.close(descriptor)
        raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), name)
    return descriptor, status


def require_unlocked(directory: int, name: str) -> None:
    """Raise a `BlockingIOError` if a process is writing the file."""
    descriptor, _ = open_regular(directory, name)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    finally:
        os.close(descriptor)


def renewed(shard: int, promised: Envelope) -> bool:
    """Tell whether a blob exists already; if so, it counts as newly added."""
    try:
        descriptor, status = open_regular(shard, promised.sha256.hex())
    except OSError:
        return False
    try:
        if status.st_size != promised.size:
            return False
        with contextlib.suppress(PermissionError):  # another user owns it
            os.fchmod(descriptor, _READ_ONLY)
        return True
    finally:
        os.close(descriptor)


def write_blob(shard: int, source: File, promised: Envelope, *, link: bool) -> None:
    """Write a blob, whole or not at all."""
    name = promised.sha256.hex()
    # Random, since two processes may write the same blob at once.
    temporary = f".{name}.{secrets.token_hex(4)}.tmp"
    try:
        linked = link and _linked(source.path, shard, temporary)
        flags = _READING if linked else _CREATING
        descriptor = os.open(temporary, flags, 0o600, dir_fd=shard)
        try:
            with contextlib.suppress(OSError):
                fcntl.flock(descriptor, fcntl.LOCK_SH | fcntl.LOCK_NB)  # marks it as in use: R-47
            if linked or _cloned(source.descriptor, descriptor):
                found = envelope_of(descriptor, source.path, source.progress)
            else:
                found = _copy(source, _CopyTarget(descriptor, temporary))
            _require(promised, found, source)
            os.fchmod(descriptor, _READ_ONLY)
            os.fsync(descriptor)
            os.replace(temporary, name, src_dir_fd=shard, dst_dir_fd=shard)
        finally:
            os.close(descriptor)
    except BaseException:
        with contextlib.suppress(OSError):
            os.unlink(temporary, dir_fd=shard)
        raise
    os.fsync(shard)


def _linked(path: Path, shard: int, temporary: str) -> bool:
    try:
        os.link(os.path.realpath(path), temporary, dst_dir_fd=shard)
    except OSError:
        return False  # another file system, or one without this feature
    return True


def _cloned(source: int, target: int) -> bool:
    try:
        fcntl.ioctl(target, _FICLONE, source)
    except OSError:
        return False  # another file system, or one without this feature
    return True


def envelope_of(descriptor: int, path: Path, progress: Progress) -> Envelope:
    """Read an open file to its end and return its size and SHA-256."""
    size = os.fstat(descriptor).st_size
    return File(path, descriptor, size, progress).envelope(ANY_TYPE)


@attrs.frozen
class _CopyTarget:
    """A `Sink` that writes a copy."""

    descriptor: int
    name: str

    def update(self, data: memoryview) -> None:
        """Write the next bytes."""
        try:
            while data:
                data = data[os.write(self.descriptor, data) :]
        except OSError as error:
            error.filename = self.name
            raise


def _copy(source: File, target: _CopyTarget) -> Envelope:
    try:
        return source.envelope(ANY_TYPE, target)
    except OSError as error:
        if error.filename == target.name:
            raise
        raise source.wrong(f"cannot be read: {error.strerror}") from error


def _require(promised: Envelope, found: Envelope, source: File) -> None:
    if (found.sha256, found.size) != (promised.sha256, promised.size):
        raise source.wrong(
            f"has SHA-256 {found.sha256.hex()}, not {promised.sha256.hex()}",
            hint="It changed while it was read: try again when it is complete.",
        )
