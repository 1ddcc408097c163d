"""The on-disk format: load, store, history.

The whole of a repository is loaded or nothing is. Reading: stream file, then history; writing: the
reverse, each file by one rename, under the lock (`spec/repository.md`). This is the only writer.
"""

from __future__ import annotations

import functools
import os
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import TypeVar

import attrs

from netota_coap.encoding.codecs import Format
from netota_coap.encoding.documents import decode, encode
from netota_coap.errors import InvalidDataError, Issue, NotFoundError, RepositoryConflictError
from netota_coap.files import make_directory, sync_directory, write, writing
from netota_coap.model.values import (
    FORMAT,
    Package,
    Repository,
    Stream,
    StreamName,
    Value,
    clashes,
    name_rule,
    require_names,
)
from netota_coap.repository import lock, scaffold
from netota_coap.repository.layout import HISTORY_NAME as HISTORY_NAME
from netota_coap.repository.layout import (
    Signature,
    history_file,
    package_names,
    read_file,
    recorded,
    signature_of,
    stream_entries,
    stream_file,
)
from netota_coap.repository.lock import locked, require_repository

T = TypeVar("T")
V = TypeVar("V", bound=Value)

_NOT_IN_GIT = (b"/" + lock.FILE.encode(), b"/blobs/", b".*.tmp")
_ABOVE = "must be above"
_REVERT_HINT = (
    "Devices ignore a sequence that they have seen. Take the edit, revert or merge back, then "
    "make the wanted state a new publish: netota-coap rollback, or publish."
)

_Files = dict[str, "tuple[Signature | None, Value]"]

# ----------------------------------------------------------------------------------------------
# Reading


@attrs.define
class Loader:
    """Loads a repository again and again, parsing only the files that changed.

    It remembers each stream's highest state, so that a sequence which was seen is never taken for
    another state, not even after the stream was removed.

    Attributes:
        root: Of the repository; may be a symbolic link.
        parsed: How many files the last load parsed.
    """

    root: Path
    parsed: int = attrs.field(init=False, default=0)
    _real: Path = attrs.field(init=False, default=Path())
    _files: dict[str, tuple[Signature | None, Value]] = attrs.field(init=False, factory=dict)
    _seen: dict[StreamName, Stream] = attrs.field(init=False, factory=dict)

    def load(self) -> Repository:
        """Load and check the whole repository.

        Returns:
            All of it; streams whose files did not change are the same objects as last time.

        Raises:
            InvalidDataError: With everything that is wrong in it, file by file.

        Source: rules R-1 to R-9.
        """
        # A link that is exchanged meanwhile must not mix two trees.
        self._real = Path(os.path.realpath(self.root))
        if not os.path.isdir(self._real):  # noqa: PTH112 - never raises
            raise InvalidDataError([Issue("", "is not a directory", str(self.root))])
        self.parsed = 0
        known, self._files = self._files, {}
        issues: list[Issue] = []
        top = self._file(Repository, "repository.toml", known, issues)
        if top is None and not issues:
            issues.append(Issue("", "is missing", "repository.toml"))
        names = _collect(issues, lambda: package_names(self._real))
        issues += _name_issues(tuple(names), "packages/{name}")
        loaded = {name: self._package(name, known, issues) for name in names}
        packages = {name: package for name, package in loaded.items() if package}
        if issues or top is None:
            raise InvalidDataError(issues, hint=sequence_hint(issues))
        for name, package in packages.items():
            self._seen.update({(name, stream): state for stream, state in package.streams.items()})
        return attrs.evolve(top, packages=packages)

    def _package(self, name: str, known: _Files, issues: list[Issue]) -> Package | None:
        place = f"packages/{name}"
        package = self._file(Package, f"{place}/package.toml", known, issues)
        entries = _collect(issues, lambda: stream_entries(self._real, name))
        if package is None and not entries:
            return None
        names = tuple(entry.name[:-5] for entry in entries)
        issues += _name_issues(names, f"{place}/streams/{{name}}.toml")
        streams = {}
        for own, entry in zip(names, entries, strict=True):
            file = f"{place}/streams/{entry.name}"
            stream = self._file(Stream, file, known, issues, entry)
            if stream is not None:
                streams[own] = stream
                issues += _removed_issues(stream, file)
                seen = self._seen.get((name, own), stream)
                if seen is not stream:
                    issues += _sequence_issues(seen, stream, file)
        return attrs.evolve(package or Package(), streams=streams)

    def _file(
        self,
        cls: type[V],
        file: str,
        known: _Files,
        issues: list[Issue],
        entry: os.DirEntry[str] | None = None,
    ) -> V | None:
        """Return what a file says, from memory if it did not change; None if it has no answer."""
        try:
            found = known.get(file)
            # A directory's entries are asked instead of paths, which take as long again to make.
            if found is None or found[0] != signature_of((entry or self._real / file).stat()):
                found = read_file(cls, self._real / file, file)
                self.parsed += 1
        except FileNotFoundError:
            return None
        except InvalidDataError as error:
            issues.extend(error.issues)
            return None
        except OSError as error:
            issues.append(Issue("", f"cannot be read: {error.strerror}", file))
            return None
        self._files[file] = found
        assert isinstance(found[1], cls)
        return found[1]


