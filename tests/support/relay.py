"""A way to a CoAP server that is long, or loses datagrams, as real ones do."""

from __future__ import annotations

import asyncio
import contextlib
import random
import socket
from collections.abc import AsyncIterator, Callable
from urllib.parse import urlsplit

import attrs

Address = tuple[str, int]


@attrs.define(eq=False)
class Relay:
    """Passes datagrams on between one server and one client.

    Attributes:
        server: Where to.
        near: Socket on the client's side.
        far: Socket on the server's side.
        delay_s: Of each datagram each way, seconds.
        loss: What part of the datagrams gets lost, 0 to 1.
        requests: Datagrams that came from the client.
        asked: What they asked for, each once: a busy machine makes clients repeat a request.
        lost: Datagrams that got lost, of both ways.
        rounds: Round trips so far of which each waited for the one before it.
    """

    server: Address
    near: socket.socket
    far: socket.socket
    delay_s: float
    loss: float
    requests: int = 0
    asked: set[bytes] = attrs.field(factory=set)
    lost: int = 0
    rounds: int = 0
    _begun: dict[bytes, int] = attrs.field(factory=dict)  # by message ID, the round of a request
    _client: Address = ("", 0)
    _dice: random.Random = attrs.field(factory=lambda: random.Random(5))

    @property
    def uri(self) -> str:
        return f"coap://127.0.0.1:{self.near.getsockname()[1]}"

    def take_request(self) -> None:
        data, self._client = self.near.recvfrom(2_000)
        self.requests += 1
        self.asked.add(data[4 + (data[0] & 15) :])
        self._begun[data[2:4]] = self.rounds + 1
        self._later(self.far, data, self.server)

    def take_answer(self) -> None:
        self._later(self.near, self.far.recv(2_000), self._client)

    def _later(self, way: socket.socket, data: bytes, address: Address) -> None:
        def arrive() -> None:
            if way is self.near:
                self.rounds = max(self.rounds, self._begun.get(data[2:4], 0))
            with contextlib.suppress(OSError):  # the relay is gone
                way.sendto(data, address)

        if self._dice.random() < self.loss:
            self.lost += 1
        else:
            asyncio.get_running_loop().call_later(self.delay_s, arrive)


@contextlib.asynccontextmanager
async def relayed(uri: str, *, delay_s: float = 0.0, loss: float = 0.0) -> AsyncIterator[Relay]:
    """Put a way before a server, `coap://127.0.0.1:PORT`."""
    parts = urlsplit(uri)
    assert parts.hostname and parts.port
    loop = asyncio.get_running_loop()
    with _opened() as near, _opened() as far:
        relay = Relay((parts.hostname, parts.port), near, far, delay_s, loss)
        readers: dict[socket.socket, Callable[[], None]] = {
            near: relay.take_request,
            far: relay.take_answer,
        }
        for opened, take in readers.items():
            loop.add_reader(opened, take)
        try:
            yield relay
        finally:
            for opened in readers:
                loop.remove_reader(opened)


def _opened() -> socket.socket:
    opened = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
    opened.setblocking(False)
    opened.bind(("127.0.0.1", 0))
    return opened
