"""http/: what is answered, by a real server to a real client."""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
import statistics
import time
from collections.abc import AsyncIterator
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from socket import SO_RCVBUF, SOL_SOCKET, socket

import attrs
import cbor2
import httpx2
import pytest
import pytest_asyncio
from prometheus_client.parser import text_string_to_metric_families

from netota_coap.encoding.codecs import Format
from netota_coap.encoding.content_formats import ContentFormat
from netota_coap.encoding.documents import decode
from netota_coap.errors import AddressError, ConfigError
from netota_coap.http.server import Bounds, HttpSite, serving
from netota_coap.model.values import Repository, Stream
from tests.support.environment import needs_ipv6
from tests.support.serving import PATIENCE_S
from tests.support.web import STATUS, archive, catalog, connected, site, stream

pytestmark = pytest.mark.asyncio(loop_scope="module")

BIG = "/p/pkg/s/big"
SMALL = "/p/pkg/s/small"
CATALOG = catalog(
    {
        "big": stream(7, count=20),
        "small": stream(8, archives=(archive("only", "/b/x"),)),
    }
)
JSON, CBOR, LINK = "application/json", "application/cbor", "application/link-format"
EVENTS = "text/event-stream"
END = b"\r\nConnection: close\r\n\r\n"


@attrs.frozen
class Server:
    """What is served, where, and somebody who asks."""

    site: HttpSite
    uri: str
    client: httpx2.AsyncClient

    async def get(self, target: str, **headers: str) -> httpx2.Response:
        named = {name.replace("_", "-"): value for name, value in headers.items()}
        return await self.client.get(target, headers=named)


@contextlib.asynccontextmanager
async def server(bounds: Bounds | None = None, **options: object) -> AsyncIterator[Server]:
    served = site(CATALOG, **options)
    async with (
        serving(served, "127.0.0.1:0", bounds) as (uri,),
        httpx2.AsyncClient(base_url=uri) as client,
    ):
        yield Server(served, uri, client)


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def it() -> AsyncIterator[Server]:
    async with server() as running:
        yield running


# ----------------------------------------------------------------------------------------------
# Representations


@pytest.mark.parametrize(
    ("target", "accept", "media_type"),
    [
        ("/p", "", JSON),
        ("/p", "*/*", JSON),
        ("/p", "application/*", JSON),
        ("/p", CBOR, CBOR),
        ("/p", LINK, LINK),
        ("/p", f"{JSON};q=0.5, {CBOR};q=0.7", CBOR),
        ("/p/pkg", f"{LINK}, {JSON};q=0.9", LINK),
        ("/p/pkg", f"text/html, {CBOR}", CBOR),
        (BIG, "image/png,application/xml;q=0.9,*/*;q=0.8", JSON),
        (BIG, CBOR, CBOR),
        (BIG, f"{JSON};q=0, */*", CBOR),
        ("/.well-known/core", "", LINK),
        ("/.well-known/core", "*/*", LINK),
    ],
)
async def test_formats(it: Server, target: str, accept: str, media_type: str) -> None:
    """JSON unless something else is asked for; the bytes and the ETag are those of the catalog."""
    answer = await it.get(target, accept=accept)

    assert (200, media_type) == (answer.status_code, answer.headers["content-type"])
    fmt = next(each for each in ContentFormat if each.media_type == media_type)
    resource = CATALOG.find(tuple(target.split("/")[1:]))
    expected = resource.represent(["full"], fmt, "http")
    assert expected.payload == answer.content
    assert f'"{expected.etag.hex()}"' == answer.headers["etag"]
    assert len(expected.payload) == int(answer.headers["content-length"])


async def test_always_full(it: Server) -> None:
    """What takes several datagrams over CoAP is whole over HTTP, in CBOR too, except by ?head."""
    whole = decode(Stream, (await it.get(BIG, accept=CBOR)).content, Format.CBOR)
    head = cbor2.loads((await it.get(f"{BIG}?head", accept=CBOR)).content)

    assert len(whole.archives or ()) == 20
    assert {1, 2, 6} == head.keys()


@pytest.mark.parametrize(
    ("query", "names"),
    [
        ("machine=m3", ["board3"]),
        ("machine=m5&machine=m3", ["board5", "board3"]),
        ("%6dachine=%6D3", ["board3"]),
        ("machine=m3&scheme=https", ["board3"]),
        ("machine=m3&scheme=coap", []),
        ("machine=m%2B3", []),
        ("machine=m3&odd&&", ["board3"]),
        ("full&sequence=7&machine=m1", ["board1"]),
    ],
)
async def test_narrowing(it: Server, query: str, names: list[str]) -> None:
    """A query narrows as it does over CoAP."""
    answer = (await it.get(f"{BIG}?{query}")).json()

    assert names == [each["name"] for each in answer["archives"]]


