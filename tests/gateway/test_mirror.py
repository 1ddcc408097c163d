"""A mirror keeps a repository level with an upstream: real services, real files."""

from __future__ import annotations

import asyncio
import contextlib
import fcntl
import os
import shutil
from pathlib import Path

import attrs
import pytest

from netota_coap.client.coap_client import Client
from netota_coap.errors import ConfigError, TransferError
from netota_coap.gateway import upstreams
from netota_coap.gateway.adoption import Choice, take_over
from netota_coap.gateway.mirror import Mirror, Terms
from netota_coap.model.selection import Selection
from netota_coap.model.values import Archive, Offer
from netota_coap.publishing import archives as sources
from netota_coap.repository import history, scaffold
from netota_coap.repository.blobs import Blobs
from netota_coap.repository.store import DirectoryStore
from tests.support import publishing
from tests.support.file_servers import Request, Response, http_server, just, whole
from tests.support.mirroring import (
    BOARD,
    QUICK,
    Origin,
    content,
    files_of,
    held,
    mirror,
    offered,
    present,
    require_correct,
    running,
    until_level,
    version,
    where,
)
from tests.support.publishing import STABLE
from tests.support.serving import PATIENCE_S, until

pytestmark = pytest.mark.slow

BETA = ("sensor-node", "beta")


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """Where the mirror is to be."""
    return tmp_path / "mirror"


# ----------------------------------------------------------------------------------------------
# Becoming level


@pytest.mark.parametrize("scheme", ["coap", "http"])
async def test_once(upstream: Origin, root: Path, scheme: str) -> None:
    """What the upstream has is here, files too; a second run writes nothing."""
    async with offered(upstream.root) as uris:
        status = await mirror(root, uris[scheme]).once()
        assert (status.behind, status.refused, status.error) == (0, 0, "")
        assert status.last_contact is not None
        there, here = present(upstream.root), present(root)
        assert there
        assert here
        assert attrs.evolve(there, author=f"mirror of {uris[scheme]}") == here
        assert content("1.0") == held(root, (here.archives or ())[0])
        require_correct(root)
        before = files_of(root)
        await mirror(root, uris[scheme]).once()
        assert before == files_of(root)
        assert upstream.asked("1.0") == 1


@pytest.mark.parametrize("scheme", ["coap", "http"])
async def test_an_observer_learns(upstream: Origin, root: Path, scheme: str) -> None:
    """A device that observes the mirror is told of what is published upstream."""
    async with offered(upstream.root) as uris, running(mirror(root, uris[scheme])):
        await until(lambda: version(root) == "1.0")
        async with offered(root) as here, Client() as client:
            states = client.observe(f"{here['coap']}/p/sensor-node/s/stable")
            async with contextlib.aclosing(states):
                assert (await anext(states)).version == "1.0"
                upstream.publish("1.1")
                async with asyncio.timeout(PATIENCE_S):
                    state = await anext(states)
                assert state.version == "1.1"
                assert content("1.1") == held(root, (state.archives or ())[0])


async def test_offers_only(upstream: Origin, root: Path) -> None:
    """Other offers under the same sequence are taken, and make no history."""
    async with offered(upstream.root) as uris, running(mirror(root, uris["coap"])):
        await until(lambda: version(root) == "1.0")
        state = present(upstream.root)
        assert state
        (archive,) = state.archives or ()
        better = attrs.evolve(archive, offers=(Offer(url="/b/x", metric=1), *archive.offers))
        take_over(
            DirectoryStore(upstream.root),
            STABLE,
            lambda _: attrs.evolve(state, archives=(better,), poll_s=77),
        )

        def offers() -> list[str]:
            here = present(root)
            return [offer.url for offer in (here.archives or ())[0].offers] if here else []

        await until(lambda: len(offers()) == 2)
        assert offers() == [f"{uris['coap']}/b/x", archive.offers[0].url]
        here = present(root)
        assert here
        assert here.poll_s == 77
        assert [state.sequence for state in history.history(root, STABLE)] == [1]
        require_correct(root)


