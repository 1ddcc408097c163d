"""Files and directories, written so that they stay, and opened without waiting for anybody."""

from __future__ import annotations

import contextlib
import errno
import os
from collections.abc import Iterator
from pathlib import Path

from netota_coap.errors import RepositoryError

_HINTS = dict.fromkeys((errno.ENOSPC, errno.EDQUOT), "Make room on the disk, then try again.")


def at_once(path: str, flags: int) -> int:
    """Open without waiting for anybody, as a pipe would that somebody put there."""
    return os.open(path, flags | os.O_NONBLOCK, 0o666)


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
