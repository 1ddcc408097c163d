"""coap/observe/table.py: who is told of what, over real sockets."""

from __future__ import annotations

import itertools
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from datetime import UTC, datetime

import attrs
import pytest

from netota_coap.catalog.catalog import Catalog
from netota_coap.coap import options as coap
from netota_coap.coap.frontdoor import FrontDoor
from netota_coap.coap.observe.table import Observers
from netota_coap.coap.responder import Responder
from netota_coap.coap.site import CoapSite
from netota_coap.encoding.codecs import Format
from netota_coap.encoding.documents import decode, selection_to_cbor
from netota_coap.model.selection import Selection
from netota_coap.model.values import Archive, Content, Envelope, Offer, Package, Repository, Stream
from tests.support.device import ACK, CON, FETCH, GET, NON, RST, device
from tests.support.serving import until

STABLE = "p/pkg/s/stable"


def archive(machine: str, url: str = "https://example.com/f") -> Archive:
    return Archive(
        name=machine,
        envelope=Envelope(type="application/octet-stream", size=9, sha256=bytes(32)),
        content=Content(machine=machine),
        offers=(Offer(url=url, metric=1),),
    )


STATE = Stream(
    version="1",
    sequence=1,
    published=datetime(2026, 11, 20, tzinfo=UTC),
    archives=(archive("a"), archive("b")),
)


@attrs.define
class Hall:
    """A server whose streams are set by the test."""

    site: CoapSite
    uri: str

    @property
    def observers(self) -> Observers:
        return self.site.observers

    def hold(self, **streams: Stream) -> None:
        repository = Repository(format=1, packages={"pkg": Package(streams=streams)})
        self.site.swap(Catalog.of(repository, self.site.responder.catalog))


@asynccontextmanager
async def hall() -> AsyncIterator[Hall]:
    site = CoapSite(Responder(Catalog.of(Repository(format=1))))
    door = await FrontDoor.open(site, ["127.0.0.1:0"])
    try:
        opened = Hall(site, door.uris[0])
        opened.hold(stable=STATE, edge=STATE)
        yield opened
    finally:
        await door.close()


def next_state(state: Stream, **changes: object) -> Stream:
    return attrs.evolve(state, sequence=state.sequence + 1, **changes)


def sequence(payload: bytes) -> int:
    return decode(Stream, payload, Format.CBOR).sequence


async def test_told_of_a_publish() -> None:
    """An observer gets the state at once, and the next one as a confirmable message."""
    async with hall() as it, device(it.uri) as observer:
        first = await observer.observe(STABLE)
        it.hold(stable=next_state(STATE), edge=STATE)
        second = await observer.notification()

    assert (first.kind, first.code, sequence(first.payload)) == (ACK, "2.05", 1)
    assert (second.kind, second.code, sequence(second.payload)) == (CON, "2.05", 2)
    assert (first.token, second.token) == (b"o", b"o")
    assert second.uint(coap.MAX_AGE) == 86_400


async def test_numbers_begin_at_two_and_rise() -> None:
    """Observe numbers rise over all observers and registrations; none is 0 or 1."""
    async with hall() as it, device(it.uri) as one, device(it.uri) as other:
        numbers = [
            (await one.observe(STABLE)).uint(coap.OBSERVE),
            (await other.observe(STABLE)).uint(coap.OBSERVE),
            (await one.observe(STABLE)).uint(coap.OBSERVE),
        ]
        it.hold(stable=next_state(STATE), edge=STATE)
        numbers += sorted(
            [
                (await one.notification()).uint(coap.OBSERVE) or 0,
                (await other.notification()).uint(coap.OBSERVE) or 0,
            ]
        )

    assert numbers == [2, 3, 4, 5, 6]


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({"archives": (archive("a"), archive("b"), archive("c"))}, True),
        ({"closed": True}, True),
        ({"closed": True, "replacement": ("pkg", "edge")}, True),
        ({"message": "why"}, False),
        ({"title": "A title", "author": "Somebody"}, False),
    ],
)
async def test_what_makes_a_difference(change: dict[str, object], told: bool) -> None:
    """What changes a byte of the representation is told, what does not is not."""
    async with hall() as it, device(it.uri) as observer:
        await observer.observe(STABLE)
        it.hold(stable=attrs.evolve(STATE, **change), edge=STATE)

        assert told is not await observer.silent()


async def test_narrowed_and_other_streams() -> None:
    """Only what changes the observer's own answer is told to it."""
    async with hall() as it, device(it.uri) as one, device(it.uri) as other:
        await one.observe(STABLE + "?machine=a")
        await other.observe("p/pkg/s/edge")
        # An offer of the build for others, under the same sequence.
        changed = attrs.evolve(STATE, archives=(archive("a"), archive("b", "coap://x/y")))
        it.hold(stable=changed, edge=STATE)
        assert await one.silent()
        it.hold(stable=next_state(changed), edge=STATE)
        assert sequence((await one.notification()).payload) == 2
        assert await other.silent()


async def test_vanished_and_back() -> None:
    """A vanished stream is a 4.04 that ends the observation."""
    async with hall() as it, device(it.uri) as observer:
        await observer.observe(STABLE)
        it.hold(edge=STATE)
        last = await observer.notification()
        it.hold(stable=next_state(STATE), edge=STATE)

        assert (last.code, last.uint(coap.OBSERVE)) == ("4.04", None)
        assert await observer.silent()
        assert len(it.observers) == 0


