"""Servers that say when they will have a file are waited for, over CoAP and HTTP."""

from __future__ import annotations

import asyncio
import os
import re
from email.utils import formatdate
from pathlib import Path
from time import time

import attrs
import pytest

from netota_coap.client.downloads import RateLimit, check_offers, download
from netota_coap.client.transports import sources_of
from netota_coap.coap import options as coap
from netota_coap.errors import PeerError, TransferError
from tests.client.test_coap_client import puppet
from tests.client.test_download_coap import SHORT, Reply, asked, piece
from tests.client.test_downloads import archive, envelope, part_of
from tests.support.device import Answer
from tests.support.file_servers import Request, Response, http_server, just, ranged
from tests.support.serving import until

pytestmark = pytest.mark.slow

BUSY = "503 Service Unavailable"


@pytest.fixture(autouse=True)
def _direct(monkeypatch: pytest.MonkeyPatch) -> None:
    """No proxy stands in the way to this host."""
    monkeypatch.setenv("NO_PROXY", "*")


@pytest.fixture
def target(tmp_path: Path) -> Path:
    return tmp_path / "image.bin"


@attrs.define
class Fetching:
    """A server of the file that does not have one block of it at first.

    Attributes:
        times: How often it says so.
        after_s: What it says, seconds; None: nothing.
        begin: Of the block, bytes.
    """

    times: int = 1
    after_s: int | None = 1
    begin: int = 0

    def busy(self, offset: int) -> bool:
        if not self.begin <= offset < self.begin + 1024 or self.times == 0:
            return False
        self.times -= 1
        return True

    def coap(self, request: Answer) -> Reply:
        if not self.busy(asked(request).offset):
            return piece(request)
        told = () if self.after_s is None else ((coap.MAX_AGE, coap.encode_uint(self.after_s)),)
        return "5.03", [*told], b""

    def http(self, request: Request) -> Response:
        found = re.match(r"bytes=(\d+)", request.headers.get("range", ""))
        if not self.busy(int(found[1]) if found else 0):
            return ranged(SHORT, request)
        told = {} if self.after_s is None else {"Retry_After": str(self.after_s)}
        return just(BUSY).having(**told)


async def took_s(url: str, target: Path, **options: object) -> tuple[float, list[TransferError]]:
    """Download and compare; how long it took, and what made it wait."""
    troubles: list[TransferError] = []
    begun = asyncio.get_running_loop().time()
    await download(
        archive(url, data=SHORT), target, on_trouble=troubles.append, **options  # type: ignore[arg-type]
    )  # fmt: skip
    assert target.read_bytes() == SHORT
    return asyncio.get_running_loop().time() - begun, troubles


@pytest.mark.parametrize(
    ("server", "in_flight"),
    [
        (Fetching(), 1),
        (Fetching(after_s=0), 1),  # nobody is asked without end
        (Fetching(times=2, begin=5120), 8),  # once ahead, and once alone
    ],
)
async def test_coap(server: Fetching, in_flight: int, target: Path) -> None:
    """5.03 with Max-Age is waited out, and what had come is gone on with."""
    paces: list[int] = []

    async def pace(count: int) -> None:
        paces.append(count)

    async with puppet(server.coap) as uri:
        took, troubles = await took_s(uri, target, in_flight=in_flight, pace=pace)

    assert took >= 1.0
    assert (len(troubles), paces.count(0)) == (1, 1)
    assert sum(paces) == len(SHORT)


async def test_http(target: Path) -> None:
    """So is 503 with Retry-After, whatever is left of the time-out."""
    async with http_server(Fetching().http) as server:
        took, troubles = await took_s(server.url, target, timeout_s=0.9)
        assert len(server.requests) == 2

    assert took >= 1.0
    assert "503 Service Unavailable" in troubles[0].detail


