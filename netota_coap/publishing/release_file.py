"""The release file, which describes all archives of one version. Source: `spec/publishing.md`."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator
from pathlib import Path

import attrs

from netota_coap.encoding.codecs import Format, dump, load
from netota_coap.encoding.documents import CONTENT, OFFER
from netota_coap.encoding.schema import Field, Many, One, Table
from netota_coap.errors import InvalidDataError, Issue
from netota_coap.files import Progress
from netota_coap.model.values import (
    LIMITS,
    URL_METRIC,
    Content,
    Envelope,
    Offer,
    Stream,
    Value,
    instance,
    optional,
    ruled,
    several,
    text,
)
from netota_coap.publishing import inspection
from netota_coap.publishing.archives import ArchiveSource

_DISK = frozenset({Format.TOML})
_DRAFT_OFFER = "https://updates.example.com/{package}/{version}/{name}"
_DRAFTED = ("**/zephyr/zephyr.signed.bin", "**/*.raucb")
_DRAFT_HEAD = """\
# What a version consists of. Publish it with:
#   netota-coap publish DIR PKG/STREAM --release {file}
# `file` is a path or a glob, relative to this file. What this file says overrides what the files
# tell; a key that is left out is read from them. Put your own server into the offers.
"""


@attrs.frozen(kw_only=True)
class ReleaseArchive(Value):
    """One or more archives of a release; all fields but `file` are as in `ArchiveSource`.

    Attributes:
        file: Path or glob, relative to the release file.
    """

    file: str = ruled(text("summary"))
    name: str | None = ruled(optional(text("text")), default=None)
    media_type: str | None = ruled(optional(Envelope.rules()["type"]), default=None)
    content: Content = ruled(instance(Content, "content"), default=Content())
    offers: tuple[Offer, ...] = ruled(several(Offer, "offers"), default=())


@attrs.frozen(kw_only=True)
class Release(Value):
    """All archives of one version.

    Attributes:
        version: None: as the files tell.
        offers: Templates for each archive that has none of its own.
    """

    version: str | None = ruled(optional(Stream.rules()["version"]), default=None)
    message: str | None = ruled(Stream.rules()["message"], default=None)
    offers: tuple[Offer, ...] = ruled(several(Offer, "offers"), default=())
    archives: tuple[ReleaseArchive, ...] = ruled(several(ReleaseArchive, "archives"))


_ARCHIVE = Table(
    ReleaseArchive,
    "an archive of a release",
    (
        Field("file", None, formats=_DISK, required=_DISK),
        Field("name", None, formats=_DISK),
        Field("media_type", None, formats=_DISK),
        Field("content", None, One(CONTENT), formats=_DISK),
        Field("offers", None, Many(OFFER, "offers"), formats=_DISK),
    ),
)
RELEASE = Table(
    Release,
    "a release",
    (
        Field("version", None, formats=_DISK),
        Field("message", None, formats=_DISK),
        Field("offers", None, Many(OFFER, "offers"), formats=_DISK),
        Field("archives", None, Many(_ARCHIVE, "archives"), formats=_DISK, required=_DISK),
    ),
)
"""The keys of a release file."""


def read(path: Path) -> Release:
    """Read a release file; an `InvalidDataError` says what is wrong in it."""
    if not path.is_file():
        raise InvalidDataError([Issue("", "is not a file", str(path))])
    try:
        with path.open("rb") as stream:
            data = stream.read(LIMITS["document"].value + 1)
        return RELEASE.from_plain(load(data, Format.TOML), Format.TOML)
    except OSError as error:
        issue = Issue("", f"cannot be read: {error.strerror}", str(path))
        raise InvalidDataError([issue]) from error
    except InvalidDataError as error:
        raise InvalidDataError(attrs.evolve(i, file=str(path)) for i in error.issues) from error


def version_of(release: Release, given: str | None, *, force: bool = False) -> str | None:
    """Return the given version, else the release's; without `force` they must not differ."""
    if given and release.version and given != release.version and not force:
        issue = Issue("version", f"is {release.version} in the release file, not {given}")
        raise InvalidDataError([issue], hint="If that is meant, give --force.")
    return given or release.version


def sources(release: Release, file: Path) -> list[ArchiveSource]:
    """Find the files of a release, in its order, those of a glob by path.

    Paths and globs start at the directory of `file`, the release file.

    Raises:
        InvalidDataError: There is no archive, or a glob matches nothing.
    """
    described: list[ArchiveSource] = []
    directory = file.parent
    issues = [] if release.archives else [Issue("archives", "must be at least one", str(file))]
    for index, archive in enumerate(release.archives):
        paths = list(_found(directory, archive.file))
        if not paths:
            reason = f"there is no file {archive.file} in {directory}"
            issues.append(Issue(f"archives[{index}].file", reason, str(file)))
        described += [
            ArchiveSource(path, archive.name, archive.media_type, archive.content, archive.offers)
            for path in paths
        ]
    if issues:
        raise InvalidDataError(issues)
    return described


def _found(directory: Path, pattern: str) -> Iterator[Path]:
    """Yield the files that a path or a glob matches, by path."""
    path = directory / pattern
    if path.exists():
        yield path
        return
    # Characters of a glob in the directory's own path must not count.
    start = Path(path.anchor) if Path(pattern).is_absolute() else directory
    try:
        relative = str(Path(pattern).relative_to(path.anchor)) if start != directory else pattern
        yield from sorted(found for found in start.glob(relative) if found.is_file())
    except (ValueError, NotImplementedError, OSError):
        return


def draft(builds: Iterable[Path], file: Path, progress: Progress = lambda _: None) -> str:
    """Return the text of a release file for builds: each file, with what it says about itself.

    Args:
        builds: Directories with Zephyr builds or RAUC bundles in them, or files.
        file: Where the release file will be; paths in it are relative to its directory.
        progress: Called with each number of bytes read.

    Raises:
        InvalidDataError: A file cannot be read, or a build has nothing to publish.
    """
    read_ = [(path, inspection.read(path, progress)) for path in found(builds)]
    archives = tuple(
        ReleaseArchive(file=_relative(path, file.absolute().parent), content=artefact.content)
        for path, artefact in read_
    )
    told = all(artefact.version for _, artefact in read_)
    release = Release(archives=archives, offers=(Offer(url=_DRAFT_OFFER, metric=URL_METRIC),))
    head = _DRAFT_HEAD.format(file=file)
    if not told:
        head += "# Not all files tell their version: give it here, or to the command.\n"
        head += '# version = "1.0.0"\n'
    return head + "\n" + dump(RELEASE.to_plain(release, Format.TOML), Format.TOML).decode()


def found(builds: Iterable[Path]) -> list[Path]:
    """Return the builds that are files, and the Zephyr images and RAUC bundles in the others."""
    return [path for build in builds for path in _made(build)]


def _made(build: Path) -> list[Path]:
    if build.is_file():
        return [build]
    paths = [path for pattern in _DRAFTED for path in sorted(build.glob(pattern))]
    if not paths:
        reason = f"there is nothing to publish: no {' and no '.join(_DRAFTED)}"
        hint = "Name the files themselves, or write the release file by hand."
        raise InvalidDataError([Issue("", reason, str(build))], hint=hint)
    # If there is an encrypted image, too, that one is published.
    encrypted = (path.with_name("zephyr.signed.encrypted.bin") for path in paths)
    return [e if e.exists() else p for p, e in zip(paths, encrypted, strict=True)]


def _relative(path: Path, directory: Path) -> str:
    return os.path.relpath(path.absolute(), directory)