async def test_what_vanishes_and_returns(upstream: Origin, root: Path) -> None:
    """A stream that is removed upstream is removed here, its history stays; it may return."""
    async with offered(upstream.root) as uris, running(mirror(root, uris["coap"])):
        await until(lambda: version(root) == "1.0")
        publishing.remove(upstream.root, STABLE)
        await until(lambda: present(root) is None)
        assert [state.sequence for state in history.history(root, STABLE)] == [1]
        upstream.publish("1.1")
        await until(lambda: version(root) == "1.1")
        assert [state.sequence for state in history.history(root, STABLE)] == [3, 1]
        require_correct(root)


async def test_what_was_dropped_returns_as_it_was(upstream: Origin, root: Path) -> None:
    """A stream that was away for a while may come back with the sequence that it had."""
    async with offered(upstream.root) as uris:
        await mirror(root, uris["coap"]).once()
        await mirror(root, uris["coap"], Choice(streams=("beta",))).once()
        assert present(root) is None
        await mirror(root, uris["coap"]).once()
        assert version(root) == "1.0"
        require_correct(root)


async def test_selection(upstream: Origin, root: Path) -> None:
    """Patterns choose streams, attributes the files that are fetched; streams stay whole."""
    upstream.publish("2.0", machines=(BOARD, "nrf9160dk"))
    upstream.publish("3.0", BETA)
    upstream.publish("3.0", ("other", "stable"))
    choice = Choice(("sensor-*",), ("sta*", "none"), Selection.of({"machine": "nrf9160dk"}))
    async with offered(upstream.root) as uris:
        await mirror(root, uris["coap"], choice).once()
    state = present(root)
    assert state
    assert [archive.name for archive in state.archives or ()] == [BOARD, "nrf9160dk"]
    assert [present(root, name) for name in (BETA, ("other", "stable"))] == [None, None]
    assert [content("2.0", "nrf9160dk")] == [
        held(root, archive) for archive in (state.archives or ())[1:]
    ]
    assert len(Blobs(root).all()) == 1


# ----------------------------------------------------------------------------------------------
# Files first


async def test_announced_when_fetched(upstream: Origin, root: Path) -> None:
    """A state takes its place when its file is here, and not while that cannot be had."""
    async with offered(upstream.root) as uris:
        it = mirror(root, uris["coap"])
        async with running(it):
            await until(lambda: version(root) == "1.0")
            upstream.refuse[f"/1.1/{BOARD}"] = lambda _: just("503 Service Unavailable")
            upstream.publish("1.1")
            await until(lambda: upstream.asked("1.1") >= 2)
            assert (version(root), it.status.behind) == ("1.0", 1)
            assert "503" in it.status.error
            upstream.refuse.clear()
            await until(lambda: version(root) == "1.1")
            await until(lambda: it.status.behind == 0)
            assert it.status.error == ""


async def test_announced_at_once(upstream: Origin, root: Path) -> None:
    """On request devices hear of a state first."""
    upstream.refuse[f"/1.0/{BOARD}"] = lambda _: just("503 Service Unavailable")
    async with offered(upstream.root) as uris:
        it = mirror(root, uris["coap"], terms=attrs.evolve(QUICK, announce_at_once=True))
        status = await it.once()
        assert (version(root), status.behind) == ("1.0", 1)
        upstream.refuse.clear()
        assert (await it.once()).behind == 0
        require_correct(root)


async def test_a_newer_state_overtakes(upstream: Origin, root: Path) -> None:
    """What is fetched of a state is given up when another one has taken its place."""
    data = b"x" * 3_000_000
    upstream.files[f"/1.1/{BOARD}"] = data
    async with offered(upstream.root) as uris:
        slow = mirror(root, uris["coap"], limit_bytes_s=200_000)
        await _overtaken(upstream, slow)
    assert [state.sequence for state in history.history(root, STABLE)] == [3, 1]


