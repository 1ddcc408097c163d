"""A service that is a gateway: it follows upstreams by itself, and fetches files on demand."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import re
from collections.abc import AsyncIterator, Callable
from pathlib import Path

import attrs
import httpx2
import pytest

from netota_coap.client.coap_client import Client
from netota_coap.errors import ConfigError, PeerError
from netota_coap.gateway import on_demand
from netota_coap.model.values import Archive, Offer, StreamName
from netota_coap.publishing.archives import ArchiveSource
from netota_coap.repository.blobs import Blobs, blob_name, path_of
from netota_coap.repository.scaffold import init
from netota_coap.service.config import Config
from netota_coap.service.service import Service
from tests.support import publishing
from tests.support.device import device
from tests.support.file_servers import Response, just, whole
from tests.support.mirroring import (
    BOARD,
    QUICK,
    Origin,
    content,
    mirror,
    offered,
    origin,
    present,
    require_correct,
    running,
    version,
)
from tests.support.publishing import STABLE
from tests.support.serving import PATIENCE_S, netota, until

pytestmark = pytest.mark.slow

OTHER = ("door-lock", "stable")
SLOW = 400_000  # bytes a second
LONG = b"x" * 200_000


@attrs.frozen
class Running:
    """A gateway.

    Attributes:
        service: That it is.
        uris: By scheme.
    """

    service: Service
    uris: dict[str, str]

    def path(self, archive: Archive) -> str:
        """Return the URI of a file over CoAP."""
        return f"{self.uris['coap']}/b/{blob_name(archive.envelope.sha256)}"


@contextlib.asynccontextmanager
async def gateway(root: Path, **settings: object) -> AsyncIterator[Running]:
    """Run a gateway over CoAP and HTTP."""
    uris: list[str] = []
    binds = {"coap_bind": ("127.0.0.1:0",), "http_bind": "127.0.0.1:0"}
    config = Config(repository=root, **binds, **settings)  # type: ignore[arg-type]
    service = Service(config, uris.append)
    task = asyncio.create_task(service.run())
    try:
        await until(lambda: len(uris) == 2 or task.done())
        if task.done():
            task.result()
        yield Running(service, {uri.partition(":")[0]: uri for uri in uris})
    finally:
        service.stop()
        await task


def archive_of(root: Path) -> Archive:
    """Return the first archive of a stream."""
    state = present(root)
    assert state
    return (state.archives or ())[0]


# ----------------------------------------------------------------------------------------------
# Upstreams


async def test_two_upstreams(tmp_path: Path, upstream: Origin) -> None:
    """One process follows both, into a repository that it makes, and tells how it stands."""
    root = tmp_path / "gateway"
    async with origin(tmp_path / "other") as second, contextlib.AsyncExitStack() as stack:
        publishing.remove(second.root, STABLE)
        second.publish("7.0", OTHER)
        uris = [
            (await stack.enter_async_context(offered(each.root)))[scheme]
            for each, scheme in ((upstream, "coap"), (second, "http"))
        ]
        async with gateway(root, mirror_upstreams=tuple(uris)) as here:
            await until(lambda: here.service.status().streams == 2)
            assert (version(root), version(root, OTHER)) == ("1.0", "7.0")
            async with Client() as client:
                states = client.observe(f"{here.uris['coap']}/p/sensor-node/s/stable")
                async with contextlib.aclosing(states):
                    await anext(states)
                    upstream.publish("1.1")
                    async with asyncio.timeout(PATIENCE_S):
                        while (state := await anext(states)).version != "1.1":
                            pass
            (local, _) = (state.archives or ())[0].offers
            assert local.url == here.path((state.archives or ())[0]).removeprefix(
                here.uris["coap"]
            )
            status = here.service.status()
            assert [each.uri for each in status.upstreams] == uris
            assert [(each.behind, each.error) for each in status.upstreams] == [(0, "")] * 2
            assert status.fetched_bytes == sum(map(len, map(content, ("1.0", "1.1", "7.0"))))
            metrics = (await _get(here, "metrics")).text
        require_correct(root)
    assert f'netota_upstream_streams_behind{{upstream="{uris[0]}"}} 0.0' in metrics
    assert f"netota_fetched_bytes_total {status.fetched_bytes}" in metrics


async def test_choice(tmp_path: Path, upstream: Origin) -> None:
    """Streams by pattern; files of the devices here only."""
    root = tmp_path / "gateway"
    upstream.publish("1.1", machines=(BOARD, "native"))
    upstream.publish("7.0", OTHER)
    async with (
        offered(upstream.root) as uris,
        gateway(
            root,
            mirror_upstreams=(uris["coap"],),
            mirror_packages=("sensor-*",),
            mirror_devices=("machine=native", "debug=false"),
        ),
    ):
        await until(lambda: version(root) == "1.1")
        assert version(root, OTHER) == ""
    assert (upstream.asked("1.1", "native"), upstream.asked("1.1")) == (1, 0)


async def test_status_of_an_upstream_that_is_away(tmp_path: Path, upstream: Origin) -> None:
    """What was taken over is served on, and its age is told."""
    root = tmp_path / "gateway"
    async with contextlib.AsyncExitStack() as stack:
        async with offered(upstream.root) as uris:
            settings = {"mirror_upstreams": (uris["http"],)}
            here = await stack.enter_async_context(gateway(root, **settings))
            await until(lambda: version(root) == "1.0")
        await until(lambda: here.service.status().upstreams[0].error)
        assert "; http://127.0.0.1:" in str(here.service.status())
        _, out, _ = await netota("status", here.uris["coap"], "--json")
        (told,) = json.loads(out)["upstreams"]
        assert (told["uri"], told["behind"], told["refused"]) == (uris["http"], 0, 0)
        assert re.fullmatch(r"20\d\d-.*Z", told["last_contact"])
        _, out, _ = await netota("status", here.uris["coap"])
        (line,) = (line for line in out.splitlines() if line.strip().startswith("upstream"))
        assert re.search(r"http://\S+, last contact \d+\.\d s ago, .*\w", line), out
        assert (await _get(here, "readyz")).status_code == 200
        async with Client() as client:
            state = await client.stream(f"{here.uris['coap']}/p/sensor-node/s/stable")
            assert state.version == "1.0"


async def test_the_first_start(tmp_path: Path, upstream: Origin) -> None:
    """It does not listen before there is something, lest devices take their streams for gone."""
    root, path = tmp_path / "gateway", f"/1.0/{BOARD}"
    upstream.refuse[path] = lambda _: just("404 Not Found")
    told: list[str] = []
    async with offered(upstream.root) as uris:
        config = Config(
            repository=root, coap_bind=("127.0.0.1:0",), mirror_upstreams=(uris["http"],)
        )
        listening: list[str] = []
        service = Service(config, listening.append)
        task = asyncio.create_task(service.run())
        await until(lambda: upstream.asked("1.0"))
        told.append(service.status_line())
        assert listening == []
        del upstream.refuse[path]
        await until(lambda: listening)
        assert service.status().streams == 1
        service.stop()
        await task
    assert told[0].startswith(f"waiting for upstreams: {uris['http']}: 1 streams behind, seen 20")


async def test_what_cannot_be_an_upstream(tmp_path: Path) -> None:
    """The service does not begin."""
    with pytest.raises(ConfigError, match="cannot be an upstream: must be at most 100 bytes"):
        async with gateway(tmp_path, mirror_upstreams=(f"http://{'x' * 90}",)):
            pass


async def test_polls(tmp_path: Path, upstream: Origin) -> None:
    """Where nothing changed only that is asked; what was lost here comes again."""
    root = tmp_path / "gateway"
    async with gateway(upstream.root) as there:
        terms = attrs.evolve(QUICK, poll_s=0.05)
        it = mirror(root, there.uris["http"], terms=terms)
        requests = there.service.metrics.requests
        async with running(it):
            await until(lambda: version(root) == "1.0")
            contact = it.status.last_contact
            await until(lambda: it.status.last_contact != contact)
            (blob,) = Blobs(root).all()
            before = requests["http", "stream", "200"]
            polls = requests["http", "packages", "200"]
            await until(lambda: requests["http", "packages", "200"] > polls + 5)
            assert requests["http", "stream", "200"] == before
            (root / path_of(blob.sha256)).unlink()
            await until(lambda: len(Blobs(root).all()) == 1)
    assert upstream.asked("1.0") == 2


# ----------------------------------------------------------------------------------------------
# On demand


async def _get(here: Running, path: str) -> httpx2.Response:
    async with httpx2.AsyncClient() as client:
        return await client.get(f"{here.uris['http']}/{path}")


@contextlib.asynccontextmanager
async def slowly(upstream: Origin, **settings: object) -> AsyncIterator[tuple[Running, Archive]]:
    """Run a gateway before a long file that comes slowly; nobody has asked for it yet."""
    upstream.files[f"/2.0/{BOARD}"] = LONG
    upstream.publish("2.0")
    bounds = {"blobs_cache": "on-demand", "blobs_limit_bytes_s": SLOW, **settings}
    async with gateway(upstream.root, **bounds) as here:
        yield here, archive_of(upstream.root)


async def test_many_devices_one_download(upstream: Origin) -> None:
    """Whoever asks before the file is whole is told when to ask again."""
    async with slowly(upstream) as (here, archive), contextlib.AsyncExitStack() as stack:
        path = here.path(archive).removeprefix(f"{here.uris['coap']}/")
        devices = [await stack.enter_async_context(device(here.uris["coap"])) for _ in range(20)]
        answers = await asyncio.gather(*(each.ask(1, path) for each in devices))
        assert {answer.code for answer in answers} == {"5.03"}
        assert {answer.uint(14) for answer in answers} == {on_demand.FIRST_S}
        over_http = await _get(here, path)
        assert (over_http.status_code, over_http.headers["Retry-After"]) == (503, "1")
        assert over_http.json()["detail"] == "the file is being fetched, ask again"
        await until(lambda: Blobs(upstream.root).held([archive.envelope]))
        answers = await asyncio.gather(*(each.ask(1, path) for each in devices))
        assert {answer.code for answer in answers} == {"2.05"}
        assert (await _get(here, path)).content == LONG
    assert upstream.asked("2.0") == 1


async def test_when_to_ask_again(upstream: Origin) -> None:
    """It is estimated from how fast the file comes."""
    async with slowly(upstream, blobs_limit_bytes_s=20_000) as (here, archive), Client() as client:
        told = []
        while not told or told[-1] <= 2:
            with pytest.raises(PeerError) as caught:
                await client.block(here.path(archive), 0)
            told.append(caught.value.retry_after_s or 0)
    assert 3 <= told[-1] <= 10
    assert Blobs(upstream.root).all() == ()
    assert list(upstream.root.glob("blobs/.incoming/.*.part"))


async def test_nobody_is_told_of_a_download(upstream: Origin) -> None:
    """The offer is there from the beginning, so that its file's arrival is no change."""
    async with slowly(upstream) as (here, archive), device(here.uris["coap"]) as observer:
        first = await observer.observe("p/sensor-node/s/stable")
        assert b"/b/" in first.payload
        async with Client() as client:
            with pytest.raises(PeerError, match=r"^\S+: 5\.03 the file is being fetched"):
                await client.block(here.path(archive), 0)
        await until(lambda: Blobs(upstream.root).held([archive.envelope]))
        publishing.publish(upstream.root, ("sensor-node", "edge"), "1", [])
        upstream.publish("2.1")
        told = await observer.notification()
    assert b"2.1" in told.payload


