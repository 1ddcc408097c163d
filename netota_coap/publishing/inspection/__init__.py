"""Inspects the files to be published: what they are, as envelope, content and facts.

A file is read once and in constant memory, whatever its format. Publishing, `cli` and `service`
import `read` from here; publishing imports `versions_differ`, too.
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


# The order matters: a RAUC bundle is a SquashFS with something after it.
_FORMATS: tuple[Callable[[File], Artefact | None], ...] = (
    mcuboot.describe,
    rauc.describe,
    elf.describe,
    filesystems.describe,
    compressed.describe,
    _bytes,
)


def read(path: Path, progress: Progress = lambda _: None) -> Artefact:
    """Inspect a regular file, and the Zephyr build directory around it if there is one.

    Raises:
        InvalidDataError: The file cannot be read, is truncated or damaged.
    """
    with opened(path, progress) as file:
        build = zephyr.build_of(path)
        artefact = next(found for describe in _FORMATS if (found := describe(file)))
    return build.complete(artefact) if build else artefact


def versions_differ(a: str, b: str) -> bool:
    """Tell whether versions differ as texts; 1.2.3 and 1.2.3+0 are the same, as for MCUboot."""
    return mcuboot.plain(a) != mcuboot.plain(b)
