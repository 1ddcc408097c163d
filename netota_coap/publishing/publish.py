"""What a release engineer does to a stream: publish, promote, roll back, close, reopen, remove.

Each change is planned on the stream as it was read, and committed if nobody changed the stream
meanwhile (`repository/store.py`). It raises a `RepositoryError` if it cannot be written, and then
nothing changed; a `RepositoryConflictError` if it is refused, a `NotFoundError` if a stream or a
state does not exist.
Source: `spec/publishing.md`.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Sequence
from datetime import datetime

import attrs

from netota_coap.errors import InvalidDataError, Issue, NotFoundError, RepositoryConflictError
from netota_coap.files import Progress
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
from netota_coap.publishing.archives import ArchiveSource, describe
from netota_coap.publishing.diff import lost
from netota_coap.repository.store import Change, Files, Snapshot, Store, update

DEFAULT_MEDIA_TYPE = "application/octet-stream"

# ----------------------------------------------------------------------------------------------
# How a change is made


@attrs.frozen(kw_only=True)
class Edit:
    """Who makes a change, when and why, and what the change may do.

    Attributes:
        now: Time of the change, in whole seconds.
        author: For the log.
        message: The reason, for the log.
        allow_missing: Whether an architecture or machine may lose its build.
        dry_run: Whether the change is only planned.
    """

    now: datetime
    author: str | None = None
    message: str | None = None
    allow_missing: bool = False
    dry_run: bool = False

    def apply(
        self,
        store: Store,
        name: StreamName,
        make: Callable[[Stream | None], Stream],
        *,
        keep_builds: bool,
        files: Files = (),
        progress: Progress = lambda _: None,
    ) -> Change:
        """Change a stream, or only plan it.

        `make` returns the new state from the present one, again if somebody else was faster; its
        sequence and author are replaced, and its message if the edit has one. With `keep_builds`
        the loss of a build is refused, unless the edit allows it.
        """

        def plan(snapshot: Snapshot) -> Change:
            state = make(snapshot.present)
            message = state.message if self.message is None else self.message
            change = snapshot.next(attrs.evolve(state, author=self.author, message=message))
            if keep_builds and not (self.allow_missing or self.dry_run):
                _refuse_loss(change)
            return change

        return (
            plan(store.read(name)) if self.dry_run else update(store, name, plan, files, progress)
        )


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
    store: Store,
    name: StreamName,
    version: str | None,
    sources: Sequence[ArchiveSource],
    offers: Sequence[Offer] = (),
    *,
    edit: Edit,
    store_files: bool = False,
    force: bool = False,
    progress: Progress = lambda _: None,
) -> Change:
    """Replace the archives, and so the version, of a stream in one step.

    Args:
        store: The repository.
        name: The stream, which is created if need be.
        version: None: as the files tell.
        sources: One per archive.
        offers: Templates for each archive that has no offers of its own; none: the package's.
        edit: How the change is made.
        store_files: Whether the files are stored in the repository, too.
        force: Whether `sources` may contradict the files, and the same be published again.
        progress: Called with each number of bytes read.

    Raises:
        InvalidDataError: Something given breaks a rule, or contradicts the files.
    """
    snapshot = store.read(name)
    _refuse_closed(store, name, snapshot.present)
    if issues := list(_note_issues(edit)):
        raise InvalidDataError(issues)
    templates = tuple(offers) or snapshot.package.offers
    version, archives = describe(sources, name, version, templates, force=force, progress=progress)
    state = Stream(version=version, sequence=1, published=edit.now, archives=archives)

    def make(present: Stream | None) -> Stream:
        if not force:
            hint = "If it is to be published again, give --force."
            _refuse_same(state, present, name, hint)
        return state

    files = [
        (source.path, archive.envelope) for source, archive in zip(sources, archives, strict=True)
    ]
    return _replace(store, name, make, edit, files if store_files else (), progress)


def _note_issues(edit: Edit) -> Iterator[Issue]:
    for field in ("author", "message"):
        if reason := Stream.rules()[field](getattr(edit, field)):
            yield Issue(field, reason)


def _replace(
    store: Store,
    name: StreamName,
    make: Callable[[Stream | None], Stream],
    edit: Edit,
    files: Files = (),
    progress: Progress = lambda _: None,
) -> Change:
    """Replace version and archives; title and poll_s belong to the stream and stay."""

    def replaced(present: Stream | None) -> Stream:
        _refuse_closed(store, name, present)
        return attrs.evolve(
            make(present),
            published=edit.now, changed=None, closed=False, replacement=None, removed=False,
            title=present.title if present else None,
            poll_s=present.poll_s if present else None,
        )  # fmt: skip

    return edit.apply(store, name, replaced, keep_builds=True, files=files, progress=progress)


def _refuse_closed(store: Store, name: StreamName, present: Stream | None) -> None:
    if present and present.closed:
        raise RepositoryConflictError(
            f"{'/'.join(name)} is closed",
            hint=f"Open it again first: netota-coap reopen {store} {'/'.join(name)}",
        )


def promote(store: Store, source: StreamName, target: StreamName, *, edit: Edit) -> Change:
    """Publish to a stream, which is created if need be, the archives of another one."""
    if source == target:
        raise RepositoryConflictError(f"{'/'.join(source)} cannot be promoted to itself")

    def make(present: Stream | None) -> Stream:
        state = existing(store, source)
        _refuse_same(state, present, target)
        return attrs.evolve(state, message=None)

    return _replace(store, target, make, edit)


def rollback(store: Store, name: StreamName, to: int | None = None, *, edit: Edit) -> Change:
    """Publish an old state of a stream again; the stream may have been removed.

    Without the sequence `to`, it is the last state with another version or other archives.
    """

    def make(present: Stream | None) -> Stream:
        state = _state_to_restore(store, name, present, to)
        _refuse_same(state, present, name)
        return attrs.evolve(state, message=f"rollback to sequence {state.sequence}")

    return _replace(store, name, make, edit)


def _state_to_restore(
    store: Store, name: StreamName, present: Stream | None, to: int | None
) -> Stream:
    if to is not None:
        state = store.state_at(name, to)
        if state.removed:
            raise NotFoundError(f"{'/'.join(name)} was removed at sequence {to}: it held nothing")
        return state
    states = (state for state in store.history(name) if not state.removed)
    found = next((state for state in states if not (present and _same(state, present))), None)
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
    store: Store, name: StreamName, replacement: StreamName | None = None, *, edit: Edit
) -> Change:
    """Close a stream; devices may move to its replacement."""
    if replacement == name:
        raise RepositoryConflictError(f"{'/'.join(name)} cannot be its own replacement")
    if replacement and store.read(replacement).present is None:
        raise NotFoundError(f"there is no stream {'/'.join(replacement)} to be the replacement")

    def make(state: Stream) -> Stream:
        if state.closed and state.replacement == replacement:
            raise RepositoryConflictError(f"{'/'.join(name)} is closed already")
        return attrs.evolve(state, closed=True, replacement=replacement)

    return _alter(store, name, make, edit)


def reopen(store: Store, name: StreamName, *, edit: Edit) -> Change:
    """Open a closed stream again, without its replacement."""

    def make(state: Stream) -> Stream:
        if not state.closed:
            raise RepositoryConflictError(f"{'/'.join(name)} is open")
        return attrs.evolve(state, closed=False, replacement=None)

    return _alter(store, name, make, edit)


def remove(store: Store, name: StreamName, *, edit: Edit) -> Change:
    """Remove a stream: devices are answered 4.04. Its history stays, so sequences go on."""

    def make(state: Stream) -> Stream:
        return attrs.evolve(state, archives=(), closed=False, replacement=None, removed=True)

    return _alter(store, name, make, edit)


def _alter(store: Store, name: StreamName, make: Callable[[Stream], Stream], edit: Edit) -> Change:
    """Change an existing stream, all but its archives."""

    def altered(present: Stream | None) -> Stream:
        if present is None:
            raise _no_stream(store, name)
        return attrs.evolve(make(present), changed=edit.now, message=None)

    return edit.apply(store, name, altered, keep_builds=False)


def existing(store: Store, name: StreamName) -> Stream:
    """Return the present state of a stream."""
    present = store.read(name).present
    if present is None:
        raise _no_stream(store, name)
    return present


def _no_stream(store: Store, name: StreamName) -> NotFoundError:
    return NotFoundError(
        f"{store}: there is no stream {'/'.join(name)}",
        hint=f"List the streams: netota-coap list {store}",
    )


# ----------------------------------------------------------------------------------------------
# A sample


def sample(store: Store, now: datetime) -> None:
    """Put a package with two streams into an empty repository, as an example."""
    store.write_package("sensor-node", Package(title="Sensor node", poll_s=86_400))
    for stream, version in (("stable", "1.0.0"), ("edge", "1.1.0-rc1")):
        archives = tuple(_sample_archive(version, board) for board in ("nrf52840dk", "nrf9160dk"))
        state = Stream(version=version, sequence=1, published=now, archives=archives)
        store.commit(store.read(("sensor-node", stream)).next(state))


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