@pytest.mark.parametrize(
    ("response", "reason"),
    [(just("404 Not Found"), "404 Not Found"), (whole(b"y" * len(LONG)), "SHA-256 is")],
)
async def test_what_cannot_be_had(
    upstream: Origin, response: Response, reason: str, caplog: pytest.LogCaptureFixture
) -> None:
    """Devices hear of it, so that they try another offer; it is tried again after a while."""
    path = f"/2.0/{BOARD}"
    upstream.refuse[path] = lambda _: response
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(on_demand, "RETRY_S", 1.0)
        async with slowly(upstream) as (here, archive), Client() as client:

            async def code() -> str:
                try:
                    await client.block(here.path(archive), 0)
                except PeerError as error:
                    return error.code
                return "2.05"

            async def until_code(wanted: str) -> None:
                async with asyncio.timeout(PATIENCE_S):
                    while await code() != wanted:
                        pass

            assert await code() == "5.03"
            await until_code("5.02")
            over_http = await _get(here, here.path(archive).partition("/b/")[2].join(("b/", "")))
            assert (over_http.status_code, over_http.headers["Retry-After"]) == (502, "1")
            assert reason in over_http.json()["detail"]
            del upstream.refuse[path]
            await until_code("2.05")
    assert len([line for line in caplog.messages if "could not be fetched" in line]) == 1
    assert upstream.asked("2.0") == 2


