"""The table of observers: it knows who observes what, and sends notifications.

What always holds:
* A datagram costs constant time, and a change of a resource constant time for each observer of
  it: observations of the same request share a `Subject`, whose response is rendered once.
* Endpoint and token identify an observation. The device ends it: by deregistering, by registering
  anew, by a RST to one of its last two notifications, by acknowledging an error (which has no
  Observe), or, with all others of the endpoint, by silence after the last retransmission.
* Every transmission carries the newest state; one that the device missed is never sent later.
* An endpoint has at most one unacknowledged notification (NSTART is 1), and the network as many
  as the congestion window allows.
* A message ID stands for the same bytes in all retransmissions. IDs count up for each endpoint.
* Whatever a restart needs is in the journal; every observer that has not acknowledged the newest
  state is notified after it.

The way of a notification:
1. `notify` marks the subjects of a path. `advance` renders each, and queues every observation
   whose `known` digest differs.
2. `_process_next` opens an exchange for it when the window has room and the endpoint has none
   open. `_transmit` sends, and puts the exchange into a wheel: a list for each tick of time.
3. `acknowledged` closes the exchange, and queues the observation again if the state is newer by
   then. Without an ACK, `_retransmit` sends again after a timeout that doubles.

Source: RFC 7641; RFC 7252, section 4; `spec/resources.md`, rules C-20 to C-29.
"""

from __future__ import annotations

import asyncio
import logging
import math
import random
from collections import Counter, deque
from collections.abc import Callable, Iterable

import attrs

from netota_coap.catalog.resources import ResourcePath
from netota_coap.coap import options as coap
from netota_coap.coap.observe.congestion import MOST_IN_FLIGHT, CongestionWindow
from netota_coap.coap.observe.entries import (
    FIRST_NOTIFICATION_ID,
    Endpoint,
    NotificationExchange,
    Observation,
    Peer,
    Request,
    ResponseTemplate,
    Subject,
    address_of,
)
from netota_coap.coap.observe.journal import Journal, RecordKind, StoredState
from netota_coap.coap.protocol import ACK, CON, NON, Timing
from netota_coap.model.values import (
    OBSERVERS_IN_TOTAL,
    OBSERVERS_PER_ADDRESS,
    OBSERVERS_PER_STREAM,
)
from netota_coap.monitoring import FanOut, Metrics

Send = Callable[[Endpoint, bytes], bool]
"""Sends a datagram; False: the system refused it."""

AnswerRequest = Callable[[Request], tuple[bool, int, bytes]]
"""Returns whether a request can be observed, the response code, encoded options and payload."""

_log = logging.getLogger(__name__)

_FIRST_NUMBER = 2  # Zephyr 1.14 drops the notification that is numbered 1
_NUMBERS = 1 << 24
# RFC 7641, section 3.4: less than 2^23 in 256 s, of which three of these intervals see a part.
_INTERVAL_S = 128.0
_MOST_NUMBERS = 1 << 21  # in an interval
_RESERVED = 1 << 16  # Observe numbers for each record of the journal
_BURST = 64  # datagrams sent at a time, before the sockets are read again


@attrs.frozen
class Caps:
    """Limits of the table.

    Attributes:
        total: Observations.
        path: Observations of one resource.
        address: Observations from one address; NAT and gateways hide many devices behind one.
        request: Length of a request, bytes.
    """

    total: int = OBSERVERS_IN_TOTAL
    path: int = OBSERVERS_PER_STREAM
    address: int = OBSERVERS_PER_ADDRESS
    request: int = 1_024


