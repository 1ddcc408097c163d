"""Server-sent events (`text/event-stream`): Observe over HTTP.

A client is sent the present state, then the newest one after each change. Nothing is queued: a
slow client skips states, and delays nobody else.
Source: rules H-30 to H-35.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Callable, Iterable, Iterator

import attrs
from starlette.types import Receive, Scope, Send

from netota_coap.catalog.resources import ResourcePath

MEDIA_TYPE = "text/event-stream"
_RETRY_MS = 5_000
_BATCH = 32  # clients woken before the event loop serves others
_HEADERS = [
    (b"content-type", MEDIA_TYPE.encode()),
    (b"cache-control", b"no-cache"),
    (b"x-accel-buffering", b"no"),  # nginx passes on each event at once
]


@attrs.frozen
class Event:
    """One state of a resource."""

    id: str  # a client that reconnects sends it as Last-Event-ID
    name: str
    data: bytes  # must be one line
    last: bool = False  # whether the stream ends with it

    def encode(self) -> bytes:
        """Return the event in the syntax of `text/event-stream`."""
        return f"id: {self.id}\nevent: {self.name}\ndata: ".encode() + self.data + b"\n\n"


@attrs.define(eq=False)
class _Client:
    wake: asyncio.Event = attrs.field(factory=asyncio.Event)
    heartbeat: bool = False  # whether a sign of life is due


@attrs.define(eq=False)
class Events:
    """The clients with an open event stream, at most `most`."""

    most: int = 4_096
    heartbeat_s: float = 15.0
    ended: bool = attrs.field(init=False, default=False)
    _clients: dict[ResourcePath, dict[_Client, None]] = attrs.field(init=False, factory=dict)
    _due: dict[_Client, None] = attrs.field(init=False, factory=dict)
    _timer: asyncio.TimerHandle | None = attrs.field(init=False, default=None)

    def __len__(self) -> int:
        return sum(map(len, self._clients.values()))

    @property
    def is_full(self) -> bool:
        """Whether another client must be refused."""
        return len(self) >= self.most

    def notify(self, paths: Iterable[ResourcePath]) -> None:
        """Wake the clients of resources that changed, appeared or vanished."""
        for path in paths:
            self._wake(self._clients.get(path, ()))

    def end(self) -> None:
        """End all event streams, later ones too."""
        self.ended = True
        self.notify(tuple(self._clients))

    @contextlib.contextmanager
    def connected(self, path: ResourcePath) -> Iterator[_Client]:
        """Count a client of a resource until the block ends."""
        client = _Client()
        self._clients.setdefault(path, {})[client] = None
        if self._timer is None:
            self._start_timer()
        try:
            yield client
        finally:
            self._due.pop(client, None)
            del self._clients[path][client]
            if not self._clients[path]:
                del self._clients[path]
            if not self._clients and self._timer:
                self._timer.cancel()
                self._timer = None

    def _start_timer(self) -> None:
        self._timer = asyncio.get_running_loop().call_later(self.heartbeat_s, self._heartbeat)

    def _heartbeat(self) -> None:
        for clients in self._clients.values():
            for client in clients:
                client.heartbeat = True
            self._wake(clients)
        self._start_timer()

    def _wake(self, clients: Iterable[_Client]) -> None:
        idle = not self._due
        self._due.update(dict.fromkeys(clients))
        if idle and self._due:
            self._wake_batch()

    def _wake_batch(self) -> None:
        for client in tuple(self._due)[:_BATCH]:
            del self._due[client]
            client.wake.set()
        if self._due:
            asyncio.get_running_loop().call_soon(self._wake_batch)


@attrs.frozen(eq=False)
class EventStream:
    """The response to one client (an ASGI application)."""

    events: Events
    path: ResourcePath
    state: Callable[[], Event]
    seen: str  # Last-Event-ID of the client, or ""

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Send states until the client disconnects, the resource vanishes or the server stops."""
        await send({"type": "http.response.start", "status": 200, "headers": _HEADERS})
        if scope["method"] != "HEAD":
            leaving = asyncio.ensure_future(_disconnected(receive))
            try:
                with self.events.connected(self.path) as client:
                    leaving.add_done_callback(lambda _: client.wake.set())
                    await self._send_states(client, leaving, send)
            finally:
                leaving.cancel()
        await send({"type": "http.response.body"})

    async def _send_states(
        self, client: _Client, leaving: asyncio.Future[None], send: Send
    ) -> None:
        seen = self.seen
        body = f"retry: {_RETRY_MS}\n\n".encode()
        while not leaving.done() and not self.events.ended:
            # Cleared before the state is read, so that a change during `send` wakes again.
            client.wake.clear()
            event = self.state()
            if event.id != seen:
                seen = event.id
                body += event.encode()
            elif client.heartbeat and not body:
                body = b":\n\n"
            client.heartbeat = False
            if body:
                await send({"type": "http.response.body", "body": body, "more_body": True})
                body = b""
            if event.last:
                return
            await client.wake.wait()


async def _disconnected(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass
