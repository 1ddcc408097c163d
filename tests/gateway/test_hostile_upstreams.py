"""A mirror, and upstreams, servers of files and directories that are not as they should be."""

from __future__ import annotations

import asyncio
import contextlib
import os
import time
from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import attrs
import pytest

from netota_coap.encoding.addresses import canonical
from netota_coap.encoding.codecs import Format, dump
from netota_coap.encoding.documents import decode_list, encode, encode_list
from netota_coap.errors import (
    ConfigError,
    IntegrityError,
    InvalidDataError,
    PeerError,
    RepositoryError,
    TransferError,
)
from netota_coap.gateway import blob_fetcher, gateway, upstreams
from netota_coap.gateway import mirror as mirrors
from netota_coap.gateway.adoption import Choice, take_over
from netota_coap.gateway.blob_fetcher import BlobFetcher
from netota_coap.gateway.gateway import Gateway
from netota_coap.gateway.mirror import Terms, task_group
from netota_coap.model.values import Archive, Offer, PackageEntry, Stream, StreamEntry
from netota_coap.repository import scaffold
from netota_coap.repository.blobs import INCOMING
from netota_coap.repository.store import DirectoryStore
from netota_coap.service.setting_types import UPSTREAMS
from tests.support.file_servers import Request, Response, http_server, just
from tests.support.mirroring import (
    BOARD,
    QUICK,
    Origin,
    mirror,
    offered,
    present,
    running,
    version,
)
from tests.support.publishing import NOW, STABLE, change
from tests.support.serving import until

pytestmark = pytest.mark.slow

LONG = b"x" * 200_000
EVENTS = {"Content-Type": "text/event-stream", "Transfer-Encoding": "chunked"}


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """Where the mirror is to be."""
    return tmp_path / "mirror"


# ----------------------------------------------------------------------------------------------
# Servers of files


def _later(_: Response) -> Response:
    return just("503 Service Unavailable").having(Retry_After="590")


async def test_servers_that_say_later(upstream: Origin, root: Path) -> None:
    """Whatever is waited for keeps nothing else from coming."""
    for each in ("2.0", "3.0"):
        upstream.publish(each, ("later", f"v{each}"))
        upstream.refuse[f"/{each}/{BOARD}"] = _later
    async with offered(upstream.root) as uris, running(it := mirror(root, uris["coap"])):
        await until(lambda: upstream.asked("2.0") and upstream.asked("3.0"))
        upstream.publish("1.1")
        await until(lambda: version(root) == "1.1")
        await until(lambda: it.status.behind == 2)