@pytest.mark.parametrize("kind", ["coap", "http"])
@pytest.mark.parametrize(
    ("after_s", "patience_s", "bound_s"),
    [
        (None, None, 0.0),
        (1, 1.5, 1.5),
        (1, 0.0, 0.0),
        (0, 0.0, 0.0),
        (60, 100.0, 100.0),  # what the caller says holds for all
        (700, 1_500.0, 1_500.0),
        (601, None, 600.0),
        (61, None, 600.0),
        (60, None, 720.0),  # a gateway says it again and again while it fetches a large file
        (0, 90.0, 90.0),
    ],
)
async def test_patience(
    kind: str,
    after_s: int | None,
    patience_s: float | None,
    bound_s: float,
    target: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Who says nothing, or makes one wait for too long in all, is left for the next offer."""
    monkeypatch.setattr("netota_coap.client.downloads.PATIENCE_FETCHING_S", 720.0)
    server = Fetching(1_000, after_s)
    waited: list[float] = []

    async def idle(wait_s: float) -> None:
        waited.append(wait_s)

    async with (
        puppet(server.coap) as coap_uri,
        http_server(server.http) as http,
        http_server(lambda request: ranged(SHORT, request)) as other,
    ):
        wanted = archive(coap_uri if kind == "coap" else http.url, other.url, data=SHORT)
        offer = await download(wanted, target, patience_s=patience_s, idle=idle)

    assert offer == wanted.offers[1]
    assert 1_000 - server.times == len(waited) + 1
    each_s = bound_s + 1 if after_s is None else max(after_s, 1)
    assert all(each_s <= wait_s <= each_s * 1.1 for wait_s in waited)
    assert sum(waited) + each_s > bound_s
    assert not waited or sum(waited[:-1]) + each_s <= bound_s


async def test_each_offer_is_waited_for(target: Path) -> None:
    """What one server made wait for in vain, the next need not pay for."""
    troubles: list[TransferError] = []
    async with puppet(Fetching(9).coap) as first, puppet(Fetching().coap) as second:
        wanted = archive(first, second, data=SHORT)
        await download(wanted, target, patience_s=1.5, on_trouble=troubles.append)

    assert [first, second] == [trouble.uri for trouble in troubles]


async def test_cancelled_while_it_waits(target: Path) -> None:
    """Whoever stops need not wait; what had come stays."""
    troubles: list[TransferError] = []
    async with puppet(Fetching(times=9, after_s=500, begin=5120).coap) as uri:
        wanted = archive(uri, data=SHORT)
        task = asyncio.create_task(download(wanted, target, on_trouble=troubles.append))
        await until(lambda: troubles)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task

    assert part_of(target, SHORT).read_bytes() == SHORT[:5120]


async def test_cancelled_while_it_opens(target: Path) -> None:
    """What had come is read first, however much it is; whoever stops meanwhile lets go of it."""
    data = bytes(2**26)
    part = part_of(target, data)
    part.touch()
    os.truncate(part, len(data) - 1)

    def is_open() -> bool:
        return part.resolve() in [each.resolve() for each in Path("/proc/self/fd").iterdir()]

    task = asyncio.create_task(download(archive("http://127.0.0.1:1/x", data=data), target))
    await until(is_open)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    await until(lambda: not is_open())

    assert part.stat().st_size == len(data) - 1


async def test_idle(target: Path) -> None:
    """Whoever downloads may do something else than to sleep."""
    waits: list[float] = []

    async def idle(wait_s: float) -> None:
        waits.append(wait_s)

    async with puppet(Fetching(after_s=500).coap) as uri:
        took, _ = await took_s(uri, target, idle=idle)

    assert took < 5.0
    assert [500 <= wait_s <= 550 for wait_s in waits] == [True]


async def test_idle_ends_it(target: Path) -> None:
    """What it raises ends the download, other offers or not; what had come stays."""

    async def idle(_wait_s: float) -> None:
        raise InterruptedError

    async with (
        puppet(Fetching(begin=5120).coap) as uri,
        http_server(lambda request: ranged(SHORT, request)) as other,
    ):
        with pytest.raises(InterruptedError):
            await download(archive(uri, other.url, data=SHORT), target, idle=idle)
        assert not other.requests

    assert part_of(target, SHORT).read_bytes() == SHORT[:5120]


async def test_a_check_does_not_wait() -> None:
    """Who only asks is told."""
    never = Fetching(times=9, after_s=0)
    async with puppet(never.coap) as uri, http_server(never.http) as http:
        for digest in (False, True):
            wanted = [(uri, envelope(SHORT)), (http.url, envelope(SHORT))]
            reports = await check_offers(wanted, digest=digest)
            assert [report.problem[:4] for report in reports] == ["5.03", "503 "]


@pytest.mark.parametrize(
    ("told", "after_s"),
    [
        ("7", 7.0),
        (1_000, 1_000.0),
        (-1_000, 0.0),
        ("9" * 5_000, float("inf")),
        ("-1", None),
        ("soon", None),
        ("\u00b2", None),
        ("Mon, 99 Foo 2026 00:00:00 GMT", None),
        ("", None),
    ],
)
async def test_retry_after(told: str | int, after_s: float | None) -> None:
    """Seconds and dates, here from now on, are understood; what is neither says nothing."""
    if isinstance(told, int):
        told = formatdate(time() + told, usegmt=True)
    answer = just(BUSY).having(Retry_After=told)
    async with (
        http_server(lambda _: answer) as server,
        sources_of([server.url], 5.0) as sources,
    ):
        with pytest.raises(PeerError) as caught:
            await sources["http"].size(server.url, 1)

    assert (after_s is None) == (caught.value.retry_after_s is None)
    assert caught.value.retry_after_s == pytest.approx(after_s, abs=60)


async def test_a_limit_makes_up_for_delays() -> None:
    """What a server takes to answer does not make a limit stricter than it is."""
    pace, now = RateLimit(100_000), asyncio.get_running_loop().time
    start, waited_s = now(), 0.0
    for _ in range(20):
        begun = now()
        await asyncio.sleep(0.01)  # a server
        waited_s += now() - begun
        await pace(2_000)
    assert 0.4 <= now() - start < 0.8 * (0.4 + waited_s)
