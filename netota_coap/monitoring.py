"""Counts what a server does, and describes its status, for any adapter to show.

`METRICS` is the one table of metrics; HTTP's `/metrics` and `spec/operation.md` are made from it.
"""

from __future__ import annotations

import math
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from datetime import datetime
from typing import Literal

import attrs

Sample = tuple["Metric", tuple[str, ...], float]
"""A metric, the values of its labels, and the number."""


@attrs.frozen
class Metric:
    """A row of `METRICS`; its fields mean what they mean in Prometheus."""

    name: str
    kind: Literal["counter", "gauge"]
    help: str
    labels: tuple[str, ...] = ()


REQUESTS = Metric(
    "netota_requests_total",
    "counter",
    "Requests answered.",
    ("transport", "resource", "code"),
)
READY = Metric(
    "netota_ready_answers_total",
    "counter",
    "CoAP requests answered from the response cache; netota_requests_total includes them.",
)
SENT_BYTES = Metric(
    "netota_sent_bytes_total",
    "counter",
    "Bytes of responses sent: payloads, and the options of CoAP.",
    ("transport",),
)
OBSERVERS = Metric("netota_observers", "gauge", "Active CoAP observations.")
NOTIFICATIONS = Metric(
    "netota_notifications_total",
    "counter",
    "CoAP notifications: sent for the first time, repeated, acknowledged, or lost because the "
    "observer never acknowledged.",
    ("outcome",),
)
FAN_OUT = Metric(
    "netota_fan_out_seconds",
    "gauge",
    "Time from the last notified change to the last acknowledgement so far.",
)
RELOADS = Metric("netota_reloads_total", "counter", "Repository reloads, by result.", ("result",))
ACCEPTED = Metric(
    "netota_repository_accepted",
    "gauge",
    "1: the repository on disk is served; 0: it is refused.",
)
PACKAGES = Metric("netota_packages", "gauge", "Packages served.")
STREAMS = Metric("netota_streams", "gauge", "Streams served.")
FETCHED = Metric(
    "netota_fetched_bytes_total", "counter", "Bytes of files downloaded from other hosts."
)
CONTACT = Metric(
    "netota_upstream_last_contact_seconds",
    "gauge",
    "Unix time of the last response of an upstream.",
    ("upstream",),
)
BEHIND = Metric(
    "netota_upstream_streams_behind",
    "gauge",
    "Streams of an upstream that are not mirrored in their newest state.",
    ("upstream",),
)
REFUSED = Metric(
    "netota_upstream_refused_total",
    "counter",
    "States of an upstream that were refused: a lower sequence or invalid data.",
    ("upstream",),
)
UPTIME = Metric("netota_uptime_seconds", "gauge", "Time since the start.")

METRICS = (
    *(REQUESTS, READY, SENT_BYTES, OBSERVERS, NOTIFICATIONS, FAN_OUT),
    *(RELOADS, ACCEPTED, PACKAGES, STREAMS, UPTIME),
    *(FETCHED, CONTACT, BEHIND, REFUSED),
)


_CLASSES = {
    (".well-known", "core"): "core",
    ("p",): "packages",
    ("p", ""): "package",
    ("p", "", "s", ""): "stream",
    ("b", ""): "blob",
    ("status",): "status",
}


def resource_class(path: Sequence[str]) -> str:
    """Return the class of a path: one of a few, so that clients cannot make up label values."""
    shape = tuple("" if place % 2 and path[0] in ("p", "b") else s for place, s in enumerate(path))
    return _CLASSES.get(shape, "other")


@attrs.define(eq=False)
class Tally:
    """A bare counter of responses of one size, for the code where every nanosecond counts."""

    size: int
    count: int = 0


@attrs.frozen
class Exchange:
    """A request and how it was answered; `size` is that of the response in bytes."""

    transport: str
    method: str
    path: Sequence[str]
    query: Sequence[str]
    code: str
    size: int
    who: str
    took_us: float


