"""Locates, reads and lists the files of a repository.

Source: `spec/repository.md`, rules R-2 to R-6.
"""

from __future__ import annotations

import os
import re
import stat
import time
from pathlib import Path
from typing import TypeVar

import attrs

from netota_coap.encoding.codecs import Format
from netota_coap.encoding.documents import decode
from netota_coap.errors import InvalidDataError, Issue
from netota_coap.files import open_nonblocking
from netota_coap.model.values import LIMITS, StreamName, Value

V = TypeVar("V", bound=Value)

HISTORY_NAME = r"([0-9]{8}|[1-9][0-9]{8,9})\.toml"  # each sequence has one spelling

Signature = tuple[int, int, int, int, int]
"""Device, inode, size and times of a file: equal if it did not change."""

_RACY_NS = 20_000_000
_MOST_ISSUES = 100  # reported of one file: a broken one can have a million


def stream_file(root: Path, name: StreamName) -> Path:
    """Return the path of a stream's present state."""
    return root / "packages" / name[0] / "streams" / f"{name[1]}.toml"


def history_file(root: Path, name: StreamName, sequence: int) -> Path:
    """Return the path of a state in a stream's history."""
    return root / "packages" / name[0] / "history" / name[1] / f"{sequence:08}.toml"


def recorded(root: Path, name: StreamName) -> list[int]:
    """Return the sequences in a stream's history, ascending."""
    entries = listing(root, f"packages/{name[0]}/history/{name[1]}")
    found = (
        int(entry.name[:-5])
        for entry in entries
        if re.fullmatch(HISTORY_NAME, entry.name) and entry.is_file()
    )
    return sorted(sequence for sequence in found if sequence <= LIMITS["sequence"].value)


def signature_of(status: os.stat_result) -> Signature:
    """Return what tells whether a file has changed."""
    times = (status.st_mtime_ns, status.st_ctime_ns)
    return (status.st_dev, status.st_ino, status.st_size, *times)


def read_file(cls: type[V], path: Path, file: str) -> tuple[Signature | None, V]:
    """Read one file.

    Returns:
        Its signature and value. The signature is None for a file so young that it could change
        once more without looking different (git calls such an entry racy).

    Raises:
        InvalidDataError: The file cannot be read or is invalid; the issues name `file`.
        FileNotFoundError: There is no such file.
    """
    try:
        status = path.stat()
        if not stat.S_ISREG(status.st_mode):
            raise InvalidDataError([Issue("", "is not a regular file", file)])
        with open(path, "rb", opener=open_nonblocking) as stream:
            status = os.fstat(stream.fileno())
            data = stream.read(LIMITS["document"].value + 1)
        if data is None:
            raise InvalidDataError([Issue("", "cannot be read without waiting", file)])
    except FileNotFoundError:
        raise
    except OSError as error:
        raise InvalidDataError([Issue("", f"cannot be read: {error.strerror}", file)]) from error
    try:
        young = time.time_ns() - status.st_mtime_ns < _RACY_NS
        return None if young else signature_of(status), decode(cls, data, Format.TOML)
    except InvalidDataError as error:
        issues = [attrs.evolve(issue, file=file) for issue in error.issues[:_MOST_ISSUES]]
        if len(error.issues) > _MOST_ISSUES:
            issues.append(Issue("", f"and {len(error.issues) - _MOST_ISSUES} more", file))
        raise InvalidDataError(issues) from error


def listing(root: Path, directory: str) -> list[os.DirEntry[str]]:
    """List a directory by name, without hidden entries; [] if it does not exist."""
    try:
        with os.scandir(root / directory) as entries:
            found = [entry for entry in entries if not entry.name.startswith(".")]
    except (FileNotFoundError, NotADirectoryError):
        return []
    except OSError as error:
        issue = Issue("", f"cannot be read: {error.strerror}", directory)
        raise InvalidDataError([issue]) from error
    return sorted(found, key=lambda entry: entry.name)


def package_names(root: Path) -> list[str]:
    """Return the names of the directories that may be packages."""
    return [entry.name for entry in listing(root, "packages") if _is_directory(entry)]


def _is_directory(entry: os.DirEntry[str]) -> bool:
    try:
        return entry.is_dir()
    except OSError:
        return True  # reading it reports the error


def stream_entries(root: Path, package: str) -> list[os.DirEntry[str]]:
    """Return the stream files of a package."""
    entries = listing(root, f"packages/{package}/streams")
    return [entry for entry in entries if entry.name.endswith(".toml")]