async def test_what_waits_is_given_up(
    upstream: Origin, root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A newer state is not kept waiting by the server of an older one."""
    monkeypatch.setattr(blob_fetcher, "CHECK_S", 0.05)
    upstream.publish("2.0")
    upstream.refuse[f"/2.0/{BOARD}"] = _later
    async with offered(upstream.root) as uris, running(it := mirror(root, uris["coap"])):
        await until(lambda: upstream.asked("2.0"))
        upstream.publish("2.1")
        await until(lambda: version(root) == "2.1")
        await until(lambda: not it.status.behind)
        assert it.fetcher._slots._value == 2


async def test_what_was_waited_for(upstream: Origin, root: Path) -> None:
    """It comes in its turn, as all others do."""
    upstream.files[f"/2.0/{BOARD}"] = LONG
    upstream.publish("2.0")

    def once(_: Response) -> Response:
        del upstream.refuse[f"/2.0/{BOARD}"]
        return just("503 Service Unavailable").having(Retry_After="0")

    upstream.refuse[f"/2.0/{BOARD}"] = once
    async with offered(upstream.root) as uris:
        it = mirror(root, uris["coap"], limit_bytes_s=400_000)
        async with running(it):
            await until(lambda: upstream.asked("2.0") == 1)
            await until(lambda: it.fetcher._slots._value == 2)
            await until(lambda: it.fetcher.received)
            assert it.fetcher._slots._value == 1
            await until(lambda: version(root) == "2.0")
            assert it.fetcher._slots._value == 2


async def test_not_all_are_begun(
    upstream: Origin, root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What is waited for holds files and sockets, so that there is a bound."""
    monkeypatch.setattr(blob_fetcher, "MOST_BEGUN", 1)
    monkeypatch.setattr(blob_fetcher, "CHECK_S", 0.05)
    upstream.refuse[f"/1.0/{BOARD}"] = _later
    async with offered(upstream.root) as uris, running(mirror(root, uris["coap"])):
        await until(lambda: upstream.asked("1.0"))
        upstream.publish("2.0", ("other", "stable"))
        upstream.publish("3.0", ("none", "stable"), machines=())
        await until(lambda: version(root, ("none", "stable")) == "3.0")
        assert upstream.asked("2.0") == 0
        upstream.publish("1.1", machines=())
        await until(lambda: version(root, ("other", "stable")) == "2.0")


# ----------------------------------------------------------------------------------------------
# Lists and states


@attrs.define
class Nasty:
    """An upstream of HTTP with a number of streams.

    Attributes:
        events: The body of its event stream, which ends with it.
        cut: Whether it is cut off there.
        stall: Whether it goes on, in silence.
        streams: How many it has.
        asked: When each path was asked for.
    """

    events: bytes
    cut: bool = False
    stall: bool = False
    streams: int = 20
    asked: dict[str, list[float]] = attrs.field(factory=dict)

    def __call__(self, request: Request) -> Response:
        """Answer."""
        follows = "event-stream" in request.headers["accept"]
        path = "events" if follows else request.path
        self.asked.setdefault(path, []).append(time.monotonic())
        if follows:
            cut = len(self.events) if self.cut or self.stall else None
            body = self.events + b"0\r\n\r\n"
            return Response(headers=EVENTS, body=body, cut=cut, stall=self.stall)
        if path == "/p":
            return _cbor(encode_list({"p": PackageEntry(title="")}, Format.CBOR))
        if path == "/p/p":
            entry = StreamEntry(version="1", sequence=1, closed=False)
            names = (f"s{index}" for index in range(self.streams))
            return _cbor(encode_list(dict.fromkeys(names, entry), Format.CBOR))
        state = Stream(version="1", sequence=1, published=NOW, archives=())
        return _cbor(encode(state, Format.CBOR))

    @property
    def states_asked(self) -> int:
        return sum(len(asked) for path, asked in self.asked.items() if "/s/" in path)


def _cbor(body: bytes) -> Response:
    headers = {"Content-Type": "application/cbor", "Content-Length": str(len(body))}
    return Response(headers=headers, body=body)


def _event(tag: str) -> bytes:
    event = f"{f'id: {tag}' if tag else 'event: packages'}\ndata: {{}}\n\n".encode()
    return f"{len(event):x}\r\n".encode() + event + b"\r\n"


@pytest.mark.parametrize("cut", [False, True])
async def test_an_event_stream_that_ends_at_once(
    root: Path, cut: bool, caplog: pytest.LogCaptureFixture
) -> None:
    """It is begun anew ever more rarely; what is as it was is not asked again; nobody is told."""
    nasty = Nasty(_event("same"), cut)
    async with http_server(nasty) as server:
        it = mirror(root, server.url.removesuffix("/file"))
        async with running(it):
            await until(lambda: len(nasty.asked.get("events", ())) >= 6)
    begun = nasty.asked["events"]
    assert begun[5] - begun[0] >= QUICK.retry_s * (1 + 2 + 4 + 8 + 16)
    assert nasty.states_asked == nasty.streams
    assert len(nasty.asked["/p"]) == 1
    assert [record.message for record in caplog.records if record.levelname != "INFO"] == []


async def test_an_event_stream_that_lasts(root: Path) -> None:
    """Where it was followed for a while, it is begun anew as soon as for the first time."""
    nasty = Nasty(_event("same"), stall=True)
    terms = attrs.evolve(QUICK, poll_s=0.05)
    async with http_server(nasty) as server:
        it = mirror(root, server.url.removesuffix("/file"), terms=terms)
        async with running(it):
            await until(lambda: len(nasty.asked.get("events", ())) >= 10)


async def test_events_without_end(root: Path) -> None:
    """Whatever an upstream says, its lists are looked at once in a while."""
    nasty = Nasty(b"".join(_event(str(number)) for number in range(1_000)), streams=1)
    terms = attrs.evolve(QUICK, retry_s=0.2)
    async with http_server(nasty) as server:
        it = mirror(root, server.url.removesuffix("/file"), terms=terms)
        async with running(it):
            await until(lambda: len(nasty.asked.get("/p", ())) >= 4)
    asked = nasty.asked["/p"]
    # The moment of an answer's arrival there is not that of the question here.
    assert asked[3] - asked[0] >= 3 * 0.2 * 0.9


async def test_too_many_streams(
    upstream: Origin, root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An upstream with more streams than anybody could want is refused; fewer can be chosen."""
    monkeypatch.setattr(mirrors, "MOST_STREAMS", 1)
    upstream.publish("2.0", ("other", "stable"))
    async with offered(upstream.root) as uris:
        with pytest.raises(IntegrityError, match="has more than 1 streams") as caught:
            await mirror(root, uris["http"]).once()
        assert "Choose fewer" in caught.value.hint
        await mirror(root, uris["http"], Choice(("other",))).once()
    assert version(root, ("other", "stable")) == "2.0"


@pytest.mark.parametrize("scheme", ["coap", "http"])
async def test_long_lists(
    upstream: Origin, root: Path, monkeypatch: pytest.MonkeyPatch, scheme: str
) -> None:
    """A list that is longer than any should be is refused."""
    monkeypatch.setattr(upstreams, "LONGEST_LIST", 10)
    async with offered(upstream.root) as uris:
        with pytest.raises(IntegrityError, match="/p: is longer than 10 bytes"):
            await mirror(root, uris[scheme]).once()


@pytest.mark.parametrize("missing", [1, 2])
async def test_a_package_that_goes_between_two_questions(root: Path, missing: int) -> None:
    """It is gone if it is not listed the next time; else the upstream contradicts itself."""
    asked: list[str] = []

    def reply(request: Request) -> Response:
        asked.append(request.path)
        if request.path != "/p":
            return just("404 Not Found")
        there = {"gone": PackageEntry(title="")} if asked.count("/p") <= missing else {}
        return _cbor(encode_list(there, Format.CBOR))

    async with http_server(reply) as server:
        it = mirror(root, server.url.removesuffix("/file"))
        if missing == 1:
            assert (await it.once()).behind == 0
        else:
            with pytest.raises(PeerError, match="404"):
                await it.once()
    assert asked == ["/p", "/p/gone"] * missing + ["/p"] * (missing == 1)


async def test_a_list_of_nonsense(root: Path, caplog: pytest.LogCaptureFixture) -> None:
    """What is wrong with it is told in brief, and found out while others are served."""
    nonsense = dump({f"bad name {number:06}": {} for number in range(13_000)}, Format.CBOR)
    begin = time.thread_time()
    with pytest.raises(InvalidDataError) as caught:
        decode_list(PackageEntry, nonsense, Format.CBOR)
    took_s = time.thread_time() - begin
    assert len(caught.value.detail) > 1_000_000

    stalled_s = 0.0

    async def watch() -> None:
        nonlocal stalled_s
        while True:
            before = time.thread_time()
            await asyncio.sleep(0.001)
            stalled_s = max(stalled_s, time.thread_time() - before)

    def reply(request: Request) -> Response:
        if "event-stream" in request.headers["accept"]:
            return Response(headers=EVENTS, body=_event("1"), stall=True)
        return _cbor(nonsense)

    async with http_server(reply) as server:
        it = mirror(root, server.url.removesuffix("/file"))
        watching = asyncio.create_task(watch())
        async with running(it):
            await until(lambda: it.status.error)
        watching.cancel()
        error = it.status.error
        with pytest.raises(IntegrityError) as refused:
            await it.once()
    assert error.endswith("…")
    assert len(error) <= 300
    assert len(refused.value.detail) < 400
    assert max(map(len, caplog.messages)) < 400
    assert stalled_s < took_s / 2


@contextlib.asynccontextmanager
async def _slow(body: bytes, pieces: int, between_s: float) -> AsyncIterator[str]:
    """Serve one answer in pieces; its URI."""
    replies: list[asyncio.Task[None]] = []

    async def reply(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readuntil(b"\r\n\r\n")
        fields = f"Content-Type: application/cbor\r\nContent-Length: {len(body)}"
        writer.write(f"HTTP/1.1 200 OK\r\n{fields}\r\nConnection: close\r\n\r\n".encode())
        step = len(body) // pieces + 1
        for begin in range(0, len(body), step):
            writer.write(body[begin : begin + step])
            await asyncio.sleep(between_s)
        writer.close()
        with contextlib.suppress(ConnectionError):
            await writer.wait_closed()

    def accept(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        replies.append(asyncio.create_task(reply(reader, writer)))

    async with await asyncio.start_server(accept, "127.0.0.1", 0) as server:
        yield f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}"
        await asyncio.gather(*replies)


async def test_what_comes_slowly(monkeypatch: pytest.MonkeyPatch) -> None:
    """A list may take long as long as more of it comes, but not for ever."""
    names = {f"p{number}": PackageEntry(title="") for number in range(20)}
    async with (
        _slow(encode_list(names, Format.CBOR), 10, 0.05) as uri,
        upstreams.upstream_of(uri, 0.4) as it,
    ):
        assert await it.packages() == names
        monkeypatch.setattr(upstreams, "TRANSFER_S", 0.2)
        with pytest.raises(TransferError, match=r"is incomplete after 0\.2 s"):
            await it.packages()


# ----------------------------------------------------------------------------------------------
# URIs


@pytest.mark.parametrize(
    "uri",
    [
        "coap://127.0.0.1:x", "coap://127.0.0.1:99999", "coap://127.0.0.1:0", "coap://[::1",
        "coap://[::1]x", "coap://[127.0.0.1]", "coap://a..b", f"coap://{'a' * 64}.example",
        "coap://u@127.0.0.1", "coap://%00", "coap://host/path", "coap://", "ftp://host", "host",
        "http://127.0.0.1:x", "https://[::1", "http://host?query", f"http://{'x/' * 45}",
    ],
)  # fmt: skip
def test_what_cannot_be_an_upstream(root: Path, uri: str) -> None:
    """It is refused when the configuration is checked, and before anything is begun."""
    with pytest.raises(ConfigError, match="cannot be an upstream: "):
        mirror(root, uri)
    with pytest.raises(InvalidDataError) as caught:
        UPSTREAMS.decode([uri], root)
    assert [issue.place for issue in caught.value.issues] == ["[0]"]


@pytest.mark.parametrize(
    ("one", "others"),
    [
        ("coap://host", ["coap://HOST", "coap://host:5683", "coap://host."]),
        ("coap://[::1]", ["coap://[0:0::1]", "coap://[::1]:5683"]),
        ("http://host/a", ["http://Host:80/a", "http://host/a/"]),
        ("https://bücher.example", ["https://xn--bcher-kva.example:443"]),
        ("http://[fe80::1%25eth0]:8000/a/b", []),
    ],
)
def test_spellings(one: str, others: list[str]) -> None:
    """What is one upstream is known as one, whatever its URI looks like."""
    assert {canonical(each) for each in others} <= {canonical(one)}


def test_what_is_not_the_same() -> None:
    """Case counts in a path; a scheme and a port make another server."""
    uris = ["http://host/a", "http://host/A", "http://host", "http://host:81", "coap://host"]
    assert len({*map(canonical, uris), canonical("https://host")}) == 6


async def test_what_the_environment_says(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A proxy that cannot be used ends a gateway as what it is."""
    monkeypatch.setenv("ALL_PROXY", "socks5://127.0.0.1:1")
    it = Gateway.of(BlobFetcher(root), ("http://127.0.0.1:1",), Choice(), Terms())
    with pytest.raises(ConfigError, match="the proxy settings of the environment are invalid"):
        await it.run()


@pytest.mark.parametrize(
    ("error", "raised"), [(ConfigError("x"), ConfigError), (KeyError("x"), ExceptionGroup)]
)
async def test_tasks(error: Exception, raised: type[Exception]) -> None:
    """Only errors of configuration are what an operator can mend."""

    async def fail() -> None:
        raise error

    with pytest.raises(raised):
        async with task_group() as group:
            group.create_task(fail())


# ----------------------------------------------------------------------------------------------
# News at a bad moment


async def test_offers_that_change_while_files_come(upstream: Origin, root: Path) -> None:
    """They are taken, too."""
    upstream.files[f"/2.0/{BOARD}"] = LONG
    state = upstream.publish("2.0")
    (archive,) = state.archives or ()
    url = "http://elsewhere.example/x"
    more = attrs.evolve(archive, offers=(*archive.offers, Offer(url=url, metric=200)))
    async with offered(upstream.root) as uris:
        it = mirror(root, uris["coap"], limit_bytes_s=400_000)
        async with running(it):
            await until(lambda: list((root / INCOMING).glob(".*.part")))
            contact = it.status.last_contact
            take_over(
                DirectoryStore(upstream.root),
                STABLE,
                lambda _: attrs.evolve(state, archives=(more,)),
            )
            await until(lambda: it.status.last_contact != contact)
            assert version(root) == ""
            await until(lambda: url in _urls(root))


def _urls(root: Path) -> Iterator[str]:
    state = present(root)
    for archive in (state.archives or ()) if state else ():
        yield from (offer.url for offer in archive.offers)


async def test_a_stream_that_is_closed(upstream: Origin, root: Path) -> None:
    """Devices hear of it, whether its files can be had or not."""
    async with offered(upstream.root) as uris, running(mirror(root, uris["http"])):
        await until(lambda: version(root) == "1.0")
        upstream.refuse[f"/2.0/{BOARD}"] = lambda _: just("404 Not Found")
        upstream.publish("2.0")
        await until(lambda: upstream.asked("2.0"))
        change(
            upstream.root,
            STABLE,
            lambda state: attrs.evolve(state, closed=True),  # type: ignore[type-var]
        )
        await until(lambda: (state := present(root)) and state.closed)
    assert version(root) == "2.0"


# ----------------------------------------------------------------------------------------------
# Directories


async def test_a_repository_that_is_gone(upstream: Origin, root: Path) -> None:
    """Nothing is made in its place."""
    with pytest.raises(RepositoryError, match="not a repository"):
        async with BlobFetcher(root).fetched(_archives(upstream), lambda: False):
            pass
    assert not root.exists()


@pytest.mark.parametrize("place", ["blobs", INCOMING])
async def test_links(upstream: Origin, root: Path, tmp_path: Path, place: str) -> None:
    """None at `blobs` or below it is followed, neither to write nor to remove."""
    scaffold.init(root)
    elsewhere = tmp_path / "elsewhere"
    old = (elsewhere if place == INCOMING else elsewhere / ".incoming") / "old"
    old.parent.mkdir(parents=True)
    old.touch()
    os.utime(old, (1, 1))
    (root / place).parent.mkdir(exist_ok=True)
    (root / place).symlink_to(elsewhere)
    it = BlobFetcher(root)
    it.remove_stale()
    with pytest.raises(RepositoryError, match="is a link"):
        async with it.fetched(_archives(upstream), lambda: False):
            pass
    assert [*old.parent.iterdir()] == [old]


def _archives(upstream: Origin) -> tuple[Archive, ...]:
    state = present(upstream.root)
    return (state.archives or ()) if state else ()


async def test_two_tidy_up(root: Path) -> None:
    """What somebody else removed meanwhile is gone, which is all right."""
    scaffold.init(root)
    place = root / INCOMING
    place.mkdir(parents=True)
    for number in range(2_000):
        (place / f".{number}").touch()
        os.utime(place / f".{number}", (1, 1))
    await asyncio.gather(*(asyncio.to_thread(BlobFetcher(root).remove_stale) for _ in range(3)))
    assert [*place.iterdir()] == []


async def test_tidies_up_now_and_then(
    upstream: Origin, root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What a long life leaves behind goes while it lasts."""
    monkeypatch.setattr(gateway, "REMOVE_STALE_S", 0.02)
    scaffold.init(root)
    old = root / INCOMING / f".{'a' * 64}.{'a' * 16}.part"
    old.parent.mkdir(parents=True)

    def leave() -> None:
        old.touch()
        os.utime(old, (1, 1))

    running_one = asyncio.create_task(Gateway(BlobFetcher(root)).run())
    for _ in range(2):
        leave()
        await until(lambda: not old.exists())
    running_one.cancel()
    await asyncio.gather(running_one, return_exceptions=True)
    async with offered(upstream.root) as uris, running(mirror(root, uris["coap"])):
        await until(lambda: version(root) == "1.0")
        leave()
        upstream.publish("1.1")
        await until(lambda: not old.exists())


async def test_two_processes(upstream: Origin, root: Path) -> None:
    """What one is done with stays for the other, which still waits for the rest."""
    scaffold.init(root)
    first = _archives(upstream)
    upstream.refuse[f"/2.0/{BOARD}"] = _later
    both = first + (upstream.publish("2.0").archives or ())
    waiting, other = BlobFetcher(root), BlobFetcher(root)
    marker = root / INCOMING / first[0].envelope.sha256.hex()

    async def wait() -> None:
        async with waiting.fetched(both, lambda: False):
            pass

    async with other.fetched(first, lambda: False):
        pass
    assert not marker.exists()
    task = asyncio.create_task(wait())
    await until(lambda: upstream.asked("2.0"))
    async with other.fetched(first, lambda: False):
        pass
    other.remove_stale()
    assert marker.exists()
    os.utime(marker, (1, 1))
    waiting.remove_stale()
    assert marker.exists()
    task.cancel()
    await asyncio.gather(task, return_exceptions=True)
    assert not marker.exists()
