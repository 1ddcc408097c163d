"""Writes files so that they survive a crash, and opens files without blocking on pipes."""

from __future__ import annotations

import contextlib
import errno
import hashlib
import os
import stat
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Protocol

import attrs

from netota_coap.errors import InvalidDataError, Issue, RepositoryError
from netota_coap.model.values import Envelope

_HINTS = dict.fromkeys((errno.ENOSPC, errno.EDQUOT), "Make room on the disk, then try again.")


def open_nonblocking(path: str, flags: int) -> int:
    """Open a file for `open(opener=…)` without blocking if it is a pipe."""
    return os.open(path, flags | os.O_NONBLOCK, 0o666)


def open_nofollow(path: str, flags: int) -> int:
    """Open like `open_nonblocking`, but refuse a link: it could lead to any file of the user."""
    return open_nonblocking(path, flags | os.O_NOFOLLOW)


@contextlib.contextmanager
def writing(root: Path) -> Iterator[None]:
    """Turn an `OSError` about a repository's files into a `RepositoryError`."""
    try:
        yield
    except OSError as error:
        place = error.filename or root
        detail = f"{place}: cannot be written: {error.strerror}"
        raise RepositoryError(detail, hint=_HINTS.get(error.errno or 0, "")) from error


def write(path: Path, data: bytes) -> None:
    """Write a file whole or not at all; make its directory if need be. Source: rule R-22."""
    make_directory(path.parent)
    temporary = path.with_name(f".{path.name}.tmp")
    if temporary.is_symlink():
        temporary.unlink()  # it could lead to any file of the user
    try:
        with temporary.open("wb") as stream:
            stream.write(data)
            stream.flush()
            os.fsync(stream.fileno())
        temporary.replace(path)
    except BaseException:
        with contextlib.suppress(OSError):
            temporary.unlink()
        raise
    sync_directory(path.parent)


def make_directory(path: Path) -> None:
    """Make a directory and those above it, also while other processes do the same."""
    if not path.is_dir():
        make_directory(path.parent)
        path.mkdir(exist_ok=True)
        sync_directory(path.parent)  # a faster process may not have synced it yet


def sync_directory(path: Path) -> None:
    """Let entries made, renamed or removed in a directory survive a crash."""
    descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


# Measured, from a warm page cache: 128 KiB to 4 MiB differ by less than 2 %, so a small one.
CHUNK = 256 << 10

Progress = Callable[[int], object]
"""Called with each number of bytes that were read or received."""


class Sink(Protocol):
    """A receiver of a file's bytes, such as a hash of `hashlib`."""

    def update(self, data: memoryview, /) -> object:
        """Take the next bytes; their memory is overwritten after the call."""


@attrs.frozen
class File:
    """A regular file that is open for reading; `size` is in bytes."""

    path: Path
    descriptor: int
    size: int
    progress: Progress

    def at(self, offset: int, length: int) -> bytes:
        """Return the bytes at an offset, fewer than `length` at the end of the file.

        Raises:
            InvalidDataError: The file has become shorter.
        """
        length = max(0, min(length, self.size - offset))
        # The kernel refuses offsets above 63 bits, and a malformed file may contain one.
        data = os.pread(self.descriptor, length, offset) if length else b""
        if len(data) < length:
            raise self.changed()
        return data

    def require(self, end: int, what: str) -> None:
        """Raise an `InvalidDataError` if the file ends before `end`, where `what` is."""
        if end > self.size:
            raise self.wrong(f"is truncated: {what} at byte {end}, the file at {self.size}")

    def wrong(self, reason: str, *, hint: str = "") -> InvalidDataError:
        """Return an error about this file, which it names."""
        return InvalidDataError([Issue("", reason, str(self.path))], hint=hint)

    def padding_end(self, start: int) -> int:
        """Return where the padding from `start` on ends: zeros, or 0xff as in erased flash."""
        for offset in range(start, self.size, CHUNK):
            if rest := self.at(offset, CHUNK).lstrip(b"\0\xff"):
                return min(offset + CHUNK, self.size) - len(rest)
        return self.size

    def envelope(self, media_type: str, *sinks: Sink) -> Envelope:
        """Return the envelope, for which the whole file is read once; see `hashed`."""
        return self.hashed(media_type, "sha256", 0, *sinks)[0]

    def hashed(
        self, media_type: str, algorithm: str, end: int, *sinks: Sink
    ) -> tuple[Envelope, bytes]:
        """Read the whole file once, and pass its bytes to the sinks, too.

        Returns:
            The envelope, and the digest of the first `end` bytes by an `algorithm` of `hashlib`.

        Raises:
            InvalidDataError: The size has changed, or `media_type` breaks its rule.
        """
        whole = hashlib.sha256()
        first = whole if algorithm == "sha256" else hashlib.new(algorithm)
        view = memoryview(bytearray(CHUNK))
        size, digest = 0, b""
        # Reading one byte past the size reveals that the file has grown.
        for stop, takers in ((end, {first, whole, *sinks}), (self.size + 1, {whole, *sinks})):
            while size < stop and (count := os.readv(self.descriptor, [view[: stop - size]])):
                for taker in takers:
                    taker.update(view[:count])
                size += count
                self.progress(count)
            digest = digest or first.digest()
        if size != self.size:
            raise self.changed()
        return Envelope(type=media_type, size=size, sha256=whole.digest()), digest

    def changed(self) -> InvalidDataError:
        """Return the error that the file changed."""
        return self.wrong("changed while it was read", hint="Try again when it is complete.")


@contextlib.contextmanager
def opened(path: Path, progress: Progress = lambda _: None) -> Iterator[File]:
    """Open a file for reading.

    Raises:
        InvalidDataError: It is not a regular file, cannot be read, or changes before it is closed.
    """
    try:
        descriptor = open_nonblocking(str(path), os.O_RDONLY)
        try:
            before = os.fstat(descriptor)
            file = File(path, descriptor, before.st_size, progress)
            if not stat.S_ISREG(before.st_mode):
                raise file.wrong("is not a regular file")
            yield file
            after = os.fstat(descriptor)
            if (before.st_size, before.st_mtime_ns) != (after.st_size, after.st_mtime_ns):
                raise file.changed()
        finally:
            os.close(descriptor)
    except OSError as error:
        issue = Issue("", f"cannot be read: {error.strerror}", str(path))
        raise InvalidDataError([issue]) from error
