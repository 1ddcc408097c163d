"""Finds errors and likely mistakes in a repository before devices do.

Beyond what a server refuses, it checks the history, the commits in git, and what devices get.
Source: rules R-1 to R-14, R-49, P-42 to P-44.
"""

from __future__ import annotations

import contextlib
import os
import re
from collections.abc import Iterator, Mapping
from pathlib import Path

import attrs

from netota_coap.encoding.codecs import Format
from netota_coap.encoding.documents import decode, encode, selection_to_query
from netota_coap.errors import InvalidDataError, Issue, NotFoundError
from netota_coap.model.selection import Selection
from netota_coap.model.values import (
    BLOB_METRIC,
    BLOBS_PATH,
    LIMITS,
    Offer,
    Repository,
    Stream,
    StreamName,
)
from netota_coap.repository import git
from netota_coap.repository.blobs import Blobs, key_of
from netota_coap.repository.history import history, history_issues
from netota_coap.repository.layout import HISTORY_NAME
from netota_coap.repository.loading import Loader, sequence_hint, sequence_issue


@attrs.frozen
class Findings:
    """The result of a check.

    Attributes:
        repository: None if it cannot be served.
        hint: What to do about the errors, or "".
    """

    repository: Repository | None
    errors: tuple[Issue, ...]
    warnings: tuple[Issue, ...]
    hint: str = ""


def check(root: Path) -> Findings:
    """Check a repository, its history and its commits."""
    try:
        repository = Loader(root).load()
    except InvalidDataError as error:
        return Findings(None, error.issues, (), error.hint)
    errors: list[Issue] = []
    warnings = list(_ignored(root))
    if doubt := git.doubt(root):
        warnings.append(Issue("", doubt, str(root)))
    committed = _committed(root)
    streams = list(_streams(repository))
    names = {name for name, _, _ in streams}
    for name, stream, file in streams:
        wrong, odd = history_issues(root, name, stream)
        errors += wrong
        warnings += odd
        errors += _git_issues(root, committed.get(name, {}), stream.sequence, file)
        target = stream.replacement
        if target and target not in names:
            reason = f"there is no stream {'/'.join(target)}"
            warnings.append(Issue("replacement", reason, file))
    warnings += _without_stream(root)
    warnings += _deleted(root, committed)
    warnings += Blobs(root).issues(repository)
    warnings += _unavailable(root, repository)
    warnings += advice(repository)
    return Findings(repository, tuple(errors), tuple(warnings), sequence_hint(errors))


def _streams(repository: Repository) -> Iterator[tuple[StreamName, Stream, str]]:
    """Yield each stream with its name and file."""
    for package_name, package in repository.packages.items():
        for name, stream in package.streams.items():
            file = f"packages/{package_name}/streams/{name}.toml"
            yield (package_name, name), stream, file


_Blobs = dict[int, set[str]]
"""By sequence, the different versions of a history file in git."""


def _committed(root: Path) -> dict[StreamName, _Blobs]:
    """Return the history files in all commits."""
    place = re.compile(rf"packages/([^/]+)/history/([^/]+)/{HISTORY_NAME}")
    found: dict[StreamName, _Blobs] = {}
    for path, blobs in git.committed(root, "packages/*/history/*/*.toml").items():
        if match := place.fullmatch(path):
            found.setdefault((match[1], match[2]), {})[int(match[3])] = blobs
    return found


def _git_issues(root: Path, committed: _Blobs, sequence: int, file: str) -> Iterator[Issue]:
    """Report a sequence that a revert or a merge broke. Source: rule R-13."""
    highest = max(committed, default=0)
    if highest > sequence:
        yield sequence_issue(highest, "which a commit before this one has", file)
    elif _are_different(root, committed.get(sequence, set())):
        yield sequence_issue(sequence, "which different states have in the commits", file)


def _are_different(root: Path, blobs: set[str]) -> bool:
    """Tell whether files hold different states; invalid ones, such as conflicts, are skipped."""
    states: list[Stream] = []
    for blob in blobs if len(blobs) > 1 else ():
        with contextlib.suppress(InvalidDataError):
            states.append(decode(Stream, git.blob(root, blob), Format.TOML).essence())
    return any(state != states[0] for state in states)


def _without_stream(root: Path) -> Iterator[Issue]:
    """Report histories that have no stream file, and do not end with a removal."""
    for directory in sorted(root.glob("packages/*/history/*/")):
        package, name = directory.parent.parent, directory.name
        if (package / "streams" / f"{name}.toml").exists():
            continue
        with contextlib.suppress(InvalidDataError, NotFoundError):
            if not history(root, (package.name, name), 1)[0].removed:
                reason = "has no stream: its file was deleted, or its first publish interrupted"
                yield Issue("", reason, directory.relative_to(root).as_posix())


