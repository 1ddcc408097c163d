"""The benchmark of gateways runs, and measures what it says."""

from __future__ import annotations

import asyncio
import contextlib
import io
import json
import sys
from collections.abc import AsyncIterator, Callable, Iterable, Sequence
from pathlib import Path

import pytest
from rich.console import Console

from netota_coap.coap import options as coap
from netota_coap.encoding.codecs import Format
from netota_coap.encoding.documents import encode
from netota_coap.model.values import Archive, Content, Envelope, Offer, Stream
from tests.support.file_servers import Response, http_server
from tests.support.publishing import NOW
from tests.support.serving import PROJECT, run, until
from tools.bench import bench_gateway, devices
from tools.bench.bench_gateway import CACHES, NAME, Bench
from tools.bench.devices import BLOCK, Devices, Image
from tools.bench.uplink import Uplink

pytestmark = pytest.mark.bench

DEVICES = 40
KILOBYTES = 60
BYTES_S = 150_000
FIGURES = {
    *("uplink", "at_gateway_s", "median_s", "all_s", "begun_before", "put_off", "repeated"),
    *("rss_mb", "rss_growth_mb", "failed"),
}
DATA = bytes(range(250)) * 10  # three blocks
IMAGE = Image.of("2.0", NAME, DATA)


def require_once(figures: dict[str, float]) -> None:
    """See that the image came over the uplink once, and to all devices."""
    assert set(figures) == FIGURES
    assert 1 <= figures["uplink"] <= 1.05
    assert figures["failed"] == 0
    assert figures["at_gateway_s"] >= KILOBYTES * 1_000 / BYTES_S
    assert 0 < figures["median_s"] <= figures["all_s"]


async def test_over_coap() -> None:
    """On demand all devices come early, and are put off; ahead none does."""
    command = (sys.executable, PROJECT / "tools/bench/bench_gateway.py", "--json")
    small = ("--devices", DEVICES, "--kilobytes", KILOBYTES, "--bytes-s", BYTES_S)
    code, out, err = await run(*command, *map(str, small), timeout_s=60)
    assert (code, err) == (0, "")
    figures = json.loads(out)
    for cache in CACHES:
        require_once(figures[cache])
    on_demand, ahead = (figures[cache] for cache in CACHES)
    assert on_demand["begun_before"] == DEVICES <= on_demand["put_off"]
    assert ahead["begun_before"] == ahead["put_off"] == 0
    shown = io.StringIO()
    table = bench_gateway.table({cache: figures[cache] for cache in CACHES}, "title")
    Console(file=shown, width=80).print(table)
    rows = [line.split() for line in shown.getvalue().splitlines() if line.strip()]
    assert [row[0] for row in rows[-2:]] == list(CACHES)
    assert rows[-1][-1] == "0"


async def test_over_http(tmp_path: Path) -> None:
    """The file comes over HTTP, once."""
    bench = Bench(tmp_path, DEVICES, KILOBYTES * 1_000, "http", BYTES_S)
    figures = await bench.measure("on-demand")
    require_once(figures)
    assert figures["begun_before"] == DEVICES <= figures["put_off"]


# ----------------------------------------------------------------------------------------------
# The uplink


async def test_datagrams_are_slowed_and_counted() -> None:
    """What comes down, in order; nothing that goes up."""
    async with echoing() as port:
        uplink = Uplink(port, 20_000)
        async with uplink.of_datagrams():
            got: list[bytes] = []
            loop = asyncio.get_running_loop()
            make = lambda: Receiver(lambda data, _: got.append(data))  # noqa: E731
            transport, _ = await loop.create_datagram_endpoint(
                make, remote_addr=("127.0.0.1", uplink.port)
            )
            start_s = loop.time()
            sent = [bytes((number,)) * 500 for number in range(8)]
            for data in sent:
                transport.sendto(data)
            await until(lambda: len(got) == len(sent))
            transport.close()
            assert got == sent
            assert uplink.carried == 4_000
            assert loop.time() - start_s >= 0.2


