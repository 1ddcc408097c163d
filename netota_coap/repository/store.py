"""The one interface for changing a repository, and its implementation by a directory.

A change is planned on a stream as it was read, and committed only if the stream is still the same.
The directory is written under its lock: history file first, stream file last, each by one rename
(`spec/repository.md`).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Protocol, TypeVar

import attrs

from netota_coap.encoding.codecs import Format
from netota_coap.encoding.documents import decode, encode
from netota_coap.errors import RepositoryConflictError
from netota_coap.files import Progress, sync_directory, write
from netota_coap.model.values import Envelope, Package, Stream, StreamName, require_names
from netota_coap.repository import history
from netota_coap.repository.blobs import Blobs
from netota_coap.repository.layout import (
    history_file,
    package_names,
    recorded,
    stream_entries,
    stream_file,
)
from netota_coap.repository.loading import read
from netota_coap.repository.lock import locked, require_repository

Files = Sequence[tuple[Path, Envelope]]
"""Files to be stored, each with the envelope that it must match."""


@attrs.frozen
class Change:
    """A change of one stream.

    Attributes:
        package: Without its streams.
        before: None if the stream did not exist.
        after: `removed` if the stream is to exist no longer.
        revision: That of the snapshot on which the change was planned.
    """

    name: StreamName
    package: Package
    before: Stream | None
    after: Stream
    revision: object = None


@attrs.frozen
class Snapshot:
    """A stream as it was read, which need not exist.

    Attributes:
        package: Without its streams.
        present: None if the stream does not exist.
        last: `present`, or else the last state before the stream was removed.
        sequence: The highest that was ever used, also by an interrupted change; 0: none.
        revision: Opaque; equal revisions mean that the stream did not change in between.
    """

    name: StreamName
    package: Package
    present: Stream | None
    last: Stream | None
    sequence: int
    revision: object

    def change(self, after: Stream) -> Change:
        """Plan a change to a state that already has its sequence."""
        return Change(self.name, self.package, self.present, after, self.revision)

    def next(self, after: Stream) -> Change:
        """Plan a change to a state under the next sequence. Source: rule R-10."""
        return self.change(attrs.evolve(after, sequence=self.sequence + 1))


class Store(Protocol):
    """A repository that can be changed; its `str()` names it in messages and commands.

    Methods that write raise a `RepositoryError` if they cannot, and then nothing changed.
    """

    def read(self, name: StreamName) -> Snapshot:
        """Read a stream, to plan a change of it.

        Raises:
            RepositoryError: There is no repository.
            RepositoryConflictError: The name differs from another one only in case.
            InvalidDataError: The name, or what is stored, is invalid.
        """

    def history(self, name: StreamName) -> list[Stream]:
        """Return the states of a stream, as `repository.history.history` does."""

    def state_at(self, name: StreamName, sequence: int) -> Stream:
        """Return a state of a stream, as `repository.history.state_at` does."""

    def held(self, envelopes: Iterable[Envelope]) -> frozenset[bytes]:
        """Return the SHA-256 of those files that are stored in the repository."""

    def commit(
        self,
        change: Change,
        files: Files = (),
        progress: Progress = lambda _: None,
    ) -> bool:
        """Write a change in one step, unless the stream has changed since it was read.

        Returns:
            False if the stream has changed: only the files were stored.

        Raises:
            InvalidDataError: A file is not what its envelope says, or what is stored is invalid.
        """

    def drop(self, name: StreamName) -> None:
        """Delete a stream that was adopted; its history stays as it is. Source: rule M-23."""

    def write_package(self, name: str, package: Package) -> None:
        """Write a package's own file, without its streams."""


C = TypeVar("C", bound="Change | None")


def update(
    store: Store,
    name: StreamName,
    plan: Callable[[Snapshot], C],
    files: Files = (),
    progress: Progress = lambda _: None,
) -> C:
    """Plan a change and commit it; plan it again whenever somebody else was faster.

    Returns:
        The plan that was committed; None if `plan` returned that.
    """
    while True:
        change = plan(store.read(name))
        if change is None or store.commit(change, files, progress):
            return change


