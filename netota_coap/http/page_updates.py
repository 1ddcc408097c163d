"""Sends open pages the numbers of observers and notifications, and whether the page changed.

One timer serves all open pages, four times a second; while no page is open, there is none.
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


def troubles_of(status: Status) -> tuple[str, ...]:
    """Return all reasons for the page's banners."""
    return (*status.issues, *status.troubles)


@attrs.frozen
class _Snapshot:
    """What pages show at one moment."""

    resources: Mapping[ResourcePath, Resource]
    troubles: tuple[str, ...]
    # Observers by stream, in total (`observers`), and those notified of the last change (`told`).
    counts: Mapping[str, int]


@attrs.define(eq=False)
class PageUpdates:
    """Tells open pages of a site what changed."""

    site: Site
    interval_s: float = 0.25
    _open: int = attrs.field(init=False, default=0)
    _seen: _Snapshot = attrs.field(init=False, default=_Snapshot({}, (), {}))
    _timer: asyncio.TimerHandle | None = attrs.field(init=False, default=None)
    _marks: WeakKeyDictionary[Resource, int] = attrs.field(init=False, factory=WeakKeyDictionary)
    # Marks of another process, before a restart, must differ from these.
    _numbers: Iterator[int] = attrs.field(init=False, factory=lambda: count(time.time_ns()))

    def mark(self, path: ResourcePath, troubles: tuple[str, ...]) -> str:
        """Return a tag of a page, () for the start page, that ignores counts and ages."""
        resources = self.site.catalog.resources
        resource = resources.get(path or ("p",))
        if resource is None:
            return "gone"
        number = self._marks.setdefault(resource, next(self._numbers))
        package = resources.get(path[:2])
        about = repr((package and package.title, troubles))
        return f"{number:x}-{etag_of(about.encode()).hex()}"

    def follow(self, path: ResourcePath) -> ASGIApp:
        """Return an event stream for an open page; each event holds what changed since the last.

        Raises:
            HttpError: There are too many event streams.
        """
        sent: dict[str, object] = {}
        event = Event("", "live", b"")

        def state() -> Event:
            nonlocal event
            counts = self._seen.counts
            if path:
                names = ("observers", "told", "/".join(path))
                counts = {name: counts.get(name, 0) for name in names}
            now = {"page": self.mark(path, self._seen.troubles), **counts}
            fresh = {name: value for name, value in now.items() if sent.get(name) != value}
            if fresh:
                sent.update(fresh)
                event = Event(f"{int(event.id or 0) + 1}", "live", json.dumps(fresh).encode())
            return event

        stream = self.site.follow(PATH, state)

        async def application(scope: Scope, receive: Receive, send: Send) -> None:
            with self._updating():
                await stream(scope, receive, send)

        return application

    @contextlib.contextmanager
    def _updating(self) -> Iterator[None]:
        """Update all pages until the block ends; blocks may overlap."""
        self._open += 1
        if self._timer is None:
            self._update()
        try:
            yield
        finally:
            self._open -= 1
            if not self._open and self._timer:
                self._timer.cancel()
                self._timer = None

    def _update(self) -> None:
        self._timer = asyncio.get_running_loop().call_later(self.interval_s, self._update)
        status, resources = self.site.status(), self.site.catalog.resources
        counts = {
            "/".join(path): self.site.observers_of(path)
            for path, resource in resources.items()
            if isinstance(resource, StreamResource)
        }
        counts["observers"] = status.observers
        counts["told"] = status.fan_out.told if status.fan_out else 0
        seen = _Snapshot(resources, troubles_of(status), counts)
        # Comparing is cheap: resources that did not change are identical objects.
        if seen != self._seen:
            self._seen = seen
            self.site.events.notify([PATH])