async def test_streams_are_slowed_and_counted() -> None:
    """What comes down; who is not there is no trouble."""
    async with http_server(lambda _: Response(body=b"x" * 4_000)) as server:
        uplink = Uplink(int(server.url.split(":")[2].split("/")[0]), 20_000)
        async with uplink.of_streams():
            start_s = asyncio.get_running_loop().time()
            reader, writer = await asyncio.open_connection("127.0.0.1", uplink.port)
            writer.write(b"GET /file HTTP/1.1\r\nHost: h\r\nConnection: close\r\n\r\n")
            answer = await reader.readuntil(b"x" * 4_000)
            writer.close()
            assert uplink.carried == len(answer)
            assert asyncio.get_running_loop().time() - start_s >= 0.2


async def test_nobody_upstream() -> None:
    """Closes the connection."""
    async with echoing() as port:
        uplink = Uplink(port, 20_000)  # of UDP
        async with uplink.of_streams():
            reader, writer = await asyncio.open_connection("127.0.0.1", uplink.port)
            with contextlib.suppress(ConnectionError):
                assert await reader.read() == b""
            writer.close()
            assert uplink.carried == 0


# ----------------------------------------------------------------------------------------------
# Devices


class Receiver(asyncio.DatagramProtocol):
    """Hands on what comes."""

    def __init__(self, take: Callable[[bytes, tuple[str, int]], object]) -> None:
        self.take = take

    def datagram_received(self, data: bytes, addr: tuple[str, int]) -> None:
        self.take(data, addr)


@contextlib.asynccontextmanager
async def answering(answer: Callable[[bytes], Iterable[bytes]]) -> AsyncIterator[int]:
    """Answer datagrams; the port."""

    def take(data: bytes, address: tuple[str, int]) -> None:
        for each in answer(data):
            transport.sendto(each, address)

    loop = asyncio.get_running_loop()
    transport, _ = await loop.create_datagram_endpoint(
        lambda: Receiver(take), local_addr=("127.0.0.1", 0)
    )
    try:
        yield transport.get_extra_info("sockname")[1]
    finally:
        transport.close()


def echoing() -> contextlib.AbstractAsyncContextManager[int]:
    """Send back what comes."""
    return answering(lambda data: (data,))


def piggybacked(request: bytes, code: int, tail: bytes) -> bytes:
    """Answer by acknowledgement."""
    end = 4 + (request[0] & 15)
    return bytes((0x60 | end - 4, code)) + request[2:end] + tail


def stream(version: str = "2.0", url: str = IMAGE.url) -> bytes:
    """Return options and payload of an answer that tells of a version."""
    envelope = Envelope(type="application/octet-stream", size=len(DATA), sha256=IMAGE.sha256)
    offers = (Offer(url=url, metric=10),)
    archive = Archive(name="image", envelope=envelope, content=Content(), offers=offers)
    state = Stream(version=version, sequence=2, published=NOW, archives=(archive,))
    return coap.encode([], encode(state, Format.CBOR))


Reply = Callable[[bytes, int], Sequence[bytes]]
"""Answers the request of a block with datagrams; of how many before, the second tells."""


def block(request: bytes, data: bytes = DATA) -> bytes:
    """Answer with the block that is asked for."""
    options, _ = coap.decode(request[6:])
    asked = coap.Block.decode(dict(options)[coap.BLOCK2])
    return piggybacked(request, 0x45, coap.encode([], data[asked.offset :][:BLOCK]))


def busy(request: bytes) -> bytes:
    """Answer that it is not there yet, nor for a while: 0 seconds."""
    return piggybacked(request, 0xA3, coap.encode([(coap.MAX_AGE, b"")]))


