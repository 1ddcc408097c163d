"""Servers of one file on loopback: well-behaved ones, and one that answers as the test says."""

from __future__ import annotations

import asyncio
import contextlib
import random
import re
import socket
import ssl
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Callable, Iterator
from pathlib import Path

import attrs

from tests.support.serving import PATIENCE_S

FILESERVER = Path(sys.executable).with_name("aiocoap-fileserver")


@attrs.frozen
class Request:
    """A request that arrived.

    Attributes:
        method: As `GET`.
        path: With query.
        headers: By name in lower case.
        number: From 0, of this server.
    """

    method: str
    path: str
    headers: dict[str, str]
    number: int


@attrs.frozen
class Response:
    """An answer, or what is left of one.

    Attributes:
        status: As `200 OK`.
        headers: By name.
        body: The bytes.
        cut: After how many bytes of the body the connection ends; None: after all of them.
        stall: Whether nothing comes after the cut, not even an end.
        head: What is sent instead of status and headers.
    """

    status: str = "200 OK"
    headers: dict[str, str] = attrs.field(factory=dict)
    body: bytes = b""
    cut: int | None = None
    stall: bool = False
    head: bytes = b""

    def but(self, **changes: object) -> Response:
        return attrs.evolve(self, **changes)

    def without(self, *names: str) -> Response:
        left = {name: value for name, value in self.headers.items() if name not in names}
        return attrs.evolve(self, headers=left)

    def having(self, **headers: str) -> Response:
        added = {name.replace("_", "-"): value for name, value in headers.items()}
        return attrs.evolve(self, headers={**self.headers, **added})


def whole(data: bytes, tag: str = '"1"') -> Response:
    """Answer with all of a file."""
    return Response(headers={"Content-Length": str(len(data)), "ETag": tag}, body=data)


def ranged(data: bytes, request: Request, tag: str = '"1"') -> Response:
    """Answer as a good server does, with a range where one is asked for."""
    asked = re.fullmatch(r"bytes=(\d+)-(\d*)", request.headers.get("range", ""))
    if asked is None or request.headers.get("if-range", tag) != tag:
        return whole(data, tag)
    begin, end = int(asked[1]), int(asked[2] or len(data) - 1)
    if begin >= len(data):
        return just("416 Range Not Satisfiable").having(Content_Range=f"bytes */{len(data)}")
    piece = data[begin : end + 1]
    headers = {"Content-Range": f"bytes {begin}-{begin + len(piece) - 1}/{len(data)}"}
    return Response("206 Partial Content", whole(piece, tag).headers | headers, piece)


def chunked(data: bytes) -> Response:
    """Answer with all of a file, its size not told before its end."""
    body = f"{len(data):x}\r\n".encode() + data + b"\r\n0\r\n\r\n"
    return Response(headers={"Transfer-Encoding": "chunked"}, body=body)


def just(status: str) -> Response:
    """Answer without a file."""
    return Response(status, {"Content-Length": "0"})


def raw(head: bytes) -> Response:
    """Answer with these bytes."""
    return Response(head=head)


def to(location: str) -> Response:
    """Answer that the file is elsewhere."""
    return just("302 Found").having(Location=location)


Reply = Callable[[Request], Response]


