"""An upstream whose files lie on a server of their own, and what is asked of mirrors of it."""

from __future__ import annotations

import asyncio
import contextlib
import os
from collections.abc import AsyncIterator, Callable
from pathlib import Path

import attrs

from netota_coap.gateway.adoption import Choice
from netota_coap.gateway.blob_fetcher import BlobFetcher
from netota_coap.gateway.mirror import Mirror, Terms
from netota_coap.model.values import Archive, Content, Offer, Stream, StreamName
from netota_coap.publishing.archives import ArchiveSource
from netota_coap.repository import loading, scaffold
from netota_coap.repository.blobs import Blobs
from netota_coap.repository.check import check
from tests.support import publishing
from tests.support.file_servers import HttpServer, Request, Response, http_server, just, ranged
from tests.support.publishing import STABLE
from tests.support.serving import PATIENCE_S, serving

QUICK = Terms(retry_s=0.02, timeout_s=PATIENCE_S)
ALL = Choice()
BOARD = "nrf52840dk"


def content(version: str, machine: str = BOARD) -> bytes:
    """Return the file of a version."""
    return f"firmware {version} for {machine}".encode() * 100


@attrs.define
class Origin:
    """An upstream.

    Attributes:
        root: Of the repository.
        files: What its file server has, by path.
        refuse: Paths that the file server does not answer as it should, and how it does.
    """

    root: Path
    server: HttpServer
    files: dict[str, bytes]
    refuse: dict[str, Callable[[Response], Response]]

    def publish(
        self, version: str, name: StreamName = STABLE, machines: tuple[str, ...] = (BOARD,)
    ) -> Stream:
        """Publish a file for each machine."""
        sources = []
        for machine in machines:
            file = self.root.parent / f"{machine}.bin"
            path = f"/{version}/{machine}"
            self.files.setdefault(path, content(version, machine))
            file.write_bytes(self.files[path])
            offer = Offer(url=self.server.url.removesuffix("/file") + path, metric=100)
            sources.append(
                ArchiveSource(file, machine, content=Content(machine=machine), offers=(offer,))
            )
        return publishing.publish(self.root, name, version, sources)

    def asked(self, version: str, machine: str = BOARD) -> int:
        """Return how often a file was asked for."""
        return sum(request.path == f"/{version}/{machine}" for request in self.server.requests)


@contextlib.asynccontextmanager
async def origin(directory: Path) -> AsyncIterator[Origin]:
    """Make an upstream with one version, which is not served yet."""
    files: dict[str, bytes] = {}
    refuse: dict[str, Callable[[Response], Response]] = {}

    def reply(request: Request) -> Response:
        if request.path not in files:
            return just("404 Not Found")
        response = ranged(files[request.path], request)
        return refuse.get(request.path, lambda same: same)(response)

    root = directory / "upstream"
    scaffold.init(root)
    async with http_server(reply) as server:
        it = Origin(root, server, files, refuse)
        it.publish("1.0")
        yield it


@contextlib.asynccontextmanager
async def offered(root: Path, *binds: str) -> AsyncIterator[dict[str, str]]:
    """Serve over CoAP and HTTP; the URIs by scheme."""
    coap, http = binds or ("127.0.0.1:0", "127.0.0.1:0")
    async with serving(root, coap, http_bind=http) as uris:
        yield {uri.partition(":")[0]: uri for uri in uris}


def where(uris: dict[str, str]) -> tuple[str, str]:
    """Return where to listen to be found again."""
    return uris["coap"].partition("://")[2], uris["http"].partition("://")[2]


def mirror(
    root: Path, uri: str, choice: Choice = ALL, terms: Terms = QUICK, **bounds: int
) -> Mirror:
    """Make a mirror, and its repository if need be; `bounds` are those of `BlobFetcher`."""
    if not root.exists():
        scaffold.init(root)
    return Mirror(BlobFetcher(root, **bounds), uri, choice, terms)


@contextlib.asynccontextmanager
async def running(*mirrors: Mirror) -> AsyncIterator[None]:
    """Let mirrors run for as long as the block takes."""
    tasks = [asyncio.create_task(each.run()) for each in mirrors]
    try:
        yield
    finally:
        for task in tasks:
            task.cancel()
        ended = await asyncio.gather(*tasks, return_exceptions=True)
        assert all(isinstance(each, asyncio.CancelledError) for each in ended), ended


def present(root: Path, name: StreamName = STABLE) -> Stream | None:
    """Return what a stream holds."""
    return loading.read(root, name)[1]


def version(root: Path, name: StreamName = STABLE) -> str:
    """Return the version that a stream holds, or ""."""
    state = present(root, name)
    return state.version if state else ""


async def until_level(it: Mirror, wanted: str, name: StreamName = STABLE) -> None:
    """Run a mirror once, and again until the upstream serves what was published."""
    async with asyncio.timeout(PATIENCE_S):
        while version(it.root, name) != wanted or it.status.behind:
            await it.once()


def held(root: Path, archive: Archive) -> bytes:
    """Return a blob."""
    with os.fdopen(Blobs(root).open(archive.envelope.sha256), "rb") as stream:
        return stream.read()


def files_of(root: Path) -> dict[str, tuple[int, int]]:
    """Return by what each file would be known as another one."""
    return {
        str(path): (path.stat().st_ino, path.stat().st_mtime_ns)
        for path in sorted(root.rglob("*"))
        if path.is_file() and path.name != ".lock"
    }


def require_correct(root: Path) -> None:
    """See that a mirror has nothing wrong in it, and the blobs of all that it tells."""
    findings = check(root)
    assert findings.errors == ()
    assert findings.repository
    assert Blobs(root).verify() == ()
    for package in findings.repository.packages.values():
        for stream in package.streams.values():
            for archive in stream.archives or ():
                assert len(held(root, archive)) == archive.envelope.size