@contextlib.asynccontextmanager
async def gateway(reply: Reply, told: Sequence[bytes] = ()) -> AsyncIterator[int]:
    """Tell of versions, the last one again and again, and answer requests of blocks; the port."""
    before = {"p": 0, "b": 0}
    told = told or (stream(),)

    def answer(request: bytes) -> Sequence[bytes]:
        if not request[1]:
            return ()
        options, _ = coap.decode(request[6:])
        kind = dict(reversed(options))[coap.URI_PATH].decode()
        before[kind] += 1
        if kind == "b":
            return reply(request, before[kind] - 1)
        if not told[0]:
            return (piggybacked(request, 0x84, b""),)[: before[kind]]
        first, *others = (piggybacked(request, 0x45, tail) for tail in told)
        return (first, *(b"\x42\x45" + other[2:] for other in others))

    async with answering(answer) as port:
        yield port


@contextlib.asynccontextmanager
async def fleet(port: int, count: int = 3) -> AsyncIterator[Devices]:
    """Let devices live until the block ends."""
    it = Devices.at(port, count, IMAGE)
    living = asyncio.create_task(it.live())
    try:
        yield it
    finally:
        living.cancel()
        await asyncio.wait((living,))


@pytest.fixture
def hurry(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nobody waits long for what does not come."""
    for name in ("TIMEOUT_S", "RETRY_S", "TICK_S"):
        monkeypatch.setattr(devices, name, 0.005)


@pytest.mark.usefixtures("hurry")
@pytest.mark.parametrize(
    ("reply", "put_off", "repeated"),
    [
        pytest.param(lambda request, _: (block(request),), 0, 0, id="right"),
        pytest.param(lambda request, _: (block(request),) * 2, 0, 0, id="twice"),
        pytest.param(
            lambda request, before: (busy(request) if before == 1 else block(request),),
            *(1, 0),
            id="busy",
        ),
        pytest.param(
            lambda request, before: () if before == 1 else (block(request),), 0, 1, id="lost"
        ),
        pytest.param(
            lambda request, _: (b"", b"\0", b"\x42\x45ab", block(request)), 0, 0, id="nonsense"
        ),
    ],
)
async def test_devices_download(
    reply: Reply, put_off: int, repeated: int, caplog: pytest.LogCaptureFixture
) -> None:
    """Once they hear of the version, by whatever happens on the way."""
    async with gateway(reply, (stream("1.0"), stream())) as port, fleet(port, 1) as it:
        (device,) = it.every
        await until(lambda: device.is_over)
        assert device.failure == ""
        assert device.registered and device.begun and device.ended_s
        assert (device.put_off, device.repeated >= repeated) == (put_off, True)
    assert caplog.messages == []


@pytest.mark.usefixtures("hurry")
@pytest.mark.parametrize(
    ("reply", "url", "failure"),
    [
        (lambda request, _: (block(request, bytes(len(DATA))),), IMAGE.url, "wrong bytes"),
        (lambda request, _: (block(request, DATA[:50]),), IMAGE.url, "instead of a block of 1024"),
        (lambda request, _: (piggybacked(request, 0x84, b""),), IMAGE.url, "4.04"),
        (lambda _request, _: (), IMAGE.url, "no answer"),
        (lambda request, _: (piggybacked(request, 0xA3, b"\xff"),), IMAGE.url, "malformed"),
        (lambda request, _: (block(request),), "coap://h/f", "does not offer the file itself"),
    ],
)
async def test_devices_that_fail(reply: Reply, url: str, failure: str) -> None:
    """Say why."""
    async with gateway(reply, (stream(url=url),)) as port, fleet(port) as it:
        await until(lambda: all(device.is_over for device in it.every))
        for device in it.every:
            assert device.ended_s is None
            assert failure in device.failure


@pytest.mark.usefixtures("hurry")
async def test_devices_wait_for_the_stream() -> None:
    """They ask again until it is there."""
    told = [b""]
    async with gateway(lambda request, _: (block(request),), told) as port, fleet(port) as it:
        await asyncio.sleep(0)
        assert not any(device.registered for device in it.every)
        told[0] = stream()
        await until(lambda: all(device.ended_s for device in it.every))