def _deleted(root: Path, committed: Mapping[StreamName, _Blobs]) -> Iterator[Issue]:
    """Report streams deleted with their history, as the revert of a first publish does."""
    for (package, name), blobs in sorted(committed.items()):
        place = f"packages/{package}/history/{name}"
        files = (f"packages/{package}/streams/{name}.toml", f"{place}/{max(blobs):08}.toml")
        if not any((root / file).exists() for file in files):
            reason = "is gone: a new stream of this name would begin with sequences that were seen"
            yield Issue("", reason, place)


def _ignored(root: Path) -> Iterator[Issue]:
    """Report files that the format does not know, except hidden ones."""
    counts = re.compile(
        r"repository\.toml|README\.md|packages/[^/]+/package\.toml|packages/[^/]+/streams/[^/]+\.toml"
        rf"|packages/[^/]+/history/[^/]+/{HISTORY_NAME}"
        r"|blobs/sha256/([0-9a-f]{2})/\2[0-9a-f]{62}|blobs/quarantine/[0-9a-f]{64}"
    )
    for directory, subdirectories, files in os.walk(root):
        subdirectories[:] = sorted(d for d in subdirectories if not d.startswith("."))
        for name in sorted(files):
            file = (Path(directory) / name).relative_to(root).as_posix()
            if not name.startswith(".") and not counts.fullmatch(file):
                yield Issue("", "is ignored: it is no file of a repository", file)


def _unavailable(root: Path, repository: Repository) -> Iterator[Issue]:
    """Report archives that no device could download. Source: rule R-49."""
    held = Blobs(root).present(repository)
    for _, stream, file in _streams(repository):
        for index, archive in enumerate(stream.archives or ()):
            elsewhere = any(not offer.url.startswith(BLOBS_PATH) for offer in archive.offers)
            if not elsewhere and key_of(archive) not in held:
                has = f"only offers of {BLOBS_PATH}" if archive.offers else "no offer"
                reason = f"has {has}, and its file is not stored here: nobody can download it"
                yield Issue(f"archives[{index}]", reason, file)


# ----------------------------------------------------------------------------------------------
# Advice to publishers

_ZEPHYR_PATH = 63  # characters of path and query that a stock Zephyr client accepts
# As long as the path of any blob.
_LOCAL_OFFER = Offer(url=BLOBS_PATH + "A" * 43, metric=BLOB_METRIC)


def advice(repository: Repository) -> Iterator[Issue]:
    """Warn of archives that do not fit into one datagram. Source: rule W-33.

    Each archive is selected by all its attributes, with and without an additional offer of a
    server that stores the file itself.
    """
    for (package, name), stream, file in _streams(repository):
        poll_s = stream.poll_s or repository.packages[package].poll_s
        yield from (Issue(*i, file) for i in _crowded(attrs.evolve(stream, poll_s=poll_s)))
        machines = [a.content.machine or "" for a in stream.archives or ()]
        longest = max(machines, key=len, default="")
        machine = f"machine={longest}&" if longest else ""
        path = f"p/{package}/s/{name}?{machine}scheme=coap"
        if len(path) > _ZEPHYR_PATH:
            reason = f"{path} has {len(path)} characters, of which Zephyr takes {_ZEPHYR_PATH}"
            yield Issue("", reason, file)


def _crowded(stream: Stream) -> Iterator[tuple[str, str]]:
    selections: dict[Selection, int] = {}
    for index, archive in enumerate(stream.archives or ()):
        selections.setdefault(Selection.of(archive.content.all()), index)
    for selection, index in selections.items():
        narrowed = selection.narrow(stream.archives or (), "")
        for offers, why in (((), ""), ((_LOCAL_OFFER,), " once a gateway adds its own offer")):
            archives = tuple(
                attrs.evolve(a, offers=(*offers, *a.offers)[: LIMITS["offers"].value])
                for a in narrowed
            )
            size = len(encode(attrs.evolve(stream, archives=archives), Format.CBOR))
            if size > LIMITS["datagram"].value:
                query = "&".join(selection_to_query(selection))
                reason = (
                    f"?{query} takes {size} bytes{why}: more than one datagram "
                    f"of {LIMITS['datagram'].value}, so something is left out"
                )
                yield f"archives[{index}]", reason
                break
