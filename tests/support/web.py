"""A site over HTTP as most tests have it, and a client of event streams without a library."""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
from collections.abc import AsyncIterator
from datetime import UTC, datetime
from typing import Any
from urllib.parse import urlsplit

import attrs

from netota_coap.catalog.catalog import Catalog
from netota_coap.http.server import HttpSite
from netota_coap.model.values import Archive, Content, Envelope, Offer, Package, Repository, Stream
from netota_coap.monitoring import Metrics, Status
from tests.support.serving import PATIENCE_S

STATUS = Status("1.0", 12.3456, 2, 3, 4, datetime(2026, 11, 24, 9, 30, tzinfo=UTC))


def archive(name: str, url: str = "https://example.com/f", **content: str | bool) -> Archive:
    return Archive(
        name=name,
        envelope=Envelope(
            type="application/octet-stream", size=9, sha256=hashlib.sha256(name.encode()).digest()
        ),
        content=Content(**content),  # type: ignore[arg-type]
        offers=(Offer(url=url, metric=1),),
    )


def stream(sequence: int = 1, count: int = 1, **options: Any) -> Stream:
    """Return a stream of this many archives, each for a machine of its own."""
    built = tuple(archive(f"board{n}", machine=f"m{n}") for n in range(count))
    published = datetime(2026, 11, 20, tzinfo=UTC)
    plain = {"version": str(sequence), "archives": built, "published": published, **options}
    return Stream(sequence=sequence, **plain)


def catalog(streams: dict[str, Stream], previous: Catalog | None = None) -> Catalog:
    """Return a catalog of one package."""
    packages = {"pkg": Package(title='A "<package>"', streams=streams)}
    return Catalog.of(Repository(format=1, packages=packages), previous)


def site(served: Catalog, **options: Any) -> HttpSite:
    plain = {"status": lambda: STATUS, "metrics": Metrics(), "root": None, **options}
    return HttpSite(served, **plain)


@attrs.define
class Connection:
    """A connection on which nothing but what the test says is sent."""

    reader: asyncio.StreamReader
    writer: asyncio.StreamWriter

    def send(self, method: str, target: str, *headers: str) -> None:
        """Send a request."""
        lines = [f"{method} {target} HTTP/1.1", "Host: x", *headers, "", ""]
        self.writer.write("\r\n".join(lines).encode("latin-1"))

    async def head(self) -> str:
        """Return status line and headers of an answer."""
        async with asyncio.timeout(PATIENCE_S):
            return (await self.reader.readuntil(b"\r\n\r\n")).decode()

    async def rest(self) -> bytes:
        """Return what comes until the other side ends."""
        async with asyncio.timeout(PATIENCE_S):
            return await self.reader.read()

    async def chunk(self) -> str:
        """Return one chunk; "" is the last one."""
        async with asyncio.timeout(PATIENCE_S):
            size = int(await self.reader.readline(), 16)
            return (await self.reader.readexactly(size + 2))[:-2].decode()

    async def event(self) -> dict[str, str]:
        """Return the fields of the next chunk's last event."""
        lines = (await self.chunk()).splitlines()
        return dict(line.split(": ", 1) for line in lines if ": " in line)

    async def follow(self, target: str, *headers: str) -> str:
        """Ask for an event stream; the head of the answer."""
        self.send("GET", target, "Accept: text/event-stream", *headers)
        return await self.head()


@contextlib.asynccontextmanager
async def connected(uri: str, limit: int = 2**16) -> AsyncIterator[Connection]:
    """Connect to a server."""
    address = urlsplit(uri)
    reader, writer = await asyncio.open_connection(address.hostname, address.port, limit=limit)
    try:
        yield Connection(reader, writer)
    finally:
        writer.close()
        with contextlib.suppress(ConnectionError):
            await writer.wait_closed()