async def _overtaken(upstream: Origin, slow: Mirror) -> None:
    root = slow.root
    async with running(slow):
        await until(lambda: version(root) == "1.0")
        upstream.publish("1.1")
        await until(lambda: list(root.glob("blobs/.incoming/.*.part")))
        upstream.publish("1.2")
        await until(lambda: version(root) == "1.2")


async def test_a_file_of_two_streams_is_fetched_once(upstream: Origin, root: Path) -> None:
    """What two streams hold is downloaded once."""
    upstream.publish("1.0", BETA)
    async with offered(upstream.root) as uris:
        assert (await mirror(root, uris["coap"]).once()).behind == 0
    assert upstream.asked("1.0") == 1
    require_correct(root)


async def test_wrong_bytes(upstream: Origin, root: Path) -> None:
    """A file that is not what it should be changes nothing; it is no fault of the upstream's."""
    upstream.refuse[f"/1.0/{BOARD}"] = lambda _: whole(b"y" * len(content("1.0")))
    async with offered(upstream.root) as uris:
        status = await mirror(root, uris["coap"]).once()
    assert (present(root), status.behind, status.refused) == (None, 1, 0)
    assert "SHA-256" in status.error


async def test_room_that_is_to_stay(upstream: Origin, root: Path) -> None:
    """Nothing is fetched that would leave too little room."""
    async with offered(upstream.root) as uris:
        status = await mirror(root, uris["coap"], keep_free=2**62).once()
    assert (present(root), status.behind) == (None, 1)
    assert status.error.endswith(f"2700 bytes would leave less than {2**62} free")
    assert upstream.asked("1.0") == 0


async def test_size_cap(upstream: Origin, root: Path) -> None:
    """Over the cap those blobs leave that belonged to no stream for longest, and no others."""
    upstream.publish("5.0", BETA)

    def blobs() -> list[str]:
        return sorted(held(root, each)[9:12].decode() for each in archives if _is_held(root, each))

    async with offered(upstream.root) as uris:
        it = mirror(root, uris["coap"], size_cap=3 * len(content("1.0")))
        await until_level(it, "1.0")
        for each in ("1.1", "1.2", "1.3"):
            upstream.publish(each)
            await until_level(it, each)
        archives = _archives(upstream.root)
        assert blobs() == ["1.2", "1.3", "5.0"]
        publishing.remove(upstream.root, BETA)
        await until_level(it, "", BETA)
        upstream.publish("1.4")
        await until_level(it, "1.4")
        archives = _archives(upstream.root)
        assert blobs() == ["1.3", "1.4", "5.0"]
        upstream.publish("1.5")
        it = mirror(root, uris["coap"], size_cap=0)
        await until_level(it, "1.5")
    require_correct(root)
    assert len(Blobs(root).all()) == 1


def _archives(root: Path) -> list[Archive]:
    """Return the archives of all states that there ever were."""
    states = (state for name in (STABLE, BETA) for state in history.history(root, name))
    return [archive for state in states for archive in state.archives or ()]


def _is_held(root: Path, archive: Archive) -> bool:
    return bool(Blobs(root).held((archive.envelope,)))


async def test_files_that_wait_for_others(upstream: Origin, root: Path) -> None:
    """What a state needs and is here stays, however long the rest takes."""
    upstream.files["/1.1/native"] = b"x" * 200_000
    upstream.publish("1.1", machines=(BOARD, "native"))
    async with offered(upstream.root) as uris:
        it = mirror(root, uris["coap"], limit_bytes_s=400_000)
        async with running(it):
            await until(lambda: Blobs(root).all())
            assert Blobs(root).gc(0, grace_s=-1) == ()
            await until(lambda: version(root) == "1.1")
            await until(lambda: not list((root / "blobs/.incoming").iterdir()))
            upstream.publish("1.2")
            await until(lambda: version(root) == "1.2")
        assert len(Blobs(root).gc(0, grace_s=-1)) == 2
    require_correct(root)


