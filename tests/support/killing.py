"""Kills `netota-coap mirror` at random, again and again, and counts what its upstream sent.

Usage: python -m tests.support.killing KILLS [coap|http]
Most kills come once the file is under way, the others while the process starts. New versions are
published whenever it comes to its end. Over HTTP the file server is throttled; over CoAP the
upstream holds the files itself.
"""

from __future__ import annotations

import asyncio
import contextlib
import random
import re
import signal
import socket
import sys
import tempfile
from collections.abc import AsyncIterator
from pathlib import Path

import attrs

from netota_coap.model.values import Offer
from netota_coap.publishing.archives import ArchiveSource
from netota_coap.repository import scaffold
from netota_coap.service.config import Config
from netota_coap.service.service import Service
from tests.support import publishing
from tests.support.mirroring import require_correct, version
from tests.support.publishing import STABLE
from tests.support.serving import COMMAND, PROJECT, until

SIZES = {"http": 4_000_000, "coap": 1_500_000}
BYTES_S = 3_000_000
BLOCK = 1_024
EARLY = 0.1  # of the kills, that do not wait until the file is under way
LONGEST_S = 0.6  # until a kill


@attrs.define
class Throttled:
    """A file server that is slow, and counts what it sends.

    Attributes:
        files: By path.
        sent: Bytes of bodies.
        url: Of the root.
    """

    files: dict[str, bytes] = attrs.field(factory=dict)
    sent: int = 0
    url: str = ""

    async def answer(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """Answer one request, piece by piece."""
        with contextlib.suppress(ConnectionError, asyncio.IncompleteReadError):
            head = (await reader.readuntil(b"\r\n\r\n")).decode()
            data = self.files[head.split(" ")[1]]
            asked = re.search(r"range: bytes=(\d+)-", head, re.IGNORECASE)
            start = int(asked[1]) if asked else 0
            status = f"206 Partial Content\r\nContent-Range: bytes {start}-{len(data) - 1}/"
            first = f"{status}{len(data)}" if asked else "200 OK"
            length = f"Content-Length: {len(data) - start}\r\nConnection: close"
            writer.write(f'HTTP/1.1 {first}\r\nETag: "1"\r\n{length}\r\n\r\n'.encode())
            for at in range(start, len(data), 16_384):
                writer.write(data[at : at + 16_384])
                await writer.drain()
                self.sent += len(data[at : at + 16_384])
                await asyncio.sleep(16_384 / BYTES_S)
        writer.transport.abort()


@contextlib.asynccontextmanager
async def throttled() -> AsyncIterator[Throttled]:
    """Serve files slowly."""
    it = Throttled()
    opened = socket.create_server(("127.0.0.1", 0))
    opened.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 16_384)
    server = await asyncio.start_server(it.answer, sock=opened)
    it.url = f"http://127.0.0.1:{opened.getsockname()[1]}"
    try:
        yield it
    finally:
        server.close()


@attrs.frozen
class Figures:
    """What came of it.

    Attributes:
        kills: That hit a living process.
        under_way: Those of them before which it had got some of a file.
        versions: That were published.
        needed: Bytes, or blocks over CoAP, that had to be sent.
        sent: Those that were.
    """

    kills: int
    under_way: int
    versions: int
    needed: int
    sent: int

    @property
    def twice(self) -> float:
        """How many were sent in vain, per kill."""
        return (self.sent - self.needed) / self.kills


async def kill(directory: Path, kills: int, scheme: str) -> Figures:
    """Kill a mirror so many times, then let it come to its end."""
    upstream, root, size = directory / "upstream", directory / "mirror", SIZES[scheme]
    scaffold.init(upstream)
    uris: list[str] = []
    service = Service(Config(repository=upstream, coap_bind=("127.0.0.1:0",)), uris.append)
    killed = under_way = versions = 0
    async with throttled() as server:

        def publish() -> None:
            nonlocal versions
            versions += 1
            file = directory / "image.bin"
            file.write_bytes(random.randbytes(size))
            server.files[f"/{versions}"] = file.read_bytes()
            offers = (Offer(url=f"{server.url}/{versions}", metric=1),) * (scheme == "http")
            source = ArchiveSource(file, "image", offers=offers)
            stored = scheme == "coap"
            publishing.publish(upstream, STABLE, str(versions), [source], store_files=stored)

        def sent() -> int:
            return _blocks(service) if scheme == "coap" else server.sent

        publish()
        serving = asyncio.create_task(service.run())
        await until(lambda: uris)
        command = (*COMMAND, "mirror", uris[0], str(root), "--once")
        while True:
            process = await asyncio.create_subprocess_exec(
                *command, cwd=PROJECT, stdout=asyncio.subprocess.PIPE, stderr=-2
            )
            said = asyncio.create_task(process.communicate())
            before = sent()
            if killed < kills:
                if not under_way or random.random() >= EARLY:
                    await until(lambda: said.done() or sent() > before)  # noqa: B023
                await asyncio.wait((said,), timeout=random.uniform(0, LONGEST_S))
                with contextlib.suppress(ProcessLookupError):
                    process.kill()
            out, _ = await said
            if process.returncode == -signal.SIGKILL:
                killed += 1
                under_way += sent() > before
                continue
            assert process.returncode == 0, out.decode()
            assert version(root) == str(versions)
            require_correct(root)
            if killed == kills:
                break
            publish()
        service.stop()
        await serving
    needed = versions * (-(-size // BLOCK) if scheme == "coap" else size)
    return Figures(killed, under_way, versions, needed, sent())


def _blocks(service: Service) -> int:
    """Return how many blocks of blobs were answered."""
    return sum(
        int(count)
        for metric, labels, count in service.metrics.samples(service.status())
        if metric.name == "netota_requests_total" and labels[1] == "blob"
    )


async def main(kills: int, scheme: str) -> None:
    """Kill, and print what came of it."""
    with tempfile.TemporaryDirectory() as directory:
        figures = await kill(Path(directory), kills, scheme)
        print(figures, f"in vain per kill: {figures.twice:.1f}")


if __name__ == "__main__":
    asyncio.run(main(int(sys.argv[1]), (*sys.argv[2:], "http")[0]))
