"""client/coap_client.py: fetch and observe, against real servers and one that misbehaves."""

from __future__ import annotations

import asyncio
import contextlib
import gc
import itertools
import logging
import socket
from collections.abc import AsyncIterator, Callable, Coroutine
from pathlib import Path

import attrs
import pytest
from aiocoap.protocol import Request

from netota_coap.client import coap_client as client_module
from netota_coap.client.coap_client import Client
from netota_coap.coap import options as coap
from netota_coap.encoding.codecs import Format
from netota_coap.encoding.content_formats import ContentFormat
from netota_coap.encoding.documents import encode
from netota_coap.errors import ConfigError, IntegrityError, PeerError, RollbackError, TransferError
from netota_coap.model.selection import Selection
from netota_coap.model.values import LIMITS, Offer, Stream
from netota_coap.publishing.archives import ArchiveSource
from tests.coap.observe.test_notifying import STATE, hall, next_state
from tests.support import publishing
from tests.support.device import Answer, code
from tests.support.publishing import NOW, publish
from tests.support.serving import PATIENCE_S, serving, until

STABLE = ("sensor-node", "stable")
PATH = "/p/sensor-node/s/stable"
BOARD = Selection.of({"machine": "nrf52840dk", "scheme": ["https"]})


def change(root: Path, **changes: object) -> Stream:
    def make(present: Stream | None) -> Stream:
        assert present is not None
        return attrs.evolve(present, **changes)

    return publishing.change(root, STABLE, make).after


def crowd(root: Path, count: int, version: str = "2.0") -> Stream:
    """Publish so many archives that they take many blocks."""
    image = root.with_name("image")
    image.write_bytes(b"image")
    sources = [ArchiveSource(image, f"board{n}") for n in range(count)]
    offer = Offer(url="https://example.com/{name}", metric=1)
    return publish(root, STABLE, version, sources, [offer], now=NOW)


async def test_stream(sample: Path) -> None:
    """A stream arrives narrowed to the device."""
    async with serving(sample) as (uri,), Client() as client:
        state = await client.stream(uri + PATH, BOARD)

    assert [archive.name for archive in state.archives or ()] == ["nrf52840dk"]


async def test_more_is_fetched(sample: Path) -> None:
    """What did not fit one datagram is fetched block by block."""
    crowd(sample, 300)
    async with serving(sample) as (uri,), Client() as client:
        state = await client.stream(uri + PATH)

    assert (len(state.archives or ()), state.more) == (300, False)


async def test_lists(sample: Path) -> None:
    """Packages and streams arrive by name."""
    async with serving(sample) as (uri,), Client() as client:
        packages = await client.packages(uri)
        streams = await client.streams(uri, "sensor-node")

    assert {name: e.title for name, e in packages.items()} == {"sensor-node": "Sensor node"}
    assert {n: e.version for n, e in streams.items()} == {"stable": "1.0.0", "edge": "1.1.0-rc1"}


@pytest.mark.parametrize(
    ("uri", "error"),
    [
        ("http://127.0.0.1/p", ConfigError),
        ("coap+tcp://127.0.0.1/p", ConfigError),
        ("nonsense", ConfigError),
        ("coap://127.0.0.1:1/p", TransferError),
        ("coap://no.such.host.invalid/p", TransferError),
    ],
)
async def test_unreachable(uri: str, error: type[Exception]) -> None:
    """What is no URI, or nobody's, is named."""
    async with Client() as client:
        with pytest.raises(error, match=r"127|nonsense|no\.such"):
            await client.get(uri)


async def test_error_of_the_server(sample: Path) -> None:
    """The server's error arrives with code and detail."""
    async with serving(sample) as (uri,), Client() as client:
        with pytest.raises(PeerError, match="there is nothing at /p/nix") as caught:
            await client.get(uri + "/p/nix")

    assert caught.value.code == "4.04"


async def test_observe(sample: Path) -> None:
    """Each state comes once, whole, as it is published; the end is the server's error."""
    async with serving(sample) as (uri,), Client() as client:
        states = client.observe(uri + PATH, BOARD)
        seen = [(await anext(states)).version]
        change(sample, version="2.0")
        seen.append((await anext(states)).version)
        change(sample, message="nothing that a device could see", version="2.1")
        seen.append((await anext(states)).version)
        crowd(sample, 50, "3.0")
        whole = await anext(states)
        (sample / "packages/sensor-node/streams/stable.toml").unlink()
        with pytest.raises(PeerError, match=r"4\.04"):
            await anext(states)

    assert seen == ["1.0.0", "2.0", "2.1"]
    assert (whole.version, len(whole.archives or ())) == ("3.0", 50)


