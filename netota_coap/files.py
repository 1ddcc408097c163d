"""Files and directories, written so that they stay, and opened without waiting for anybody."""

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
    """Opener for `open`: a pipe in the file's place does not block."""
    return os.open(path, flags | os.O_NONBLOCK, 0o666)


def open_nofollow(path: str, flags: int) -> int:
    """Opener for `open`: no link is followed, for it could lead to any file of the user."""
    return open_nonblocking(path, flags | os.O_NOFOLLOW)


@contextlib.contextmanager
def writing(root: Path) -> Iterator[None]:
    """Turn what the system says of a repository's files into an error of our own."""
    try:
        yield
    except OSError as error:
        place = error.filename or root
        detail = f"{place}: cannot be written: {error.strerror}"
        raise RepositoryError(detail, hint=_HINTS.get(error.errno or 0, "")) from error


def write(path: Path, data: bytes) -> None:
    """Write a file, whole or not at all, whatever happens; its directory is made if need be.

    Source: rule R-22.
    """
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
    """Make a directory and those above it, each to stay; somebody else may do so at once.

    Raises:
        OSError: It cannot be made, or something else is in its place.
    """
    if not path.is_dir():
        make_directory(path.parent)
        path.mkdir(exist_ok=True)
        sync_directory(path.parent)  # who was faster may not have come to that yet


def sync_directory(path: Path) -> None:
    """Let what was made, renamed or removed in a directory stay so."""
    descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


# Measured, from a warm page cache: 128 KiB to 4 MiB differ by less than 2 %, so a small one.
_CHUNK = 256 << 10

Progress = Callable[[int], object]
"""Called with each number of bytes that were read or received."""


class Sink(Protocol):
    """What takes the bytes of a file piece by piece, as the hashes of `hashlib` do."""

    def update(self, data: memoryview, /) -> object:
        """Take the next piece, which is not kept: its memory is used again."""


@attrs.frozen
class File:
    """A regular file that is open for reading.

    Attributes:
        path: As it was given.
        descriptor: At its start.
        size: Bytes.
        progress: Called with the number of bytes read, again and again.
    """

    path: Path
    descriptor: int
    size: int
    progress: Progress

    def at(self, offset: int, length: int) -> bytes:
        """Return the bytes at an offset: fewer than `length` where the file ends before.

        Raises:
            InvalidDataError: It is shorter than it was.
        """
        length = max(0, min(length, self.size - offset))
        # The system refuses offsets of more than 63 bits, which a file may well name.
        data = os.pread(self.descriptor, length, offset) if length else b""
        if len(data) < length:
            raise self.changed()
        return data

    def require(self, end: int, what: str) -> None:
        """Refuse a file that ends before what it says to hold.

        Raises:
            InvalidDataError: It has fewer than `end` bytes.
        """
        if end > self.size:
            raise self.wrong(f"is truncated: {what} at byte {end}, the file at {self.size}")

    def wrong(self, reason: str, *, hint: str = "") -> InvalidDataError:
        """Return the error that names this file."""
        return InvalidDataError([Issue("", reason, str(self.path))], hint=hint)

    def padding_end(self, start: int) -> int:
        """Return where padding from `start` on ends: zeros, and 0xff as of erased flash."""
        for offset in range(start, self.size, _CHUNK):
            if rest := self.at(offset, _CHUNK).lstrip(b"\0\xff"):
                return min(offset + _CHUNK, self.size) - len(rest)
        return self.size

    def envelope(self, media_type: str, *sinks: Sink) -> Envelope:
        """Read all of it, once; as `hashed`."""
        return self.hashed(media_type, "sha256", 0, *sinks)[0]

    def hashed(
        self, media_type: str, algorithm: str, end: int, *sinks: Sink
    ) -> tuple[Envelope, bytes]:
        """Read all of it, once.

        Args:
            media_type: Of the file.
            algorithm: As in `hashlib`.
            end: Up to the size of the file.
            sinks: Take all of it, too.

        Returns:
            The envelope, and the digest of the first `end` bytes.

        Raises:
            InvalidDataError: It is longer or shorter than it was, or `media_type` breaks its rule.
        """
        whole = hashlib.sha256()
        first = whole if algorithm == "sha256" else hashlib.new(algorithm)
        view = memoryview(bytearray(_CHUNK))
        size, digest = 0, b""
        # One byte past the size tells that it grew.
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
        """Return the error that it changed."""
        return self.wrong("changed while it was read", hint="Try again when it is complete.")


@contextlib.contextmanager
def opened(path: Path, progress: Progress = lambda _: None) -> Iterator[File]:
    """Open a file for reading.

    Raises:
        InvalidDataError: It is not a regular file, cannot be read, or changed meanwhile.
    """
    try:
        # Opening a pipe would wait for its other end.
        descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK)
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