@pytest.mark.parametrize(
    ("scheme", "forwarded", "found"),
    [
        ("http", "", True),
        ("https", "", False),
        ("coap", "", False),
        ("https", "https", True),
        ("http", "https", False),
        ("http", "gopher", True),
    ],
)
async def test_scheme_of_a_relative_offer(
    it: Server, scheme: str, forwarded: str, found: bool
) -> None:
    """It is the request's, as a reverse proxy on this machine tells."""
    answer = await it.get(f"{SMALL}?scheme={scheme}", x_forwarded_proto=forwarded)

    assert found == bool(answer.json()["archives"])


@pytest.mark.parametrize(
    ("if_none_match", "status"),
    [
        ('"{}"', 304),
        ('W/"{}"', 304),
        ('"other", "{}"', 304),
        ("*", 304),
        ('"other"', 200),
        ("{}", 200),
        ("", 200),
        ('"', 200),
    ],
)
async def test_conditional(it: Server, if_none_match: str, status: int) -> None:
    """A client that has the bytes is told so in a few."""
    etag = (await it.get(BIG)).headers["etag"]

    answer = await it.get(BIG, if_none_match=if_none_match.format(etag.strip('"')))

    assert status == answer.status_code
    assert etag == answer.headers["etag"]
    assert answer.headers["cache-control"] == "public, max-age=60"
    assert answer.headers["vary"] == "Accept"
    assert (status == 304) == (answer.content == b"")


@pytest.mark.parametrize("target", ["/p", BIG, "/.well-known/core", "/nix", "/healthz", "/"])
async def test_head(it: Server, target: str) -> None:
    """HEAD is GET without the payload."""
    asked, got = await it.client.head(target), await it.get(target)

    del asked.headers["date"], got.headers["date"]
    assert (got.status_code, got.headers, b"") == (
        asked.status_code,
        asked.headers,
        asked.content,
    )


async def test_common_headers(it: Server) -> None:
    """Each answer has the date, forbids guessing of its type, and active contents."""
    for target in ("/p", "/nix", "/healthz"):
        headers = (await it.get(target)).headers
        assert (
            abs((parsedate_to_datetime(headers["date"]) - datetime.now(UTC)).total_seconds()) < 60
        )
        assert headers["x-content-type-options"] == "nosniff"
        assert headers["content-security-policy"].startswith("default-src 'none'")
        assert not {"server", "access-control-allow-origin"} & headers.keys()


async def test_prefix() -> None:
    """Links lead where a client behind a reverse proxy finds them; titles stay."""
    served = site(CATALOG, prefix="/ota")
    plain = CATALOG.find(("p",)).represent((), ContentFormat.LINK, "http").payload
    representation = served.represent(CATALOG.find(("p",)), (), ContentFormat.LINK, "http")

    assert plain.replace(b"</p/", b"</ota/p/") == representation.payload
    assert b'"A \\"<package>\\""' in representation.payload


# ----------------------------------------------------------------------------------------------
# Errors


@pytest.mark.parametrize(
    ("target", "accept", "status"),
    [
        ("/nix", "", 404),
        ("/p/", "", 404),
        ("/p/pkg/s", "", 404),
        ("/p/PKG", "", 404),
        (f"{BIG}/", "", 404),
        (f"{BIG}?full&sequence=6", "", 404),
        (f"{BIG}?full&sequence=6", EVENTS, 404),
        (f"{BIG}?full&sequence=x", "", 400),
        (f"{BIG}?full&sequence=x", EVENTS, 400),
        (f"{BIG}?machine=%ff", "", 400),
        (f"{BIG}?" + "&".join(["a=b"] * 65), "", 400),
        (BIG, LINK, 406),
        (BIG, "text/plain", 406),
        (BIG, f"{JSON};q=0", 406),
        ("/p/pkg", EVENTS, 406),
        ("/.well-known/core", JSON, 406),
        ("/status", "", 404),
    ],
)
async def test_problems(it: Server, target: str, accept: str, status: int) -> None:
    """Each wrong request gets its status, and problem details that say why."""
    answer = await it.get(target, accept=accept)

    assert status == answer.status_code
    assert answer.headers["content-type"] == "application/problem+json"
    assert answer.headers["cache-control"] == "no-store"
    assert status == answer.json()["status"]
    assert {"title", "status", "detail"} == answer.json().keys()


