"""What a change of a stream means for its archives and for each kind of device.

A kind of device is the set of content attributes of an archive before or after the change. What
it gets is computed as by a server: narrowed, in one datagram.
Source: `spec/publishing.md`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping

import attrs

from netota_coap.encoding.codecs import Format
from netota_coap.encoding.datagram_fit import in_one_datagram
from netota_coap.encoding.documents import decode
from netota_coap.errors import Issue
from netota_coap.model.selection import Index, Selection, text_form
from netota_coap.model.values import Archive, AttributeValue, Content, Package, Stream, StreamName
from netota_coap.repository.store import Change, Store

USABLE_SCHEMES = frozenset(
    ("coap", "coaps", "coap+tcp", "coaps+tcp", "coap+ws", "coaps+ws", "http", "https")
)
"""Schemes that some device can be expected to speak."""

_REQUEST_SCHEME = "coap"  # offers that are paths count as offers of this scheme


@attrs.frozen
class ArchiveChange:
    """What happens to the archive of a name.

    Attributes:
        what: `added`, `removed`, `rebuilt` (other bytes), `described` (other content, type or
            offers of the same bytes) or `kept`.
    """

    name: str
    what: str
    before: Archive | None
    after: Archive | None


@attrs.frozen
class Got:
    """What a kind of device gets from a state of the stream.

    Attributes:
        archive: The preferred one; None if nothing suits.
        notification: Size of its CBOR, in bytes.
        more: Whether the notification had to leave something out.
    """

    version: str
    archive: Archive | None
    notification: int
    more: bool


@attrs.frozen
class KindChange:
    """What a change means for a kind of device.

    Attributes:
        kind: The attributes of the device.
        before: None if there was no stream.
        after: None if there will be none.
    """

    kind: Mapping[str, AttributeValue]
    before: Got | None
    after: Got | None


@attrs.frozen
class Difference:
    """What a change of a stream means.

    Attributes:
        archives: The old ones in their order, then the added ones.
        kinds: In the order of the archives.
        lost: Architectures and machines that lose their build, as `arch=arm machine=x`.
        other: The stream whose state is `change.after`, if that is another one.
    """

    change: Change
    archives: tuple[ArchiveChange, ...]
    kinds: tuple[KindChange, ...]
    lost: tuple[str, ...]
    warnings: tuple[Issue, ...]
    other: StreamName | None = None

    @classmethod
    def of(
        cls,
        change: Change,
        other: StreamName | None = None,
        *,
        held: frozenset[bytes] = frozenset(),
    ) -> Difference:
        """Compare the two states of a change; servers offer the files in `held` themselves."""
        old, new = archives_of(change.before), archives_of(change.after)
        kinds = tuple(_kind_changes(change))
        return cls(
            change,
            tuple(archive_changes(old, new)),
            kinds,
            lost(change),
            tuple(_warnings(kinds, new, held)),
            other,
        )


def compare(
    store: Store,
    name: StreamName,
    other: StreamName | None = None,
    *,
    start: int | None = None,
    end: int | None = None,
) -> Difference:
    """Compare two states of a stream, or a stream with another one.

    Args:
        store: The repository.
        name: The stream before.
        other: The stream after; None: the same.
        start: Sequence of the state before; None: the one before `end`, or with `other` the last.
        end: Sequence of the state after; None: the last.

    Raises:
        NotFoundError: There is no such stream, or no such state.
    """
    states = store.history(name)
    if start is not None:
        before: Stream | None = store.state_at(name, start)
    elif other:
        before = states[0]
    else:
        before = next((s for s in states if s.sequence < (end or states[0].sequence)), None)
    if end is not None:
        after = store.state_at(other or name, end)
    else:
        after = store.history(other)[0] if other else states[0]
    change = Change(name, store.read(name).package, before, after)
    return Difference.of(change, other, held=held_after(store, change))


def held_after(store: Store, change: Change) -> frozenset[bytes]:
    """Return which files of the new state are stored in the repository, by SHA-256."""
    return store.held(archive.envelope for archive in change.after.archives or ())


def archives_of(stream: Stream | None) -> tuple[Archive, ...]:
    """Return the archives that devices can get: none of a stream that was removed."""
    return () if stream is None or stream.removed else stream.archives or ()


def describe(attributes: Mapping[str, AttributeValue]) -> str:
    """Format attributes for people."""
    texts = (f"{name}={text_form(value)}" for name, value in attributes.items())
    return " ".join(texts) or "any device"


def lost(change: Change) -> tuple[str, ...]:
    """Return the architectures and machines that lose their last build."""
    index = Index.of(archives_of(change.after), _REQUEST_SCHEME)
    targets = dict.fromkeys(_target(archive.content) for archive in archives_of(change.before))
    return tuple(
        describe(dict(target))
        for target in targets
        if not index.narrow(Selection.of(dict(target)))
    )


def _target(content: Content) -> tuple[tuple[str, AttributeValue], ...]:
    said = content.all()
    return tuple((name, said[name]) for name in ("arch", "machine") if name in said)


def archive_changes(old: tuple[Archive, ...], new: tuple[Archive, ...]) -> Iterator[ArchiveChange]:
    """Compare archives by name: the old ones in their order, then the added ones."""
    before = {archive.name: archive for archive in old}
    after = {archive.name: archive for archive in new}
    for name in before | after:
        was, is_ = before.get(name), after.get(name)
        yield ArchiveChange(name, _what(was, is_), was, is_)


def _what(before: Archive | None, after: Archive | None) -> str:
    if before is None:
        return "added"
    if after is None:
        return "removed"
    if before.envelope.sha256 != after.envelope.sha256:
        return "rebuilt"
    return "kept" if before == after else "described"


def _kind_changes(change: Change) -> Iterator[KindChange]:
    both = (*archives_of(change.before), *archives_of(change.after))
    kinds = {Selection.of(archive.content.all()): archive.content.all() for archive in both}
    before, after = (_getting(stream, change.package) for stream in (change.before, change.after))
    for selection, kind in kinds.items():
        yield KindChange(kind, before(selection), after(selection))


def _getting(stream: Stream | None, package: Package) -> Callable[[Selection], Got | None]:
    """Return a function from a selection to what such a device gets of a state."""
    if stream is None or stream.removed:
        return lambda _: None
    served = attrs.evolve(stream, poll_s=stream.poll_s or package.poll_s)
    index = Index.of(served.archives or (), _REQUEST_SCHEME)

    def got(selection: Selection) -> Got:
        narrowed = index.narrow(selection)
        payload = in_one_datagram(attrs.evolve(served, archives=narrowed))
        more = decode(Stream, payload, Format.CBOR).more
        return Got(served.version, next(iter(narrowed), None), len(payload), more)

    return got


def _warnings(
    kinds: Iterable[KindChange], archives: Iterable[Archive], held: frozenset[bytes]
) -> Iterator[Issue]:
    for archive in archives:
        schemes = _schemes(archive, held)
        if not schemes:
            yield Issue(archive.name, "has no offer: nobody can download it")
        elif not schemes & USABLE_SCHEMES:
            yield Issue(archive.name, f"has no offer of a usable scheme, only {_list(schemes)}")
    for each in kinds:
        before, after, kind = each.before, each.after, describe(each.kind)
        if not (after and after.archive):
            if before and before.archive and after:
                yield Issue(kind, "nothing suits such a device any more")
            continue
        if after.more and not (before and before.more):
            reason = "more than one datagram holds: something is left out of the notification"
            yield Issue(kind, reason)
        if before and before.archive:
            gone = _schemes(before.archive, held) - _schemes(after.archive, held)
            if gone:
                yield Issue(kind, f"its build has no offer by {_list(gone)} any more")


def _schemes(archive: Archive, held: frozenset[bytes]) -> set[str]:
    own = {_REQUEST_SCHEME} if archive.envelope.sha256 in held else set()
    return own | {offer.scheme(_REQUEST_SCHEME) for offer in archive.offers}


def _list(texts: Iterable[str]) -> str:
    return ", ".join(sorted(texts))
