"""What a change of a stream means for archives and devices."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

import attrs
import pytest
from hypothesis import given

from netota_coap.catalog.catalog import Catalog
from netota_coap.encoding.content_formats import ContentFormat
from netota_coap.encoding.documents import selection_to_query
from netota_coap.errors import NotFoundError
from netota_coap.model.selection import Selection
from netota_coap.model.values import (
    Archive,
    Content,
    Envelope,
    Offer,
    Package,
    Repository,
    Stream,
    StreamName,
)
from netota_coap.publishing import diff
from netota_coap.publishing.diff import Difference, describe
from netota_coap.repository.store import Change, DirectoryStore
from tests.support.publishing import NOW, close, promote, publish, remove
from tests.support.strategies import streams

NAME = ("sensor-node", "stable")
OFFER = Offer(url="https://example.com/a", metric=100)


def archive(name: str, build: str = "1", *offers: Offer, **content: Any) -> Archive:
    """Describe a build; what it says besides its machine and architecture is given."""
    image = f"{name} {build}".encode()
    envelope = Envelope(type="a/b", size=len(image), sha256=hashlib.sha256(image).digest())
    said = {"arch": "arm", "machine": name} | content
    return Archive(
        name=name, envelope=envelope, content=Content(**said), offers=offers or (OFFER,)
    )


def state(version: str, *archives: Archive, **fields: Any) -> Stream:
    """Return a state of a stream."""
    return Stream(version=version, sequence=1, published=NOW, archives=archives, **fields)


def difference(before: Stream | None, after: Stream) -> Difference:
    """Compare two states."""
    return Difference.of(Change(NAME, Package(), before, after))


A, B = archive("a"), archive("b")
CROWDED = "more than one datagram holds: something is left out of the notification"
FAR = Offer(url="https://example.com/" + "x" * 200, metric=1)


@pytest.mark.parametrize(
    ("before", "after", "expected"),
    [
        ((A,), (A,), [("a", "kept")]),
        ((A,), (archive("a", "2"),), [("a", "rebuilt")]),
        ((A,), (archive("a", "1", FAR),), [("a", "described")]),
        ((A,), (archive("a", debug=True),), [("a", "described")]),
        ((A, B), (B, archive("c")), [("a", "removed"), ("b", "kept"), ("c", "added")]),
    ],
)
def test_archives(
    before: tuple[Archive, ...], after: tuple[Archive, ...], expected: list[tuple[str, str]]
) -> None:
    """Each archive of before or after is there once, with what happens to it."""
    found = difference(state("1", *before), state("2", *after)).archives
    assert expected == [(each.name, each.what) for each in found]
    assert [
        (n in [a.name for a in before], n in [a.name for a in after]) for n, _ in expected
    ] == [(each.before is not None, each.after is not None) for each in found]


@pytest.mark.parametrize(
    ("before", "after", "expected"),
    [
        ((A, B), (A, B), ()),
        ((A, B), (A,), ("arch=arm machine=b",)),
        ((A,), (), ("arch=arm machine=a",)),
        ((A,), (archive("c", machine="a"),), ()),
        ((A,), (archive("c", machine=None),), ()),
        ((archive("a", arch=None),), (archive("c", arch="riscv32", machine="a"),), ()),
        ((archive("a", machine=None),), (archive("c", machine="other"),), ()),
        ((archive("a", machine=None),), (archive("c", arch="x86_64"),), ("arch=arm",)),
        ((A, archive("d", machine="a", debug=True)), (A,), ()),
        ((archive("e", arch=None, machine=None),), (), ("any device",)),
    ],
)
def test_lost_builds(
    before: tuple[Archive, ...], after: tuple[Archive, ...], expected: tuple[str, ...]
) -> None:
    """An architecture and machine that something suited, and nothing suits any more, is lost."""
    assert expected == difference(state("1", *before), state("2", *after)).lost


@pytest.mark.parametrize(
    ("before", "after", "expected"),
    [
        ((A,), (A,), []),
        (None, (archive("a", "1"),), []),
        (None, (attrs.evolve(A, offers=()),), ["a: has no offer: nobody can download it"]),
        (
            None,
            (archive("a", "1", Offer(url="gopher://x", metric=1), Offer(url="ftp:x", metric=1)),),
            ["a: has no offer of a usable scheme, only ftp, gopher"],
        ),
        (None, (archive("a", "1", Offer(url="/b/x", metric=1)),), []),
        (
            (archive("a", "1", OFFER, Offer(url="coap://x/a", metric=1)),),
            (archive("a", "2"),),
            ["arch=arm machine=a: its build has no offer by coap any more"],
        ),
        (
            (A, archive("d", machine="a", debug=True)),
            (archive("a", debug=False),),
            ["arch=arm machine=a debug=true: nothing suits such a device any more"],
        ),
        (
            (A,),
            (archive("a", "2", FAR),),
            [f"arch=arm machine=a: {CROWDED}"],
        ),
        ((archive("a", "1", FAR),), (archive("a", "2", FAR),), []),
    ],
)
def test_warnings(
    before: tuple[Archive, ...] | None, after: tuple[Archive, ...], expected: list[str]
) -> None:
    """What would break, or is probably not meant, is told once."""
    old = None if before is None else state("1", *before)
    assert expected == [str(issue) for issue in difference(old, state("2", *after)).warnings]


def test_kinds_of_devices() -> None:
    """Each kind is told what it has and gets: version, archive, size and notification."""
    before = state("1", A, archive("d", machine="a", debug=True))
    after = state("2", archive("a", "rebuilt"), B)
    found = difference(before, after)
    rows = [
        (
            describe(each.kind),
            each.before
            and (each.before.version, each.before.archive and each.before.archive.name),
            each.after and (each.after.version, each.after.archive and each.after.archive.name),
        )
        for each in found.kinds
    ]
    assert rows == [
        ("arch=arm machine=a", ("1", "a"), ("2", "a")),
        ("arch=arm machine=a debug=true", ("1", "d"), ("2", "a")),
        ("arch=arm machine=b", ("1", None), ("2", "b")),
    ]


@given(streams())
def test_notification_is_what_a_server_sends(stream: Stream) -> None:
    """The bytes of a notification are those that a catalog renders for such a device."""
    package = Package(poll_s=77, streams={"s": stream})
    resource = Catalog.of(Repository(format=1, packages={"p": package})).find(("p", "p", "s", "s"))
    found = Difference.of(Change(("p", "s"), attrs.evolve(package, streams={}), None, stream))
    for each in found.kinds:
        query = selection_to_query(Selection.of(each.kind))
        served = resource.represent(query, ContentFormat.CBOR, "coap").payload
        assert each.after is not None
        assert len(served) == each.after.notification


@pytest.mark.parametrize("before", [None, state("1", A)])
def test_removal_leaves_nothing(before: Stream | None) -> None:
    """After a removal there is nothing to get, and no stream."""
    found = difference(before, state("1", removed=True))
    assert [each.after for each in found.kinds] == [None] * len(found.kinds)
    assert found.warnings == ()


# ----------------------------------------------------------------------------------------------
# Of a repository


def compare(root: Path, name: StreamName, *other: StreamName, **states: int) -> Difference:
    return diff.compare(DirectoryStore(root), name, *other, **states)


def test_compare_shows_the_last_change(repository_dir: Path) -> None:
    """Without more, a stream is compared with itself before its last change."""
    found = compare(repository_dir, NAME).change
    assert found.before is not None
    assert (found.before.sequence, found.after.sequence) == (16, 17)


def test_compare_takes_any_two_states(repository_dir: Path) -> None:
    """Sequences choose the states, of one stream or of two; the removed one is a state, too."""
    remove(repository_dir, ("sensor-node", "edge"))
    cases = [
        (compare(repository_dir, NAME, start=15), (15, 17)),
        (compare(repository_dir, NAME, start=17, end=15), (17, 15)),
        (compare(repository_dir, NAME, end=16), (15, 16)),
        (compare(repository_dir, NAME, end=15), (None, 15)),
        (compare(repository_dir, NAME, ("sensor-node", "beta")), (17, 9)),
        (
            compare(repository_dir, NAME, ("sensor-node", "beta"), start=16, end=8),
            (16, 8),
        ),
        (compare(repository_dir, ("sensor-node", "edge")), (213, 214)),
    ]
    for found, expected in cases:
        before = found.change.before
        assert expected == (before.sequence if before else None, found.change.after.sequence)


def test_compare_refuses_what_is_not_there(repository_dir: Path) -> None:
    """A stream or a sequence that never was is named."""
    with pytest.raises(NotFoundError, match="no sequence 3"):
        compare(repository_dir, NAME, start=3)
    with pytest.raises(NotFoundError, match="no stream sensor-node/x, and never was"):
        compare(repository_dir, NAME, ("sensor-node", "x"))


def test_dry_run_tells_what_the_change_does(repository_dir: Path) -> None:
    """What promote would do is the difference to the stream that is promoted."""
    beta, stable = ("sensor-node", "beta"), NAME
    expected = compare(repository_dir, stable, beta)
    promote(repository_dir, beta, stable)
    done = compare(repository_dir, stable)
    assert (expected.archives, expected.lost) == (done.archives, done.lost)
    close(repository_dir, stable)
    assert {each.what for each in compare(repository_dir, stable).archives} == {"kept"}
    publish(repository_dir, ("new", "s"), "1", [])
    assert compare(repository_dir, ("new", "s")).change.before is None
