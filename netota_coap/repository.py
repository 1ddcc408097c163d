"""The on-disk format: load, check, store, history.

The whole of a repository is loaded or nothing is. Reading: stream file, then history; writing: the
reverse, each file by one rename, under the lock (`spec/repository.md`). This is the only writer.
"""

from __future__ import annotations

import contextlib
import fcntl
import functools
import os
import re
import stat
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import TypeVar

import attrs

from netota_coap.errors import (
    InvalidDataError,
    Issue,
    RepositoryConflictError,
    RepositoryError,
    RepositoryLockedError,
)
from netota_coap.formats import Format
from netota_coap.model import (
    FORMAT,
    LIMITS,
    Package,
    Repository,
    Stream,
    StreamName,
    Value,
    clashes,
    name_rule,
    require_names,
)
from netota_coap.wire import decode, encode

T = TypeVar("T")
V = TypeVar("V", bound=Value)

LOCK = ".lock"
_NOT_IN_GIT = (b"/" + LOCK.encode(), b"/blobs/", b".*.tmp")
_HISTORY_NAME = r"([0-9]{8}|[1-9][0-9]{8,9})\.toml"  # each sequence has one spelling
_REGRESSED = "which stood for another state"
_REVERT_HINT = (
    "Devices ignore a state whose sequence they have seen: "
    "publish the wanted state again instead of editing or reverting a stream's file."
)


# ----------------------------------------------------------------------------------------------
# Places


def _stream_file(root: Path, name: StreamName) -> Path:
    return root / "packages" / name[0] / "streams" / f"{name[1]}.toml"


def _history_file(root: Path, name: StreamName, sequence: int) -> Path:
    return root / "packages" / name[0] / "history" / name[1] / f"{sequence:08}.toml"


def _history(root: Path, name: StreamName) -> list[int]:
    """Return the sequences in a stream's history, ascending."""
    entries = _listing(root, f"packages/{name[0]}/history/{name[1]}")
    found = (
        int(entry.name[:-5])
        for entry in entries
        if re.fullmatch(_HISTORY_NAME, entry.name) and entry.is_file()
    )
    return sorted(sequence for sequence in found if sequence <= LIMITS["sequence"].value)


# ----------------------------------------------------------------------------------------------
# Reading

_Signature = tuple[int, int, int, int, int]
_Files = dict[str, "tuple[_Signature | None, Value]"]
_RACY_NS = 20_000_000
_MOST_ISSUES = 100  # that are told of one file: a broken one can have a million


def _signature(status: os.stat_result) -> _Signature:
    return (
        status.st_dev,
        status.st_ino,
        status.st_size,
        status.st_mtime_ns,
        status.st_ctime_ns,
    )


def _read(cls: type[V], path: Path, file: str) -> tuple[_Signature | None, V]:
    """Read one file.

    Returns:
        What it says, and by what to know it again. That is None for a file so young that it
        could change once more without looking different (git calls such an entry racy).

    Raises:
        InvalidDataError: Its issues name `file`.
        FileNotFoundError: It is not there.
    """
    try:
        status = path.stat()
        # Opening a pipe would wait for its other end.
        if not stat.S_ISREG(status.st_mode):
            raise InvalidDataError([Issue("", "is not a regular file", file)])
        with open(path, "rb", opener=_at_once) as stream:
            status = os.fstat(stream.fileno())
            data = stream.read(LIMITS["document"].value + 1)
        if data is None:
            raise InvalidDataError([Issue("", "cannot be read: nothing comes", file)])
    except FileNotFoundError:
        raise
    except OSError as error:
        raise InvalidDataError([Issue("", f"cannot be read: {error.strerror}", file)]) from error
    try:
        young = time.time_ns() - status.st_mtime_ns < _RACY_NS
        return None if young else _signature(status), decode(cls, data, Format.TOML)
    except InvalidDataError as error:
        issues = [attrs.evolve(issue, file=file) for issue in error.issues[:_MOST_ISSUES]]
        if len(error.issues) > _MOST_ISSUES:
            issues.append(Issue("", f"and {len(error.issues) - _MOST_ISSUES} more", file))
        raise InvalidDataError(issues) from error


def _at_once(path: str, flags: int) -> int:
    """Open without waiting for anybody, as a pipe would that somebody put there."""
    return os.open(path, flags | os.O_NONBLOCK, 0o666)


def _listing(root: Path, directory: str) -> list[os.DirEntry[str]]:
    """List a directory in the order of the names, without what is hidden; [] if it is not there.

    Raises:
        InvalidDataError: It cannot be read.
    """
    try:
        with os.scandir(root / directory) as entries:
            found = [entry for entry in entries if not entry.name.startswith(".")]
    except (FileNotFoundError, NotADirectoryError):
        return []
    except OSError as error:
        issue = Issue("", f"cannot be read: {error.strerror}", directory)
        raise InvalidDataError([issue]) from error
    return sorted(found, key=lambda entry: entry.name)


def _packages(root: Path) -> list[str]:
    return [entry.name for entry in _listing(root, "packages") if _is_directory(entry)]