async def test_leftovers(upstream: Origin, root: Path) -> None:
    """What a kill left between two steps goes; so does what nobody went on with for a week.

    What somebody writes to, or what cannot be removed, stays.
    """
    async with offered(upstream.root) as uris:
        await mirror(root, uris["coap"]).once()
        place = root / "blobs" / ".incoming"
        (blob,) = Blobs(root).all()
        (place / blob.sha256.hex()).write_bytes(content("1.0"))
        young, old, locked = (place / f".{digit * 64}.{digit * 16}.part" for digit in "abc")
        directory = place / "lost+found"
        directory.mkdir()
        for file in (young, old, locked):
            file.touch()
        for file in (place / blob.sha256.hex(), old, locked, directory):
            os.utime(file, (1, 1))
        with locked.open("rb") as stream:
            fcntl.flock(stream, fcntl.LOCK_EX)
            it = mirror(root, uris["coap"])
            await it.once()
            assert {*place.iterdir()} == {young, locked, directory}
        await it.once()
        assert {*place.iterdir()} == {young, directory}


# ----------------------------------------------------------------------------------------------
# Several servers


async def test_a_chain_of_three(upstream: Origin, tmp_path: Path) -> None:
    """A mirror of a mirror learns of a publish, and needs nothing but the mirror."""
    one, two = tmp_path / "one", tmp_path / "two"
    scaffold.init(one)
    async with (
        offered(upstream.root) as first,
        offered(one) as second,
        running(mirror(one, first["coap"]), mirror(two, second["http"])),
    ):
        await until(lambda: version(two) == "1.0")
        upstream.publish("1.1")
        await until(lambda: version(two) == "1.1")
    require_correct(two)
    state = present(two)
    assert state
    assert [offer.url.partition("/b/")[0] for offer in (state.archives or ())[0].offers] == [
        second["http"],
        (present(upstream.root).archives or ())[0].offers[0].url,  # type: ignore[union-attr]
    ]


async def test_a_ring(upstream: Origin, tmp_path: Path) -> None:
    """Two that mirror each other, and an own stream each, come to rest; removals get around."""
    other = tmp_path / "other"
    scaffold.init(other)
    file = tmp_path / "own.bin"
    file.write_bytes(b"own")
    source = sources.ArchiveSource(file, "own")
    publishing.publish(other, ("own", "stable"), "7", [source], store_files=True)
    async with offered(upstream.root) as first, offered(other) as second:
        here = mirror(other, first["coap"])
        there = mirror(upstream.root, second["coap"])
        async with running(here, there):
            await until(lambda: version(other) == "1.0")
            await until(lambda: version(upstream.root, ("own", "stable")) == "7")
            await until(lambda: here.status.refused and there.status.refused)
            before = files_of(other), files_of(upstream.root)
            await here.once()
            await there.once()
            assert before == (files_of(other), files_of(upstream.root))
            publishing.remove(upstream.root, STABLE)
            await until(lambda: present(other) is None)
            await here.once()
            await there.once()
            assert (present(other), present(upstream.root)) == (None, None)


# ----------------------------------------------------------------------------------------------
# What is refused