@attrs.define(eq=False)
class Observers:
    """The table, which has no socket, clock or task: `Scheduler` lets it act in time.

    Its times are seconds of one monotonic clock.

    Attributes:
        wake: Called when `advance` has something to do earlier than it returned.
    """

    answer: AnswerRequest
    journal: Journal = attrs.field(factory=Journal)
    timing: Timing = Timing()
    caps: Caps = Caps()
    window: CongestionWindow = attrs.field()
    send: Send = lambda _endpoint, _datagram: False
    wake: Callable[[], object] = lambda: None
    metrics: Metrics = attrs.field(factory=Metrics)
    _peers: dict[Endpoint, Peer] = attrs.field(init=False, factory=dict)
    _subjects: dict[Request, Subject] = attrs.field(init=False, factory=dict)
    _by_path: dict[ResourcePath, dict[Subject, None]] = attrs.field(init=False, factory=dict)
    _counts: Counter[bytes | ResourcePath] = attrs.field(init=False, factory=Counter)
    _total: int = attrs.field(init=False, default=0)
    _subject_number: int = attrs.field(init=False, default=0)
    _changed: dict[Subject, None] = attrs.field(init=False, factory=dict)
    _queue: deque[Observation] = attrs.field(init=False, factory=deque)
    _wheel: dict[int, list[NotificationExchange]] = attrs.field(init=False, factory=dict)
    _tick_s: float = attrs.field(init=False)
    _number: int = attrs.field(init=False, default=_FIRST_NUMBER - 1)
    _numbers_left: int = attrs.field(init=False, default=0)
    _interval_s: float = attrs.field(init=False, default=-math.inf)
    _unreserved: int = attrs.field(init=False, default=0)
    # When the last change was first sent, and its acknowledgements.
    _since_s: float | None = attrs.field(init=False, default=None)
    _acknowledged: int = attrs.field(init=False, default=0)
    _acknowledged_s: float = attrs.field(init=False, default=0.0)

    @window.default
    def _default_window(self) -> CongestionWindow:
        return CongestionWindow(MOST_IN_FLIGHT, self.timing)

    @_tick_s.default
    def _default_tick_s(self) -> float:
        return self.timing.ack_timeout_s / 16

    def __len__(self) -> int:
        return self._total

    def of(self, path: ResourcePath) -> int:
        """Return the number of observations of a resource."""
        return self._counts[path]

    @property
    def fan_out(self) -> FanOut | None:
        """Acknowledgements of the last change; None before the first one."""
        if self._since_s is None or not self._acknowledged:
            return None
        return FanOut(self._acknowledged, self._acknowledged_s - self._since_s)

    # ---- events

    def register(
        self,
        now: float,
        endpoint: Endpoint,
        token: bytes,
        message_id: int,
        request: Request,
        *,
        confirmable: bool,
    ) -> bytes | None:
        """Register an observer by a request with Observe 0; it replaces one with the same token.

        Returns:
            The response; None if the request cannot be observed or a limit is reached: it then
            gets a response without Observe.
        """
        subject = self._subjects.get(request)
        response = self._render(subject) if subject else self._respond(request)
        if not response.observable:
            return None
        peer = self._peers.get(endpoint)
        old = peer.find(token) if peer else None
        path = subject.path if subject else _path_of(request)
        if (old is None and self._is_full(path, endpoint)) or len(request) > self.caps.request:
            return None
        if subject is None:
            subject = self._new_subject(request, path, response)
        if peer is None:
            peer = self._new_peer(endpoint)
        peer.registration_id = message_id if message_id >= FIRST_NOTIFICATION_ID else 0
        self._add(Observation(peer, token, subject, response.digest))
        if old is not None:
            self._unlink(old)
            self._close(old)
            self.journal.append(RecordKind.ENDED, 0, 0, endpoint, token)
        self.journal.append(RecordKind.OBSERVER, subject.number, message_id, endpoint, token)
        number = self._next_number(now)
        if confirmable:
            return response.message(ACK, message_id, token, number)
        peer.last_id = peer.new_id()
        return response.message(NON, peer.last_id, token, number)

    def deregister(self, endpoint: Endpoint, token: bytes) -> None:
        """End the observation with an endpoint and token, if there is one."""
        peer = self._peers.get(endpoint)
        found = peer.find(token) if peer else None
        if found:
            self._remove(found)
            self._wake()

    def acknowledged(self, now: float, endpoint: Endpoint, message_id: int) -> None:
        """Process an ACK."""
        peer = self._peers.get(endpoint)
        exchange = peer.exchange if peer else None
        if exchange is None or exchange.observation.message_id != message_id:
            return
        observation = exchange.observation
        if exchange.attempts == 1:
            busy = bool(self._queue or self._changed)
            self.window.acknowledged(now - exchange.sent_s, busy=busy)
        observation.known = exchange.digest
        self.metrics.notifications["acknowledged"] += 1
        self._acknowledged, self._acknowledged_s = self._acknowledged + 1, now
        subject = observation.subject
        if not exchange.number:
            self._remove(observation)
        else:
            if exchange.digest == subject.digest:
                self.journal.append(
                    RecordKind.ACKNOWLEDGED, 0, message_id, endpoint, observation.token
                )
            self._close(observation)
            if subject.response and subject.digest != observation.known:
                self._enqueue(observation)
        self._wake()

    def reset(self, endpoint: Endpoint, message_id: int) -> None:
        """Process a RST to one of the last two notifications: it ends the observation."""
        peer = self._peers.get(endpoint)
        observation = peer.notified(message_id) if peer else None
        if observation:
            self._remove(observation)
            self._wake()

    def notify(self, paths: Iterable[ResourcePath]) -> None:
        """Notify the observers of resources that changed, appeared or vanished."""
        for path in paths:
            for subject in self._by_path.get(path, ()):
                subject.response = None
                self._changed[subject] = None
                self._acknowledged, self._since_s = 0, None
        self._wake()

    def restore(self, stored: StoredState) -> None:
        """Restore the observers of before a restart, and notify those that miss a state.

        `stored` is emptied of them, since it takes as much memory as the table.
        """
        self._number = max(stored.number, _FIRST_NUMBER - 1)
        known: dict[int, Subject] = {}
        for (endpoint, token), entry in stored.observers.items():
            number = entry.subject
            if number not in known:
                old = stored.subjects[number]
                subject = Subject(number, old.request, _path_of(old.request), old.digest, None)
                known[number] = self._put_subject(subject)
                self._changed[subject] = None
            subject = known[number]
            peer = self._peers.get(endpoint) or self._new_peer(endpoint)
            peer.registration_id = entry.registration_id
            has = subject.digest if stored.has_newest(entry) else b""
            self._add(Observation(peer, token, subject, has, entry.message_id))
        self._subject_number = max(stored.subjects, default=0)
        stored.observers.clear()
        stored.subjects.clear()

    # ---- time

    def advance(self, now: float) -> float | None:
        """Send what is due, up to a burst of datagrams.

        Returns:
            When to call again, unless `wake` is called before; not after `now` if more is due;
            None if nothing is.
        """
        if self._since_s is None:
            self._since_s = now
        budget = self._retransmit(now, _BURST)
        while budget and (self._queue or self._changed) and self.window.has_room(now):
            self._process_next(now)
            budget -= 1
        waits = [tick * self._tick_s for tick in self._wheel]
        if self._queue or self._changed:
            waits.append(now if self.window.has_room(now) else self.window.room_at())
        return min(waits, default=None)

    def _retransmit(self, now: float, budget: int) -> int:
        """Retransmit what was not acknowledged in time; return what is left of the budget."""
        for tick in sorted(tick for tick in self._wheel if tick * self._tick_s <= now):
            exchanges = self._wheel[tick]
            while exchanges:
                if not budget:
                    return 0
                exchange = exchanges.pop()
                observation = exchange.observation
                if observation.peer.exchange is not exchange:
                    continue
                budget -= 1
                if exchange.attempts > self.timing.max_retransmit:
                    self.metrics.notifications["lost"] += 1
                    for each in observation.peer:
                        self._remove(each)
                    continue
                if exchange.attempts == 1 and not exchange.failures:
                    self.window.lost(now)
                self._transmit(now, exchange)
            del self._wheel[tick]
        return budget

    def _process_next(self, now: float) -> None:
        """Process one queued observation, or else one subject that changed."""
        if not self._queue:
            subject, _ = next(iter(self._changed.items()))
            del self._changed[subject]
            digest = self._render(subject).digest
            for observation in subject.observations:
                if observation.known != digest:
                    self._enqueue(observation)
            return
        observation = self._queue.popleft()
        peer = observation.peer
        observation.queued = False
        if (
            not observation.is_alive
            or observation.known == self._render(observation.subject).digest
        ):
            self._next_of(peer)
            return
        if peer.exchange:
            # An exchange of its own will carry the newest state anyway.
            if peer.exchange.observation is not observation:
                peer.waiting = peer.waiting or deque()
                peer.waiting.append(observation)
                observation.queued = True
            return
        factor = random.uniform(1, self.timing.ack_random_factor)  # noqa: S311 - no secret
        peer.exchange = NotificationExchange(observation, self.timing.ack_timeout_s * factor, now)
        self.window.add(peer.exchange)
        self._transmit(now, peer.exchange)

    def _transmit(self, now: float, exchange: NotificationExchange) -> None:
        """Send a notification of the newest state, for the first time or again."""
        observation = exchange.observation
        peer = observation.peer
        response = self._render(observation.subject)
        if observation.known == response.digest:
            self._close(observation)  # the state changed back before anything was sent
            return
        if exchange.digest != response.digest:
            exchange.digest = response.digest
            exchange.number = self._next_number(now) if response.observable else 0
            peer.number(observation)
        message_id, token = observation.message_id, observation.token
        datagram = response.message(CON, message_id, token, exchange.number)
        if self.send(peer.endpoint, datagram):
            observation.known = b""
            self.metrics.notifications["repeated" if exchange.attempts else "sent"] += 1
            if not exchange.attempts:
                exchange.sent_s = now
            exchange.attempts += 1
            exchange.failures = 0
            after_s = exchange.timeout_s
            exchange.timeout_s *= 2
        else:
            after_s = self.timing.ack_timeout_s * 2.0 ** min(exchange.failures - 5, 4)
            exchange.failures += 1
        tick = math.ceil((now + after_s) / self._tick_s)
        self._wheel.setdefault(tick, []).append(exchange)

    def _wake(self) -> None:
        if self._queue or self._changed:
            self.wake()

    # ---- entries

    def _respond(self, request: Request) -> ResponseTemplate:
        """Answer a request; a bug ends the observations of this one, and of no others."""
        try:
            return ResponseTemplate.of(*self.answer(request))
        except Exception:  # noqa: BLE001 - whatever it is, the others must be notified
            _log.exception("bug: a request of an observer could not be answered")
            return ResponseTemplate.of(False, 0xA0, b"")

    def _render(self, subject: Subject) -> ResponseTemplate:
        if subject.response is None:
            subject.response = self._respond(subject.request)
            if subject.response.digest != subject.digest:
                subject.digest = subject.response.digest
                self.journal.append(RecordKind.STATE, subject.number, 0, subject.digest)
        return subject.response

    def _is_full(self, path: ResourcePath, endpoint: Endpoint) -> bool:
        return (
            self._total >= self.caps.total
            or self._counts[path] >= self.caps.path
            or self._counts[address_of(endpoint)] >= self.caps.address
        )

    def _new_subject(
        self, request: Request, path: ResourcePath, response: ResponseTemplate
    ) -> Subject:
        self._subject_number = self._subject_number + 1 & 0xFFFFFFFF
        number = self._subject_number
        self.journal.append(RecordKind.SUBJECT, number, 0, response.digest, request)
        return self._put_subject(Subject(number, request, path, response.digest, response))

    def _put_subject(self, subject: Subject) -> Subject:
        self._subjects[subject.request] = subject
        self._by_path.setdefault(subject.path, {})[subject] = None
        return subject

    def _new_peer(self, endpoint: Endpoint) -> Peer:
        peer = self._peers[endpoint] = Peer(
            endpoint, FIRST_NOTIFICATION_ID | random.getrandbits(15)
        )
        return peer

    def _add(self, observation: Observation) -> None:
        observation.peer.put(observation)
        observation.subject.observations[observation] = None
        self._counts[observation.subject.path] += 1
        self._counts[address_of(observation.peer.endpoint)] += 1
        self._total += 1

    def _remove(self, observation: Observation) -> None:
        peer = observation.peer
        peer.drop(observation)
        if peer.is_empty:
            del self._peers[peer.endpoint]
        self._unlink(observation)
        self._close(observation)
        self.journal.append(RecordKind.ENDED, 0, 0, peer.endpoint, observation.token)

    def _unlink(self, observation: Observation) -> None:
        """Undo `_add`, except in the peer."""
        subject = observation.subject
        del subject.observations[observation]
        if not subject.observations:
            del self._subjects[subject.request]
            self._changed.pop(subject, None)
            del self._by_path[subject.path][subject]
            if not self._by_path[subject.path]:
                del self._by_path[subject.path]
        for key in (subject.path, address_of(observation.peer.endpoint)):
            self._counts[key] -= 1
            if not self._counts[key]:
                del self._counts[key]
        self._total -= 1

    def _close(self, observation: Observation) -> None:
        peer = observation.peer
        if peer.exchange and peer.exchange.observation is observation:
            self.window.remove(peer.exchange)
            peer.exchange = None
            self._next_of(peer)

    def _next_of(self, peer: Peer) -> None:
        if peer.waiting and not peer.exchange:
            self._queue.append(peer.waiting.popleft())

    def _enqueue(self, observation: Observation) -> None:
        if not observation.queued:
            observation.queued = True
            self._queue.append(observation)

    def _next_number(self, now: float) -> int:
        if now - self._interval_s >= _INTERVAL_S:
            self._interval_s, self._numbers_left = now, _MOST_NUMBERS
        if self._numbers_left:
            self._numbers_left -= 1
            self._number = max((self._number + 1) % _NUMBERS, _FIRST_NUMBER)
            self._unreserved -= 1
            if self._unreserved < 0:
                self._reserve()
        return self._number

    def _reserve(self) -> None:
        """Record that a restart must begin above the next `_RESERVED` Observe numbers."""
        self._unreserved = _RESERVED
        self.journal.append(RecordKind.NUMBER, (self._number + 2 * _RESERVED) % _NUMBERS)


