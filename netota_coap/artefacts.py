"""Reads the files that are published, into envelopes."""

from __future__ import annotations

import hashlib
import stat
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import attrs

from netota_coap.errors import InvalidDataError, Issue
from netota_coap.model import Content, Envelope

_CHUNK = 1 << 20


def envelope_of(
    path: Path, media_type: str, progress: Callable[[int], object] = lambda _: None
) -> Envelope:
    """Read a file once and describe it as it will be downloaded.

    Args:
        path: A regular file of any size.
        media_type: Of the file.
        progress: Called with the number of bytes read, again and again.

    Raises:
        InvalidDataError: It cannot be read, or `media_type` breaks its rule.
    """
    digest, size = hashlib.sha256(), 0
    try:
        # Opening a pipe would wait for its other end.
        if not stat.S_ISREG(path.stat().st_mode):
            raise InvalidDataError([Issue("", "is not a regular file", str(path))])
        with path.open("rb", buffering=0) as stream:
            while chunk := stream.read(_CHUNK):
                digest.update(chunk)
                size += len(chunk)
                progress(len(chunk))
    except OSError as error:
        issue = Issue("", f"cannot be read: {error.strerror}", str(path))
        raise InvalidDataError([issue]) from error
    return Envelope(type=media_type, size=size, sha256=digest.digest())


@attrs.frozen(kw_only=True)
class Artefact:
    """What a file is, as far as it tells itself."""

    envelope: Envelope
    content: Content = Content()
    version: str | None = None
    stated: frozenset[str] = frozenset()
    facts: Mapping[str, Any] = {"format": "bytes"}


def read(path: Path, progress: Callable[[int], object] = lambda _: None) -> Artefact:
    """Read a file once, and tell what it is."""
    return Artefact(envelope=envelope_of(path, "application/octet-stream", progress))


def versions_differ(a: str, b: str) -> bool:
    """Tell whether two versions are not the same."""
    return a != b
