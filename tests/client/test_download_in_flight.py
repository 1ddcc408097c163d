"""Several blocks in flight over CoAP: over long and lossy ways, and from servers of all kinds."""

from __future__ import annotations

import asyncio
import contextlib
import gc
import json
import logging
from collections.abc import AsyncIterator, Callable
from pathlib import Path

import pytest

from netota_coap.client.coap_client import Client, ReceivedBlock
from netota_coap.client.downloads import RateLimit, download
from netota_coap.errors import ConfigError, PeerError, TransferError
from netota_coap.publishing.archives import ArchiveSource
from netota_coap.repository.blobs import Blobs, blob_name
from tests.client.test_coap_client import puppet
from tests.client.test_download_coap import LONG, SHORT, Reply, asked, piece, sent, with_size
from tests.client.test_downloads import OTHER, archive, envelope, part_of
from tests.coap.test_interop import LIBCOAP, needs_libcoap
from tests.support import publishing
from tests.support.device import Answer
from tests.support.file_servers import coap_fileserver, libcoap_server
from tests.support.publishing import STABLE
from tests.support.relay import relayed
from tests.support.serving import netota, run, serving, until

pytestmark = pytest.mark.slow

COUNT = -(-len(LONG) // 1024)


@pytest.fixture
def target(tmp_path: Path) -> Path:
    return tmp_path / "image.bin"


@pytest.fixture
async def server(sample: Path, target: Path) -> AsyncIterator[str]:
    """Our own server, which holds a file; the file's URI."""
    source = target.with_name("source")
    source.write_bytes(LONG)
    Blobs(sample).add(source, envelope(LONG))
    async with serving(sample) as (uri,):
        yield f"{uri}/b/{blob_name(envelope(LONG).sha256)}"


async def took_s(url: str, target: Path, in_flight: int) -> float:
    """Download and compare; how long it took."""
    begun = asyncio.get_running_loop().time()
    await download(archive(url, data=LONG), target, in_flight=in_flight)
    assert target.read_bytes() == LONG
    return asyncio.get_running_loop().time() - begun


# ----------------------------------------------------------------------------------------------
# Ways


async def test_a_long_way(server: str, target: Path) -> None:
    """Eight blocks in flight take a quarter of the round trips at the most."""
    async with relayed(server, delay_s=0.02) as relay:
        url = relay.uri + server[server.index("/b/") :]
        await took_s(url, target, 1)
        slow = relay.rounds
        target.unlink()
        await took_s(url, target, 8)
        fast = relay.rounds - slow

    assert len(relay.asked) == COUNT
    assert slow == COUNT
    assert fast * 4 <= slow


async def test_a_lossy_way(server: str, target: Path) -> None:
    """What gets lost is soon asked for again, and nothing else is."""
    async with relayed(server, delay_s=0.01, loss=0.05) as relay:
        url = relay.uri + server[server.index("/b/") :]
        took = await took_s(url, target, 8)

    assert relay.lost >= 3
    assert took < relay.lost  # by the times of RFC 7252 it would be at least twice that
    assert relay.requests <= COUNT + 3 * relay.lost


# ----------------------------------------------------------------------------------------------
# Servers


@needs_libcoap
async def test_libcoap(target: Path) -> None:
    """Libcoap's server bears it."""
    source = target.with_name("source")
    source.write_bytes(LONG)
    with libcoap_server() as uri:
        code, _, _ = await run(LIBCOAP, "-m", "put", "-b", "1024", "-f", source, f"{uri}/put")
        assert code == 0
        await took_s(f"{uri}/put", target, 8)


@pytest.mark.parametrize("left", [0, 1, 1500, 39_999])
async def test_aiocoap(left: int, target: Path) -> None:
    """A server that tells no size is asked for no block past the end; a part is gone on with."""
    root = target.with_name("files")
    root.mkdir()
    (root / "long").write_bytes(LONG)
    part_of(target, LONG).write_bytes(LONG[:left])
    with coap_fileserver(root) as uri:
        async with relayed(uri) as relay:
            await took_s(f"{relay.uri}/long", target, 8)

    assert len(relay.asked) == COUNT - left // 1024


def shrinking(request: Answer) -> Reply:
    return piece(request, szx=6 if asked(request).offset < 4096 else 4)


def with_the_size_at_first(request: Answer) -> Reply:
    reply = piece(request)
    return reply if asked(request).number else with_size(reply, len(SHORT))


@pytest.mark.parametrize(
    "reply", [piece, with_the_size_at_first, shrinking, lambda request: piece(request, szx=2)]
)
@pytest.mark.parametrize("in_flight", [1, 2, 64])
async def test_blocks(reply: Callable[[Answer], Reply], in_flight: int) -> None:
    """The blocks come in their order, whatever size the server likes; none past the end."""
    offsets: list[int] = []

    def noted(request: Answer) -> Reply:
        offsets.append(asked(request).offset)
        return reply(request)

    async with puppet(noted) as uri, Client() as client:
        blocks = client.blocks(uri, 2048, size=len(SHORT), in_flight=in_flight)
        got = [block async for block in blocks]

    assert SHORT[2048:] == b"".join(block.payload for block in got)
    assert [block.more for block in got[-2:]] == [True, False]
    assert max(offsets) < len(SHORT)


async def test_in_any_order() -> None:
    """What overtakes the others waits for them."""
    held: set[int] = set()

    def reply(request: Answer) -> Reply | None:
        number = asked(request).number
        if number % 4 == 1 and number not in held:
            held.add(number)
            return None
        return piece(request)

    async with puppet(reply) as uri, Client() as client:
        blocks = client.blocks(uri, size=len(SHORT), in_flight=8)
        payloads = [block.payload async for block in blocks]

    assert b"".join(payloads) == SHORT
    assert len(held) == 5


@pytest.mark.parametrize("told", [0, 5000, len(SHORT)])
async def test_another_size_than_expected(told: int) -> None:
    """A resource that is shorter or longer than its reader thinks is had to its end."""
    for data in (SHORT, SHORT[:4096], SHORT[:5000]):

        def reply(request: Answer, data: bytes = data) -> Reply:
            past = asked(request).offset >= len(data)
            return ("4.00", [], b"") if past else piece(request, data)

        async with puppet(reply) as uri, Client() as client:
            blocks = client.blocks(uri, size=told, in_flight=8)
            assert data == b"".join([block.payload async for block in blocks])


async def test_a_size_that_the_server_tells() -> None:
    """Who does not know the size asks ahead as well, as soon as the server has told it."""
    numbers: list[int] = []

    def reply(request: Answer) -> Reply | None:
        numbers.append(asked(request).number)
        held = numbers[-1] == 1 and 8 not in numbers
        return None if held else with_the_size_at_first(request)

    async with puppet(reply) as uri, Client(timeout_s=5) as client:
        blocks = client.blocks(uri, in_flight=8)
        assert b"".join([block.payload async for block in blocks]) == SHORT

    assert list(range(9)) == numbers[:9]  # which go out in their order, too


async def test_repeated_ever_more_slowly() -> None:
    """A server that has fallen silent is not pressed."""
    numbers: list[int] = []

    def reply(request: Answer) -> Reply | None:
        numbers.append(asked(request).number)
        return piece(request) if numbers[-1] == 0 else None

    async with puppet(reply) as uri, Client(timeout_s=1) as client:
        blocks = client.blocks(uri, size=len(SHORT), in_flight=2)
        with pytest.raises(TransferError, match="no answer in 1 s"):
            assert [await anext(blocks) for _ in range(2)]

    assert 2 <= numbers.count(1) <= 3  # 0.2 to 0.3 s after the first, and twice that after that


@pytest.mark.parametrize("in_flight", [0, 65])
async def test_how_many(in_flight: int) -> None:
    """None is too few, and 65 are too many."""
    async with Client() as client:
        with pytest.raises(ConfigError, match="1 to 64"):
            await anext(client.blocks("coap://127.0.0.1:1/", in_flight=in_flight))


@pytest.mark.parametrize(
    ("code", "forgetful"),
    [("4.00", False), ("4.08", False), ("4.29", False), ("4.00", True), ("4.08", True)],
)
async def test_one_after_the_other(code: str, forgetful: bool, target: Path) -> None:
    """A server that can send only the next block is asked for one at a time."""
    numbers: list[int] = []
    place = 0

    def reply(request: Answer) -> Reply:
        nonlocal place
        number = asked(request).number
        numbers.append(number)
        if number not in (0, place) or (number == 3 and len(numbers) < 10):
            place = 0 if forgetful else place
            return code, [], b""
        place = number + 1
        return piece(request)

    async with puppet(reply) as uri:
        await download(archive(uri, data=SHORT), target, in_flight=8)

    assert target.read_bytes() == SHORT
    assert list(range(3, 20)) == numbers[-17:]
    assert (numbers.count(0) == 2) == forgetful


async def test_a_file_that_is_replaced(target: Path) -> None:
    """Blocks of two files never make one, however they are mixed."""
    count = 0

    def reply(request: Answer) -> Reply:
        nonlocal count
        count += 1
        data, tag = (OTHER[:20_000], b"1") if count < 12 else (SHORT, b"2")
        return piece(request, data, tag=tag)

    steps: list[int] = []
    async with puppet(reply) as uri:
        wanted = archive(uri, data=SHORT)
        await download(wanted, target, in_flight=8, progress=steps.append)

    assert target.read_bytes() == SHORT
    assert [step for step in steps if step < 0] == [-11 * 1024]


async def test_a_pace(target: Path) -> None:
    """What is read slowly is asked for slowly."""
    limit = RateLimit(10 * len(SHORT))
    asked_for = arrived = most = 0

    def reply(request: Answer) -> Reply:
        nonlocal asked_for, most
        asked_for = max(asked_for, asked(request).number + 1)
        most = max(most, asked_for - arrived)
        return piece(request)

    async def pace(count: int) -> None:
        nonlocal arrived
        await limit(count)
        arrived += 1

    async with puppet(reply) as uri:
        await download(archive(uri, data=SHORT), target, pace=pace, in_flight=4)

    assert target.read_bytes() == SHORT
    assert 2 <= most <= 1 + 4  # the one that is waited with, and those ahead of it


@pytest.mark.parametrize("when", ["download", "block"])
async def test_left_in_the_middle(
    when: str, target: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Whoever stops, stops all that is under way."""
    numbers: list[int] = []

    def reply(request: Answer) -> Reply | None:
        numbers.append(asked(request).number)
        return piece(request) if numbers[-1] < 4 else None

    async with puppet(reply) as uri:
        before = asyncio.all_tasks()
        if when == "download":
            task = asyncio.create_task(download(archive(uri, data=SHORT), target, in_flight=8))
            await until(lambda: numbers and max(numbers) >= 10)
            task.cancel()
            with pytest.raises(asyncio.CancelledError):
                await task
            assert part_of(target, SHORT).read_bytes() == SHORT[:4096]
        else:
            async with Client() as client:
                blocks = client.blocks(uri, size=len(SHORT), in_flight=8)
                async with contextlib.aclosing(blocks):
                    await anext(blocks)
                    await anext(blocks)
                await until(lambda: asyncio.all_tasks() == before)
        await until(lambda: asyncio.all_tasks() == before)
    gc.collect()

    assert not [record for record in caplog.records if record.levelno >= logging.WARNING]


async def test_nobody_there(target: Path) -> None:
    """A host that refuses is told at once."""
    with pytest.raises(TransferError, match="Connection refused"):
        await download(archive("coap://127.0.0.1:1/x", data=SHORT), target, in_flight=8)


async def test_gone_in_the_middle(caplog: pytest.LogCaptureFixture) -> None:
    """A server that goes away while it is asked for several is told as it is; nothing is left."""
    numbers: list[int] = []

    def reply(request: Answer) -> Reply | None:
        numbers.append(asked(request).number)
        return piece(request) if numbers[-1] == 0 else None

    async with Client() as client:
        async with puppet(reply) as uri:
            blocks = client.blocks(uri, size=len(SHORT), in_flight=8)
            await anext(blocks)
            waiting = asyncio.ensure_future(anext(blocks))
            await until(lambda: numbers.count(1) == 2)
        (error,) = await asyncio.gather(waiting, return_exceptions=True)
    assert isinstance(error, TransferError)
    assert "refused" in error.detail
    del error, waiting, blocks  # which hold what nobody looked at
    gc.collect()

    assert not [record for record in caplog.records if record.levelno >= logging.WARNING]


async def test_silence(target: Path) -> None:
    """A server that answers nothing is given up in time."""
    async with puppet(lambda _: None) as uri:
        wanted = archive(uri, data=SHORT)
        with pytest.raises(TransferError, match=r"no answer in 0\.2 s"):
            await download(wanted, target, in_flight=8, timeout_s=0.2)


async def test_refused_alone() -> None:
    """What is refused again when it is asked for alone is refused."""

    def reply(request: Answer) -> Reply:
        return piece(request) if asked(request).number < 4 else ("4.03", [sent(4, False)], b"")

    async with puppet(reply) as uri, Client() as client:
        blocks = client.blocks(uri, size=len(SHORT), in_flight=8)
        got: list[ReceivedBlock] = []
        with pytest.raises(PeerError, match=r"4\.03"):
            async for block in blocks:
                got.append(block)  # noqa: PERF401 - those before the error count

    assert len(got) == 4


# ----------------------------------------------------------------------------------------------
# The command


async def test_the_command(sample: Path, target: Path) -> None:
    """`--in-flight` is taken, and has bounds."""
    source = target.with_name("source")
    source.write_bytes(LONG)
    publishing.publish(
        sample, STABLE, "9.0", [ArchiveSource(source, "image")], store_files=True, force=True
    )
    async with serving(sample) as (uri,):
        given = ("download", uri, "/".join(STABLE), "-o", target, "--in-flight")
        code, out, err = await netota(*given, "8", "--json")
        assert (code, err) == (0, "")
        assert json.loads(out)
        assert target.read_bytes() == LONG
        code, _, err = await netota(*given, "65")
        assert (code, "1<=x<=64" in err) == (2, True)
