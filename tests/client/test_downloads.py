"""client/downloads.py over HTTP and HTTPS: checks and downloads; lies are found out."""

from __future__ import annotations

import asyncio
import hashlib
import random
import re
import sys
from collections.abc import AsyncIterator, Callable, Iterator
from pathlib import Path

import attrs
import pytest

from netota_coap.client.downloads import RateLimit, Report, check_offers, download, resolve
from netota_coap.errors import ConfigError, IntegrityError, TransferError
from netota_coap.model.values import Archive, Envelope, Offer
from tests.support.file_servers import (
    HttpServer,
    Request,
    Response,
    chunked,
    http_server,
    just,
    ranged,
    raw,
    to,
    whole,
)
from tests.support.serving import PROJECT, until

DATA = random.Random(1).randbytes(300_000)
OTHER = random.Random(2).randbytes(300_000)
CUT = 100_000


@pytest.fixture(autouse=True)
def _direct(monkeypatch: pytest.MonkeyPatch) -> None:
    """No proxy stands in the way to this host; no authority is trusted, which also saves time."""
    monkeypatch.setenv("NO_PROXY", "*")
    monkeypatch.setenv("SSL_CERT_FILE", "/dev/null")


def envelope(data: bytes = DATA) -> Envelope:
    digest = hashlib.sha256(data).digest()
    return Envelope(type="application/octet-stream", size=len(data), sha256=digest)


def archive(*urls: str, data: bytes = DATA) -> Archive:
    offers = tuple(Offer(url=url, metric=number) for number, url in enumerate(urls))
    return Archive(name="image", envelope=envelope(data), offers=offers)


def part_of(target: Path, data: bytes = DATA) -> Path:
    return target.with_name(f".{target.name}.{envelope(data).sha256.hex()[:16]}.part")


@pytest.fixture
def target(tmp_path: Path) -> Iterator[Path]:
    """Where the archive goes; nothing may be left beside it but parts."""
    yield tmp_path / "image.bin"
    others = {path.name for path in tmp_path.iterdir()} - {"image.bin"}
    assert all(name.startswith(".image.bin.") and name.endswith(".part") for name in others)


@pytest.fixture
async def good() -> AsyncIterator[HttpServer]:
    async with http_server(lambda request: ranged(DATA, request)) as it:
        yield it


# ----------------------------------------------------------------------------------------------
# URLs


@pytest.mark.parametrize(
    ("url", "server", "absolute"),
    [
        ("/b/x", "coap://[::1]:5683", "coap://[::1]:5683/b/x"),
        ("/b/x", "https://example.com/p/pkg?q", "https://example.com/b/x"),
        ("http://h/x", None, "http://h/x"),
        ("http://h/x", "coap://other", "http://h/x"),
    ],
)
def test_resolve(url: str, server: str | None, absolute: str) -> None:
    """A path means the server; all else means itself."""
    assert absolute == resolve(url, server)


@pytest.mark.parametrize("server", [None, "example.com", "coap://", "http://[::1"])
def test_resolve_without_a_server(server: str | None) -> None:
    """A path needs a server, and one that is a URI."""
    with pytest.raises(ConfigError) as caught:
        resolve("/b/x", server)

    assert caught.value.hint


# ----------------------------------------------------------------------------------------------
# Asking


async def check(
    url: str, *, digest: bool = False, data: bytes = DATA, timeout_s: float = 5.0
) -> Report:
    (report,) = await check_offers([(url, envelope(data))], digest=digest, timeout_s=timeout_s)
    return report


def no_head(status: str) -> Callable[[Request], Response]:
    return lambda r: just(status) if r.method == "HEAD" else ranged(DATA, r)


def lengthless_head(request: Request) -> Response:
    answer = ranged(DATA, request)
    if request.method == "GET":
        return answer
    return answer.without("Content-Length").having(Connection="close")


def found_at(path: str) -> Callable[[Request], Response]:
    return lambda request: ranged(DATA, request) if request.path == path else to(path)


