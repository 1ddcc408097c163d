"""client/downloads.py over CoAP: a real server of files, and one that lies."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from pathlib import Path

import attrs
import pytest

from netota_coap.client.downloads import check_offers, download
from netota_coap.coap import options as coap
from netota_coap.errors import IntegrityError, TransferError
from netota_coap.model.values import Envelope
from tests.client.test_coap_client import puppet
from tests.client.test_downloads import DATA, OTHER, archive, check, envelope, part_of
from tests.coap.test_interop import LIBCOAP, needs_libcoap
from tests.support.device import Answer
from tests.support.file_servers import coap_fileserver, libcoap_server
from tests.support.serving import run

pytestmark = pytest.mark.slow

SHORT, LONG = DATA[:20_000], DATA[:40_000]
FILES = {"empty": b"", "tiny": b"1", "block": DATA[:1024], "blocks": DATA[:4096], "long": LONG}


@pytest.fixture(scope="module")
def fileserver(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[str, Path]]:
    """The real `aiocoap-fileserver`: its URI, and the directory that it serves."""
    root = tmp_path_factory.mktemp("files")
    for name, data in FILES.items():
        (root / name).write_bytes(data)
    with coap_fileserver(root) as uri:
        yield uri, root


@pytest.fixture
def target(tmp_path: Path) -> Path:
    return tmp_path / "image.bin"


# ----------------------------------------------------------------------------------------------
# The real one


@pytest.mark.parametrize("name", FILES)
async def test_files(name: str, fileserver: tuple[str, Path], target: Path) -> None:
    """Files of all sizes are asked for, compared, and downloaded."""
    url, data = f"{fileserver[0]}/{name}", FILES[name]
    report = await check(url, data=data)

    assert ("", len(data)) == (report.problem, report.size)
    assert (await check(url, data=data, digest=True)).problem == ""
    await download(archive(url, data=data), target)
    assert data == target.read_bytes()
    assert [target] == list(target.parent.iterdir())


@pytest.mark.parametrize(
    ("name", "data", "problem"),
    [
        ("nix", LONG, "4.04 Not Found"),
        ("long", LONG + b"!", "has 40000 bytes, not 40001"),
        ("long", LONG[:-1], "has 40000 bytes, not 39999"),
        ("long", LONG + bytes(4096), "has fewer than 44096 bytes"),
        ("long", LONG[:1024], "has more than 1024 bytes"),
        ("long", b"", "has more than 0 bytes"),
        ("tiny", b"", "has 1 bytes, not 0"),
        ("tiny", LONG, "has 1 bytes, not 40000"),
    ],
)
async def test_other_sizes(
    name: str, data: bytes, problem: str, fileserver: tuple[str, Path]
) -> None:
    """A server that tells no size is asked for the block that should be the last."""
    assert (await check(f"{fileserver[0]}/{name}", data=data)).problem == problem


async def test_many_at_once(fileserver: tuple[str, Path]) -> None:
    """Requests to one server, which come one after the other, do not starve each other."""
    wanted = [
        (f"{fileserver[0]}/{name}?{n}", envelope(FILES[name])) for n in range(8) for name in FILES
    ]
    reports = await check_offers(wanted, digest=True)

    assert [""] * len(wanted) == [report.problem for report in reports]


@pytest.mark.parametrize("left", [1, 1024, 1500, 20_480, 39_999])
async def test_resume(left: int, fileserver: tuple[str, Path], target: Path) -> None:
    """A part is gone on with, wherever it ends."""
    part_of(target, LONG).write_bytes(LONG[:left])
    steps: list[int] = []
    await download(archive(f"{fileserver[0]}/long", data=LONG), target, progress=steps.append)

    assert (left, len(LONG)) == (steps[0], sum(steps))
    assert min(steps) > 0
    assert target.read_bytes() == LONG


async def test_a_file_that_is_replaced(fileserver: tuple[str, Path], target: Path) -> None:
    """A file that is replaced while it is downloaded is begun anew, not mixed."""
    url, path = f"{fileserver[0]}/replaced", fileserver[1] / "replaced"
    path.write_bytes(OTHER[:40_000])
    fresh = path.with_name("fresh")
    fresh.write_bytes(LONG)
    steps: list[int] = []

    def progress(count: int) -> None:
        steps.append(count)
        if sum(steps) >= 10_000 and fresh.exists():
            fresh.rename(path)

    await download(archive(url, data=LONG), target, progress=progress)

    assert [step for step in steps if step < 0] == [-10_240]
    assert target.read_bytes() == LONG


@needs_libcoap
async def test_libcoap(target: Path) -> None:
    """Libcoap's server, which tells the size, is asked and downloaded from."""
    source = target.with_name("source")
    source.write_bytes(LONG)
    with libcoap_server() as server:
        url = f"{server}/put"
        code, _, _ = await run(LIBCOAP, "-m", "put", "-b", "1024", "-f", source, url)
        assert code == 0
        assert (await check(url, data=LONG)).size == len(LONG)
        assert (await check(url, data=SHORT)).problem == "has 40000 bytes, not 20000"
        await download(archive(url, data=LONG), target)

    assert target.read_bytes() == LONG