def also(root: Path, name: StreamName, archive: Archive) -> None:
    """Let another stream hold an archive."""
    state = present(root)
    assert state
    publishing.change(root, name, lambda _: attrs.evolve(state, archives=(archive,)))


@contextlib.asynccontextmanager
async def doubled(upstream: Origin, change: Callable[[Archive], Archive]) -> AsyncIterator[str]:
    """Run a gateway where streams before and after another hold what is almost its file."""
    archive = archive_of(upstream.root)
    for package in ("a", "z"):
        also(upstream.root, (package, "stable"), change(archive))
    async with gateway(upstream.root, blobs_cache="on-demand") as here:
        yield here.path(archive)


async def until_served(uri: str) -> None:
    """Ask for a file until it is here."""
    async with Client() as client, asyncio.timeout(PATIENCE_S):
        while not await _is_served(client, uri):
            pass


def other_size(archive: Archive) -> Archive:
    """Return an archive that lies about the size of its file."""
    envelope = archive.envelope
    return attrs.evolve(archive, envelope=attrs.evolve(envelope, size=envelope.size + 1))


def dead(archive: Archive) -> Archive:
    """Return an archive that nobody has."""
    return attrs.evolve(archive, offers=(Offer(url="http://127.0.0.1:1/", metric=1),))