async def test_somebody_elses_stream(
    upstream: Origin, root: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """A stream that is not of this upstream is left alone; that is told once."""
    scaffold.init(root)
    publishing.publish(root, STABLE, "9", [])
    async with offered(upstream.root) as uris:
        it = mirror(root, uris["coap"])
        for _ in range(2):
            status = await it.once()
    assert (version(root), status.behind, status.refused) == ("9", 1, 2)
    told = [line for line in caplog.messages if "not a stream of this upstream" in line]
    assert len(told) == 1


@pytest.mark.parametrize("scheme", ["coap", "http"])
@pytest.mark.parametrize(
    ("releases", "reason"),
    [
        (["0.9"], "went back from sequence 2 to 1"),
        (["0.9", "9.9"], "is another state under the same sequence 2"),
    ],
)
async def test_an_upstream_that_was_reset(
    upstream: Origin, root: Path, scheme: str, releases: list[str], reason: str
) -> None:
    """An upstream that goes back, or tells another state by the same sequence, is refused."""
    upstream.publish("1.1")
    async with offered(upstream.root) as uris:
        it = mirror(root, uris[scheme])
        await it.once()
    shutil.rmtree(upstream.root)
    scaffold.init(upstream.root)
    for each in releases:
        upstream.publish(each)
    before = files_of(root)
    async with offered(upstream.root, *where(uris)):
        status = await it.once()
    assert (status.behind, status.refused) == (1, 1)
    assert reason in status.error
    assert before == files_of(root)


@pytest.mark.parametrize(
    ("path", "response", "reason"),
    [
        ("/p", Response(body=b"\xff"), "is malformed"),
        ("/p", Response(body=b"\xa1\x62..\x81\x60"), "is malformed: ..: must consist of letters"),
        ("/p", Response(body=b"\0" * (9 * 2**20)), "is longer than 262144 bytes"),
        ("/p", Response(status="500 Oops"), "500 Internal Server Error"),
        ("/p/a/s/b", Response(body=b"\xa0"), "version"),
        ("/p/a/s/b", Response(body=bytes.fromhex("a30161310201061903e8")), "incomplete state"),
        ("/p/a/s/b", Response(headers={"Content-Type": "text/html"}), "is 'text/html'"),
    ],
)
async def test_malformed(root: Path, path: str, response: Response, reason: str) -> None:
    """What is malformed is refused, and nothing changes."""
    lists = {"/p": bytes.fromhex("a161618160"), "/p/a": bytes.fromhex("a1616283613101f4")}

    def reply(request: Request) -> Response:
        found = response if request.path == path else Response(body=lists[request.path])
        length = {"Content-Length": str(len(found.body)), "Content-Type": "application/cbor"}
        return attrs.evolve(found, headers={**length, **found.headers})

    async with http_server(reply) as server:
        it = mirror(root, server.url.removesuffix("/file"))
        before = files_of(root)
        try:
            error = (await it.once()).error
        except TransferError as raised:
            error = str(raised)
    assert reason in error
    assert before == files_of(root)


async def test_malformed_lists_while_running(root: Path, caplog: pytest.LogCaptureFixture) -> None:
    """A server that sends nonsense again and again is told of once."""
    requests = 0

    def reply(request: Request) -> Response:
        nonlocal requests
        requests += 1
        events = request.headers["accept"] == "text/event-stream"
        head = {"Content-Type": request.headers["accept"], "Transfer-Encoding": "chunked"}
        body = b"9\r\ndata: 1\n\n\r\n" if events else b"1\r\n\xff\r\n0\r\n\r\n"
        return Response(headers=head, body=body, stall=events)

    async with http_server(reply) as server:
        it = mirror(root, server.url.removesuffix("/file"))
        async with running(it):
            await until(lambda: it.status.refused >= 2)
    assert len([line for line in caplog.messages if "is malformed" in line]) == 1


# ----------------------------------------------------------------------------------------------
# Away


@pytest.mark.parametrize("scheme", ["coap", "http"])
async def test_away_and_back(upstream: Origin, root: Path, scheme: str) -> None:
    """While the upstream is away nothing changes; when it is back, what was missed is taken."""
    terms = Terms(retry_s=0.02, timeout_s=0.3, poll_s=0.3)
    async with offered(upstream.root) as uris:
        it = mirror(root, uris[scheme], terms=terms)
        tasks = contextlib.AsyncExitStack()
        await tasks.enter_async_context(running(it))
        await until(lambda: version(root) == "1.0")
    async with tasks:
        await until(lambda: it.status.error)
        contact = it.status.last_contact
        assert (version(root), it.status.behind) == ("1.0", 0)
        upstream.publish("1.1")
        async with offered(upstream.root, *where(uris)):
            await until(lambda: version(root) == "1.1")
            await until(lambda: not it.status.error)
            assert it.status.last_contact != contact


@pytest.mark.parametrize(
    ("uri", "error", "reason"),
    [
        ("ftp://127.0.0.1", ConfigError, "cannot be an upstream: must be the URI of an upstream"),
        ("coap://127.0.0.1:1", TransferError, "Connection refused"),
        ("http://127.0.0.1:1", TransferError, "Connection refused|failed"),
        ("http://" + "x" * 90, ConfigError, "cannot be an upstream: must be at most 100 bytes"),
    ],
)
async def test_no_upstream(root: Path, uri: str, error: type[Exception], reason: str) -> None:
    """What is no upstream, or not there, is told."""
    with pytest.raises(error, match=reason):
        await mirror(root, uri).once()


async def test_a_repository_that_is_broken(
    upstream: Origin, root: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """While the files here are malformed nothing is changed; once they are mended it goes on."""
    async with offered(upstream.root) as uris:
        it = mirror(root, uris["coap"])
        stray = root / "packages" / "own" / "package.toml"
        stray.parent.mkdir()
        stray.write_text("nonsense")
        async with running(it):
            await until(lambda: it.status.error)
            assert present(root) is None
            stray.unlink()
            await until(lambda: version(root) == "1.0")


@pytest.mark.parametrize(
    ("head", "reason"),
    [
        ("", "no answer in 0.1 s"),
        ("text/event-stream", "no sign of life in 0.1 s"),
        ("application/cbor", "not text/event-stream"),
    ],
)
async def test_silence(
    root: Path, monkeypatch: pytest.MonkeyPatch, head: str, reason: str
) -> None:
    """An upstream that says nothing more over HTTP is away."""
    monkeypatch.setattr(upstreams, "SILENCE_S", 0.1)
    raw = f"HTTP/1.1 200 OK\r\nContent-Type: {head}\r\n\r\n".encode() if head else b"HTTP"

    def reply(_request: Request) -> Response:
        return Response(head=raw, stall=True)

    async with http_server(reply) as server:
        terms = attrs.evolve(QUICK, timeout_s=0.1)
        it = mirror(root, server.url.removesuffix("/file"), terms=terms)
        async with running(it):
            await until(lambda: reason in it.status.error)


async def test_an_event_stream_that_ends(root: Path) -> None:
    """An upstream that ends it is asked anew; it costs no time until then."""
    ends = whole(b"data: 1\n\n").having(Content_Type="text/event-stream")
    async with (
        http_server(lambda _: ends) as server,
        upstreams.upstream_of(server.url.removesuffix("/file"), PATIENCE_S) as it,
        asyncio.timeout(PATIENCE_S),
    ):
        assert [change async for change in it.changes(3_600)] == [None]


async def test_lists_that_do_not_come(root: Path) -> None:
    """A list that does not come whole in time is none."""
    half = Response(headers={"Content-Type": "application/cbor"}, body=b"\xa1", stall=True)
    async with http_server(lambda _: half) as server:
        terms = attrs.evolve(QUICK, timeout_s=0.1)
        with pytest.raises(TransferError, match=r"no progress in 0\.1 s"):
            await mirror(root, server.url.removesuffix("/file"), terms=terms).once()


async def test_a_place_that_cannot_be_written(upstream: Origin, root: Path) -> None:
    """Where files cannot be put, the old state stays, and it is told why."""
    scaffold.init(root)
    (root / "blobs").mkdir()
    (root / "blobs" / ".incoming").write_text("in the way")
    async with offered(upstream.root) as uris:
        status = await mirror(root, uris["coap"]).once()
        assert "cannot be written" in status.error
        (root / "blobs" / ".incoming").unlink()
        state = present(upstream.root)
        assert state
        digest = (state.archives or ())[0].envelope.sha256.hex()
        (root / "blobs" / ".incoming" / digest).mkdir(parents=True)
        status = await mirror(root, uris["coap"]).once()
    assert (present(root), status.behind) == (None, 1)
    assert "not a regular file" in status.error
