"""The load generator counts what it says, and is bounded."""

from __future__ import annotations

import asyncio
import contextlib
import signal
from collections.abc import AsyncIterator, Callable
from pathlib import Path

import attrs
import pytest

from netota_coap.catalog.catalog import Catalog
from netota_coap.coap import options as coap
from netota_coap.coap.options import Block
from netota_coap.encoding.content_formats import ContentFormat
from netota_coap.repository.loading import Loader
from tests.support.environment import needs, needs_ipv6
from tests.support.serving import serving, until
from tools.bench import load
from tools.bench.load import Load, Result

CON, NON, ACK, RST = range(4)
CONTENT = 0x45
PATH = load.options(["a"])

pytestmark = needs("cc")

Answering = Callable[[bytes], "list[bytes]"]


@pytest.fixture(scope="module")
def program(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The load generator, compiled."""
    return load.build(tmp_path_factory.mktemp("load"))


@pytest.fixture
def asking(program: Path, tmp_path: Path) -> Load:
    """A load of one request."""
    return Load.write(program, tmp_path / "requests", [PATH])


def answer(request: bytes, tail: bytes = b"\xffx", kind: int = ACK, code: int = CONTENT) -> bytes:
    """Answer a request with its message ID and token."""
    return bytes((0x44 | kind << 4, code)) + request[2:8] + tail


def empty(kind: int, request: bytes) -> bytes:
    """Make the empty message of a request's message ID."""
    return bytes((0x40 | kind << 4, 0)) + request[2:4]


class Peer(asyncio.DatagramProtocol):
    """A server that answers as it is told to, and remembers what came."""

    def __init__(self, answering: Answering) -> None:
        self.answering = answering
        self.received: list[bytes] = []
        self.addresses: set[object] = set()

    def connection_made(self, transport: asyncio.DatagramTransport) -> None:  # type: ignore[override]
        self.transport = transport
        self.port: int = transport.get_extra_info("sockname")[1]

    def datagram_received(self, data: bytes, address: object) -> None:
        self.received.append(data)
        self.addresses.add(address)
        for reply in self.answering(data):
            self.transport.sendto(reply, address)  # type: ignore[arg-type]


@contextlib.asynccontextmanager
async def listening(answering: Answering, host: str = "127.0.0.1") -> AsyncIterator[Peer]:
    """Open a peer on loopback."""
    loop = asyncio.get_running_loop()
    transport, peer = await loop.create_datagram_endpoint(
        lambda: Peer(answering), local_addr=(host, 0)
    )
    try:
        yield peer
    finally:
        transport.close()


async def ask(
    asking: Load, answering: Answering, *more: str, host: str = "127.0.0.1"
) -> tuple[Result, Peer]:
    """Put a load on a peer."""
    async with listening(answering, host) as peer:
        return await asyncio.to_thread(asking.run, peer.port, 10, *more, host=host), peer


@pytest.mark.parametrize("host", ["127.0.0.1", "127.8.8.8", pytest.param("::1", marks=needs_ipv6)])
async def test_counts(asking: Load, host: str) -> None:
    """Each request is answered once; tokens and message IDs differ."""
    result, peer = await ask(asking, lambda data: [answer(data)], "-c", "100", host=host)

    assert (result.requests, result.answers, result.by_code) == (100, 100, {"2.05": 100})
    assert (result.lost, result.strays, result.resets, result.failed) == (0, 0, 0, 0)
    assert (result.transfers, result.payload_bytes) == (100, 1)
    assert 0 < result.median_us <= result.p99_us <= result.max_us <= result.seconds * 1e6
    assert result.per_second == pytest.approx(100 / result.seconds, rel=0.01)
    assert sum(result.slices) == 100
    assert {(0x44, 1, PATH)} == {(data[0], data[1], data[8:]) for data in peer.received}
    assert len({data[4:8] for data in peer.received}) == 100
    ids = [int.from_bytes(data[2:4], "big") for data in peer.received]
    assert [(ids[0] + index) % 65_536 for index in range(100)] == ids


async def test_codes(asking: Load) -> None:
    """Answers are counted by code; a redirected or refused one is a failure."""
    codes = iter([CONTENT, 0x43, 0x84, 0x9D])
    result, _ = await ask(asking, lambda data: [answer(data, code=next(codes))], "-c", "4")

    assert result.by_code == {"2.05": 1, "2.03": 1, "4.04": 1, "4.29": 1}
    assert (result.failed, result.transfers) == (2, 2)


async def test_rotation(program: Path, tmp_path: Path) -> None:
    """Requests are sent in the order of the file, again and again."""
    lines = [load.options(["p"], [f"unit={index}"]) for index in range(3)]
    asking = Load.write(program, tmp_path / "requests", lines)
    _, peer = await ask(asking, lambda data: [answer(data)], "-c", "7")

    assert [*lines, *lines, lines[0]] == [data[8:] for data in peer.received]


async def test_window(asking: Load) -> None:
    """As many are in flight as was asked for, and no more, spread over as many sockets."""
    wide = attrs.evolve(asking, window=7, sockets=3)
    result, peer = await ask(wide, lambda _: [], "-n", "-r", "50", "-t", "0.02")

    assert (result.requests, result.lost) == (7, 7)
    assert len(peer.addresses) == 3


async def test_repetition(asking: Load) -> None:
    """A confirmable request is repeated three times, unchanged, and then given up."""
    result, peer = await ask(asking, lambda _: [], "-c", "1", "-r", "20")

    assert (
        result.requests,
        result.answers,
        result.lost,
        result.retransmissions,
        result.failed,
    ) == (1, 0, 1, 3, 1)
    assert len(peer.received) == 4
    assert len(set(peer.received)) == 1


async def test_late_answer(asking: Load) -> None:
    """An answer to a repetition counts; its latency is that from the first request on."""
    count = iter(range(10))
    result, _ = await ask(
        asking, lambda data: [answer(data)] if next(count) else [], "-c", "1", "-r", "20"
    )
    assert (result.answers, result.lost, result.retransmissions) == (1, 0, 1)
    assert result.median_us >= 20_000


async def test_non_confirmable(asking: Load) -> None:
    """A non-confirmable request is not repeated; its answer has a message ID of its own."""
    silent, peer = await ask(asking, lambda _: [], "-n", "-c", "1", "-r", "20")
    assert (silent.lost, silent.retransmissions, len(peer.received)) == (1, 0, 1)
    assert peer.received[0][0] == 0x54

    def answering(data: bytes) -> list[bytes]:
        return [answer(bytes((*data[:2], 0, 1, *data[4:])), kind=NON)]

    answered, _ = await ask(asking, answering, "-n", "-c", "5")
    assert (answered.answers, answered.strays) == (5, 0)


async def test_reset(asking: Load) -> None:
    """A reset ends a request."""
    result, _ = await ask(asking, lambda data: [empty(RST, data)], "-c", "2")
    assert (result.resets, result.answers, result.failed) == (2, 0, 2)


async def test_separate_answer(asking: Load) -> None:
    """After an empty acknowledgement nothing is repeated; the answer is acknowledged."""

    def answering(data: bytes) -> list[bytes]:
        if data[1] == 0:
            return []
        return [empty(ACK, data), answer(b"\0\0\x12\x34" + data[4:8], kind=CON)]

    result, peer = await ask(asking, answering, "-c", "1")
    assert (result.answers, result.retransmissions, result.strays) == (1, 0, 0)
    assert peer.received[1:] == [b"\x60\x00\x12\x34"]


@pytest.mark.parametrize(
    "stray",
    [
        lambda data: b"\x64\x45\0",
        lambda data: b"\x24" + answer(data)[1:],
        lambda data: answer(data)[:6],
        lambda data: answer(data[:7] + bytes((data[7] ^ 1,))),
        lambda data: answer(bytes((0, 0, data[2] ^ 1)) + data[3:]),
        lambda data: answer(data, code=1),
        lambda data: b"\x60\x45" + data[2:4] + b"\xffx",
        lambda data: empty(RST, bytes((0, 0, data[2] ^ 1, data[3]))),
        lambda data: empty(CON, data),
    ],
    ids=[
        *("short", "version", "cut token", "token", "message ID", "request"),
        *("no token", "reset of another", "ping"),
    ],
)
async def test_strays(asking: Load, stray: Callable[[bytes], bytes]) -> None:
    """What answers no open request is counted, and nothing else."""
    result, _ = await ask(asking, lambda data: [stray(data), answer(data)], "-c", "1")
    assert (result.strays, result.answers) == (1, 1)


@pytest.mark.parametrize(
    ("tail", "said"),
    [
        (b"\xf0", "malformed options"),
        (b"\xff", "malformed options"),
        (b"\xd0", "malformed options"),
        (b"\x42a", "malformed options"),
        (coap.encode([(coap.BLOCK2, Block(1, True, 6).encode())], b"x"), "block 1 of szx 6"),
        (coap.encode([(coap.BLOCK2, Block(0, True, 4).encode())], b"x"), "block 0 of szx 4"),
    ],
)
async def test_answers_that_are_wrong(asking: Load, tail: bytes, said: str) -> None:
    """A server that answers nonsense is not measured."""
    with pytest.raises(RuntimeError, match=said):
        await ask(asking, lambda data: [answer(data, tail)], "-c", "3", "-b", "6")


@pytest.mark.parametrize("szx", [2, 6])
async def test_blocks(program: Path, tmp_path: Path, repository_dir: Path, szx: int) -> None:
    """A resource of our own server is fetched block by block, as often as it goes."""
    path = ("p", "sensor-node", "s", "stable")
    resource = Catalog.of(Loader(repository_dir).load()).find(path)
    size = len(resource.represent(["full"], ContentFormat.CBOR, "coap").payload)
    blocks = -(-size // (16 << szx))
    made = Load.write(program, tmp_path / "requests", [load.options(path, ["full"])])
    asking = attrs.evolve(made, szx=szx)
    async with serving(repository_dir) as uris:
        port = int(uris[0].rpartition(":")[2])
        result = await asyncio.to_thread(asking.run, port, 5, "-c", str(blocks * 3))
        wide = attrs.evolve(asking, window=4, sockets=2)
        many = await asyncio.to_thread(wide.run, port, 5, "-c", str(blocks * 30))

    assert result.by_code == {"2.05": blocks * 3}
    assert (result.transfers, result.payload_bytes) == (3, size)
    assert many.by_code == {"2.05": blocks * 30}
    assert 27 <= many.transfers <= 30
    assert (many.lost, many.strays) == (0, 0)


async def test_numbers_of_blocks(program: Path, tmp_path: Path) -> None:
    """Blocks are asked for one after the other, with the option where it belongs."""
    lines = [load.options([]), load.options(["a"]), load.options([], ["b" * 300])]
    asking = attrs.evolve(Load.write(program, tmp_path / "requests", lines), szx=0)

    def answering(data: bytes) -> list[bytes]:
        asked = Block.decode(dict(coap.decode(data[8:])[0])[coap.BLOCK2])
        block = Block(asked.number, asked.number < 4_100, 0)
        return [answer(data, coap.encode([(coap.BLOCK2, block.encode())], bytes(16)))]

    result, peer = await ask(asking, answering, "-c", "12303")
    assert (result.answers, result.transfers, result.payload_bytes) == (12_303, 3, 16 * 4_101)
    asked = iter(peer.received)
    for line in lines:
        for number in range(4_101):
            block = (coap.BLOCK2, Block(number, False, 0).encode())
            assert coap.encode([*coap.decode(line)[0], block]) == next(asked)[8:]


async def test_end(asking: Load) -> None:
    """It ends by time, or when it is told to; what it has got until then it tells."""
    async with listening(lambda data: [answer(data)]) as peer:
        timed = await asyncio.to_thread(asking.run, peer.port, 0.05)
        assert 0.02 < timed.seconds < 5

        running = asking.start(peer.port, 60)
        seen = len(peer.received)
        await until(lambda: len(peer.received) > seen)
        running.send_signal(signal.SIGTERM)
        told = await asyncio.to_thread(load.result, running)
    assert 0 < told.answers == told.requests
    assert told.seconds < 30


@pytest.mark.parametrize(
    ("host", "more", "said"),
    [
        *((host, (), "not an address of loopback") for host in ("192.0.2.1", "0.0.0.0", "::")),
        *((host, (), "not an address of loopback") for host in ("localhost", "2001:db8::1", "")),
        ("127.0.0.1", (), "nobody listens there"),
        ("127.0.0.1", ("-w", "5000"), "5000: must be a number from 1 to 4096"),
        ("127.0.0.1", ("-s", "x"), "x: must be a number"),
        ("127.0.0.1", ("-b", "7"), "from 0 to 6"),
        ("127.0.0.1", ("-t", "61"), "from 0.001 to 60"),
        ("127.0.0.1", ("-c", "1e9"), "from 1 to"),
        ("127.0.0.1", ("-r", "nan"), "from 20 to 5000"),
        ("127.0.0.1", ("-x",), "invalid option"),
        ("127.0.0.1", ("more",), "HOST, PORT and FILE are needed"),
    ],
)
async def test_refusals(asking: Load, host: str, more: tuple[str, ...], said: str) -> None:
    """Anything but loopback, and anything without a bound, is refused."""
    async with listening(lambda _: []) as peer:
        pass
    with pytest.raises(RuntimeError, match=said):
        await asyncio.to_thread(asking.run, peer.port, 1, *more, host=host)


@pytest.mark.parametrize(
    ("text", "more", "said"),
    [
        ("", (), "no requests"),
        ("b161\nb1\n", (), ":2: must be options in hexadecimal digits"),
        ("b16\n", (), ":1: must be"),
        ("b16x\n", (), ":1: must be"),
        ("b161", (), ":1: must be"),
        ("b161ff61\n", (), ":1: must be"),
        (f"{'00' * 1_025}\n", (), ":1: must be"),
        (f"{load.options(['x' * 1_024]).hex()}\n", (), ":1: must be"),
        ("d10a61\n", ("-b", "6"), "that Block2 can follow"),
        ("00\n" * 65_537, (), ":65537: must be"),
    ],
)
def test_files(asking: Load, text: str, more: tuple[str, ...], said: str) -> None:
    """A file that holds something else than options is refused, by its line."""
    asking.requests.write_text(text)
    with pytest.raises(RuntimeError, match=said):
        asking.run(1, 1, *more)


def test_file_that_is_missing(program: Path, tmp_path: Path) -> None:
    """A file that is not there is named."""
    with pytest.raises(RuntimeError, match="nothing: No such file"):
        Load(program, tmp_path / "nothing").run(1, 1)