# ----------------------------------------------------------------------------------------------
# One that lies

Reply = tuple[str, list[coap.Option], bytes]


def asked(request: Answer) -> coap.Block:
    (value,) = request.values(coap.BLOCK2)
    return coap.Block.decode(value)


def piece(request: Answer, data: bytes = SHORT, szx: int = 6, tag: bytes = b"1") -> Reply:
    """Answer as a good server does, in blocks of at most a size."""
    block = asked(request)
    szx = min(szx, block.szx)
    number, end = block.offset >> szx + 4, block.offset + (16 << szx)
    return "2.05", [(coap.ETAG, tag), sent(number, end < len(data), szx)], data[block.offset : end]


def sent(number: int, more: bool, szx: int = 6) -> coap.Option:
    return coap.BLOCK2, coap.Block(number, more, szx).encode()


def size(value: int) -> coap.Option:
    return coap.SIZE2, coap.encode_uint(value)


def with_size(reply: Reply, value: int) -> Reply:
    return reply[0], [*reply[1], size(value)], reply[2]


def then(later: Callable[[Answer], Reply | None]) -> Callable[[Answer], Reply | None]:
    """Send four blocks as they are, and others in another way."""
    return lambda request: piece(request) if asked(request).number < 4 else later(request)


TAGS = iter(range(1 << 20))
BLOCK = DATA[:1024]
FINE = ""
SILENCE = "no answer in 0.2 s"
ANOTHER = "answers with another block than was asked for"


@pytest.mark.parametrize(
    ("reply", "told", "downloaded"),
    [
        (piece, FINE, FINE),
        (lambda r: with_size(piece(r), 20_000), FINE, FINE),
        (lambda r: with_size(piece(r), 0), FINE, FINE),
        (lambda r: with_size(piece(r), 2**40), FINE, FINE),
        (lambda r: piece(r, szx=2), FINE, FINE),
        (lambda r: with_size(piece(r), 12), "has 12 bytes, not 20000", "has 12 bytes, not 20000"),
        (lambda r: piece(r, OTHER[:20_000]), FINE, "SHA-256 is "),
        (lambda r: piece(r, tag=b"%d" % next(TAGS)), FINE, "changed again and again"),
        (lambda _: None, SILENCE, SILENCE),
        (then(lambda _: None), SILENCE, SILENCE),
        (lambda _: ("4.03", [], b"go \x1b[31m away"), "^4.03 ", "^4.03 "),
        (then(lambda _: ("4.03", [], b"")), "^4.03 ", "^4.03 "),
        (then(lambda _: ("4.00", [], b"")), "has fewer than 20000 bytes", "^4.00 "),
        (then(lambda _: ("4.02", [], b"")), "has fewer than 20000 bytes", "^4.02 "),
        (lambda _: ("2.05", [sent(1, True)], BLOCK), ANOTHER, ANOTHER),
        (lambda _: ("2.05", [sent(0, True)], BLOCK[1:]), ANOTHER, ANOTHER),
        (lambda _: ("2.05", [sent(0, True)], b""), ANOTHER, ANOTHER),
        (lambda _: ("2.05", [sent(0, False)], b""), "has 0 bytes", "has 0 bytes"),
        (lambda _: ("2.05", [], BLOCK), "has 1024 bytes, not 20000", "has 1024 bytes, not 20000"),
        (then(lambda _: ("2.05", [(coap.ETAG, b"1")], BLOCK)), ANOTHER, ANOTHER),
        (then(lambda r: piece(r, SHORT[:5000])), "has fewer than", "has 5000 bytes"),
        (then(lambda r: piece(r, DATA)), "has more than 20000 bytes", "has more than 20000 bytes"),
    ],
)
async def test_lies(
    reply: Callable[[Answer], Reply | None], told: str, downloaded: str, target: Path
) -> None:
    """What is wrong is told in one line, and never put in place."""
    async with puppet(reply) as uri:
        for digest, match in ((False, told), (True, downloaded)):
            timeout_s = 0.2 if match == SILENCE else 5.0
            report = await check(uri, data=SHORT, digest=digest, timeout_s=timeout_s)
            assert report.problem.isprintable()
            assert bool(match) == bool(report.problem), report.problem
            assert re.search(match, report.problem)
        for in_flight in (1, 8):
            place = target.with_name(f"{in_flight}")
            fetching = download(
                archive(uri, data=SHORT), place, timeout_s=timeout_s, in_flight=in_flight
            )
            if downloaded:
                with pytest.raises(TransferError, match=downloaded.removeprefix("^")):
                    await fetching
            else:
                await fetching
            assert place.exists() == (not downloaded)