def _is_directory(entry: os.DirEntry[str]) -> bool:
    try:
        return entry.is_dir()
    except OSError:
        return True  # what is wrong with it is told when it is read


def _streams(root: Path, package: str) -> list[os.DirEntry[str]]:
    entries = _listing(root, f"packages/{package}/streams")
    return [entry for entry in entries if entry.name.endswith(".toml")]


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
    _files: dict[str, tuple[_Signature | None, Value]] = attrs.field(init=False, factory=dict)
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
        names = _collect(issues, lambda: _packages(self._real))
        issues += _name_issues(tuple(names), "packages/{name}")
        packages = {name: self._package(name, known, issues) for name in names}
        if issues or top is None:
            raise InvalidDataError(issues, hint=_hint(issues))
        for name, package in packages.items():
            self._seen.update({(name, stream): state for stream, state in package.streams.items()})
        return attrs.evolve(top, packages=packages)

    def _package(self, name: str, known: _Files, issues: list[Issue]) -> Package:
        place = f"packages/{name}"
        package = self._file(Package, f"{place}/package.toml", known, issues) or Package()
        entries = _collect(issues, lambda: _streams(self._real, name))
        names = tuple(entry.name[:-5] for entry in entries)
        issues += _name_issues(names, f"{place}/streams/{{name}}.toml")
        streams = {}
        for own, entry in zip(names, entries, strict=True):
            file = f"{place}/streams/{entry.name}"
            stream = self._file(Stream, file, known, issues, entry)
            if stream is not None:
                streams[own] = stream
                seen = self._seen.get((name, own), stream)
                if seen is not stream:
                    issues += _sequence_issues(seen, stream, file)
        return attrs.evolve(package, streams=streams)

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
            if found is None or found[0] != _signature((entry or self._real / file).stat()):
                found = _read(cls, self._real / file, file)
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


def _hint(issues: Iterable[Issue]) -> str:
    return _REVERT_HINT if any(i.reason.endswith(_REGRESSED) for i in issues) else ""


def _sequence_issues(seen: Stream, stream: Stream, file: str) -> Iterator[Issue]:
    """Find a change of a stream without a higher sequence. Source: rule R-9."""
    if stream.sequence <= seen.sequence and stream.essence() != seen.essence():
        reason = f"must be above {seen.sequence}, {_REGRESSED}"
        yield Issue("sequence", reason, file)


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
# Checking


@attrs.frozen
class Findings:
    """What a check of a repository found.

    Attributes:
        repository: None if it cannot be served.
        errors: Why it cannot be served, or would be refused.
        warnings: What is allowed and probably not meant.
        hint: What to do about the errors, or "".
    """

    repository: Repository | None
    errors: tuple[Issue, ...]
    warnings: tuple[Issue, ...]
    hint: str = ""


def check(root: Path) -> Findings:
    """Check a repository and its history, without anything served to compare it to.

    Source: rules R-1 to R-12.
    """
    try:
        repository = Loader(root).load()
    except InvalidDataError as error:
        return Findings(None, error.issues, (), error.hint)
    errors: list[Issue] = []
    warnings = list(_ignored(root))
    for package_name, package in repository.packages.items():
        for name, stream in package.streams.items():
            _check_history(root, (package_name, name), stream, errors, warnings)
            target = stream.replacement
            if target and not _exists(repository, target):
                file = f"packages/{package_name}/streams/{name}.toml"
                reason = f"there is no stream {'/'.join(target)}"
                warnings.append(Issue("replacement", reason, file))
    return Findings(repository, tuple(errors), tuple(warnings), _hint(errors))


def _exists(repository: Repository, name: StreamName) -> bool:
    package = repository.packages.get(name[0])
    return package is not None and name[1] in package.streams


def _check_history(
    root: Path, name: StreamName, stream: Stream, errors: list[Issue], warnings: list[Issue]
) -> None:
    for sequence in _collect(errors, lambda: _history(root, name)):
        path = _history_file(root, name, sequence)
        file = path.relative_to(root).as_posix()
        try:
            _, state = _read(Stream, path, file)
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
            file = _stream_file(root, name).relative_to(root).as_posix()
            errors.extend(_sequence_issues(state, stream, file))


def _ignored(root: Path) -> Iterator[Issue]:
    """List the files that do not count. Hidden ones and the blobs are left out."""
    counts = re.compile(
        r"repository\.toml|blobs/.*|packages/[^/]+/package\.toml|packages/[^/]+/streams/[^/]+\.toml"
        rf"|packages/[^/]+/history/[^/]+/{_HISTORY_NAME}"
    )
    for directory, subdirectories, files in os.walk(root):
        subdirectories[:] = sorted(d for d in subdirectories if not d.startswith("."))
        for name in sorted(files):
            file = (Path(directory) / name).relative_to(root).as_posix()
            if not name.startswith(".") and not counts.fullmatch(file):
                yield Issue("", "is ignored: it stands at no place that counts", file)


# ----------------------------------------------------------------------------------------------
# Writing