async def test_nothing_to_observe() -> None:
    """What is not there cannot be observed, what is not observable neither."""
    async with hall() as it, device(it.uri) as observer:
        for path in ("p/pkg/s/nix", "p/pkg", ".well-known/core"):
            assert (await observer.observe(path)).uint(coap.OBSERVE) is None

        assert len(it.observers) == 0


async def test_fetch_is_observed() -> None:
    """A FETCH with Observe is notified like a GET."""
    payload = selection_to_cbor(Selection.of({"machine": "b"}))
    options = [(coap.OBSERVE, b""), (coap.CONTENT_FORMAT, b"\x3c")]
    async with hall() as it, device(it.uri) as observer:
        await observer.ask(FETCH, STABLE, options=options, payload=payload)
        it.hold(stable=next_state(STATE), edge=STATE)
        told = decode(Stream, (await observer.notification()).payload, Format.CBOR)

    assert [found.name for found in told.archives or ()] == ["b"]


async def test_packages_are_observed() -> None:
    """One observation of /p tells that anything changed."""
    async with hall() as it, device(it.uri) as observer:
        first = await observer.observe("p")
        it.hold(stable=next_state(STATE), edge=STATE)
        second = await observer.notification()

    assert first.payload == second.payload
    assert first.values(coap.ETAG) != second.values(coap.ETAG)


async def test_large_notifications_carry_the_first_block() -> None:
    """A notification of JSON is its block 0; the rest is there for plain GETs, same ETag."""
    json = (coap.ACCEPT, b"\x32")
    async with hall() as it, device(it.uri) as observer:
        await observer.ask(GET, STABLE, token=b"o", options=[(coap.OBSERVE, b""), json])
        it.hold(stable=next_state(STATE), edge=STATE)
        told = await observer.notification()
        rest = [
            await observer.ask(
                GET, STABLE, options=[json, (coap.BLOCK2, bytes((number << 4 | 4,)))]
            )
            for number in (1, 2)
        ]

    assert coap.Block(0, True, 4) == coap.Block.decode(told.values(coap.BLOCK2)[0])
    assert len(told.payload) == 256
    assert all(told.values(coap.ETAG) == block.values(coap.ETAG) for block in rest)
    assert told.uint(coap.SIZE2) == len(told.payload) + sum(len(block.payload) for block in rest)


@pytest.mark.parametrize("ending", ["deregister", "reset"])
async def test_the_end_of_an_observation(ending: str) -> None:
    """Observe: 1, and a reset of a notification, end one."""
    async with hall() as it, device(it.uri) as observer:
        await observer.observe(STABLE)
        assert len(it.observers) == 1
        if ending == "deregister":
            await observer.ask(GET, STABLE, token=b"o", options=[(coap.OBSERVE, b"\x01")])
        else:
            it.hold(stable=next_state(STATE), edge=STATE)
            observer.acknowledge(await observer.receive(), RST)
        await until(lambda: len(it.observers) == 0)


async def test_registering_again_replaces() -> None:
    """The same token from the same endpoint is the same observation."""
    async with hall() as it, device(it.uri) as observer:
        await observer.observe(STABLE)
        await observer.observe(STABLE, kind=NON)
        it.hold(stable=next_state(STATE), edge=STATE)
        await observer.notification()

        assert await observer.silent()
        assert len(it.observers) == 1


async def test_many_are_told_once_each() -> None:
    """A crowd is told, each member once, and a passer-by is answered meanwhile."""
    async with hall() as it, device(it.uri) as crowd, device(it.uri) as passer:
        tokens = [bytes((n,)) for n in range(150)]
        for token in tokens:
            await crowd.observe(STABLE + "?machine=a", token=token)
        it.hold(stable=next_state(STATE), edge=STATE)
        answered = await passer.ask(GET, "p")
        told = [(await crowd.notification()).token for _ in tokens]

        assert answered.code == "2.05"
        assert tokens == sorted(told)
        assert await crowd.silent()


async def test_only_the_newest_state_is_sent() -> None:
    """Of states that come faster than they can be sent, the last one arrives."""
    async with hall() as it, device(it.uri) as observer:
        await observer.observe(STABLE)
        states = itertools.accumulate(range(5), lambda state, _: next_state(state), initial=STATE)
        for state in states:
            it.hold(stable=state, edge=STATE)
        told = sequence((await observer.notification()).payload)

        assert told == 6
        assert await observer.silent()


async def test_a_bug_costs_the_others_nothing(caplog: pytest.LogCaptureFixture) -> None:
    """If the answer to one observer fails, it is ended with 5.00, and the others are told."""

    def failing(request: bytes) -> tuple[bool, int, bytes]:
        if b"machine=a" in request:
            raise ZeroDivisionError
        return it.site.answer(request)

    async with hall() as it, device(it.uri) as one, device(it.uri) as other:
        await one.observe(STABLE + "?machine=a")
        await other.observe(STABLE + "?machine=b")
        it.observers.answer = failing
        it.hold(stable=next_state(STATE))
        ended, told = await one.notification(), await other.notification()

    assert (ended.code, sequence(told.payload)) == ("5.00", 2)
    assert "bug: a request of an observer could not be answered" in caplog.text
