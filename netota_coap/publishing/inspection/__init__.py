"""Reads the files that are published: what they are, into envelope and content.

A file is read once and in constant memory, whatever its format.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from netota_coap.files import File, Progress, opened
from netota_coap.publishing.inspection import compressed, elf, filesystems, mcuboot, rauc, zephyr
from netota_coap.publishing.inspection.artefact import Artefact

__all__ = ["Artefact", "read", "versions_differ"]


def _bytes(file: File) -> Artefact:
    return Artefact(envelope=file.envelope("application/octet-stream"), facts={"format": "bytes"})


# Tried in this order: a RAUC bundle is a SquashFS with something after it.
_FORMATS: tuple[Callable[[File], Artefact | None], ...] = (
    mcuboot.describe,
    rauc.describe,
    elf.describe,
    filesystems.describe,
    compressed.describe,
    _bytes,
)


def read(path: Path, progress: Progress = lambda _: None) -> Artefact:
    """Read a file once and say what it is.

    Args:
        path: A regular file of any size; in a Zephyr build directory that counts, too.
        progress: Called with the number of bytes read, again and again.

    Raises:
        InvalidDataError: It cannot be read, or is not what it says to be: truncated, damaged.
    """
    with opened(path, progress) as file:
        build = zephyr.build_of(path)
        artefact = next(found for describe in _FORMATS if (found := describe(file)))
    return build.complete(artefact) if build else artefact


def versions_differ(a: str, b: str) -> bool:
    """Compare versions as texts, except that MCUboot takes 1.2.3 and 1.2.3+0 for the same."""
    return mcuboot.plain(a) != mcuboot.plain(b)
