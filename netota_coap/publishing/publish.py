"""What a release engineer does to a stream: publish, promote, roll back, close, reopen, remove.

Each change is open → change → check → commit: `Edit.apply` is the way of all of them, and
`repository.change` does the first and the last.
Source: `spec/publishing.md`.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Sequence
from datetime import datetime
from pathlib import Path

import attrs

from netota_coap.errors import InvalidDataError, Issue, NotFoundError, RepositoryConflictError
from netota_coap.model.values import (
    URL_METRIC,
    Archive,
    Content,
    Envelope,
    Offer,
    Package,
    Stream,
    StreamName,
)
from netota_coap.publishing.archives import ArchiveSource, Progress, describe
from netota_coap.publishing.diff import lost
from netota_coap.repository import changes, history, loading
from netota_coap.repository.blobs import Blobs
from netota_coap.repository.changes import Change, Make
from netota_coap.repository.lock import require_repository

DEFAULT_MEDIA_TYPE = "application/octet-stream"

# ----------------------------------------------------------------------------------------------
# How a change is made


@attrs.frozen(kw_only=True)
class Edit:
    """Who changes something, when and why, and what the change may do.

    Attributes:
        now: The time of the change, in whole seconds.
        author: Who makes it, or None.
        message: Why, or None.
        allow_missing: Whether an architecture or machine may lose its build.
        dry_run: Whether only to tell what would be done.
    """

    now: datetime
    author: str | None = None
    message: str | None = None
    allow_missing: bool = False
    dry_run: bool = False

    def apply(
        self,
        root: Path,
        name: StreamName,
        make: Make,
        *,
        keep_builds: bool,
        store: Callable[[], object] | None = None,
    ) -> Change:
        """Change a stream, or tell what would be changed.

        Args:
            root: Of the repository.
            name: Of the stream.
            make: As in `repository.change`; its message stands if the edit has none.
            keep_builds: Whether to refuse the loss of a build, unless it is allowed.
            store: Puts what the new state is of into the repository, or sees that it is there.

        Raises:
            RepositoryConflictError: An architecture or machine would lose its build.
        """

        def signed(package: Package, present: Stream | None) -> Stream:
            state = make(package, present)
            message = state.message if self.message is None else self.message
            return attrs.evolve(state, author=self.author, message=message)

        if self.dry_run:
            return changes.plan(root, name, signed)

        def approve(change: Change) -> None:
            if keep_builds and not self.allow_missing:
                _refuse_loss(change)

        def approve_stored(change: Change) -> None:
            approve(change)
            if store:
                store()  # what was removed meanwhile

        if store:
            # It may take long: without the lock, and only for what is not refused.
            approve(changes.plan(root, name, signed))
            store()
        return changes.change(root, name, signed, approve_stored)


def _refuse_loss(change: Change) -> None:
    missing = lost(change)
    if missing:
        raise RepositoryConflictError(
            f"{'/'.join(change.name)}: nothing would be left for {', '.join(missing)}",
            hint="Add the builds, or give --allow-missing if that is meant.",
        )


# ----------------------------------------------------------------------------------------------
# The changes


def publish(
    root: Path,
    name: StreamName,
    version: str | None,
    sources: Sequence[ArchiveSource],
    offers: Sequence[Offer] = (),
    *,
    edit: Edit,
    store: bool = False,
    force: bool = False,
    progress: Progress = lambda _: None,
) -> Change:
    """Replace the archives, and so the version, of a stream in one step.

    Args:
        root: Of the repository.
        name: Of the stream; it is made if need be.
        version: Of all archives; None: as the files tell.
        sources: One per archive.
        offers: Templates, for each archive that has none of its own; none: those of the package.
        edit: How.
        store: Whether the files go into the repository, before the stream names them.
        force: Whether what is said may contradict what the files state, and the stream may hold
            the same already.
        progress: Called with the number of bytes read, again and again.

    Returns:
        What was done.

    Raises:
        InvalidDataError: Something given breaks a rule, or contradicts the files.
        RepositoryConflictError: The stream is closed, holds the same already, or would lose a
            build.
        RepositoryError: It could not be written; nothing changed.
    """
    package, present = loading.read(root, name)
    _refuse_closed(root, name, present)
    if issues := list(_rules_of_note(edit)):
        raise InvalidDataError(issues)
    templates = tuple(offers) or package.offers
    version, archives = describe(sources, name, version, templates, force=force, progress=progress)
    state = Stream(version=version, sequence=1, published=edit.now, archives=archives)

    def make(present: Stream | None) -> Stream:
        if not force:
            _refuse_same(
                state, present, name, hint="If it is to be published again, give --force."
            )
        return state

    def fill() -> None:
        for source, archive in zip(sources, archives, strict=True):
            Blobs(root).add(source.path, archive.envelope, progress=progress)

    return _replace(root, name, make, edit, fill if store else None)


def _rules_of_note(edit: Edit) -> Iterator[Issue]:
    for field in ("author", "message"):
        if reason := Stream.rules()[field](getattr(edit, field)):
            yield Issue(field, reason)


def _replace(
    root: Path,
    name: StreamName,
    make: Callable[[Stream | None], Stream],
    edit: Edit,
    store: Callable[[], object] | None = None,
) -> Change:
    """Replace version and archives; title and poll_s are the stream's own, and stay."""

    def replaced(_package: Package, present: Stream | None) -> Stream:
        _refuse_closed(root, name, present)
        return attrs.evolve(
            make(present),
            published=edit.now, changed=None, closed=False, replacement=None, removed=False,
            title=present.title if present else None,
            poll_s=present.poll_s if present else None,
        )  # fmt: skip

    return edit.apply(root, name, replaced, keep_builds=True, store=store)