@pytest.mark.parametrize(
    ("target", "status"),
    [
        ("/%70", 200),
        ("/p/pkg/s/%62ig", 200),
        ("/%2570", 404),
        ("/p%2Fpkg", 404),
        ("/p/pkg%2Fs%2Fbig", 404),
        ("/p/../p", 404),
        ("/p/%2e%2e/p", 404),
        ("//p", 404),
        ("/p//pkg", 404),
        ("/p/%ff", 404),
        ("/p/%00", 404),
        ("/p/%0d%0aX:%20y", 404),
        ("/p/%", 404),
        ("/" + "a/" * 3500, 404),
        ("http://x/p", 200),
        ("*", 404),
    ],
)
async def test_hostile_paths(it: Server, target: str, status: int) -> None:
    """Segments are decoded exactly once, and lead to what they name or nowhere."""
    async with connected(it.uri) as connection:
        connection.send("GET", target, "Connection: close")
        assert (await connection.head()).startswith(f"HTTP/1.1 {status} ")
        body = await connection.rest()
        assert isinstance(json.loads(body), dict)


@pytest.mark.parametrize("method", ["POST", "PUT", "DELETE", "OPTIONS", "TRACE", "FETCH"])
async def test_methods(it: Server, method: str) -> None:
    """Nothing can be changed; what is sent to that end is not read."""
    answer = await it.client.request(method, SMALL, content=b"x" * 100_000)

    assert (answer.status_code, answer.headers["allow"]) == (405, "GET, HEAD")
    assert answer.headers["connection"] == "close"
    assert answer.json()["status"] == 405


async def test_a_bug_is_logged_and_told_to_nobody(caplog: pytest.LogCaptureFixture) -> None:
    """What was not foreseen is answered without a trace, and the next request as ever."""

    def fails() -> None:
        raise ZeroDivisionError("secret")

    async with server(status=fails) as it:
        answer = await it.get("/readyz")
        assert (answer.status_code, answer.json()["detail"]) == (500, "a bug; it was logged")
        assert (await it.get("/healthz")).status_code == 200
    (record,) = caplog.records
    assert (record.levelno, record.getMessage()) == (logging.ERROR, "a bug: GET /readyz")
    assert "secret" in caplog.text


# ----------------------------------------------------------------------------------------------
# What the service tells of itself


async def test_health(it: Server) -> None:
    """It lives, and is ready unless what is on disk is refused."""
    assert [(await it.get(f"/{t}z")).text for t in ("health", "ready")] == ["alive\n", "ready\n"]
    async with server(status=lambda: attrs.evolve(STATUS, issues=("a.toml: bad",))) as refusing:
        answer = await refusing.get("/readyz")
        assert (answer.status_code, answer.json()["issues"]) == (503, ["a.toml: bad"])
        assert (await refusing.get("/healthz")).status_code == 200


async def test_root_leads_to_the_packages(it: Server) -> None:
    """By a relative reference, which holds behind a prefix as well."""
    answer = await it.get("/")

    assert (answer.status_code, answer.headers["location"]) == (302, "p")


async def test_metrics() -> None:
    """Prometheus' own parser reads what was counted: by class of resource, never by path."""
    async with server() as it:
        size = len((await it.get(BIG)).content)
        await it.client.head(BIG)
        await it.get(BIG, if_none_match="*")
        await it.get("/")
        error = len((await it.get("/p/%ff")).content)
        for target in ("/p", "/p/pkg", "/.well-known/core", "/b/x"):
            await it.client.head(target)
        answer = await it.get("/metrics")
        openmetrics = await it.get("/metrics", accept="application/openmetrics-text")
    families = {family.name: family for family in text_string_to_metric_families(answer.text)}
    requests = {
        (sample.labels["resource"], sample.labels["code"]): sample.value
        for sample in families["netota_requests"].samples
    }

    assert requests == {
        ("stream", "200"): 2,
        ("stream", "304"): 1,
        ("page", "302"): 1,
        ("other", "404"): 1,
        ("packages", "200"): 1,
        ("package", "200"): 1,
        ("core", "200"): 1,
        ("blob", "404"): 1,
    }
    assert size + error == families["netota_sent_bytes"].samples[0].value
    assert all(name.startswith("netota_") for name in families)
    assert families["netota_uptime_seconds"].type == "gauge"
    assert openmetrics.text.endswith("# EOF\n")


# ----------------------------------------------------------------------------------------------
# The server


