"""Event streams: Observe, as HTTP has it (`text/event-stream`).

Who follows a resource is told the state of now, and of each change the newest state. Nothing is
queued: whoever reads slowly misses what was passed meanwhile, and delays nobody.
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
BEAT_S = 15.0
_RETRY_MS = 5_000
_AT_ONCE = 32  # are woken before the rest of the event loop has its turn
_HEADERS = [
    (b"content-type", MEDIA_TYPE.encode()),
    (b"cache-control", b"no-cache"),
    (b"x-accel-buffering", b"no"),  # nginx passes on each event at once
]


@attrs.frozen
class Event:
    """A state.

    Attributes:
        id: What it is known by, when a client comes back.
        name: Of its kind.
        data: One line.
        last: Whether no other follows.
    """

    id: str
    name: str
    data: bytes
    last: bool = False

    def encode(self) -> bytes:
        """Return it as it goes over the wire."""
        return f"id: {self.id}\nevent: {self.name}\ndata: ".encode() + self.data + b"\n\n"


@attrs.define(eq=False)
class _Follower:
    """One client.

    Attributes:
        wake: Set when there may be something to tell.
        beat: Whether a sign of life is due.
    """

    wake: asyncio.Event = attrs.field(factory=asyncio.Event)
    beat: bool = False


@attrs.define(eq=False)
class Events:
    """All who follow.

    Attributes:
        most: How many there may be.
        beat_s: Between signs of life.
        ended: Whether all are to end.
    """

    most: int = 4_096
    beat_s: float = BEAT_S
    ended: bool = attrs.field(init=False, default=False)
    _followers: dict[ResourcePath, dict[_Follower, None]] = attrs.field(init=False, factory=dict)
    _count: int = attrs.field(init=False, default=0)
    _due: dict[_Follower, None] = attrs.field(init=False, factory=dict)
    _beating: asyncio.TimerHandle | None = attrs.field(init=False, default=None)

    def __len__(self) -> int:
        return self._count

    @property
    def is_full(self) -> bool:
        """Whether no more are taken."""
        return self._count >= self.most

    def notify(self, paths: Iterable[ResourcePath]) -> None:
        """Learn which resources changed, appeared or vanished."""
        for path in paths:
            self._wake(self._followers.get(path, ()))

    def end(self) -> None:
        """End all, now and later ones."""
        self.ended = True
        self.notify(tuple(self._followers))

    @contextlib.contextmanager
    def following(self, path: ResourcePath) -> Iterator[_Follower]:
        """Be one of those who follow a resource, for as long as the block takes."""
        follower = _Follower()
        self._followers.setdefault(path, {})[follower] = None
        self._count += 1
        if self._beating is None:
            self._beat_later()
        try:
            yield follower
        finally:
            self._count -= 1
            self._due.pop(follower, None)
            del self._followers[path][follower]
            if not self._followers[path]:
                del self._followers[path]
            if not self._followers and self._beating:
                self._beating.cancel()
                self._beating = None

    def _beat_later(self) -> None:
        self._beating = asyncio.get_running_loop().call_later(self.beat_s, self._beat)

    def _beat(self) -> None:
        for followers in self._followers.values():
            for follower in followers:
                follower.beat = True
            self._wake(followers)
        self._beat_later()

    def _wake(self, followers: Iterable[_Follower]) -> None:
        idle = not self._due
        self._due.update(dict.fromkeys(followers))
        if idle and self._due:
            self._wake_some()

    def _wake_some(self) -> None:
        for follower in tuple(self._due)[:_AT_ONCE]:
            del self._due[follower]
            follower.wake.set()
        if self._due:
            asyncio.get_running_loop().call_soon(self._wake_some)


@attrs.frozen(eq=False)
class EventStream:
    """The answer to one who follows a resource (an ASGI application).

    Attributes:
        events: All who follow.
        path: Of the resource.
        state: Returns its state of now.
        seen: The id of the state that the client has, or "".
    """

    events: Events
    path: ResourcePath
    state: Callable[[], Event]
    seen: str

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Tell states until the client goes, the resource vanishes or the server stops."""
        await send({"type": "http.response.start", "status": 200, "headers": _HEADERS})
        if scope["method"] != "HEAD":
            leaving = asyncio.ensure_future(_disconnected(receive))
            try:
                with self.events.following(self.path) as follower:
                    leaving.add_done_callback(lambda _: follower.wake.set())
                    await self._tell(follower, leaving, send)
            finally:
                leaving.cancel()
        await send({"type": "http.response.body"})

    async def _tell(self, follower: _Follower, leaving: asyncio.Future[None], send: Send) -> None:
        seen = self.seen
        told = f"retry: {_RETRY_MS}\n\n".encode()
        while not leaving.done() and not self.events.ended:
            # What happens from here on, while what is told is on its way too, wakes again.
            follower.wake.clear()
            event = self.state()
            if event.id != seen:
                seen = event.id
                told += event.encode()
            elif follower.beat and not told:
                told = b":\n\n"
            follower.beat = False
            if told:
                await send({"type": "http.response.body", "body": told, "more_body": True})
                told = b""
            if event.last:
                return
            await follower.wake.wait()


async def _disconnected(receive: Receive) -> None:
    """Return when the client is gone."""
    while (await receive())["type"] != "http.disconnect":
        pass