def _refuse_closed(root: Path, name: StreamName, present: Stream | None) -> None:
    if present and present.closed:
        raise RepositoryConflictError(
            f"{'/'.join(name)} is closed",
            hint=f"Open it again first: netota-coap reopen {root} {'/'.join(name)}",
        )


def promote(root: Path, source: StreamName, target: StreamName, *, edit: Edit) -> Change:
    """Publish to a stream what another one holds: the same archives, the next sequence.

    Args:
        root: Of the repository.
        source: The stream to take from.
        target: The stream to publish to; it is made if need be.
        edit: How.

    Raises:
        NotFoundError: There is no stream to take from.
        RepositoryConflictError: The target is closed, holds the same already, or would lose a
            build.
        RepositoryError: It could not be written; nothing changed.
    """
    if source == target:
        raise RepositoryConflictError(f"{'/'.join(source)} cannot be promoted to itself")

    def make(present: Stream | None) -> Stream:
        state = existing(root, source)
        _refuse_same(state, present, target)
        return attrs.evolve(state, message=None)

    return _replace(root, target, make, edit)


def rollback(root: Path, name: StreamName, to: int | None = None, *, edit: Edit) -> Change:
    """Publish an old state of a stream again: its version and archives, the next sequence.

    Args:
        root: Of the repository.
        name: Of the stream; it may have been removed.
        to: The sequence of the old state; None: the last one with another version or other
            archives than now.
        edit: How.

    Raises:
        NotFoundError: There is no such stream, or no such state.
        RepositoryConflictError: The stream is closed, holds that state already, or would lose a
            build.
        RepositoryError: It could not be written; nothing changed.
    """

    def make(present: Stream | None) -> Stream:
        state = _state_to_restore(root, name, to)
        _refuse_same(state, present, name)
        return attrs.evolve(state, message=f"rollback to sequence {state.sequence}")

    return _replace(root, name, make, edit)


def _state_to_restore(root: Path, name: StreamName, to: int | None) -> Stream:
    if to is not None:
        state = history.state_at(root, name, to)
        if state.removed:
            raise NotFoundError(f"{'/'.join(name)} was removed at sequence {to}: it held nothing")
        return state
    present = loading.read(root, name)[1]
    states = (s for s in history.history(root, name) if not s.removed)
    found = next((s for s in states if not (present and _same(s, present))), None)
    if found is None:
        raise NotFoundError(f"{'/'.join(name)} never held anything else")
    return found


def _same(one: Stream, other: Stream) -> bool:
    return (one.version, one.archives) == (other.version, other.archives)


def _refuse_same(state: Stream, present: Stream | None, name: StreamName, hint: str = "") -> None:
    if present and _same(state, present):
        detail = f"{'/'.join(name)} holds {state.version} with these archives already"
        raise RepositoryConflictError(detail, hint=hint)