@attrs.define(eq=False)
class Metrics:
    """Counters since the start, by the labels of their metrics.

    Attributes:
        listener: Called with each request; each call delays the response.
        requests: By transport (`coap`, `http`), class of resource and code.
        notifications: By outcome: `sent`, `repeated`, `acknowledged`, `lost`.
        reloads: By result: `taken`, `refused`.
    """

    listener: Callable[[Exchange], object] | None = None
    requests: Counter[tuple[str, str, str]] = attrs.field(init=False, factory=Counter)
    sent_bytes: Counter[str] = attrs.field(init=False, factory=Counter)
    notifications: Counter[str] = attrs.field(init=False, factory=Counter)
    reloads: Counter[str] = attrs.field(init=False, factory=Counter)
    _ready: dict[tuple[str, str, int], Tally] = attrs.field(init=False, factory=dict)

    def answered(self, transport: str, resource: str, code: str, size: int) -> None:
        """Count one request."""
        self.requests[transport, resource, code] += 1
        self.sent_bytes[transport] += size

    def exchanged(
        self,
        transport: str,
        method: str,
        path: Sequence[str],
        query: Sequence[str],
        code: str,
        size: int,
        who: str,
        start_ns: int,
    ) -> None:
        """Pass an `Exchange` to the listener, if any; `start_ns` is of `time.perf_counter_ns`."""
        if self.listener:
            took_us = (time.perf_counter_ns() - start_ns) / 1_000
            self.listener(Exchange(transport, method, path, query, code, size, who, took_us))

    def tally(self, resource: str, code: str, size: int) -> Tally:
        """Return the counter of responses from the response cache; one per distinct size."""
        return self._ready.setdefault((resource, code, size), Tally(size))

    def samples(self, status: Status) -> Iterator[Sample]:
        """Return a sample of each metric and combination of labels."""
        requests = self.requests.copy()
        for (resource, code, _), tally in self._ready.items():
            requests["coap", resource, code] += tally.count
        for labels, count in sorted(requests.items()):
            yield REQUESTS, labels, count
        ready = self._ready.values()
        yield READY, (), sum(tally.count for tally in ready)
        sent = self.sent_bytes + Counter(coap=sum(each.count * each.size for each in ready))
        for counter, metric in (
            (sent, SENT_BYTES),
            (self.notifications, NOTIFICATIONS),
            (self.reloads, RELOADS),
        ):
            for label, count in sorted(counter.items()):
                yield metric, (label,), count
        yield OBSERVERS, (), status.observers
        yield FAN_OUT, (), math.nan if status.fan_out is None else status.fan_out.seconds
        yield ACCEPTED, (), float(not status.issues)
        yield PACKAGES, (), status.packages
        yield STREAMS, (), status.streams
        yield UPTIME, (), status.uptime_s
        if status.fetched_bytes is not None:
            yield FETCHED, (), status.fetched_bytes
        for each in status.upstreams:
            if each.last_contact:
                yield CONTACT, (each.uri,), each.last_contact.timestamp()
            yield BEHIND, (each.uri,), each.behind
            yield REFUSED, (each.uri,), each.refused


@attrs.frozen
class FanOut:
    """How many observers acknowledged the last change, and after what time the last one did."""

    told: int
    seconds: float


@attrs.frozen(kw_only=True)
class UpstreamStatus:
    """The state of an upstream.

    Attributes:
        last_contact: Time of its last response, or None.
        behind: How many of its streams are not mirrored in their newest state.
        refused: How many of its states were refused.
        error: One reason why a stream is behind, or "".
    """

    uri: str
    last_contact: datetime | None
    behind: int
    refused: int
    error: str

    def __str__(self) -> str:
        """Return one line for people."""
        seen = f"{self.last_contact:%Y-%m-%d %H:%M:%SZ}" if self.last_contact else "never"
        line = f"{self.uri}: {self.behind} streams behind, seen {seen}"
        return f"{line}: {self.error}" if self.error else line


@attrs.frozen
class Status:
    """The present state of a service.

    Attributes:
        reloaded: When the served repository was loaded.
        issues: The first reasons why the repository on disk is not served; empty: it is served.
        troubles: Other problems, such as a read-only state directory; for people.
        fetched_bytes: Bytes of files downloaded from other hosts; None: the service fetches none.
    """

    version: str
    uptime_s: float
    packages: int
    streams: int
    observers: int
    reloaded: datetime
    issues: tuple[str, ...] = ()
    fan_out: FanOut | None = None
    troubles: tuple[str, ...] = ()
    upstreams: tuple[UpstreamStatus, ...] = ()
    fetched_bytes: int | None = None

    @property
    def is_ready(self) -> bool:
        """Whether the repository on disk is served."""
        return not self.issues

    def to_plain(self) -> dict[str, object]:
        """Return plain data for JSON, without empty fields."""
        plain = attrs.asdict(
            self,
            filter=lambda _, value: value not in (None, (), ""),
            value_serializer=lambda _, __, value: _instant(value),
        )
        plain["uptime_s"] = round(self.uptime_s, 3)
        return plain

    def __str__(self) -> str:
        """Return one line for a service manager."""
        state = f"not reloaded: {self.issues[0]}" if self.issues else "serving"
        troubles = [*self.troubles, *(str(each) for each in self.upstreams if each.error)]
        fan_out = self.fan_out
        told = f", told {fan_out.told} in {fan_out.seconds:.2f} s" if fan_out else ""
        return (
            f"{state}: {self.packages} packages, {self.streams} streams, "
            f"{self.observers} observers{told}; loaded {self.reloaded:%Y-%m-%d %H:%M:%SZ}"
            + "".join(f"; {trouble}" for trouble in troubles)
        )


def _instant(value: object) -> object:
    return value.strftime("%Y-%m-%dT%H:%M:%SZ") if isinstance(value, datetime) else value
