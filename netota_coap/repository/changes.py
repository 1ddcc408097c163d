"""Changes a repository on disk: one stream at a time, in one step, under the lock.

This is the only writer of streams and history: history file first, stream file last, each by one
rename (`spec/repository.md`).
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import attrs

from netota_coap.encoding.codecs import Format
from netota_coap.encoding.documents import decode, encode
from netota_coap.errors import RepositoryConflictError
from netota_coap.files import sync_directory, write
from netota_coap.model.values import Package, Stream, StreamName, require_names
from netota_coap.repository.history import interrupted, last_before_removal, recorded_state
from netota_coap.repository.layout import (
    history_file,
    package_names,
    recorded,
    stream_entries,
    stream_file,
)
from netota_coap.repository.loading import read
from netota_coap.repository.lock import locked, require_repository

Make = Callable[[Package, Stream | None], Stream]
"""From a package, without its streams, and the present state of a stream to the new one."""


@attrs.frozen
class Change:
    """What is done to one stream.

    Attributes:
        name: Of the stream.
        package: That it is in, without its streams.
        before: Its state; None: there is no such stream.
        after: The new one, with its sequence; if `removed`, there is no such stream any more.
    """

    name: StreamName
    package: Package
    before: Stream | None
    after: Stream


def plan(root: Path, name: StreamName, make: Make) -> Change:
    """Return what a change would do, without doing it.

    Args:
        root: Of the repository.
        name: Of the stream; it need not exist.
        make: The new state's sequence is replaced by the next.

    Raises:
        RepositoryError: There is no repository.
        InvalidDataError: A name, the present state, or the new one, is wrong.

    Source: rule R-10.
    """
    require_repository(root)
    package, present = read(root, name)
    _refuse_similar(root, *name)
    sequence = 1 + max([*recorded(root, name), present.sequence if present else 0])
    state = attrs.evolve(make(package, present), sequence=sequence)
    return Change(name, package, present, state)


def change(
    root: Path, name: StreamName, make: Make, approve: Callable[[Change], object] = lambda _: None
) -> Change:
    """Change one stream in one step: the old state or the new one, whatever happens.

    Args:
        root: As in `plan`.
        name: As in `plan`.
        make: As in `plan`.
        approve: Asked before anything is written; what it raises stops the change.

    Returns:
        What was done.

    Raises:
        RepositoryError: It could not be written; nothing changed.
        InvalidDataError: As `plan` does.

    Source: rules R-9 to R-11 and R-20 to R-24.
    """
    with locked(root):
        planned = plan(root, name, make)
        approve(planned)
        _commit(root, planned)
    return planned


def _commit(root: Path, planned: Change) -> None:
    name, before, after = planned.name, planned.before, planned.after
    data = encode(after, Format.TOML)
    # What cannot be read back must never be written.
    if decode(Stream, data, Format.TOML) != after:
        raise AssertionError(f"{'/'.join(name)}: does not survive writing and reading")
    history = recorded(root, name)
    if before and before.sequence not in history:
        # Made by hand; what is replaced must not be lost.
        write(history_file(root, name, before.sequence), encode(before, Format.TOML))
    stream, record = stream_file(root, name), history_file(root, name, after.sequence)
    try:
        write(record, data)
        for leftover in interrupted(root, name, before, history):
            if leftover != after.sequence:
                history_file(root, name, leftover).unlink()
        if after.removed:
            stream.unlink()
            sync_directory(stream.parent)
        else:
            write(stream, data)
    except BaseException:  # Ctrl-C, too
        if read(root, name)[1] == before:
            # Nobody has seen the new state. The disk may be full: what is removed is a relief.
            record.unlink(missing_ok=True)
        raise


Adopt = Callable[["Stream | None"], "Stream | None"]
"""From the state that a stream holds, or held last, to the one to be written; None: none."""


def take_over(root: Path, name: StreamName, adopt: Adopt) -> Stream | None:
    """Write a state of somebody else's stream under the sequence that it has there.

    Args:
        root: Of the repository.
        name: Of the stream; it need not exist.
        adopt: Asked under the lock; what it raises stops the change. A state that differs from
            the last one in no more than R-9 allows, under the same sequence, makes no history.

    Returns:
        What was written; None: nothing.

    Raises:
        RepositoryError: It could not be written; nothing changed.
        InvalidDataError: As `plan` does.

    Source: rules M-20 to M-22.
    """
    with locked(root):
        package, present = read(root, name)
        _refuse_similar(root, *name)
        known = present or last_before_removal(root, name)
        state = adopt(known) or (None if present else known)
        if state is None:
            return None
        if _is_recorded(root, name, state):
            write(stream_file(root, name), encode(state, Format.TOML))
        else:
            _commit(root, Change(name, package, present, state))
    return state


def _is_recorded(root: Path, name: StreamName, state: Stream) -> bool:
    recording = recorded(root, name)
    if state.sequence not in recording:
        return False
    return recorded_state(root, name, state.sequence).essence() == state.essence()


def drop(root: Path, name: StreamName) -> None:
    """Remove a stream that is gone where it was taken over from; its history stays as it is.

    Raises:
        RepositoryError: It could not be removed.

    Source: rule M-23.
    """
    with locked(root):
        path = stream_file(root, name)
        path.unlink(missing_ok=True)
        sync_directory(path.parent)


def _refuse_similar(root: Path, package: str, stream: str | None = None) -> None:
    names = [(package, package_names(root))]
    if stream is not None:
        names.append((stream, [entry.name[:-5] for entry in stream_entries(root, package)]))
    for wanted, others in names:
        for other in others:
            if other != wanted and other.casefold() == wanted.casefold():
                raise RepositoryConflictError(
                    f"{wanted!r} differs from {other!r} only in case",
                    hint="Some file systems cannot hold both: choose another name.",
                )


def write_package(root: Path, name: str, package: Package) -> None:
    """Write a package's own file, without its streams.

    Raises:
        InvalidDataError: The name breaks the rule of names.
        RepositoryError: It cannot be written.
    """
    require_names(name)
    with locked(root):
        _refuse_similar(root, name)
        path = root / "packages" / name / "package.toml"
        write(path, encode(package, Format.TOML))