@pytest.mark.parametrize("left", [1, 700, 1024, 1500])
async def test_resume_in_small_blocks(left: int, target: Path) -> None:
    """A server that wants smaller blocks than asked for is gone on with, too."""
    part_of(target, SHORT).write_bytes(SHORT[:left])
    async with puppet(lambda request: piece(request, szx=2)) as uri:
        await download(archive(uri, data=SHORT), target)

    assert target.read_bytes() == SHORT


@pytest.mark.parametrize("code", ["4.00", "4.02", "4.08"])
async def test_a_server_that_begins_at_the_first_block_only(code: str, target: Path) -> None:
    """What refuses to go on with a part of an earlier run is downloaded from its begin."""
    part_of(target, SHORT).write_bytes(SHORT[:5000])
    numbers: list[int] = []

    def reply(request: Answer) -> Reply:
        numbers.append(asked(request).number)
        begins = numbers[-1] == 0 or numbers[-1] - 1 in numbers
        return piece(request) if begins else (code, [], b"")

    async with puppet(reply) as uri:
        await download(archive(uri, data=SHORT), target)

    assert numbers[:3] == [4, 0, 1]
    assert target.read_bytes() == SHORT


async def test_silence_in_the_middle(target: Path) -> None:
    """What came before a server fell silent need not come again."""
    numbers: list[int] = []

    def reply(request: Answer) -> Reply | None:
        numbers.append(asked(request).number)
        return piece(request) if awake or numbers[-1] < 9 else None

    awake = False
    async with puppet(reply) as uri:
        with pytest.raises(TransferError, match=SILENCE):
            await download(archive(uri, data=SHORT), target, timeout_s=0.2)
        awake = True
        numbers.clear()
        await download(archive(uri, data=SHORT), target)

    assert list(range(9, 20)) == sorted(set(numbers))
    assert target.read_bytes() == SHORT


async def test_a_file_that_grows(target: Path) -> None:
    """A file that ends too early, and is another one when it is asked for again, is begun anew."""
    grown = iter([False])

    def reply(request: Answer) -> Reply:
        if asked(request).number == 4 and next(grown, True):
            state["data"], state["tag"] = SHORT, b"2"
        return piece(request, state["data"], tag=state["tag"])

    state = {"data": SHORT[:5000], "tag": b"1"}
    async with puppet(reply) as uri:
        await download(archive(uri, data=SHORT), target)

    assert target.read_bytes() == SHORT


async def test_the_next_offer_over_coap(target: Path) -> None:
    """What one server has brought, wrong as it may be, does not spoil what the next brings."""
    async with (
        puppet(then(lambda _: None)) as silent,
        puppet(lambda request: piece(request, OTHER[:20_000])) as wrong,
        puppet(lambda request: piece(request, tag=b"2")) as good,
    ):
        wanted = archive(silent, wrong, good, data=SHORT)
        assert wanted.offers[2] == await download(wanted, target, timeout_s=0.2)

    assert target.read_bytes() == SHORT


async def test_more_than_coap_can_count() -> None:
    """CoAP has a million blocks; a block after them is not asked for."""
    huge: Envelope = attrs.evolve(envelope(), size=2**30 + 1)
    async with puppet(lambda request: piece(request, DATA)) as uri:
        (report,) = await check_offers([(uri, huge)])

    assert report.problem == "CoAP cannot address a block at 1073741824 bytes"


async def test_errors_of_both_kinds(target: Path) -> None:
    """Of several reasons, one that says that somebody lies makes it an integrity error."""
    async with puppet(lambda request: piece(request, OTHER[:20_000])) as uri:
        with pytest.raises(IntegrityError, match=r"SHA-256.*; http.*refused"):
            await download(archive(uri, "http://127.0.0.1:1/", data=SHORT), target)
