"""Loads a repository from disk as a whole, parsing only what changed since the last load."""

from __future__ import annotations

import functools
import os
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import TypeVar

import attrs

from netota_coap.errors import InvalidDataError, Issue
from netota_coap.model.values import (
    Package,
    Repository,
    Stream,
    StreamName,
    Value,
    clashes,
    name_rule,
    require_names,
)
from netota_coap.repository.layout import (
    Signature,
    package_names,
    read_file,
    signature_of,
    stream_entries,
    stream_file,
)

T = TypeVar("T")
V = TypeVar("V", bound=Value)
_ABOVE = "must be above"
_REVERT_HINT = (
    "Devices ignore a sequence that they have seen. Take the edit, revert or merge back, then "
    "make the wanted state a new publish: netota-coap rollback, or publish."
)

_Files = dict[str, "tuple[Signature | None, Value]"]


@attrs.define
class Loader:
    """Loads a repository again and again, parsing only the files that changed.

    It remembers the last state of each stream, also of removed ones: another state under the same
    sequence is refused.

    Attributes:
        root: It may be a symbolic link.
        parsed: How many files the last load parsed.
    """

    root: Path
    parsed: int = attrs.field(init=False, default=0)
    _real: Path = attrs.field(init=False, default=Path())
    _files: dict[str, tuple[Signature | None, Value]] = attrs.field(init=False, factory=dict)
    _seen: dict[StreamName, Stream] = attrs.field(init=False, factory=dict)

    def load(self) -> Repository:
        """Load and check the whole repository. Source: rules R-1 to R-9.

        Returns:
            The repository; unchanged streams are the same objects as after the last load.

        Raises:
            InvalidDataError: The repository is malformed; all issues are reported at once.
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
        names = collect(issues, lambda: package_names(self._real))
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
        entries = collect(issues, lambda: stream_entries(self._real, name))
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
                    issues += sequence_issues(seen, stream, file)
        return attrs.evolve(package or Package(), streams=streams)

    def _file(
        self,
        cls: type[V],
        file: str,
        known: _Files,
        issues: list[Issue],
        entry: os.DirEntry[str] | None = None,
    ) -> V | None:
        """Return the value of a file, parsed if it changed; None if it is missing or invalid."""
        try:
            found = known.get(file)
            # `DirEntry.stat` saves making a path, which takes as long again.
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


def collect(issues: list[Issue], entries: Callable[[], list[T]]) -> list[T]:
    """List a directory; if it cannot be read, add issues and return nothing."""
    try:
        return entries()
    except InvalidDataError as error:
        issues.extend(error.issues)
        return []


def sequence_hint(issues: Iterable[Issue]) -> str:
    """Return the hint about sequences that were not raised, or "" if none is among the issues."""
    return _REVERT_HINT if any(i.reason.startswith(_ABOVE) for i in issues) else ""


def sequence_issue(lowest: int, why: str, file: str) -> Issue:
    """Report a sequence that must be above another."""
    return Issue("sequence", f"{_ABOVE} {lowest}, {why}", file)


def sequence_issues(seen: Stream, stream: Stream, file: str) -> Iterator[Issue]:
    """Find a change of a stream without a higher sequence. Source: rule R-9."""
    if stream.sequence <= seen.sequence and stream.essence() != seen.essence():
        yield sequence_issue(seen.sequence, "the sequence of another state", file)


def _removed_issues(stream: Stream, file: str) -> list[Issue]:
    reason = "only a state in the history has it: remove this file instead"
    return [Issue("removed", reason, file)] if stream.removed else []


@functools.lru_cache(maxsize=1_024)  # called for every package at each load
def _name_issues(names: tuple[str, ...], place: str) -> tuple[Issue, ...]:
    """Report names that break their rule, and names that differ only in case."""
    found = [(name, f"the name {why}") for name in names if (why := name_rule(name))]
    found += [(issue.place, issue.reason) for issue in clashes(names)]
    return tuple(Issue("", reason, place.replace("{name}", name)) for name, reason in found)


def read(root: Path, name: StreamName) -> tuple[Package, Stream | None]:
    """Read one package (without its streams) and one stream of it.

    Returns:
        An empty package, and None, where the files are missing.

    Raises:
        InvalidDataError: The name, one of the files, or `repository.toml` is invalid.
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
