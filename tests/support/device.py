"""A device made of a UDP socket: sends what it is told to, and shows what comes back."""

from __future__ import annotations

import asyncio
import itertools
import socket
from collections.abc import AsyncIterator, Iterable
from contextlib import asynccontextmanager
from urllib.parse import urlsplit

import attrs

from netota_coap.coap import options as coap
from tests.support.serving import PATIENCE_S

CON, NON, ACK, RST = range(4)
GET, POST, FETCH = 1, 2, 5


def code(text: str) -> int:
    """Return the number of a dotted code."""
    whole, _, part = text.partition(".")
    return int(whole) << 5 | int(part)


@attrs.frozen
class Answer:
    """A datagram, read."""

    kind: int
    code: str
    message_id: int
    token: bytes
    options: tuple[coap.Option, ...]
    payload: bytes

    @classmethod
    def parse(cls, data: bytes) -> Answer:
        end = 4 + (data[0] & 15)
        options, payload = coap.decode(data[end:])
        dotted = f"{data[1] >> 5}.{data[1] & 31:02}"
        number = int.from_bytes(data[2:4], "big")
        return cls(data[0] >> 4 & 3, dotted, number, data[4:end], options, payload)

    def values(self, number: int) -> list[bytes]:
        return [value for found, value in self.options if found == number]

    def uint(self, number: int) -> int | None:
        values = self.values(number)
        return coap.decode_uint(values[0]) if values else None


@attrs.define
class Device:
    """A CoAP endpoint that does nothing by itself."""

    socket: socket.socket
    timeout_s: float = PATIENCE_S
    _numbers: itertools.count[int] = attrs.field(factory=lambda: itertools.count(0x1000))

    def send(self, data: bytes) -> None:
        self.socket.send(data)

    async def receive(self) -> Answer:
        async with asyncio.timeout(self.timeout_s):
            return Answer.parse(await asyncio.get_running_loop().sock_recv(self.socket, 65_535))

    async def silent(self, seconds: float = 0.1) -> bool:
        """Tell whether nothing comes for a while: the bound of a wait, not a wait."""
        try:
            async with asyncio.timeout(seconds):
                await asyncio.get_running_loop().sock_recv(self.socket, 65_535)
        except TimeoutError:
            return True
        return False

    def message(
        self,
        method: int,
        path: str,
        *,
        kind: int = CON,
        token: bytes = b"t",
        options: Iterable[coap.Option] = (),
        payload: bytes = b"",
    ) -> bytes:
        """Build a request; the path may have a query."""
        where, _, query = path.partition("?")
        found = [(coap.URI_PATH, part.encode()) for part in where.strip("/").split("/")]
        found += [(coap.URI_QUERY, part.encode()) for part in query.split("&") if part]
        head = bytes((0x40 | kind << 4 | len(token), method))
        number = next(self._numbers).to_bytes(2, "big")
        return head + number + token + coap.encode([*found, *options], payload)

    async def ask(self, method: int, path: str, **parts: object) -> Answer:
        """Send a request and return the answer."""
        self.send(self.message(method, path, **parts))  # type: ignore[arg-type]
        return await self.receive()

    async def observe(self, path: str, token: bytes = b"o", **parts: object) -> Answer:
        """Register; the first answer."""
        return await self.ask(GET, path, token=token, options=[(coap.OBSERVE, b"")], **parts)

    def acknowledge(self, answer: Answer, kind: int = ACK) -> None:
        self.send(bytes((0x40 | kind << 4, 0)) + answer.message_id.to_bytes(2, "big"))

    async def notification(self) -> Answer:
        """Wait for a notification and acknowledge it."""
        answer = await self.receive()
        assert answer.kind == CON
        self.acknowledge(answer)
        return answer


@asynccontextmanager
async def device(uri: str) -> AsyncIterator[Device]:
    """Connect a device to a server (`coap://HOST:PORT`)."""
    parts = urlsplit(uri)
    family = socket.AF_INET6 if ":" in (parts.hostname or "") else socket.AF_INET
    with socket.socket(family, socket.SOCK_DGRAM) as opened:
        opened.setblocking(False)
        opened.connect((parts.hostname, parts.port or 5683))
        yield Device(opened)