def _collect(issues: list[Issue], entries: Callable[[], list[T]]) -> list[T]:
    """Return what a directory holds; nothing, and an issue more, if it cannot be read."""
    try:
        return entries()
    except InvalidDataError as error:
        issues.extend(error.issues)
        return []


def sequence_hint(issues: Iterable[Issue]) -> str:
    """Return what to do about issues of which one is a sequence that was not raised, or ""."""
    return _REVERT_HINT if any(i.reason.startswith(_ABOVE) for i in issues) else ""


def sequence_issue(lowest: int, why: str, file: str) -> Issue:
    """Return the issue of a sequence that must be above another."""
    return Issue("sequence", f"{_ABOVE} {lowest}, {why}", file)


def _sequence_issues(seen: Stream, stream: Stream, file: str) -> Iterator[Issue]:
    """Find a change of a stream without a higher sequence. Source: rule R-9."""
    if stream.sequence <= seen.sequence and stream.essence() != seen.essence():
        yield sequence_issue(seen.sequence, "which stood for another state", file)


def _removed_issues(stream: Stream, file: str) -> list[Issue]:
    reason = "only a state in the history has it: remove this file instead"
    return [Issue("removed", reason, file)] if stream.removed else []


@functools.lru_cache(maxsize=1_024)  # asked of every package at each load, and few change
def _name_issues(names: tuple[str, ...], place: str) -> tuple[Issue, ...]:
    """Find the names that break the rule, and those that do not go together."""
    reasons = ((name, name_rule(name)) for name in names)
    return (
        *(
            Issue("", f"the name {why}", place.replace("{name}", name))
            for name, why in reasons
            if why
        ),
        *(
            Issue("", issue.reason, place.replace("{name}", issue.place))
            for issue in clashes(names)
        ),
    )


# ----------------------------------------------------------------------------------------------
# Writing


def read(root: Path, name: StreamName) -> tuple[Package, Stream | None]:
    """Read one package (without its streams) and one stream of it.

    Returns:
        Empty package and None where the files are missing.

    Raises:
        InvalidDataError: A name, one of the files, or `repository.toml`, is wrong.
    """
    require_names(*name)

    def optional(cls: type[V], path: Path) -> V | None:
        try:
            return read_file(cls, path, path.relative_to(root).as_posix())[1]
        except FileNotFoundError:
            return None

    optional(Repository, root / "repository.toml")
    package = optional(Package, root / "packages" / name[0] / "package.toml") or Package()
    path = stream_file(root, name)
    stream = optional(Stream, path)
    if stream and (issues := _removed_issues(stream, path.relative_to(root).as_posix())):
        raise InvalidDataError(issues)
    return package, stream


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
        for leftover in _interrupted(root, name, before, history):
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
        known = present or _last(root, name)
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
    return _state(root, name, state.sequence).essence() == state.essence()


def last(root: Path, name: StreamName) -> Stream | None:
    """Return the state that a stream holds, or held last; None: there never was such a stream.

    Raises:
        InvalidDataError: As `history` does.
    """
    return read(root, name)[1] or _last(root, name)


def _last(root: Path, name: StreamName) -> Stream | None:
    """Return the state that a stream which is gone held last."""
    found = recorded(root, name)
    traces = _interrupted(root, name, None, found)
    sequence = next((each for each in reversed(found) if each not in traces), None)
    return None if sequence is None else _state(root, name, sequence)


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