@pytest.mark.parametrize(
    ("request_", "status"),
    [
        (b"nonsense\r\n\r\n", 400),
        (b"GET /p HTTP/1.1\r\n\r\n", 400),
        (b"GET /p HTTP/1.1\r\nHost: x\r\nX: " + b"x" * 20_000, 400),
        (b"GET /p HTTP/1.1\r\nHost: x\r\nX: " + b"x" * 20_000 + END, 431),
        (b"GET /p?" + b"x" * 20_000 + b" HTTP/1.1\r\nHost: x" + END, 431),
        (b"GET /p HTTP/1.1\r\nHost: x\r\n" + b"a:\r\n" * 3_000 + b"b: c" + END, 431),
        (b"GET http://x/p HTTP/1.1\r\nHost: x" + END, 200),
        (b"GET HTTPS://x HTTP/1.1\r\nHost: x" + END, 302),
        (b"GET /p\x00 HTTP/1.1\r\nHost: x\r\n\r\n", 400),
        (b"GET /p HTTP/1.1\r\nHost: x\r\nContent-Length: lies\r\n\r\n", 400),
        (b"GET /p HTTP/1.0\r\n\r\n", 200),
        (b"GET /p HTTP/1.1\r\nHost: x\r\nContent-Length: 999999\r\n\r\n", 200),
        (b"GET /p HTTP/1.1\r\nHost: x\r\nConnection: upgrade, close\r\nUpgrade: h2c\r\n\r\n", 200),
    ],
)
async def test_malformed_requests(
    it: Server, request_: bytes, status: int, caplog: pytest.LogCaptureFixture
) -> None:
    """Each is answered, its connection ended, and nothing is logged."""
    async with connected(it.uri) as connection:
        connection.writer.write(request_)
        assert f" {status} " in (await connection.head()).splitlines()[0]
        await connection.rest()
    assert caplog.records == []


async def test_several_requests_by_one_connection(it: Server) -> None:
    """They may be sent before the answers to the ones before have come."""
    async with connected(it.uri) as connection:
        for _ in range(20):
            connection.send("HEAD", "/p")
        assert [(await connection.head()).splitlines()[0] for _ in range(20)] == [
            "HTTP/1.1 200 OK"
        ] * 20


async def test_answers_do_not_wait_for_acknowledgements(it: Server) -> None:
    """Headers and payload are two writes, and come together all the same."""
    await it.get(BIG)
    took_s = []
    for _ in range(20):
        start = time.perf_counter()
        await it.get(BIG)
        took_s.append(time.perf_counter() - start)
    assert statistics.median(took_s) < 0.03  # a delayed acknowledgement would take 40 ms


async def test_idle_server_sleeps() -> None:
    """Nothing is to be done later when nobody asks."""
    async with serving(site(CATALOG), "127.0.0.1:0"):
        await asyncio.sleep(0)
        pending = [h for h in asyncio.get_running_loop()._scheduled if not h.cancelled()]
        assert [h for h in pending if "uvicorn" in repr(h) or "netota" in repr(h)] == []


@pytest.mark.parametrize("begun", [b"", b"GET /p HT", b"HEAD /p HTTP/1.1\r\nHost: x\r\n\r\nGET"])
async def test_requests_must_come(begun: bytes) -> None:
    """A connection that does not bring its next request in time is ended."""
    async with server(Bounds(request_s=0.05)) as it, connected(it.uri) as connection:
        for byte in begun:
            connection.writer.write(bytes((byte,)))
        with contextlib.suppress(ConnectionError):
            await connection.rest()
        # An event stream is a request that came.
        async with connected(it.uri) as following:
            await following.follow(BIG)
            await following.chunk()
            await asyncio.sleep(0.1)
            it.site.swap(catalog({"big": stream(9)}))
            assert '"sequence":9' in await following.chunk()


async def test_connections_have_a_bound() -> None:
    """One more is closed, and can come again when another one has left."""
    async with server(Bounds(connections=2)) as it:
        async with connected(it.uri) as first, connected(it.uri) as second:
            for each in (first, second):
                each.send("HEAD", "/p")
                await each.head()
            async with connected(it.uri) as third:
                third.send("HEAD", "/p")
                with pytest.raises((ConnectionError, asyncio.IncompleteReadError)):
                    await third.head()
        await _answered(it.uri)


async def _answered(uri: str) -> None:
    """Wait until there is room for one more."""
    async with asyncio.timeout(PATIENCE_S):
        while True:
            with contextlib.suppress(ConnectionError, asyncio.IncompleteReadError):
                async with connected(uri) as connection:
                    connection.send("HEAD", "/healthz")
                    assert await connection.head()
                    return
            await asyncio.sleep(0.01)