async def test_observe_over_a_restart(sample: Path) -> None:
    """A server that restarts, and forgets its observers, is found again."""
    troubles: list[TransferError] = []
    async with Client(retry_s=0.05, timeout_s=0.5, on_trouble=troubles.append) as client:
        async with serving(sample) as (uri,):
            states = client.observe(uri + PATH, poll_s=0.2)
            assert (await anext(states)).version == "1.0.0"
        waiting = asyncio.ensure_future(anext(states))
        await until(lambda: troubles)
        change(sample, version="2.0")
        async with serving(sample, uri.removeprefix("coap://")) as _:
            assert (await waiting).version == "2.0"
            change(sample, version="3.0")
            assert (await anext(states)).version == "3.0"
        await states.aclose()


# ----------------------------------------------------------------------------------------------
# A server that answers what the test says


Reply = Callable[[Answer], "tuple[str, list[coap.Option], bytes] | None"]


@contextlib.asynccontextmanager
async def puppet(reply: Reply) -> AsyncIterator[str]:
    """Answer each request by what `reply` makes of it: code, options, payload."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as opened:
        opened.setblocking(False)
        opened.bind(("127.0.0.1", 0))
        loop = asyncio.get_running_loop()

        async def answer() -> None:
            while True:
                data, peer = await loop.sock_recvfrom(opened, 2_000)
                request = Answer.parse(data)
                made = reply(request) if data[1] else None
                if made is not None:
                    head = bytes((0x60 | len(request.token), code(made[0]))) + data[2:4]
                    tail = coap.encode(made[1], made[2])
                    await loop.sock_sendto(opened, head + request.token + tail, peer)

        answering = asyncio.create_task(answer())
        try:
            yield f"coap://127.0.0.1:{opened.getsockname()[1]}"
        finally:
            answering.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await answering


CBOR = (coap.CONTENT_FORMAT, b"\x3c")


def state(sequence: int, **changes: object) -> bytes:
    stream = Stream(version="1", sequence=sequence, published=NOW, archives=())
    return encode(attrs.evolve(stream, **changes), Format.CBOR)


async def test_rollback() -> None:
    """A sequence below one that was there before is refused, by whatever view it comes."""
    payloads = iter([state(7), state(7), state(6)])
    async with (
        puppet(lambda _: ("2.05", [CBOR], next(payloads))) as uri,
        Client() as client,
    ):
        await client.stream(uri + PATH)
        await client.stream(uri + PATH, BOARD)
        with pytest.raises(RollbackError, match="went back from sequence 7 to 6"):
            await client.stream(uri + PATH)


@pytest.mark.parametrize(
    ("options", "payload", "match"),
    [
        ([CBOR], b"\xa0", "version: missing"),
        ([CBOR], state(7) + b"\x00", "bytes follow"),
        ([CBOR], b"", "not valid CBOR"),
        ([], state(7), "is in format None"),
        ([(coap.CONTENT_FORMAT, b"\x32")], b"{}", "is in format JSON"),
        ([CBOR], state(7, archives=None, more=True), "changed again and again"),
    ],
)
async def test_malformed(options: list[coap.Option], payload: bytes, match: str) -> None:
    """What is malformed, or never whole, is refused, observed or not."""
    async with puppet(lambda _: ("2.05", options, payload)) as uri, Client() as client:
        with pytest.raises(IntegrityError, match=match):
            await client.stream(uri + PATH)
        with pytest.raises(IntegrityError, match=match):
            await anext(client.observe(uri + PATH))


def block(number: int, more: bool) -> coap.Option:
    return coap.BLOCK2, coap.Block(number, more, 0).encode()


@pytest.mark.parametrize(
    ("blocks", "match"),
    [
        ([(block(0, True), b"1"), (block(1, False), b"2")], "changed again and again"),
        ([(block(0, True), b"1"), (block(2, True), b"1")], "another block"),
        ([(block(5, False), b"1")], "another block"),
        ([(block(0, True), b"1"), ((60, b""), b"1")], "another block"),
    ],
)
async def test_bad_blocks(blocks: list[tuple[coap.Option, bytes]], match: str) -> None:
    """Blocks of two states, and blocks that nobody asked for, never make one payload."""

    def reply(request: Answer) -> tuple[str, list[coap.Option], bytes]:
        option, etag = blocks[1 if request.values(coap.BLOCK2) else 0]
        return "2.05", [(coap.ETAG, etag), CBOR, option], b"x" * 16

    async with puppet(reply) as uri, Client() as client:
        with pytest.raises(IntegrityError, match=match):
            await client.get(uri)


async def test_moved_on_while_fetching(sample: Path) -> None:
    """If the state is gone when its rest is asked for, the new one is fetched."""
    gone = iter([True, False])

    def reply(request: Answer) -> tuple[str, list[coap.Option], bytes]:
        if b"full" not in request.values(coap.URI_QUERY):
            return "2.05", [CBOR], state(next(numbers), archives=None, more=True)
        if next(gone):
            return "4.04", [], b""
        return "2.05", [CBOR], state(8)

    numbers = iter([7, 8])
    async with puppet(reply) as uri, Client() as client:
        assert (await client.stream(uri + PATH)).sequence == 8


async def test_errors_while_fetching_the_rest() -> None:
    """Another error of the server is told as it is."""

    def reply(request: Answer) -> tuple[str, list[coap.Option], bytes]:
        if b"full" in request.values(coap.URI_QUERY):
            return "4.03", [], b""
        return "2.05", [CBOR], state(7, archives=None, more=True)

    async with puppet(reply) as uri, Client() as client:
        with pytest.raises(PeerError, match=r"4\.03"):
            await client.stream(uri + PATH)


async def test_silence() -> None:
    """A server that does not answer is given up in time."""
    async with puppet(lambda _: None) as uri, Client(timeout_s=0.1) as client:
        with pytest.raises(TransferError, match=r"no answer in 0\.1 s"):
            await client.get(uri)


async def test_a_server_that_does_not_notify() -> None:
    """Without an observation, the client polls as often as the server says, or the caller."""
    numbers = iter(range(7, 100))

    async with (
        puppet(lambda _: ("2.05", [CBOR, (coap.MAX_AGE, b"")], state(next(numbers)))) as uri,
        Client(retry_s=0.02) as client,
    ):
        states = client.observe(uri + PATH)
        assert [(await anext(states)).sequence for _ in range(2)] == [7, 8]
        await states.aclose()


async def test_a_server_in_trouble_is_waited_for() -> None:
    """5.03 is no end: the client tries again, later and later."""
    codes = iter(["5.03", "5.03", "2.05"])
    troubles: list[TransferError] = []

    def reply(_: Answer) -> tuple[str, list[coap.Option], bytes]:
        return next(codes), [CBOR], state(7)

    async with (
        puppet(reply) as uri,
        Client(retry_s=0.01, on_trouble=troubles.append) as client,
    ):
        states = client.observe(uri + PATH)
        assert (await anext(states)).sequence == 7
        await states.aclose()

    assert len(troubles) == 2


@pytest.mark.parametrize(
    ("code", "options", "after_s"),
    [
        ("5.03", [(coap.MAX_AGE, b"\x07")], 7),
        ("5.03", [(coap.MAX_AGE, b"")], 0),
        ("5.03", [], None),
        ("4.04", [(coap.MAX_AGE, b"\x07")], None),
    ],
)
async def test_when_to_ask_again(
    code: str, options: list[coap.Option], after_s: int | None
) -> None:
    """Max-Age of 5.03 is when to ask again; that of other errors is not."""
    async with puppet(lambda _: (code, options, b"")) as uri, Client() as client:
        for asking in (client.get(uri), client.block(uri, 0)):
            with pytest.raises(PeerError) as caught:
                await asking
            assert after_s == caught.value.retry_after_s


async def test_formats(sample: Path) -> None:
    """Any resource can be had in any of its formats."""
    async with serving(sample) as (uri,), Client() as client:
        for fmt in (ContentFormat.LINK, ContentFormat.JSON, ContentFormat.CBOR):
            assert fmt == (await client.get(uri + "/p", accept=fmt)).format
        core = await client.get(uri + "/.well-known/core", ["rt=netota.stream"])

    assert core.payload.count(b"netota.stream") == 2


async def test_blocks_without_end(monkeypatch: pytest.MonkeyPatch) -> None:
    """A server that sends empty or short blocks, or more than any document has, is left."""
    document = attrs.evolve(LIMITS["document"], value=100_000)
    monkeypatch.setattr(client_module, "LIMITS", {**LIMITS, "document": document})
    more = (coap.BLOCK2, coap.Block(0, True, 6).encode())
    async with puppet(lambda _: ("2.05", [CBOR, more], b"")) as uri, Client() as client:
        with pytest.raises(IntegrityError, match="another block"):
            await client.get(uri)

    def endless(request: Answer) -> tuple[str, list[coap.Option], bytes]:
        asked = [coap.Block.decode(value).number for value in request.values(coap.BLOCK2)]
        number = asked[0] if asked else 0
        return "2.05", [CBOR, (coap.BLOCK2, coap.Block(number, True, 6).encode())], b"x" * 1024

    async with puppet(endless) as uri, Client() as client:
        with pytest.raises(IntegrityError, match="longer than a document"):
            await client.get(uri)


async def test_observations_are_ended() -> None:
    """Registering again, and leaving, ends the observation at the server."""
    async with hall() as it, Client(retry_s=0.02) as client:
        async with contextlib.aclosing(
            client.observe(f"{it.uri}/p/pkg/s/stable", poll_s=0.02)
        ) as states:
            await anext(states)
            waiting = asyncio.ensure_future(anext(states))
            number = it.observers._number
            await until(lambda: it.observers._number >= number + 5)
            assert len(it.observers) <= 2
            it.hold(stable=next_state(STATE), edge=STATE)
            assert (await waiting).sequence == 2
        await until(lambda: len(it.observers) == 0)


async def test_a_late_notification() -> None:
    """A notification that a later answer overtook is no rollback, if the server is ahead."""
    sequences = iter([5, 7, 6, 7, 8])

    def reply(_: Answer) -> tuple[str, list[coap.Option], bytes]:
        return "2.05", [CBOR, (coap.MAX_AGE, b"")], state(next(sequences))

    async with puppet(reply) as uri, Client(retry_s=0.02) as client:
        states = client.observe(uri + PATH)
        assert [(await anext(states)).sequence for _ in range(3)] == [5, 7, 8]
        await states.aclose()


async def test_a_real_rollback_while_observing() -> None:
    """A server that stays behind what it said is refused."""
    sequences = itertools.chain([5], itertools.repeat(4))

    def reply(_: Answer) -> tuple[str, list[coap.Option], bytes]:
        return "2.05", [CBOR, (coap.MAX_AGE, b"")], state(next(sequences))

    async with puppet(reply) as uri, Client(retry_s=0.02) as client:
        states = client.observe(uri + PATH)
        assert (await anext(states)).sequence == 5
        with pytest.raises(RollbackError):
            await anext(states)


async def test_changing_while_observed_in_full(sample: Path) -> None:
    """A long state that changes while its blocks are fetched comes as the new one."""
    crowd(sample, 60)
    async with (
        serving(sample) as (uri,),
        Client(retry_s=0.02) as client,
        contextlib.aclosing(client.observe(uri + PATH + "?full", poll_s=0.05)) as states,
    ):
        seen = (await anext(states)).sequence
        for _ in range(5):
            last = change(sample).sequence
            while seen < last:
                seen = (await anext(states)).sequence

    assert seen == 7


@pytest.mark.parametrize(
    ("accept", "option", "payload", "match"),
    [
        (ContentFormat.JSON, b"\x32", b"{nope", "not valid JSON"),
        (ContentFormat.JSON, b"\x3c", b"{}", "is in format CBOR"),
        (ContentFormat.CBOR, b"\x3c", b"\xff", "not valid CBOR"),
    ],
)
async def test_bad_plain_data(
    accept: ContentFormat, option: bytes, payload: bytes, match: str
) -> None:
    """What is malformed is the server's fault, and said with its URI."""
    options = [(coap.CONTENT_FORMAT, option)]
    async with puppet(lambda _: ("2.05", options, payload)) as uri, Client() as client:
        with pytest.raises(IntegrityError, match=match):
            await client.get_plain(uri, (), accept)


