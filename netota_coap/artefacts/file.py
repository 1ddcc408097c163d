"""An open file: looked at here and there, then read once from end to end."""

from __future__ import annotations

import contextlib
import hashlib
import os
import stat
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, Protocol

import attrs

from netota_coap.errors import InvalidDataError, Issue
from netota_coap.model import Content, Envelope, Rule

# Measured, from a warm page cache: 128 KiB to 4 MiB differ by less than 2 %, so a small one.
_CHUNK = 256 << 10

Progress = Callable[[int], object]


class Sink(Protocol):
    """What takes the bytes of a file piece by piece, as the hashes of `hashlib` do."""

    def update(self, data: memoryview, /) -> object:
        """Take the next piece, which is not kept: its memory is used again."""


@attrs.frozen(kw_only=True)
class Artefact:
    """What a file is, as far as it tells itself, and a Zephyr build directory beside it.

    Attributes:
        envelope: The file as it is downloaded.
        content: What is known of what is inside.
        version: That the file states or, failing that, the Zephyr build.
        stated: Which of `version`, `arch`, `filesystem`, `compression` the file itself states as a
            fact: whoever publishes it as something else contradicts it.
        facts: For people and scripts: by name, in the types of JSON; `format` is the first.
    """

    envelope: Envelope
    content: Content = Content()
    version: str | None = None
    stated: frozenset[str] = frozenset()
    facts: Mapping[str, Any] = attrs.field(hash=False)


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


def fitting(rule: Rule, value: Any) -> str | None:
    """Return a value that the model takes; one that it refuses is left to the facts."""
    return value if rule(value) is None else None