@pytest.mark.parametrize("change", [other_size, dead])
async def test_one_file_of_several_streams(
    upstream: Origin, change: Callable[[Archive], Archive], caplog: pytest.LogCaptureFixture
) -> None:
    """What is wrong with one stream does not keep a file from others."""
    caplog.set_level("INFO")
    async with doubled(upstream, change) as uri:
        await until_served(uri)
        await until(lambda: [line for line in caplog.messages if line.endswith(": fetched")])
        await until_served(uri)
    assert len([line for line in caplog.messages if line.endswith(": fetched")]) == 1
    assert not [line for line in caplog.messages if "could not" in line]


async def test_a_lie_takes_nothing_from_others(upstream: Origin) -> None:
    """What is served stays so when a stream comes that lies about its size."""
    archive = archive_of(upstream.root)
    file = upstream.root.parent / "file"
    file.write_bytes(content("1.0"))
    Blobs(upstream.root).add(file)
    async with gateway(upstream.root) as here, Client() as client:
        await client.block(here.path(archive), 0)
        also(upstream.root, ("z", "stable"), other_size(archive))
        await until(lambda: here.service.status().packages == 2)
        await client.block(here.path(archive), 0)
        states = [
            await client.stream(f"{here.uris['coap']}/p/{name}/s/stable")
            for name in ("sensor-node", "z")
        ]
    offers = [(state.archives or ())[0].offers[0].url for state in states]
    assert [url.startswith("/b/") for url in offers] == [True, False]


async def refusal_of(client: Client, path: str) -> str:
    """Return why a block is refused; "" if it is served."""
    try:
        await client.block(path, 0)
    except PeerError as error:
        return error.detail
    return ""