@pytest.mark.parametrize(
    ("reply", "size"),
    [
        (lambda request: ranged(DATA, request), len(DATA)),
        (lambda _: whole(DATA), len(DATA)),
        (lambda request: ranged(DATA, request, 'W/"weak"'), len(DATA)),
        (no_head("403 Forbidden"), len(DATA)),
        (no_head("405 Method Not Allowed"), len(DATA)),
        (no_head("501 Not Implemented"), len(DATA)),
        (lengthless_head, len(DATA)),
        (found_at("/elsewhere"), len(DATA)),
        (lambda _: chunked(DATA), None),
    ],
)  # fmt: skip
async def test_fine(reply: Callable[[Request], Response], size: int | None) -> None:
    """What a server may do, and what good ones do, is fine."""
    async with http_server(reply) as it:
        asked = await check(it.url)
        downloaded = await check(it.url, digest=True)

    assert Report(it.url, envelope(), size) == asked
    assert (downloaded.problem, downloaded.envelope) == ("", envelope())


async def test_an_empty_file() -> None:
    """A file without bytes has no first byte to ask for."""

    def reply(request: Request) -> Response:
        return just("405 X") if request.method == "HEAD" else ranged(b"", request)

    async with http_server(reply) as it:
        assert Report(it.url, envelope(b""), 0) == await check(it.url, data=b"")
        assert (await check(it.url, data=b"", digest=True)).problem == ""


MISSING = "404 Not Found"
PARTIAL = "206 Partial Content"
STATUS = b"HTTP/1.1 200 OK\r\n"
ENDLESS = Response(
    headers={"Transfer-Encoding": "chunked"},
    body=(b"8000\r\n" + DATA[:0x8000] + b"\r\n") * 20,
    stall=True,
)


def missing_elsewhere(request: Request) -> Response:
    return just(MISSING) if request.path == "/x" else to("/x")


@pytest.mark.parametrize(
    ("reply", "asked", "downloaded"),
    [
        (lambda _: whole(OTHER), "", "SHA-256 is .*, not "),
        (lambda _: whole(DATA[:12]), "has 12 bytes, not 300000", "has 12 bytes, not 300000"),
        (lambda _: just("404 Nix\x1b[31m"), "^404 Not Found$", "^404 Not Found$"),
        (lambda _: just("599 Own"), "^599 Unknown$", "^599 Unknown$"),
        (lambda _: Response("204 No Content"), "204", "204"),
        (missing_elsewhere, "404 Not Found at http://127", "404 Not Found at http://127"),
        (lambda _: chunked(DATA + b"!"), "", "has more than 300000 bytes"),
        (lambda _: chunked(DATA[:-1]), "", "ended after 299999 of 300000 bytes"),
        (lambda _: ENDLESS, "", "has more than 300000 bytes"),
        (
            lambda _: whole(DATA).having(Content_Encoding="gzip"),
            "Content-Encoding gzip",
            "Content-Encoding gzip",
        ),
        (
            lambda _: whole(DATA).having(Content_Length="\u00b2"),
            "Content-Length",
            "Content-Length",
        ),
        (lambda _: raw(STATUS + b"Content-Length: %r\r\n\r\n" % 10**30), "bad Con", "bad Con"),
        (lambda _: raw(STATUS + b"a: b\r\n" * 40_000), "too long", "too long"),
        (lambda _: raw(b"\xff\x00nonsense\r\n\r\n"), "illegal", "illegal"),
        (lambda _: raw(b"x" * 10_000 + b"\r\n\r\n"), "illegal", "illegal"),
        (lambda _: raw(STATUS).but(stall=True), "no answer in 0.2 s", "no answer in 0.2 s"),
        (lambda _: whole(DATA).but(cut=10, stall=True), "", "no progress in 0.2 s"),
        (lambda _: whole(DATA).but(cut=0), "", "peer closed connection"),
        (lambda _: whole(DATA).but(status=PARTIAL), "", "another range"),
        (lambda _: to("/file"), "more than 10 times", "more than 10 times"),
        (lambda _: to("ftp://h/x"), "unsupported protocol", "unsupported protocol"),
        (lambda _: to("http://xn--/"), "not known|resolution", "not known|resolution"),
        (lambda _: to("http://127.0.0.1:99999/"), "valid HTTP URL", "valid HTTP URL"),
        (lambda _: to("http://a:b/"), "redirects to an invalid URL", "to an invalid URL"),
    ],
)
async def test_problems(reply: Callable[[Request], Response], asked: str, downloaded: str) -> None:
    """What is wrong is told in one line."""
    async with http_server(reply) as it:
        for digest, match in ((False, asked), (True, downloaded)):
            timeout_s = 0.2 if "0.2" in match else 5.0
            problem = (await check(it.url, digest=digest, timeout_s=timeout_s)).problem
            assert bool(match) == bool(problem), problem
            assert re.search(match, problem)
            assert problem.isprintable()
            assert len(problem) < 200


