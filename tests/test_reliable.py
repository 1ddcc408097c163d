"""coap/reliable.py: CoAP over TCP, with aiocoap's client and with bytes of our own."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import random
import socket
from collections.abc import AsyncIterator, Iterator

import pytest
from aiocoap.message import Message
from aiocoap.numbers.codes import Code
from aiocoap.protocol import Context

from netota_coap.catalog import Catalog
from netota_coap.coap import options as coap
from netota_coap.coap import reliable
from netota_coap.coap.frontdoor import FrontDoor
from netota_coap.coap.server import Responder, Site
from netota_coap.errors import AddressError
from netota_coap.model import Repository
from netota_coap.repository import Loader
from tests.conftest import FIXTURES
from tests.serving import until

EMPTY = Catalog.of(Repository(format=1))
TYPICAL = Catalog.of(Loader(FIXTURES / "repositories" / "typical").load())
STABLE = "/p/sensor-node/s/stable"
CSM = bytes((0x00, 0xE1))


@contextlib.asynccontextmanager
async def reached() -> AsyncIterator[tuple[Site, str]]:
    """Serve over TCP, too; the site and the URI."""
    site = Site(Responder(TYPICAL))
    door = await FrontDoor.open(site, ["127.0.0.1:0"], tcp=["127.0.0.1:0"])
    try:
        yield site, door.uris[1]
    finally:
        await door.close()


@contextlib.asynccontextmanager
async def client() -> AsyncIterator[Context]:
    context = await Context.create_client_context(transports=["tcpclient"])
    try:
        yield context
    finally:
        await context.shutdown()
        await asyncio.sleep(0)


@contextlib.contextmanager
def connection(uri: str) -> Iterator[socket.socket]:
    host, port = uri.removeprefix("coap+tcp://").split(":")
    with socket.create_connection((host, int(port))) as opened:
        opened.setblocking(False)
        yield opened


async def receive(opened: socket.socket) -> bytes:
    """Return what comes next; nothing when the connection has ended."""
    try:
        async with asyncio.timeout(5):
            return await asyncio.get_running_loop().sock_recv(opened, 65_536)
    except ConnectionError:
        return b""


def message(options: list[coap.Option], code: int = 1, token: bytes = b"t") -> bytes:
    """Frame a message (RFC 8323, section 3.2)."""
    body = coap.encode(options)
    assert 13 <= len(body) < 269
    return bytes((13 << 4 | len(token), len(body) - 13, code)) + token + body


STABLE_PATH = [(coap.URI_PATH, part.encode()) for part in STABLE.split("/")[1:]]
OBSERVE_STABLE = [(coap.OBSERVE, b""), *STABLE_PATH]


async def test_get_and_observe() -> None:
    """What is got is what UDP gives; each change is told once; a stream that vanishes ends it."""
    async with reached() as (site, uri), client() as context:
        plain = await context.request(Message(code=Code.GET, uri=uri + STABLE)).response
        assert TYPICAL.find(("p", "sensor-node", "s", "stable")).default.payload == plain.payload
        request = context.request(Message(code=Code.GET, uri=uri + STABLE, observe=0))
        first = await request.response
        assert first.payload == plain.payload and first.opt.observe is not None
        notifications = aiter(request.observation)
        site.followers.notify([("p", "sensor-node", "s", "stable")])  # nothing differs
        site.swap(EMPTY)
        assert (await anext(notifications)).code == Code.NOT_FOUND
        await until(lambda: len(site.followers) == 0)
        assert site.metrics.requests["coap+tcp", "stream", "2.05"] >= 2


async def test_an_end_of_the_connection_ends_the_observation() -> None:
    """Nothing is left of an observer that is gone, nor of one that deregistered."""
    async with reached() as (site, uri):
        with connection(uri) as it:
            it.send(CSM + message(OBSERVE_STABLE) + message(OBSERVE_STABLE, token=b"u"))
            await until(lambda: len(site.followers) == 2)
            it.send(message([(coap.OBSERVE, b"\1"), *STABLE_PATH], token=b"u"))
            await until(lambda: len(site.followers) == 1)
        await until(lambda: len(site.followers) == 0)


async def test_bytes_in_any_portions() -> None:
    """Messages may come in pieces, and several at once; each is answered, in order."""
    tokens = [bytes((number,)) for number in range(1, 30)]
    asked = CSM + b"".join(message(STABLE_PATH, token=token) for token in tokens)
    async with reached() as (_, uri):
        with connection(uri) as it:
            for place in range(40):
                it.send(asked[place : place + 1])
                await asyncio.sleep(0)
            it.send(asked[40:])
            received = b""
            while received.count(b"2.4.1") < len(tokens):
                received += await receive(it)
            places = [received.index(b"\x45" + token) for token in tokens]
            assert sorted(places) == places


async def test_what_is_not_answered_over_tcp(monkeypatch: pytest.MonkeyPatch) -> None:
    """Only GET and FETCH; over the cap nobody observes; POST registers nothing."""
    monkeypatch.setattr(reliable, "_MOST_FOLLOWERS", 0)
    async with reached() as (site, uri), client() as context:
        refused = await context.request(Message(code=Code.POST, uri=uri + STABLE)).response
        assert refused.code == Code.METHOD_NOT_ALLOWED
        request = context.request(Message(code=Code.GET, uri=uri + STABLE, observe=0))
        plain = await request.response
        assert (plain.code, plain.opt.observe) == (Code.CONTENT, None)
        assert len(site.followers) == 0


async def test_a_peer_that_reads_nothing_is_left(monkeypatch: pytest.MonkeyPatch) -> None:
    """What it leaves unread is bounded: the connection ends, and with it the observation."""
    monkeypatch.setattr(reliable, "_MOST_WAITING", 1_000)
    asked = message([(coap.URI_PATH, b".well-known"), (coap.URI_PATH, b"core")])
    async with reached() as (site, uri):
        with connection(uri) as it:
            it.send(CSM + message(OBSERVE_STABLE))
            await until(lambda: len(site.followers) == 1)
            with contextlib.suppress(ConnectionError):
                async with asyncio.timeout(20):
                    while site.followers:
                        await asyncio.get_running_loop().sock_sendall(it, asked * 100)
                        await asyncio.sleep(0)


async def test_too_many_connections(monkeypatch: pytest.MonkeyPatch) -> None:
    """One too many is ended at once, the others stay."""
    monkeypatch.setattr(reliable, "_MOST_CONNECTIONS", 1)
    async with reached() as (_, uri):
        with connection(uri) as kept, connection(uri) as other:
            while await receive(other):
                pass
            assert await receive(kept)
            kept.send(CSM + message(OBSERVE_STABLE))
            assert await receive(kept)


async def test_hostile_bytes(caplog: pytest.LogCaptureFixture) -> None:
    """Mutated messages end their connection at most: no traceback, and others are served."""
    caplog.set_level(logging.ERROR)
    rng = random.Random(8323)
    good = CSM + message(OBSERVE_STABLE)
    async with reached() as (site, uri):
        for _ in range(300):
            hostile = bytearray(good)
            for _ in range(rng.randint(1, 4)):
                hostile[rng.randrange(2, len(hostile))] = rng.randrange(256)
            with connection(uri) as it:
                it.send(bytes(hostile))
                await receive(it)
        with connection(uri) as it:
            it.send(good)
            while b"\x45t" not in (received := await receive(it)):
                assert received
        await until(lambda: len(site.followers) == 0)
    assert [record.getMessage() for record in caplog.records] == []


async def test_an_address_that_is_taken() -> None:
    """It is said which; and nothing stays open."""
    async with reached() as (_, uri):
        taken = uri.removeprefix("coap+tcp://")
        site = Site(Responder(EMPTY))
        with pytest.raises(AddressError, match="Address already in use"):
            await FrontDoor.open(site, ["127.0.0.1:0"], tcp=[taken])