async def test_a_file_that_was_changed_here(
    upstream: Origin, caplog: pytest.LogCaptureFixture
) -> None:
    """It is not served, nor fetched over what is there, until somebody has looked at it."""
    caplog.set_level("INFO")
    async with gateway(upstream.root, blobs_cache="on-demand") as here, Client() as client:
        archive = archive_of(upstream.root)
        await until_served(here.path(archive))
        blob = upstream.root / path_of(archive.envelope.sha256)
        reloads = here.service.metrics.reloads
        for time_s in range(1, 20):
            caplog.clear()
            await client.block(here.path(archive), 0)
            before = reloads["taken"]
            os.utime(blob, (time_s, time_s))
            told = [await refusal_of(client, here.path(archive)) for _ in range(3)]
            if (
                reloads["taken"] == before
            ):  # else the service has looked at it, for its own arrival
                break
        assert all("4.04 the blob" in each and "is damaged" in each for each in told), told
        before = reloads["taken"]
        publishing.publish(upstream.root, ("sensor-node", "edge"), "1", [])
        await until(lambda: reloads["taken"] > before)
        await client.block(here.path(archive), 0)
    assert len([line for line in caplog.messages if "changed while served" in line]) == 1
    assert upstream.asked("1.0") == 1


async def test_room_is_made_later(upstream: Origin, caplog: pytest.LogCaptureFixture) -> None:
    """A file that is here is served, even if no room can be made for others now."""
    stray = upstream.root / "packages" / "own" / "package.toml"
    async with (
        gateway(upstream.root, blobs_cache="on-demand", blobs_size_cap=1) as here,
        Client() as client,
    ):
        archive = archive_of(upstream.root)
        stray.parent.mkdir()
        stray.write_text("nonsense")
        async with asyncio.timeout(PATIENCE_S):
            while not await _is_served(client, here.path(archive)):
                pass
        await until(
            lambda: [
                line for line in caplog.messages if "unused blobs could not be deleted" in line
            ]
        )
    assert not [line for line in caplog.messages if "could not be fetched" in line]


async def test_what_is_wanted_no_more(upstream: Origin) -> None:
    """What no stream holds is not fetched; what is being fetched when that comes is given up."""
    async with slowly(upstream, blobs_limit_bytes_s=20_000) as (here, archive), Client() as client:
        with pytest.raises(PeerError, match=r"5\.03"):
            await client.block(here.path(archive), 0)
        upstream.publish("2.1")
        tasks = here.service._gateway.on_demand._fetches  # type: ignore[union-attr]
        await until(lambda: not tasks)
        with pytest.raises(PeerError, match=r"4\.04"):
            await client.block(here.path(archive), 0)


async def test_mirrored_on_demand(tmp_path: Path, upstream: Origin) -> None:
    """Streams of an upstream are taken over without files, which come when they are asked for."""
    root = tmp_path / "gateway"
    settings = {"blobs_cache": "on-demand", "blobs_size_cap": len(content("1.0"))}
    async with (
        offered(upstream.root) as uris,
        gateway(root, mirror_upstreams=(uris["coap"],), **settings) as here,
        Client() as client,
    ):
        for each in ("1.0", "1.1"):
            if each != "1.0":
                upstream.publish(each)
            await until(lambda each=each: version(root) == each)
            assert upstream.asked(each) == 0
            archive = archive_of(root)
            async with asyncio.timeout(PATIENCE_S):
                while not await _is_served(client, here.path(archive)):
                    pass
            assert upstream.asked(each) == 1
        await until(lambda: len(Blobs(root).all()) == 1)
    require_correct(root)


async def _is_served(client: Client, uri: str) -> bool:
    """Tell whether a file is there; if not, the server must be waiting for it, or a reload."""
    try:
        await client.block(uri, 0)
    except PeerError as error:
        assert error.code in ("5.03", "4.04")
        return False
    return True


async def test_nothing_is_fetched_that_nobody_offers(tmp_path: Path) -> None:
    """A file that is neither held nor offered elsewhere is not offered here."""
    root = tmp_path / "repository"
    init(root)
    file = tmp_path / "image.bin"
    file.write_bytes(LONG)
    publishing.publish(root, STABLE, "1.0", [ArchiveSource(file, "image")])
    async with gateway(root, blobs_cache="on-demand") as here, Client() as client:
        state = await client.stream(f"{here.uris['coap']}/p/sensor-node/s/stable")
        assert (state.archives or ())[0].offers == ()
        with pytest.raises(PeerError, match=r"4\.04"):
            await client.block(here.path(archive_of(root)), 0)