@attrs.frozen
class DirectoryStore:
    """A repository in a directory, as servers read it."""

    root: Path

    def __str__(self) -> str:
        return str(self.root)

    def read(self, name: StreamName) -> Snapshot:
        """Read a stream, as `Store` says."""
        require_repository(self.root)
        package, present = read(self.root, name)
        self._refuse_similar(*name)
        sequences = recorded(self.root, name)
        highest = max([*sequences, present.sequence if present else 0])
        last = present or history.last_before_removal(self.root, name)
        return Snapshot(name, package, present, last, highest, (present, tuple(sequences)))

    def history(self, name: StreamName) -> list[Stream]:
        """Return the states of a stream, as `Store` says."""
        return history.history(self.root, name)

    def state_at(self, name: StreamName, sequence: int) -> Stream:
        """Return a state of a stream, as `Store` says."""
        return history.state_at(self.root, name, sequence)

    def held(self, envelopes: Iterable[Envelope]) -> frozenset[bytes]:
        """Return which files are stored, as `Store` says."""
        return Blobs(self.root).held(envelopes)

    def commit(
        self,
        change: Change,
        files: Files = (),
        progress: Progress = lambda _: None,
    ) -> bool:
        """Write a change, as `Store` says. Source: rules R-9 to R-11, R-20 to R-24 and R-44."""

        def add_files() -> None:
            for path, envelope in files:
                Blobs(self.root).add(path, envelope, progress=progress)

        add_files()  # without the lock, since it may take long
        with locked(self.root):
            if self.read(change.name).revision != change.revision:
                return False
            add_files()  # a garbage collection may have removed some since
            self._write(change)
        return True

    def _write(self, change: Change) -> None:
        root, name, before, after = self.root, change.name, change.before, change.after
        data = encode(after, Format.TOML)
        # What cannot be read back must never be written.
        if decode(Stream, data, Format.TOML) != after:
            raise AssertionError(f"{'/'.join(name)}: does not survive writing and reading")
        sequences = recorded(root, name)
        stream, record = stream_file(root, name), history_file(root, name, after.sequence)
        if after.sequence in sequences and self._recorded_as(change):
            write(stream, data)  # other offers, say: R-9 allows that, and it makes no history
            return
        if before and before.sequence not in sequences:
            # Made by hand; what is replaced must not be lost.
            write(history_file(root, name, before.sequence), encode(before, Format.TOML))
        try:
            write(record, data)
            for leftover in history.interrupted(root, name, before, sequences):
                if leftover != after.sequence:
                    history_file(root, name, leftover).unlink()
            if after.removed:
                stream.unlink()
                sync_directory(stream.parent)
            else:
                write(stream, data)
        except BaseException:  # Ctrl-C, too
            if read(root, name)[1] == before:
                # Nobody has seen the new state. The disk may be full: this makes room.
                record.unlink(missing_ok=True)
            raise

    def _recorded_as(self, change: Change) -> bool:
        recorded_state = history.recorded_state(self.root, change.name, change.after.sequence)
        return recorded_state.essence() == change.after.essence()

    def drop(self, name: StreamName) -> None:
        """Delete a stream that was adopted, as `Store` says."""
        with locked(self.root):
            path = stream_file(self.root, name)
            path.unlink(missing_ok=True)
            sync_directory(path.parent)

    def write_package(self, name: str, package: Package) -> None:
        """Write a package's own file, as `Store` says."""
        require_names(name)
        with locked(self.root):
            self._refuse_similar(name)
            path = self.root / "packages" / name / "package.toml"
            write(path, encode(package, Format.TOML))

    def _refuse_similar(self, package: str, stream: str | None = None) -> None:
        names = [(package, package_names(self.root))]
        if stream is not None:
            entries = stream_entries(self.root, package)
            names.append((stream, [entry.name[:-5] for entry in entries]))
        for wanted, others in names:
            for other in others:
                if other != wanted and other.casefold() == wanted.casefold():
                    raise RepositoryConflictError(
                        f"{wanted!r} differs from {other!r} only in case",
                        hint="Some file systems cannot hold both: choose another name.",
                    )
