"""Who asked to be notified of what, and telling them.

`Observers` is a table without sockets, clocks or tasks: it is told what came in and what time it
is, and sends by a function that it is given. `Alarm` lets it act in time. What it must remember
over a restart it says to a journal.

An observer is compared with what it should have, whenever something happens to it: so a state that
was passed is not sent any more, and nobody is forgotten.
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
from netota_coap.coap.observe.congestion import MOST_OPEN, Timing, Window
from netota_coap.coap.observe.entries import (
    OUR_IDS,
    Answer,
    Endpoint,
    Exchange,
    Observation,
    Peer,
    Request,
    Subject,
    address_of,
)
from netota_coap.coap.observe.journal import Journal, Kept, Kind
from netota_coap.monitoring import FanOut, Metrics

Send = Callable[[Endpoint, bytes], bool]
"""Sends a datagram; False: the system refused it, for whatever reason."""

Answering = Callable[[Request], tuple[bool, int, bytes]]
"""Whether a request can be observed; code of its answer; options and payload of it."""

_log = logging.getLogger(__name__)

_CON, _NON, _ACK = range(3)
_FIRST_NUMBER = 2  # Zephyr 1.14 drops the notification that is numbered 1
_NUMBERS = 1 << 24
# RFC 7641, section 3.4: less than 2^23 in 256 s, of which three of these intervals see a part.
_INTERVAL_S = 128.0
_MOST_NUMBERS = 1 << 21  # in an interval
_RESERVED = 1 << 16  # numbers at a time, in the journal
_BURST = 64  # datagrams between two looks at the sockets


@attrs.frozen
class Caps:
    """How many observers there may be.

    Attributes:
        total: Of everything.
        path: Of one resource.
        address: From one address; gateways and NAT have many devices behind one.
        request: Bytes of what one asks for.
    """

    total: int = 200_000
    path: int = 100_000
    address: int = 10_000
    request: int = 1_024


# ----------------------------------------------------------------------------------------------
# The table


@attrs.define(eq=False)
class Observers:
    """The observers of a server.

    Attributes:
        answering: Answers requests, from the present state.
        journal: Told what has to be remembered.
        timing: Of retransmissions.
        caps: Of the table.
        window: Of notifications.
        send: By which notifications leave.
        wake: Called when `advance` has something to do before the time that it said.
        metrics: What is counted goes there.
    """

    answering: Answering
    journal: Journal = attrs.field(factory=Journal)
    timing: Timing = Timing()
    caps: Caps = Caps()
    window: Window = attrs.field()
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
    _wheel: dict[int, list[Exchange]] = attrs.field(init=False, factory=dict)
    _tick_s: float = attrs.field(init=False)
    _number: int = attrs.field(init=False, default=_FIRST_NUMBER - 1)
    _numbers_left: int = attrs.field(init=False, default=0)
    _interval_s: float = attrs.field(init=False, default=-math.inf)
    _unreserved: int = attrs.field(init=False, default=0)
    _told: int = attrs.field(init=False, default=0)
    _since_s: float | None = attrs.field(init=False, default=None)
    _told_s: float = attrs.field(init=False, default=0.0)

    @window.default
    def _default_window(self) -> Window:
        return Window(MOST_OPEN, self.timing)

    @_tick_s.default
    def _sixteenth(self) -> float:
        return self.timing.ack_timeout_s / 16

    def __len__(self) -> int:
        return self._total

    def of(self, path: ResourcePath) -> int:
        """Return how many observe a resource."""
        return self._counts[path]

    @property
    def fan_out(self) -> FanOut | None:
        """How the last change was told; None: nobody acknowledged one."""
        if self._since_s is None or not self._told:
            return None
        return FanOut(self._told, self._told_s - self._since_s)

    # ---- what comes in

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
        """Register an observer, in place of one with the same endpoint and token.

        Args:
            now: Seconds, of any clock that never goes back.
            endpoint: Where it came from.
            token: Of the request.
            message_id: Of the request.
            request: With Observe 0.
            confirmable: Whether the answer is an acknowledgement.

        Returns:
            The answer; None: it cannot be observed, or over a cap; it is to be answered plainly.
        """
        subject = self._subjects.get(request)
        answer = self._render(subject) if subject else self._answer(request)
        if not answer.lives:
            return None
        peer = self._peers.get(endpoint)
        old = peer.find(token) if peer else None
        path = subject.path if subject else _path_of(request)
        if (old is None and self._is_full(path, endpoint)) or len(request) > self.caps.request:
            return None
        if subject is None:
            subject = self._new_subject(request, path, answer)
        if peer is None:
            peer = self._new_peer(endpoint)
        peer.registration_id = message_id if message_id >= OUR_IDS else 0
        self._add(Observation(peer, token, subject, answer.digest))
        if old is not None:
            self._forget(old)
            self._close(old)
            self.journal.append(Kind.ENDED, 0, 0, endpoint, token)
        self.journal.append(Kind.OBSERVER, subject.number, message_id, endpoint, token)
        number = self._next_number(now)
        if confirmable:
            return answer.message(_ACK, message_id, token, number)
        peer.last_id = peer.new_id()
        return answer.message(_NON, peer.last_id, token, number)

    def deregister(self, endpoint: Endpoint, token: bytes) -> None:
        """End the observation of an endpoint and token, if there is one."""
        peer = self._peers.get(endpoint)
        found = peer.find(token) if peer else None
        if found:
            self._remove(found)
            self._wake()

    def acknowledged(self, now: float, endpoint: Endpoint, message_id: int) -> None:
        """Take an ACK."""
        peer = self._peers.get(endpoint)
        exchange = peer.exchange if peer else None
        if exchange is None or exchange.observation.message_id != message_id:
            return
        observation = exchange.observation
        if exchange.attempts == 1:
            busy = bool(self._queue or self._changed)
            self.window.acknowledged(now - exchange.sent_s, busy=busy)
        observation.told = exchange.digest
        self.metrics.notifications["acknowledged"] += 1
        self._told, self._told_s = self._told + 1, now
        subject = observation.subject
        if not exchange.number:
            self._remove(observation)
        else:
            if exchange.digest == subject.digest:
                self.journal.append(Kind.TOLD, 0, message_id, endpoint, observation.token)
            self._close(observation)
            if subject.answer and subject.digest != observation.told:
                self._enqueue(observation)
        self._wake()

    def reset(self, endpoint: Endpoint, message_id: int) -> None:
        """Take a RST; of an observation's last notification, or last but one, it ends it."""
        peer = self._peers.get(endpoint)
        observation = peer.notified(message_id) if peer else None
        if observation:
            self._remove(observation)
            self._wake()

    def notify(self, paths: Iterable[ResourcePath]) -> None:
        """Learn which resources changed, appeared or vanished."""
        for path in paths:
            for subject in self._by_path.get(path, ()):
                subject.answer = None
                self._changed[subject] = None
                self._told, self._since_s = 0, None
        self._wake()

    def restore(self, kept: Kept) -> None:
        """Take over the observers of before a restart, and tell them what they do not have.

        Nothing is left of them in `kept`, which would take as much room as the table.
        """
        self._number = max(kept.number, _FIRST_NUMBER - 1)
        known: dict[int, Subject] = {}
        for (endpoint, token), entry in kept.observers.items():
            if entry.subject not in known:
                old = kept.subjects[entry.subject]
                subject = Subject(
                    entry.subject, old.request, _path_of(old.request), old.digest, None
                )
                known[entry.subject] = self._put_subject(subject)
                self._changed[subject] = None
            subject = known[entry.subject]
            peer = self._peers.get(endpoint) or self._new_peer(endpoint)
            peer.registration_id = entry.registration_id
            told = subject.digest if kept.has_newest(entry) else b""
            self._add(Observation(peer, token, subject, told, entry.message_id))
        self._subject_number = max(kept.subjects, default=0)
        kept.observers.clear()
        kept.subjects.clear()

    # ---- what time brings

    def advance(self, now: float) -> float | None:
        """Send what is due, up to some datagrams.

        Returns:
            When to call again if nothing happens before: at most `now` if there is more to do;
            None: there is nothing to wait for.
        """
        if self._since_s is None:
            self._since_s = now
        budget = self._repeat(now, _BURST)
        while budget and (self._queue or self._changed) and self.window.has_room(now):
            self._look(now)
            budget -= 1
        waits = [tick * self._tick_s for tick in self._wheel]
        if self._queue or self._changed:
            waits.append(now if self.window.has_room(now) else self.window.room_at())
        return min(waits, default=None)

    def _repeat(self, now: float, budget: int) -> int:
        """Repeat what was not acknowledged in time; what is left of the budget."""
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
                    # The peer is gone, with all that it observed.
                    self.metrics.notifications["lost"] += 1
                    for each in observation.peer:
                        self._remove(each)
                    continue
                if exchange.attempts == 1 and not exchange.failures:
                    self.window.lost(now)
                self._transmit(now, exchange)
            del self._wheel[tick]
        return budget

    def _look(self, now: float) -> None:
        """Look at one observation, or else at one subject that changed."""
        if not self._queue:
            subject, _ = next(iter(self._changed.items()))
            del self._changed[subject]
            digest = self._render(subject).digest
            for observation in subject.observations:
                if observation.told != digest:
                    self._enqueue(observation)
            return
        observation = self._queue.popleft()
        peer = observation.peer
        observation.queued = False
        if (
            not observation.is_alive
            or observation.told == self._render(observation.subject).digest
        ):
            self._next_of(peer)
            return
        if peer.exchange:
            # If it is its own, what is sent next is the newest state anyway.
            if peer.exchange.observation is not observation:
                peer.waiting = peer.waiting or deque()
                peer.waiting.append(observation)
                observation.queued = True
            return
        factor = random.uniform(1, self.timing.ack_random_factor)  # noqa: S311 - no secret
        peer.exchange = Exchange(observation, self.timing.ack_timeout_s * factor, now)
        self.window.enter(peer.exchange)
        self._transmit(now, peer.exchange)

    def _transmit(self, now: float, exchange: Exchange) -> None:
        """Send a notification, again or for the first time: always of the newest state."""
        observation = exchange.observation
        peer = observation.peer
        answer = self._render(observation.subject)
        if observation.told == answer.digest:
            self._close(observation)  # it is back, and nothing else was sent
            return
        if exchange.digest != answer.digest:
            exchange.digest = answer.digest
            exchange.number = self._next_number(now) if answer.lives else 0
            peer.number(observation)
        datagram = answer.message(_CON, observation.message_id, observation.token, exchange.number)
        if self.send(peer.endpoint, datagram):
            observation.told = b""
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

    def _answer(self, request: Request) -> Answer:
        """Answer a request; a bug ends the observations of this one, and of no others."""
        try:
            return Answer.of(*self.answering(request))
        except Exception:  # noqa: BLE001 - whatever it is, the others must be told
            _log.exception("bug: the answer to an observer failed")
            return Answer.of(False, 0xA0, b"")

    def _render(self, subject: Subject) -> Answer:
        if subject.answer is None:
            subject.answer = self._answer(subject.request)
            if subject.answer.digest != subject.digest:
                subject.digest = subject.answer.digest
                self.journal.append(Kind.STATE, subject.number, 0, subject.digest)
        return subject.answer

    def _is_full(self, path: ResourcePath, endpoint: Endpoint) -> bool:
        return (
            self._total >= self.caps.total
            or self._counts[path] >= self.caps.path
            or self._counts[address_of(endpoint)] >= self.caps.address
        )

    def _new_subject(self, request: Request, path: ResourcePath, answer: Answer) -> Subject:
        self._subject_number = self._subject_number + 1 & 0xFFFFFFFF
        number = self._subject_number
        self.journal.append(Kind.SUBJECT, number, 0, answer.digest, request)
        return self._put_subject(Subject(number, request, path, answer.digest, answer))

    def _put_subject(self, subject: Subject) -> Subject:
        self._subjects[subject.request] = subject
        self._by_path.setdefault(subject.path, {})[subject] = None
        return subject

    def _new_peer(self, endpoint: Endpoint) -> Peer:
        peer = self._peers[endpoint] = Peer(endpoint, OUR_IDS | random.getrandbits(15))
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
        self._forget(observation)
        self._close(observation)
        self.journal.append(Kind.ENDED, 0, 0, peer.endpoint, observation.token)

    def _forget(self, observation: Observation) -> None:
        """Undo what `_add` did, but for the entry itself."""
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
        """End the exchange of an observation, if it is open."""
        peer = observation.peer
        if peer.exchange and peer.exchange.observation is observation:
            self.window.leave(peer.exchange)
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
        """Let the journal say that numbers up to some higher one may be used."""
        self._unreserved = _RESERVED
        self.journal.append(Kind.NUMBER, (self._number + 2 * _RESERVED) % _NUMBERS)


def _path_of(request: Request) -> ResourcePath:
    options, _ = coap.decode(request[1:])
    return tuple(value.decode() for number, value in options if number == coap.URI_PATH)


# ----------------------------------------------------------------------------------------------
# The clock


@attrs.define(eq=False)
class Alarm:
    """Lets a table act in time, by one timer of the running loop.

    Attributes:
        observers: The table.
    """

    observers: Observers
    _loop: asyncio.AbstractEventLoop = attrs.field(init=False, factory=asyncio.get_running_loop)
    _timer: asyncio.TimerHandle | None = attrs.field(init=False, default=None)
    _soon: bool = attrs.field(init=False, default=False)

    def start(self) -> None:
        """Let it act from now on."""
        self.observers.wake = self._ring
        self._ring()

    def stop(self) -> None:
        """Let it act no more."""
        self.observers.wake = lambda: None
        if self._timer:
            self._timer.cancel()

    def _ring(self) -> None:
        """Something happened: let the table act after what the loop has to do now."""
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
