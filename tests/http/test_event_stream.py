"""http/event_stream.py: clients are sent each new state, and delay nobody."""

from __future__ import annotations

import asyncio
import contextlib
import json
import resource
import time
from collections.abc import AsyncIterator, Iterator

import attrs
import pytest

from netota_coap.catalog.catalog import Catalog
from netota_coap.http.event_stream import Events
from netota_coap.http.server import Bounds, HttpSite, serving
from netota_coap.model.values import Repository
from tests.support.serving import PATIENCE_S, until
from tests.support.web import Connection, catalog, connected, site, stream

BIG = "/p/pkg/s/big"
CLIENTS = 300


@contextlib.asynccontextmanager
async def following(
    events: Events, served: Catalog | None = None
) -> AsyncIterator[tuple[HttpSite, str]]:
    """Serve a stream of 3 archives; the site and its URI."""
    it = site(served or catalog({"big": stream(1, count=3)}), events=events)
    async with serving(it, "127.0.0.1:0") as (uri,):
        yield it, uri


async def test_each_state_is_told() -> None:
    """That of now at once, and then each other one; what changes no byte is told to nobody."""
    async with following(Events()) as (it, uri), connected(uri) as narrowed:
        async with connected(uri) as connection:
            head = await connection.follow(BIG)
            assert head.startswith("HTTP/1.1 200 OK")
            for line in ("text/event-stream", "x-accel-buffering: no", "cache-control: no-cache"):
                assert line in head
            first = await connection.event()
            assert (first["retry"], first["event"]) == ("5000", "stream")
            assert json.loads(first["data"])["sequence"] == 1
            await narrowed.follow(f"{BIG}?machine=m1")
            assert _names((await narrowed.event())["data"]) == ["board1"]

            it.swap(catalog({"big": stream(1, count=4)}, it.catalog))
            assert _names((await connection.event())["data"]) == [
                "board0",
                "board1",
                "board2",
                "board3",
            ]
            it.swap(catalog({"big": stream(2)}, it.catalog))
            second = await connection.event()
            assert (second["event"], json.loads(second["data"])["sequence"]) == ("stream", 2)
            assert first["id"] != second["id"]
            assert json.loads((await narrowed.event())["data"])["sequence"] == 2
            assert len(it.events) == 2
        await until(lambda: len(it.events) == 1)


def _names(data: str) -> list[str]:
    return [archive["name"] for archive in json.loads(data)["archives"]]


async def test_a_client_comes_back() -> None:
    """It is told the state of now only if that is not the one it has."""
    async with following(Events()) as (it, uri):
        async with connected(uri) as connection:
            await connection.follow(BIG)
            id_ = (await connection.event())["id"]
        async with connected(uri) as connection:
            await connection.follow(BIG, f"Last-Event-ID: {id_}")
            assert await connection.event() == {"retry": "5000"}
            it.swap(catalog({"big": stream(2)}, it.catalog))
            assert id_ != (await connection.event())["id"]
        async with connected(uri) as connection:
            await connection.follow(BIG, f"Last-Event-ID: {id_}")
            assert json.loads((await connection.event())["data"])["sequence"] == 2


async def test_one_stream_tells_that_something_changed() -> None:
    """Following the packages means to be told of each change below them."""
    async with following(Events()) as (it, uri), connected(uri) as connection:
        await connection.follow("/p")
        first = await connection.event()
        it.swap(catalog({"big": stream(2)}, it.catalog))
        second = await connection.event()
        assert (first["event"], second["event"]) == ("packages", "packages")
        assert first["data"] == second["data"]
        assert first["id"] != second["id"]


@pytest.mark.parametrize("query", ["", "?full&sequence=1"])
async def test_what_is_gone_ends(query: str) -> None:
    """A last event says so, where the stream vanished or does not hold the state asked for."""
    async with following(Events()) as (it, uri), connected(uri) as connection:
        await connection.follow(BIG + query)
        await connection.event()
        it.swap(catalog({"big": stream(2)}) if query else Catalog.of(Repository(format=1)))
        last = await connection.event()
        assert (last["event"], json.loads(last["data"])["status"]) == ("gone", 404)
        assert await connection.chunk() == ""
        assert len(it.events) == 0