HUGE = catalog({"huge": stream(1, count=1000)})


async def test_those_who_do_not_read_are_left() -> None:
    """Whether what they leave unread is still in this process or not."""
    bounds = Bounds(connections=2, stalled_s=0.2)
    async with serving(site(HUGE), "127.0.0.1:0", bounds) as (uri,):
        with _silent(uri) as one, _silent(uri) as other:
            for each, times in ((one, 40), (other, 1)):
                each.sendall(b"GET /p/pkg/s/huge HTTP/1.1\r\nHost: x\r\n\r\n" * times)
            await _answered(uri)


async def test_the_end_waits_for_a_moment() -> None:
    """Those who read get the rest of what was begun, those who do not are left."""
    async with contextlib.AsyncExitStack() as stack:
        running = contextlib.AsyncExitStack()
        bounds = Bounds(grace_s=0.3)
        served = site(HUGE)
        (uri,) = await running.enter_async_context(serving(served, "127.0.0.1:0", bounds))
        deaf = stack.enter_context(_silent(uri))
        deaf.sendall(b"GET /p/pkg/s/huge HTTP/1.1\r\nHost: x\r\n\r\n" * 40)
        begun = 0
        while begun == 0 or begun < served.metrics.requests["http", "stream", "200"]:
            begun = served.metrics.requests["http", "stream", "200"]
            await asyncio.sleep(0.05)  # until no more fits into the kernel
        reads = await stack.enter_async_context(connected(uri))
        reads.send("GET", "/p/pkg/s/huge")
        await reads.head()
        async with asyncio.timeout(PATIENCE_S):
            rest, _ = await asyncio.gather(reads.rest(), running.aclose())
        assert json.loads(rest)["sequence"] == 1


def _silent(uri: str) -> socket:
    """Return a connection with a small buffer, from which nobody reads."""
    connection = socket()
    connection.setsockopt(SOL_SOCKET, SO_RCVBUF, 4096)
    address = httpx2.URL(uri)
    connection.connect((address.host, address.port))
    connection.setblocking(False)
    return connection


@pytest.mark.parametrize("bind", ["192.0.2.1:0", "nonsense:x", "no.such.host.invalid:80"])
async def test_addresses(bind: str) -> None:
    """Where it cannot listen, it says so as over CoAP."""
    with pytest.raises((AddressError, ConfigError)):
        async with serving(site(CATALOG), bind):
            pass


async def test_address_in_use(it: Server) -> None:
    """Two servers do not share an address."""
    with pytest.raises(AddressError, match="in use"):
        async with serving(site(CATALOG), f"127.0.0.1:{httpx2.URL(it.uri).port}"):
            pass


@needs_ipv6
async def test_names_of_addresses() -> None:
    """Each socket has its URI, IPv6 in brackets."""
    async with serving(site(CATALOG), "[::1]:0") as (uri,), httpx2.AsyncClient() as client:
        assert uri.startswith("http://[::1]:")
        assert (await client.get(f"{uri}/p")).status_code == 200


async def test_swap() -> None:
    """Another catalog is served from now on."""
    async with server() as it:
        it.site.swap(catalog({"big": stream(8)}))
        assert (await it.get(BIG)).json()["sequence"] == 8
        it.site.swap(CATALOG.of(Repository(format=1)))
        assert (await it.get(BIG)).status_code == 404


MALFORMED = "Transfer-Encoding: chunked"


@pytest.mark.parametrize("accept", ["*/*", EVENTS])
@pytest.mark.parametrize("at_once", [True, False])
async def test_what_turns_out_to_be_malformed_is_not_logged(
    it: Server, caplog: pytest.LogCaptureFixture, accept: str, *, at_once: bool
) -> None:
    """Its connection ends, and that is all: nobody can fill a log."""
    head = f"GET {BIG} HTTP/1.1\r\nHost: x\r\nAccept: {accept}\r\n{MALFORMED}\r\n\r\n".encode()
    for _ in range(5):
        async with connected(it.uri) as connection:
            connection.writer.write(head + b"ZZ\r\n" * at_once)
            if not at_once:
                await connection.reader.read(1)
                connection.writer.write(b"ZZ\r\n")
            with contextlib.suppress(ConnectionError):
                async with asyncio.timeout(PATIENCE_S):
                    while await connection.reader.read(65_536):
                        pass
    assert (await it.get("/healthz")).status_code == 200
    assert [record.getMessage() for record in caplog.records if record.levelno > 20] == []
