"""What a server counts: plain numbers, which any adapter can show.

`METRICS` is the one table of names and meanings: HTTP's `/metrics` and `spec/operation.md` are
made from it.
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
    """One thing that is counted.

    Attributes:
        name: As Prometheus has it.
        kind: `counter` only rises, from 0 at the start; `gauge` is of now.
        help: What it means, one sentence.
        labels: By which it is told apart.
    """

    name: str
    kind: Literal["counter", "gauge"]
    help: str
    labels: tuple[str, ...] = ()


REQUESTS = Metric(
    "netota_requests_total",
    "counter",
    "Requests that were answered.",
    ("transport", "resource", "code"),
)
READY = Metric(
    "netota_ready_answers_total",
    "counter",
    "Requests over CoAP that the front door answered from their bytes; among those answered.",
)
SENT_BYTES = Metric(
    "netota_sent_bytes_total",
    "counter",
    "Bytes of answers: of payloads, over CoAP with their options.",
    ("transport",),
)
OBSERVERS = Metric("netota_observers", "gauge", "Observations over CoAP.")
NOTIFICATIONS = Metric(
    "netota_notifications_total",
    "counter",
    "Notifications over CoAP: sent for the first time, repeated, acknowledged; or lost, since the "
    "observer was silent to the end.",
    ("outcome",),
)
FAN_OUT = Metric(
    "netota_fan_out_seconds",
    "gauge",
    "From the last change that observers are told of to the last acknowledgement of it so far.",
)
RELOADS = Metric(
    "netota_reloads_total", "counter", "Changed repositories that were taken, or not.", ("result",)
)
ACCEPTED = Metric(
    "netota_repository_accepted", "gauge", "1: what is on disk is served; 0: it was refused."
)
PACKAGES = Metric("netota_packages", "gauge", "Packages that are served.")
STREAMS = Metric("netota_streams", "gauge", "Streams that are served.")
FETCHED = Metric(
    "netota_fetched_bytes_total", "counter", "Bytes of files that were fetched from elsewhere."
)
CONTACT = Metric(
    "netota_upstream_last_contact_seconds",
    "gauge",
    "When an upstream answered last, in seconds of Unix time.",
    ("upstream",),
)
BEHIND = Metric(
    "netota_upstream_streams_behind",
    "gauge",
    "Streams of an upstream that are not here in the state that it has.",
    ("upstream",),
)
REFUSED = Metric(
    "netota_upstream_refused_total",
    "counter",
    "States of an upstream that were refused: it went back, or sent what cannot be taken.",
    ("upstream",),
)
UPTIME = Metric("netota_uptime_seconds", "gauge", "Since the start.")

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
    """Return the class of the resource at a path: there are few, whatever is asked for."""
    shape = tuple("" if place % 2 and path[0] in ("p", "b") else s for place, s in enumerate(path))
    return _CLASSES.get(shape, "other")


@attrs.define(eq=False)
class Tally:
    """Answers that are all the same to the metrics, to be counted where every nanosecond counts.

    Attributes:
        size: Bytes of each.
        count: How many there were.
    """

    size: int
    count: int = 0


@attrs.frozen
class Heard:
    """A request, and how it was answered.

    Attributes:
        transport: As in `Metrics.requests`.
        method: `GET`, ….
        path: Segments.
        query: Parameters.
        code: Of the answer.
        size: Of the answer, bytes.
        who: Asked, as text.
        took_us: Until it was answered, microseconds.
    """

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
    """What was counted since the start.

    Attributes:
        listener: Called with each request, where somebody wants to see them; slows the door.
        requests: By transport (`coap`, `http`), class of resource and code.
        sent_bytes: By transport.
        notifications: By outcome: `sent`, `repeated`, `acknowledged`, `lost`.
        reloads: By result: `taken`, `refused`.
    """

    listener: Callable[[Heard], object] | None = None
    requests: Counter[tuple[str, str, str]] = attrs.field(init=False, factory=Counter)
    sent_bytes: Counter[str] = attrs.field(init=False, factory=Counter)
    notifications: Counter[str] = attrs.field(init=False, factory=Counter)
    reloads: Counter[str] = attrs.field(init=False, factory=Counter)
    _ready: dict[tuple[str, str, int], Tally] = attrs.field(init=False, factory=dict)

    def answered(self, transport: str, resource: str, code: str, size: int) -> None:
        """Count one request that was answered with some bytes."""
        self.requests[transport, resource, code] += 1
        self.sent_bytes[transport] += size

    def heard(
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
        """Pass a `Heard` to the listener, if any; `start_ns` is of `time.perf_counter_ns`."""
        if self.listener:
            took_us = (time.perf_counter_ns() - start_ns) / 1_000
            self.listener(Heard(transport, method, path, query, code, size, who, took_us))

    def ready(self, resource: str, code: str, size: int) -> Tally:
        """Return where to count answers of the front door; there are as many as distinct sizes."""
        return self._ready.setdefault((resource, code, size), Tally(size))

    def samples(self, status: Status) -> Iterator[Sample]:
        """Return all that was counted, and what is so now."""
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
    """How observers were told of the last change.

    Attributes:
        told: How many acknowledged it.
        seconds: From the change to the last acknowledgement so far.
    """

    told: int
    seconds: float


@attrs.frozen(kw_only=True)
class UpstreamStatus:
    """How it stands with an upstream.

    Attributes:
        uri: Of the upstream.
        last_contact: When it answered last; None: not yet.
        behind: How many of its streams are not here in the state that it has.
        refused: How often a state of it was refused.
        error: Why something is not level, or ""; one reason of maybe several.
    """

    uri: str
    last_contact: datetime | None
    behind: int
    refused: int
    error: str

    def __str__(self) -> str:
        """One line."""
        seen = f"{self.last_contact:%Y-%m-%d %H:%M:%SZ}" if self.last_contact else "never"
        line = f"{self.uri}: {self.behind} streams behind, seen {seen}"
        return f"{line}: {self.error}" if self.error else line


@attrs.frozen
class Status:
    """What a service does now.

    Attributes:
        version: Of the software.
        uptime_s: Since the start.
        packages: That are served.
        streams: That are served.
        observers: Over CoAP.
        reloaded: When what is served was loaded.
        issues: Why what is on disk is not served, the first few of many; empty: it is.
        fan_out: Of the last change that observers were told of.
        troubles: What else is wrong, as a state directory that cannot be written; for people.
        upstreams: That are followed.
        fetched_bytes: Of files, from elsewhere; None: none are fetched.
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
        """Whether what is on disk is what is served."""
        return not self.issues

    def to_plain(self) -> dict[str, object]:
        """Return it as JSON has it; what is not so is left out."""
        plain = attrs.asdict(
            self,
            filter=lambda _, value: value not in (None, (), ""),
            value_serializer=lambda _, __, value: _instant(value),
        )
        plain["uptime_s"] = round(self.uptime_s, 3)
        return plain

    def __str__(self) -> str:
        """One line, for a service manager."""
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