async def test_signs_of_life() -> None:
    """They come by one timer for all, and there is none without clients."""
    events = Events(heartbeat_s=0.02)
    async with following(events) as (_, uri):
        assert events._timer is None
        async with connected(uri) as one, connected(uri) as other:
            for connection in (one, other):
                await connection.follow(BIG)
                await connection.event()
            for connection in (one, other, one, other):
                assert await connection.chunk() == ":\n\n"
            assert events._timer is not None
        await until(lambda: events._timer is None)


async def test_head_follows_nothing() -> None:
    """It tells the headers, and the connection goes on."""
    async with following(Events()) as (it, uri), connected(uri) as connection:
        for _ in range(2):
            connection.send("HEAD", BIG, "Accept: text/event-stream")
            assert "text/event-stream" in await connection.head()
        assert len(it.events) == 0


async def test_clients_have_a_bound() -> None:
    """One more is told to come again later, and nothing of it is kept."""
    serves = following(Events(most=1))
    async with serves as (it, uri), connected(uri) as one, connected(uri) as other:
        await one.follow(BIG)
        await one.event()
        head = await other.follow(BIG)
        assert head.startswith("HTTP/1.1 503 ")
        assert "retry-after: 60" in head.lower()
        assert len(it.events) == 1


async def test_the_end_of_the_server_ends_all() -> None:
    """Clients see a complete answer, without delay, and come again."""
    async with contextlib.AsyncExitStack() as stack:
        it = site(catalog({"big": stream(1)}))
        running = contextlib.AsyncExitStack()
        # Waiting for the clients to leave would take far longer than the test is given.
        bounds = Bounds(grace_s=100 * PATIENCE_S)
        (uri,) = await running.enter_async_context(serving(it, "127.0.0.1:0", bounds=bounds))
        connection = await stack.enter_async_context(connected(uri))
        await connection.follow(BIG)
        await connection.event()
        async with asyncio.timeout(PATIENCE_S):
            end, _ = await asyncio.gather(connection.chunk(), running.aclose())
        assert end == ""


# ----------------------------------------------------------------------------------------------
# Many


@pytest.fixture
def many_files() -> Iterator[None]:
    """Both ends of each connection are in this process."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (max(soft, min(hard, 4 * CLIENTS)), hard))
    yield
    resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


@pytest.mark.slow
async def test_many_clients_and_one_that_does_not_read(many_files: None) -> None:
    """All others are told at once; the one misses what was passed, and gets what is so now."""
    first = stream(1, count=1_000)
    numbers = (*range(2, 32), 99)
    later = [attrs.evolve(first, sequence=number, version=str(number)) for number in numbers]
    async with (
        following(Events(), catalog({"big": first})) as (it, uri),
        contextlib.AsyncExitStack() as stack,
    ):
        others = [await stack.enter_async_context(connected(uri)) for _ in range(CLIENTS)]
        slow = await stack.enter_async_context(connected(uri, limit=1_024))
        await slow.follow(BIG)
        for other in others:
            await other.follow(f"{BIG}?head")
        await asyncio.gather(*(other.event() for other in others))
        assert len(it.events) == CLIENTS + 1

        for each in later:
            it.swap(catalog({"big": each}))
            if each is later[0]:
                longest_s = await _told(others, "2")
            await asyncio.sleep(0.001)
        await asyncio.gather(*(_until_version(other, "99") for other in others))
        assert longest_s < 0.5

        seen = []
        while not seen or seen[-1] != "99":
            seen.append(json.loads((await slow.event())["data"])["version"])
        assert seen[0] == "1"
        assert len(seen) < len(later) / 2  # the kernel holds some


async def _told(clients: list[Connection], version: str) -> float:
    """Wait until all are told; the longest that the event loop was busy meanwhile, in CPU time."""
    telling = asyncio.gather(*(_until_version(client, version) for client in clients))
    longest_s, before = 0.0, time.thread_time()
    while not telling.done():
        await asyncio.sleep(0)
        now = time.thread_time()
        longest_s, before = max(longest_s, now - before), now
    await telling
    return longest_s


async def _until_version(client: Connection, version: str) -> None:
    while json.loads((await client.event())["data"])["version"] != version:
        pass