def _interrupted(
    root: Path, name: StreamName, present: Stream | None, sequences: list[int]
) -> list[int]:
    """Return what of a history is the trace of changes that were interrupted. Source: R-11.

    Without a stream file it is what follows a removal; a history that begins without one is taken
    for that of a file that was deleted (decision 0003).
    """
    if present:
        return [each for each in sequences if each > present.sequence]
    after: list[int] = []
    for sequence in reversed(sequences):
        if _state(root, name, sequence).removed:
            return after
        after.append(sequence)
    return []


def history(root: Path, name: StreamName, most: int | None = None) -> list[Stream]:
    """Return the states that a stream held, the present or last one first; at most so many.

    Traces of interrupted changes are left out; a removal is a state of its own, `removed`.

    Raises:
        NotFoundError: There never was such a stream.
        InvalidDataError: A name, or one of the files, is wrong.
    """
    sequences = _sequences(root, name)[:most]
    present = read(root, name)[1]
    past = [
        _state(root, name, each) for each in sequences if not present or each < present.sequence
    ]
    return [present, *past][:most] if present else past


def _sequences(root: Path, name: StreamName) -> list[int]:
    """Return the sequences that a stream held, the last one first; its own may be missing."""
    require_repository(root)
    present, found = read(root, name)[1], recorded(root, name)
    if not present and not found:
        raise NotFoundError(
            f"{root}: there is no stream {'/'.join(name)}, and never was",
            hint=f"See what there is: netota-coap list {root}",
        )
    traces = _interrupted(root, name, present, found)
    return [each for each in reversed(found) if each not in traces]


def _state(root: Path, name: StreamName, sequence: int) -> Stream:
    path = history_file(root, name, sequence)
    return read_file(Stream, path, path.relative_to(root).as_posix())[1]


def history_issues(
    root: Path, name: StreamName, stream: Stream
) -> tuple[list[Issue], list[Issue]]:
    """Compare the history of a stream with its present state.

    Returns:
        Errors and warnings.

    Source: rules R-9, R-11 and R-12.
    """
    errors: list[Issue] = []
    warnings: list[Issue] = []
    for sequence in _collect(errors, lambda: recorded(root, name)):
        path = history_file(root, name, sequence)
        file = path.relative_to(root).as_posix()
        try:
            _, state = read_file(Stream, path, file)
        except FileNotFoundError:
            continue  # a publisher has just replaced an interrupted publish
        except InvalidDataError as error:
            errors.extend(error.issues)
            continue
        if state.sequence != sequence:
            errors.append(Issue("sequence", f"must be {sequence}, as the file's name says", file))
        elif sequence > stream.sequence:
            reason = (
                "is above the stream's sequence: an interrupted publish, which the next replaces"
            )
            warnings.append(Issue("", reason, file))
        elif sequence == stream.sequence:
            file = stream_file(root, name).relative_to(root).as_posix()
            errors.extend(_sequence_issues(state, stream, file))
    return errors, warnings


def state_at(root: Path, name: StreamName, sequence: int) -> Stream:
    """Return the state that a stream held at a sequence.

    Raises:
        NotFoundError: It never held it, or the history lacks it.
        InvalidDataError: As `history` does.
    """
    sequences = _sequences(root, name)
    present = read(root, name)[1]
    if present and present.sequence == sequence:
        return present
    if sequence not in sequences:
        raise NotFoundError(
            f"{root}: the history of {'/'.join(name)} has no sequence {sequence}",
            hint=f"See what it has: netota-coap log {root} {'/'.join(name)}",
        )
    return _state(root, name, sequence)


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


def init(root: Path, title: str | None = None) -> None:
    """Make an empty repository, ready to be kept in git.

    Args:
        root: A directory that is made if need be, and may hold other things, which stay.
        title: For people.

    Raises:
        InvalidDataError: The title breaks its rule.
        RepositoryConflictError: There is one already.
        RepositoryError: It cannot be written.
    """
    if (root / "repository.toml").exists():
        raise RepositoryConflictError(f"{root}: there is a repository already")
    top = encode(Repository(format=FORMAT, title=title), Format.TOML)
    with writing(root):
        make_directory((root / "packages").absolute())
        for name, data in scaffold.files(title).items():
            if not (root / name).exists():
                write(root / name, data)
        ignored = root / ".gitignore"
        lines = ignored.read_bytes().splitlines() if ignored.exists() else []
        lines += [line for line in _NOT_IN_GIT if line not in lines]
        write(ignored, b"\n".join(lines) + b"\n")
        write(root / "repository.toml", top)


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