def _path_of(request: Request) -> ResourcePath:
    options, _ = coap.decode(request[1:])
    return tuple(value.decode() for number, value in options if number == coap.URI_PATH)


@attrs.define(eq=False)
class Scheduler:
    """Calls `Observers.advance` in time, by one timer of the running loop."""

    observers: Observers
    _loop: asyncio.AbstractEventLoop = attrs.field(init=False, factory=asyncio.get_running_loop)
    _timer: asyncio.TimerHandle | None = attrs.field(init=False, default=None)
    _soon: bool = attrs.field(init=False, default=False)

    def start(self) -> None:
        """Let the table act from now on."""
        self.observers.wake = self._wake
        self._wake()

    def stop(self) -> None:
        """Let the table act no more."""
        self.observers.wake = lambda: None
        if self._timer:
            self._timer.cancel()

    def _wake(self) -> None:
        """Let the table act after what the loop already has to do."""
        if not self._soon:
            self._set(self._loop.time())
            self._soon = True

    def _set(self, when: float) -> None:
        if self._timer:
            self._timer.cancel()
        self._timer = self._loop.call_at(when, self._advance)

    def _advance(self) -> None:
        self._timer, self._soon = None, False
        when = self.observers.advance(self._loop.time())
        if when is not None:
            self._set(when)