@pytest.mark.parametrize(
    ("url", "match"),
    [
        ("http://127.0.0.1:1/x", "^Connection refused$"),
        ("http://no.such.host.invalid/x", "not known|resolution"),
        ("http://127.0.0.1:99999/x", "valid HTTP URL"),
        ("http://[::1/x", "valid HTTP URL"),
        ("http://a\u00e4..b/x", "valid HTTP URL|not known"),
        ("http:///x", "missing"),
        ("ftp://127.0.0.1/x", "^scheme ftp is not supported$"),
        ("coap+tcp://127.0.0.1/x", r"^scheme coap\+tcp is not supported$"),
        ("coap://127.0.0.1:1/x", "Connection refused"),
    ],
)
async def test_nobody_there(url: str, match: str) -> None:
    """What leads nowhere is told with the system's own reason."""
    assert re.search(match, (await check(url)).problem)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("ALL_PROXY", "socks5://127.0.0.1:1"),
        ("HTTP_PROXY", "nonsense://127.0.0.1:1"),
        ("HTTPS_PROXY", "http://[::1"),
    ],
)
async def test_a_proxy_that_is_none(
    name: str, value: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What the environment says wrong of proxies is told as such."""
    monkeypatch.delenv("NO_PROXY")
    monkeypatch.setenv(name, value)
    with pytest.raises(ConfigError, match="proxy settings of the environment") as caught:
        await check("http://127.0.0.1:1/x")

    assert name in caught.value.hint


async def test_urls_without_end() -> None:
    """A URL that a server sent is shown in part."""

    def reply(request: Request) -> Response:
        far = "/" + "x" * 20_000
        return Response("404 X", {"Content-Length": "0"}) if request.path == far else to(far)

    async with http_server(reply) as it:
        problem = (await check(it.url)).problem

    assert problem.startswith("404 Not Found at http://127")
    assert len(problem) < 300


async def test_reports(good: HttpServer) -> None:
    """Each distinct offer is asked once, a few at a time; reports are in the order given."""
    urls = [f"{good.url}?{number}" for number in range(20)]
    wanted = [
        (url, envelope(DATA if number % 2 else OTHER[1:])) for number, url in enumerate(urls)
    ]
    seen: list[Report] = []
    received: list[int] = []
    reports = await check_offers(
        [*wanted, *wanted], digest=True, concurrency=3, on_report=seen.append,
        progress=received.append,
    )  # fmt: skip

    assert wanted == [(report.url, report.envelope) for report in reports]
    assert [bool(number % 2) for number in range(20)] == [not report.problem for report in reports]
    assert len(seen) == 20
    assert 10 * len(DATA) == sum(received)
    assert len(good.requests) == 20


async def test_nothing_to_check() -> None:
    """Without offers there are no reports."""
    assert await check_offers([]) == []


async def test_a_report_that_nobody_wants(good: HttpServer) -> None:
    """What the caller raises ends the check, and all that is under way."""

    def refuse(_: Report) -> None:
        raise BrokenPipeError

    with pytest.raises(BrokenPipeError):
        await check_offers([(good.url, envelope())], on_report=refuse)


# ----------------------------------------------------------------------------------------------
# Downloading


async def test_download(good: HttpServer, target: Path) -> None:
    """An archive arrives whole, from the offer of the lowest metric; nothing is left beside it."""
    steps: list[int] = []
    wanted = archive(good.url + "?0", good.url + "?1")
    wanted = attrs.evolve(wanted, offers=wanted.offers[::-1])
    offer = await download(wanted, target, progress=steps.append)

    assert wanted.offers[1] == offer
    assert target.read_bytes() == DATA
    assert [target] == list(target.parent.iterdir())
    assert (0, len(DATA)) == (steps[0], sum(steps))
    (request,) = good.requests
    assert request.headers["user-agent"].startswith("netota-coap/")
    assert request.headers["accept-encoding"] == "identity"


async def test_relative_to_a_server(good: HttpServer, target: Path) -> None:
    """A relative offer is downloaded from the server that was named."""
    assert await download(archive("/file"), target, server=good.url)
    assert target.read_bytes() == DATA


async def test_nothing_to_do(target: Path) -> None:
    """What is there already is not downloaded again, and nobody is asked."""
    target.write_bytes(DATA)
    assert await download(archive("http://127.0.0.1:1/x"), target) is None

    target.write_bytes(b"")
    part_of(target).write_bytes(DATA)
    assert await download(archive("http://127.0.0.1:1/x"), target) is None
    assert target.read_bytes() == DATA


@pytest.mark.parametrize("data", [b"", b"1"])
async def test_small_files(data: bytes, target: Path) -> None:
    """A file may be as small as it likes."""
    async with http_server(lambda request: ranged(data, request)) as it:
        await download(archive(it.url, data=data), target)

    assert data == target.read_bytes()


@pytest.mark.parametrize("before", [None, OTHER, b"another version"])
async def test_a_wrong_file_never_takes_the_place(before: bytes | None, target: Path) -> None:
    """Without a right file, the target is what it was."""
    if before is not None:
        target.write_bytes(before)
    async with http_server(lambda request: ranged(OTHER, request)) as it:
        with pytest.raises(IntegrityError, match=r"^image: http://127.*SHA-256 is "):
            await download(archive(it.url), target)

    assert before == (target.read_bytes() if target.exists() else None)
    assert not part_of(target).exists()


@pytest.mark.parametrize("tag", ['"1"', 'W/"1"'])
async def test_cut_connections(tag: str, target: Path) -> None:
    """A connection that is cut again and again is resumed where it was cut."""

    def reply(request: Request) -> Response:
        return ranged(DATA, request, tag).but(cut=CUT)

    async with http_server(reply) as it:
        await download(archive(it.url), target)
        starts = [request.headers.get("range", "") for request in it.requests]
        conditions = [request.headers.get("if-range") for request in it.requests]

    assert ["", f"bytes={CUT}-", f"bytes={2 * CUT}-"] == starts[:3]
    assert ['"1"' if tag == '"1"' else None] * 2 == conditions[1:3]
    assert target.read_bytes() == DATA


async def test_stalls(target: Path) -> None:
    """A server that falls silent is asked again."""

    def reply(request: Request) -> Response:
        return ranged(DATA, request).but(**({} if request.number else {"cut": CUT, "stall": True}))

    async with http_server(reply) as it:
        await download(archive(it.url), target, timeout_s=0.2)

    assert target.read_bytes() == DATA


async def test_bytes_that_drip(target: Path) -> None:
    """A few bytes now and then are no progress."""
    gone = asyncio.Event()

    async def drip(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readuntil(b"\r\n\r\n")
        writer.write(b"HTTP/1.1 200 OK\r\nContent-Length: 300000\r\n\r\n")
        while not (reader.at_eof() or writer.is_closing()):
            writer.write(b"x")
            await asyncio.sleep(0.01)  # slower than a KiB in the time-out
        writer.close()
        gone.set()

    async with await asyncio.start_server(drip, "127.0.0.1", 0) as server:
        url = f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}/"
        with pytest.raises(TransferError, match=r"no progress in 0\.3 s"):
            await download(archive(url), target, timeout_s=0.3)
        await gone.wait()


def then(first: Response, reply: Callable[[Request], Response]) -> Callable[[Request], Response]:
    """Cut the first answer, and go on with others."""
    return lambda request: reply(request) if request.number else first.but(cut=CUT)


OTHER_RANGE = Response("206 Partial Content", {"Content-Range": "bytes 0-9/300000"}, b"0" * 10)
GARBLED_RANGE = OTHER_RANGE.having(Content_Range="bytes eleven-")
LATER = '"2"'


@pytest.mark.parametrize(
    ("reply", "error"),
    [
        (then(whole(DATA), lambda _: whole(DATA)), ""),
        (then(whole(OTHER), lambda request: ranged(DATA, request, LATER)), ""),
        (then(whole(OTHER), lambda request: ranged(DATA, request)), ""),
        (then(whole(OTHER).without("ETag"), lambda request: ranged(DATA, request)), ""),
        (then(whole(DATA), lambda request: ranged(DATA[: CUT // 2], request)), "has 50000 bytes"),
        (then(whole(DATA), lambda request: ranged(DATA + b"!", request)), "has 300001 bytes"),
        (then(whole(DATA), lambda request: ranged(OTHER, request, LATER)), "SHA-256"),
        (then(whole(DATA), lambda _: OTHER_RANGE.having(ETag='"1"')), "another range"),
        (then(whole(DATA), lambda _: GARBLED_RANGE.having(ETag='"1"')), "another range"),
        (then(whole(DATA), lambda _: just("404 X")), "404 Not Found"),
        (then(whole(DATA), lambda _: just("416 X")), "416 "),
        (lambda r: ranged(DATA, r, f'"{r.number}"').but(cut=CUT), "^.*peer closed"),
        (then(whole(DATA), lambda r: ranged(DATA, r).having(ETag='"x"')), ""),
        (lambda _: chunked(DATA[:-1]), "ended after 299999 of 300000 bytes"),
        (lambda _: whole(DATA).but(cut=1023), "peer closed"),
    ],
)  # fmt: skip
async def test_changes(reply: Callable[[Request], Response], error: str, target: Path) -> None:
    """What does not fit to what has arrived is begun anew, a few times."""
    steps: list[int] = []
    async with http_server(reply) as it:
        if error:
            with pytest.raises(TransferError, match=error):
                await download(archive(it.url), target, progress=steps.append)
        else:
            await download(archive(it.url), target, progress=steps.append)
        assert len(it.requests) <= 10

    kept = target if target.exists() else part_of(target)
    assert (kept.stat().st_size if kept.exists() else 0) == sum(steps)
    assert target.exists() == (not error)
    assert error or target.read_bytes() == DATA


@pytest.mark.parametrize(
    ("left", "asked"),
    [
        (DATA[:CUT], [f"bytes={CUT}-"]),
        (OTHER[:CUT], [f"bytes={CUT}-", None]),
        (OTHER, [None]),
        (DATA + b"!", [None]),
        (b"", [None]),
    ],
)
async def test_what_an_earlier_run_left(
    left: bytes, asked: list[str | None], good: HttpServer, target: Path
) -> None:
    """A part is gone on with where it is right, and begun anew where it is not."""
    part_of(target).write_bytes(left)
    steps: list[int] = []
    await download(archive(good.url), target, progress=steps.append)

    assert asked == [request.headers.get("range") for request in good.requests]
    assert target.read_bytes() == DATA
    assert len(DATA) == sum(steps)


async def test_the_next_offer(good: HttpServer, target: Path) -> None:
    """Offers that fail are passed over; what one has brought, the next need not."""

    def cut(request: Request) -> Response:
        return whole(DATA).but(cut=CUT) if not request.number else Response("503 X")

    async with http_server(cut) as bad:
        wanted = archive("ftp://h/x", "/relative", "http://127.0.0.1:1/", bad.url, good.url)
        offer = await download(wanted, target)

    assert wanted.offers[-1] == offer
    assert f"bytes={CUT}-" == good.requests[0].headers["range"]
    assert target.read_bytes() == DATA


async def test_no_offer_works(target: Path) -> None:
    """The error has each offer and its reason."""
    with pytest.raises(TransferError) as caught:
        await download(archive("ftp://h/x", "/b/x", "http://127.0.0.1:1/"), target)

    assert caught.value.detail == (
        "image: ftp://h/x: scheme ftp is not supported; /b/x: relative to a server; "
        "http://127.0.0.1:1/: Connection refused"
    )
    assert "--server" in caught.value.hint
    with pytest.raises(TransferError, match=r"^image: has no offer$"):
        await download(archive(), target)


async def test_one_at_a_time(good: HttpServer, target: Path) -> None:
    """Two processes do not write to one part."""
    async with http_server(lambda _: whole(DATA).but(cut=CUT, stall=True)) as slow:
        first = asyncio.create_task(download(archive(slow.url), target))
        await until(lambda: part_of(target).exists() and part_of(target).stat().st_size == CUT)
        with pytest.raises(TransferError, match="by another process"):
            await download(archive(good.url), target)
        first.cancel()
        with pytest.raises(asyncio.CancelledError):
            await first
    await download(archive(good.url), target)

    assert f"bytes={CUT}-" == good.requests[0].headers["range"]


async def test_places_that_are_no_files(tmp_path: Path, good: HttpServer) -> None:
    """Only a regular file is replaced; a link in the place of the part is not followed."""
    with pytest.raises(ConfigError, match="not a regular file"):
        await download(archive(good.url), tmp_path)
    with pytest.raises(ConfigError, match="not a regular file"):
        await download(archive(good.url), Path("/dev/null"))
    with pytest.raises(FileNotFoundError):
        await download(archive(good.url), tmp_path / "no/such/directory")
    victim = tmp_path / "victim"
    victim.write_bytes(b"precious")
    part_of(tmp_path / "image.bin").symlink_to(victim)
    with pytest.raises(OSError, match="symbolic links"):
        await download(archive(good.url), tmp_path / "image.bin")

    assert victim.read_bytes() == b"precious"


CHILD = """
import asyncio, sys
from pathlib import Path
from netota_coap.client.downloads import download
from tests.client.test_downloads import archive
asyncio.run(download(archive(sys.argv[1]), Path(sys.argv[2])))
"""


async def test_killed(target: Path) -> None:
    """A process that is killed leaves what it has; the next goes on from there."""

    def reply(request: Request) -> Response:
        answer = ranged(DATA, request)
        return answer if request.number else answer.but(cut=CUT, stall=True)

    async with http_server(reply) as it:
        child = await asyncio.create_subprocess_exec(
            sys.executable, "-c", CHILD, it.url, str(target), cwd=PROJECT
        )
        try:
            part = part_of(target)
            await until(lambda: part.exists() and part.stat().st_size == CUT)
        finally:
            child.kill()
            await child.wait()
        assert not target.exists()
        await download(archive(it.url), target)

        assert f"bytes={CUT}-" == it.requests[1].headers["range"]
    assert target.read_bytes() == DATA


async def test_a_limit(tmp_path: Path) -> None:
    """All downloads together are as slow as they are told to be; that wait is no silence."""
    async with http_server(lambda request: ranged(DATA, request)) as server:
        pace = RateLimit(2 * len(DATA))
        start = asyncio.get_running_loop().time()
        await asyncio.gather(
            *(
                download(archive(server.url), tmp_path / name, timeout_s=0.4, pace=pace)
                for name in ("one", "two")
            )
        )
        took_s = asyncio.get_running_loop().time() - start
    assert took_s >= 1.0
    assert (tmp_path / "one").read_bytes() == (tmp_path / "two").read_bytes() == DATA