def is_locked(root: Path) -> bool:
    """Tell whether somebody is writing."""
    try:
        with open(root / LOCK, "rb", opener=_at_once) as lock:
            fcntl.flock(lock, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    except OSError:
        return False
    return False


@contextlib.contextmanager
def locked(root: Path, timeout_s: float = 10.0) -> Iterator[None]:
    """Hold the lock of a repository; the kernel lets go of it if the process dies.

    Args:
        root: Of the repository.
        timeout_s: How long to wait for somebody else, seconds.

    Raises:
        RepositoryLockedError: Somebody else held it all the time.
        RepositoryError: There is no repository, or it cannot be written to.
    """
    if not (root / "repository.toml").is_file():
        raise RepositoryError(
            f"{root}: not a repository, it has no repository.toml",
            hint=f"Make one: netota-coap init {root}",
        )
    deadline = time.monotonic() + timeout_s
    with _writing(root), open(root / LOCK, "ab", opener=_at_once) as lock:
        while True:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                if time.monotonic() >= deadline:
                    raise RepositoryLockedError(
                        f"{root}: somebody else has been writing for {timeout_s:g} s",
                        hint="Try again when the other publisher is done.",
                    ) from None
                time.sleep(0.01)
        yield


@contextlib.contextmanager
def _writing(root: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        place = error.filename or root
        raise RepositoryError(f"{place}: cannot be written: {error.strerror}") from error


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
            return _read(cls, path, path.relative_to(root).as_posix())[1]
        except FileNotFoundError:
            return None

    optional(Repository, root / "repository.toml")
    package = optional(Package, root / "packages" / name[0] / "package.toml") or Package()
    return package, optional(Stream, _stream_file(root, name))


def change(
    root: Path, name: StreamName, make: Callable[[Package, Stream | None], Stream]
) -> Stream:
    """Change one stream in one step: the old state or the new one, whatever happens.

    Args:
        root: Of the repository.
        name: Of the stream; it need not exist.
        make: From the package and the present state to the new one. The new one's sequence is
            replaced by the next.

    Returns:
        The state as it was written.

    Raises:
        RepositoryError: It could not be written; nothing changed.
        InvalidDataError: A name, the present state, or the new one, is wrong.

    Source: rules R-9 to R-11 and R-20 to R-24.
    """
    with locked(root):
        package, present = read(root, name)
        _refuse_similar(root, *name)
        history = _history(root, name)
        sequence = 1 + max([*history, present.sequence if present else 0])
        state = attrs.evolve(make(package, present), sequence=sequence)
        data = encode(state, Format.TOML)
        # What cannot be read back must never be written.
        if decode(Stream, data, Format.TOML) != state:
            raise AssertionError(f"{'/'.join(name)}: does not survive writing and reading")
        if present and present.sequence not in history:
            # Made by hand; what is replaced must not be lost.
            _write(_history_file(root, name, present.sequence), encode(present, Format.TOML))
        _write(_history_file(root, name, sequence), data)
        for leftover in history:
            if present and leftover > present.sequence:
                _history_file(root, name, leftover).unlink()
        _write(_stream_file(root, name), data)
    return state


def _refuse_similar(root: Path, package: str, stream: str | None = None) -> None:
    names = [(package, _packages(root))]
    if stream is not None:
        names.append((stream, [entry.name[:-5] for entry in _streams(root, package)]))
    for wanted, others in names:
        for other in others:
            if other != wanted and other.casefold() == wanted.casefold():
                raise RepositoryConflictError(
                    f"{wanted!r} differs from {other!r} only in case",
                    hint="Some file systems cannot hold both: choose another name.",
                )


def _write(path: Path, data: bytes) -> None:
    _make_directory(path.parent)
    temporary = path.with_name(f".{path.name}.tmp")
    with temporary.open("wb") as stream:
        stream.write(data)
        stream.flush()
        os.fsync(stream.fileno())
    temporary.replace(path)
    _sync_directory(path.parent)


def _make_directory(path: Path) -> None:
    if not path.is_dir():
        _make_directory(path.parent)
        path.mkdir()
        _sync_directory(path.parent)


def _sync_directory(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def init(root: Path, title: str | None = None) -> None:
    """Make an empty repository.

    Args:
        root: A directory that is made if need be, and may hold other things.
        title: For people.

    Raises:
        InvalidDataError: The title breaks its rule.
        RepositoryConflictError: There is one already.
        RepositoryError: It cannot be written.
    """
    if (root / "repository.toml").exists():
        raise RepositoryConflictError(f"{root}: there is a repository already")
    top = encode(Repository(format=FORMAT, title=title), Format.TOML)
    with _writing(root):
        _make_directory((root / "packages").absolute())
        ignored = root / ".gitignore"
        lines = ignored.read_bytes().splitlines() if ignored.exists() else []
        lines += [line for line in _NOT_IN_GIT if line not in lines]
        _write(ignored, b"\n".join(lines) + b"\n")
        _write(root / "repository.toml", top)


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
        _write(path, encode(package, Format.TOML))