@pytest.mark.parametrize("host", ["a..b", "x" * 70 + ".example"])
async def test_hosts_that_are_none(host: str) -> None:
    """A host name that cannot be one is told as such."""
    async with Client() as client:
        with pytest.raises((ConfigError, TransferError), match=host[:9]):
            await client.get(f"coap://{host}/p")


async def test_block(sample: Path) -> None:
    """A block can be had alone, from anywhere; a server may want it smaller."""
    crowd(sample, 20)
    async with serving(sample) as (uri,), Client() as client:
        path = f"{uri}{PATH}?full"
        whole = (await client.get(path)).payload
        first = await client.block(path, 0)
        later = await client.block(path, 512, 4)
        last = await client.block(path, len(whole) // 64 * 64, 2)
        with pytest.raises(PeerError, match=r"4\.00"):
            await client.block(path, 1 << 20)

    assert (whole[:1024], True) == (first.payload, first.more)
    assert (whole[512:768], True, first.etag) == (later.payload, later.more, later.etag)
    assert (whole[-(len(whole) % 64) :], False) == (last.payload, last.more)


@pytest.mark.parametrize(
    ("offset", "option", "payload"),
    [
        (0, block(1, True), b"x" * 16),
        (32, block(1, True), b"x" * 16),
        (16, (coap.BLOCK2, coap.Block(0, False, 1).encode()), b"x" * 32),
        (0, (coap.BLOCK2, coap.Block(0, True, 1).encode()), b"x" * 32),
        (0, block(0, True), b"short"),
        (16, CBOR, b"x" * 16),
    ],
)
async def test_another_block(offset: int, option: coap.Option, payload: bytes) -> None:
    """What is not the block that was asked for is refused."""
    async with puppet(lambda _: ("2.05", [option], payload)) as uri, Client() as client:
        with pytest.raises(IntegrityError, match="another block"):
            await client.block(uri, offset, 0)


async def test_a_block_past_all() -> None:
    """A block that the option cannot number is not asked for."""
    async with Client() as client:
        with pytest.raises(TransferError, match="cannot address a block"):
            await client.block("coap://127.0.0.1:1", 1 << 30)


async def test_changes(sample: Path) -> None:
    """One observation tells that anything changed; it ends after silence."""
    async with serving(sample) as (uri,), Client(retry_s=0.1) as client:
        async with contextlib.aclosing(client.changes(f"{uri}/", poll_s=3_600)) as changes:
            await anext(changes)
            crowd(sample, 1)
            async with asyncio.timeout(PATIENCE_S):
                await anext(changes)
        assert len([None async for _ in client.changes(f"{uri}/", poll_s=0.1)]) == 1
    with pytest.raises(TransferError):
        async with Client(timeout_s=1) as client:
            await anext(client.changes(uri))


async def _blocks(client: Client, uri: str) -> None:
    async for _ in client.blocks(uri, size=4096, in_flight=4):
        pass


@pytest.mark.parametrize(
    "asking",
    [
        lambda client, uri: client.get(uri),
        lambda client, uri: client.block(uri, 0),
        _blocks,
        lambda client, uri: anext(client.observe(uri + PATH)),
    ],
)
@pytest.mark.parametrize("answers", [True, False])
async def test_cancelled(
    asking: Callable[[Client, str], Coroutine[None, None, object]],
    answers: bool,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """A request that is cancelled, in the moment of its answer or before, leaves nothing."""
    tasks: list[asyncio.Task[object]] = []
    before = asyncio.all_tasks()

    def reply(_: Answer) -> tuple[str, list[coap.Option], bytes] | None:
        # The answer is there in the next round of the loop, which runs this first.
        asyncio.get_running_loop().call_soon(tasks[-1].cancel)
        return ("2.05", [CBOR], state(7)) if answers else None

    async with puppet(reply) as uri, Client() as client:
        for _ in range(20):
            tasks.append(asyncio.create_task(asking(client, uri)))
            await asyncio.wait(tasks[-1:])
            if not answers:  # of those to one server, the next would wait for this one
                break
    assert all(task.cancelled() for task in tasks)
    tasks.clear()
    del client
    gc.collect()

    assert asyncio.all_tasks() == before
    assert not [it for it in gc.get_objects() if type(it) is Request]
    assert not [record for record in caplog.records if record.levelno >= logging.WARNING]


async def test_cancelled_while_the_name_is_looked_up(caplog: pytest.LogCaptureFixture) -> None:
    """A host that turns out to be none when nobody waits any more is told to nobody."""
    async with Client() as client:
        task = asyncio.create_task(client.get("coap://no.such.host.invalid"))
        await asyncio.sleep(0)
        task.cancel()
        await asyncio.wait([task])
        await until(lambda: len(asyncio.all_tasks()) == 1)
    gc.collect()

    assert not [record for record in caplog.records if record.levelno >= logging.WARNING]


async def test_cancelled_in_the_moment_of_a_registration(
    caplog: pytest.LogCaptureFixture,
) -> None:
    """A server that took the registration of one who left finds out by its notifications."""
    sequences = itertools.count(2)

    async with hall() as it, Client() as client:
        waiting = asyncio.ensure_future(anext(client.observe(f"{it.uri}/p/pkg/s/stable")))
        async with asyncio.timeout(PATIENCE_S):
            while not len(it.observers):  # noqa: ASYNC110 - to be there in its very next round
                await asyncio.sleep(0)
        waiting.cancel()
        await asyncio.wait([waiting])
        assert waiting.cancelled()

        def found_out() -> bool:
            it.hold(stable=attrs.evolve(STATE, sequence=next(sequences)), edge=STATE)
            return not len(it.observers)

        await until(found_out)

    assert not [record for record in caplog.records if record.levelno >= logging.WARNING]
