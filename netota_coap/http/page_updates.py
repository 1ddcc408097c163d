"""What pages show live: that they changed, and how many observe and were told.

One look serves all pages that are open, four times a second; while none is open, nothing is done.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import time
from collections.abc import Iterator, Mapping
from itertools import count
from weakref import WeakKeyDictionary

import attrs
from starlette.types import ASGIApp, Receive, Scope, Send

from netota_coap.catalog.resources import Resource, ResourcePath, StreamResource, etag_of
from netota_coap.http.event_stream import Event
from netota_coap.http.site import Site
from netota_coap.monitoring import Status

PATH = ("live",)
LOOK_S = 0.25


def troubles_of(status: Status) -> tuple[str, ...]:
    """Return what is wrong, the reasons why what is on disk is refused first."""
    return (*status.issues, *status.troubles)


@attrs.frozen
class _Look:
    """What was seen.

    Attributes:
        resources: Of the catalog.
        troubles: Of the service.
        counts: Observers, in all and by stream; and how many were told of the last change.
    """

    resources: Mapping[ResourcePath, Resource]
    troubles: tuple[str, ...]
    counts: Mapping[str, int]


@attrs.define(eq=False)
class Live:
    """What is live of a site.

    Attributes:
        site: It.
        look_s: Between two looks, seconds.
    """

    site: Site
    look_s: float = LOOK_S
    _open: int = attrs.field(init=False, default=0)
    _seen: _Look = attrs.field(init=False, default=_Look({}, (), {}))
    _later: asyncio.TimerHandle | None = attrs.field(init=False, default=None)
    _marks: WeakKeyDictionary[Resource, int] = attrs.field(init=False, factory=WeakKeyDictionary)
    # Another process must not use the same marks for other states.
    _numbers: Iterator[int] = attrs.field(init=False, factory=lambda: count(time.time_ns()))

    def mark(self, path: ResourcePath, troubles: tuple[str, ...]) -> str:
        """Return by what a page is known for as long as it shows the same, counts and ages aside.

        Args:
            path: Of its stream; (): the page is of all.
            troubles: Of the service.
        """
        resources = self.site.catalog.resources
        resource = resources.get(path or ("p",))
        if resource is None:
            return "gone"
        number = self._marks.setdefault(resource, next(self._numbers))
        package = resources.get(path[:2])
        about = repr((package and package.title, troubles))
        return f"{number:x}-{etag_of(about.encode()).hex()}"

    def follow(self, path: ResourcePath) -> ASGIApp:
        """Return the answer to a page that is open: events that say what changed since the last.

        Args:
            path: As in `mark`.

        Raises:
            RefusedError: There are too many.
        """
        sent: dict[str, object] = {}
        event = Event("", "live", b"")

        def state() -> Event:
            nonlocal event
            own = (
                self._seen.counts
                if not path
                else {
                    name: self._seen.counts.get(name, 0)
                    for name in ("observers", "told", "/".join(path))
                }
            )
            now = {"page": self.mark(path, self._seen.troubles), **own}
            fresh = {name: value for name, value in now.items() if sent.get(name) != value}
            if fresh:
                sent.update(fresh)
                event = Event(f"{int(event.id or 0) + 1}", "live", json.dumps(fresh).encode())
            return event

        stream = self.site.follow(PATH, state)

        async def application(scope: Scope, receive: Receive, send: Send) -> None:
            with self._looking():
                await stream(scope, receive, send)

        return application

    @contextlib.contextmanager
    def _looking(self) -> Iterator[None]:
        """Look again and again for as long as the block takes; one look is for all."""
        self._open += 1
        if self._later is None:
            self._look()
        try:
            yield
        finally:
            self._open -= 1
            if not self._open and self._later:
                self._later.cancel()
                self._later = None

    def _look(self) -> None:
        self._later = asyncio.get_running_loop().call_later(self.look_s, self._look)
        status, resources = self.site.status(), self.site.catalog.resources
        counts = {
            "/".join(path): self.site.observers_of(path)
            for path, resource in resources.items()
            if isinstance(resource, StreamResource)
        }
        counts["observers"] = status.observers
        counts["told"] = status.fan_out.told if status.fan_out else 0
        seen = _Look(resources, troubles_of(status), counts)
        # The very same resources are found equal at once, without looking into them.
        if seen != self._seen:
            self._seen = seen
            self.site.events.notify([PATH])