def close(
    root: Path, name: StreamName, replacement: StreamName | None = None, *, edit: Edit
) -> Change:
    """Close a stream: nothing new will come; devices may be sent to a replacement.

    Raises:
        NotFoundError: There is no such stream, or no such replacement.
        RepositoryConflictError: It is closed already, with this replacement, or would be its own.
        RepositoryError: It could not be written; nothing changed.
    """
    if replacement == name:
        raise RepositoryConflictError(f"{'/'.join(name)} cannot be its own replacement")
    if replacement and loading.read(root, replacement)[1] is None:
        raise NotFoundError(f"there is no stream {'/'.join(replacement)} to be the replacement")

    def make(state: Stream) -> Stream:
        if state.closed and state.replacement == replacement:
            raise RepositoryConflictError(f"{'/'.join(name)} is closed already")
        return attrs.evolve(state, closed=True, replacement=replacement)

    return _alter(root, name, make, edit)


def reopen(root: Path, name: StreamName, *, edit: Edit) -> Change:
    """Open a closed stream again; its replacement is forgotten.

    Raises:
        NotFoundError: There is no such stream.
        RepositoryConflictError: It is open.
        RepositoryError: It could not be written; nothing changed.
    """

    def make(state: Stream) -> Stream:
        if not state.closed:
            raise RepositoryConflictError(f"{'/'.join(name)} is open")
        return attrs.evolve(state, closed=False, replacement=None)

    return _alter(root, name, make, edit)


def remove(root: Path, name: StreamName, *, edit: Edit) -> Change:
    """Remove a stream: devices are answered 4.04. Its history and its sequence stay.

    Raises:
        NotFoundError: There is no such stream.
        RepositoryError: It could not be written; nothing changed.
    """

    def make(state: Stream) -> Stream:
        return attrs.evolve(state, archives=(), closed=False, replacement=None, removed=True)

    return _alter(root, name, make, edit)


def _alter(root: Path, name: StreamName, make: Callable[[Stream], Stream], edit: Edit) -> Change:
    """Change a stream that is there, all but its archives."""

    def altered(_package: Package, present: Stream | None) -> Stream:
        if present is None:
            raise _no_stream(root, name)
        return attrs.evolve(make(present), changed=edit.now, message=None)

    return edit.apply(root, name, altered, keep_builds=False)


def existing(root: Path, name: StreamName) -> Stream:
    """Return the present state of a stream.

    Raises:
        NotFoundError: There is no such stream.
    """
    require_repository(root)
    present = loading.read(root, name)[1]
    if present is None:
        raise _no_stream(root, name)
    return present


def _no_stream(root: Path, name: StreamName) -> NotFoundError:
    return NotFoundError(
        f"{root}: there is no stream {'/'.join(name)}",
        hint=f"See what there is: netota-coap list {root}",
    )


# ----------------------------------------------------------------------------------------------
# A sample


def sample(root: Path, now: datetime) -> None:
    """Put a package with two streams into an empty repository, to be looked at and replaced.

    Raises:
        RepositoryError: It could not be written.
    """
    title = "Sensor node"
    changes.write_package(root, "sensor-node", Package(title=title, poll_s=86_400))
    for stream, version in (("stable", "1.0.0"), ("edge", "1.1.0-rc1")):
        archives = tuple(_sample_archive(version, board) for board in ("nrf52840dk", "nrf9160dk"))
        changes.change(root, ("sensor-node", stream), _first(version, now, archives))


def _first(
    version: str, now: datetime, archives: tuple[Archive, ...]
) -> Callable[[Package, Stream | None], Stream]:
    state = Stream(version=version, sequence=1, published=now, archives=archives)
    return lambda _package, _present: state


def _sample_archive(version: str, board: str) -> Archive:
    image = f"a stand-in for sensor-node {version}, {board}".encode()
    url = f"https://updates.example.com/sensor-node/{version}/{board}.bin"
    return Archive(
        name=board,
        envelope=Envelope(
            type=DEFAULT_MEDIA_TYPE, size=len(image), sha256=hashlib.sha256(image).digest()
        ),
        content=Content(type="zephyr-image", arch="arm", machine=board, debug=False),
        offers=(Offer(url=url, metric=URL_METRIC),),
    )