@attrs.define
class HttpServer:
    """A server of one file.

    Attributes:
        reply: What it answers.
        url: Of the file.
        requests: Those that came.
    """

    reply: Reply
    url: str = ""
    requests: list[Request] = attrs.field(factory=list)

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            while await self._answer(reader, writer):
                pass
        except (ConnectionError, asyncio.IncompleteReadError, ssl.SSLError):
            pass
        finally:
            writer.close()
            with contextlib.suppress(ConnectionError, ssl.SSLError):
                await writer.wait_closed()

    async def _answer(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> bool:
        """Answer one request; tell whether another may follow."""
        lines = (await reader.readuntil(b"\r\n\r\n")).decode().split("\r\n")
        method, path, _ = lines[0].split(" ")
        pairs = (line.partition(":") for line in lines[1:-2])
        headers = {name.lower(): value.strip() for name, _, value in pairs}
        self.requests.append(Request(method, path, headers, len(self.requests)))
        response = self.reply(self.requests[-1])
        fields = "".join(f"{name}: {value}\r\n" for name, value in response.headers.items())
        head = response.head or f"HTTP/1.1 {response.status}\r\n{fields}\r\n".encode("latin-1")
        writer.write(head + (b"" if method == "HEAD" else response.body[: response.cut]))
        await writer.drain()
        if response.stall:
            await reader.read()
        return response.cut is None and not response.head and "Connection" not in response.headers


@contextlib.asynccontextmanager
async def http_server(
    reply: Reply, tls: ssl.SSLContext | None = None
) -> AsyncIterator[HttpServer]:
    """Serve what `reply` answers."""
    it = HttpServer(reply)
    serving: dict[asyncio.Task[None], asyncio.StreamWriter] = {}

    def accept(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.create_task(it._serve(reader, writer))
        serving[task] = writer
        task.add_done_callback(serving.pop)

    server = await asyncio.start_server(accept, "127.0.0.1", 0, ssl=tls)
    it.url = f"http{'s' if tls else ''}://127.0.0.1:{server.sockets[0].getsockname()[1]}/file"
    try:
        yield it
    finally:
        server.close()
        tasks = list(serving)
        for task in tasks:
            serving[task].transport.abort()
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


def certificate(directory: Path) -> Path:
    """Make a certificate of 127.0.0.1, signed by itself, and its key, in one file."""
    path = directory / "certificate.pem"
    subprocess.run(
        ["openssl", "req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1",
         "-nodes", "-days", "2", "-subj", "/CN=127.0.0.1",
         "-addext", "subjectAltName=IP:127.0.0.1",
         "-keyout", path, "-out", directory / "alone.pem"],
        check=True, capture_output=True,
    )  # fmt: skip
    with path.open("ab") as stream:
        stream.write((directory / "alone.pem").read_bytes())
    return path


@contextlib.contextmanager
def coap_fileserver(root: Path) -> Iterator[str]:
    """Run the real `aiocoap-fileserver` over a directory; its URI."""
    with _coap_server(lambda port: [FILESERVER, "--bind", f"127.0.0.1:{port}", root]) as uri:
        yield uri


@contextlib.contextmanager
def libcoap_server() -> Iterator[str]:
    """Run libcoap's real server, which keeps what is put to it; its URI."""
    arguments = ["-d", "9", "-A", "127.0.0.1"]
    with _coap_server(lambda port: ["coap-server-notls", *arguments, "-p", str(port)]) as uri:
        yield uri


@contextlib.contextmanager
def _coap_server(command: Callable[[int], list[str | Path]]) -> Iterator[str]:
    """Run a server on a port of its own; on another one if somebody was faster to take it."""
    for _ in range(5):
        port = free_port()
        with subprocess.Popen(command(port), stderr=subprocess.DEVNULL) as process:
            try:
                if _answers(port, process):
                    yield f"coap://127.0.0.1:{port}"
                    return
            finally:
                process.kill()
    raise AssertionError(f"{command(0)[0]} ended, or answered nothing in {PATIENCE_S} s")


def free_port(kind: socket.SocketKind = socket.SOCK_DGRAM) -> int:
    """Return a port that is free, and that no socket gets which asks for any."""
    while True:
        port = random.randrange(20_000, 32_000)
        with (
            socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe,
            contextlib.suppress(OSError),
        ):
            probe.bind(("127.0.0.1", port))
            return port


def _answers(port: int, process: subprocess.Popen[bytes]) -> bool:
    """Wait for an answer; tell whether there was one before the process ended."""
    end_s = time.monotonic() + PATIENCE_S
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as ping:
        ping.connect(("127.0.0.1", port))
        ping.settimeout(0.05)
        while process.poll() is None and time.monotonic() < end_s:
            try:
                ping.send(b"\x40\x00\x00\x01")
                ping.recv(100)
            except OSError:
                time.sleep(0.025)
            else:
                return True
    return False
