"""How many notifications may be on their way at a time.

Source: RFC 7252, sections 4.7 and 4.8.
"""

from __future__ import annotations

import math
from collections import deque

import attrs

from netota_coap.coap.observe.entries import Exchange

MOST_OPEN = 128
"""Exchanges whose ACKs fit half of a receive buffer of 208 KiB, Linux's default."""

_LEAST_OPEN = 16
_FIRST_OPEN = 64


@attrs.frozen
class Timing:
    """The times of RFC 7252, section 4.8.

    Attributes:
        ack_timeout_s: Until a message is repeated, at least, seconds; doubled with each time.
        ack_random_factor: By which that may be longer.
        max_retransmit: How often it is repeated.
    """

    ack_timeout_s: float = 2.0
    ack_random_factor: float = 1.5
    max_retransmit: int = 4


@attrs.define(eq=False)
class Window:
    """How many ACKs may be on their way at a time.

    It grows with ACKs in time, doubling in each round trip up to where it last was too large, by
    one in each afterwards; not with those that took much longer than the quickest, since then
    something on the way has a queue already. A first repetition halves it, at most once in a round
    trip. What is silent for longer than a round trip takes is not on its way: the dead do not fill
    it.

    Attributes:
        most: That the receive buffer holds.
        timing: Bounds what a round trip can take.
        size: Of now.
        flying: ACKs that may be on their way.
    """

    most: int
    timing: Timing
    size: float = attrs.field(init=False, default=_FIRST_OPEN)
    flying: int = attrs.field(init=False, default=0)
    _threshold: float = attrs.field(init=False, default=math.inf)
    _quickest_s: float = attrs.field(init=False, default=math.inf)
    _halved_s: float = attrs.field(init=False, default=-math.inf)
    _smoothed_s: float | None = attrs.field(init=False, default=None)
    _variation_s: float = attrs.field(init=False, default=0.0)
    _flight: deque[Exchange] = attrs.field(init=False, factory=deque)

    @property
    def patience_s(self) -> float:
        """How long a round trip may take."""
        longest = self.timing.ack_timeout_s
        if self._smoothed_s is None:
            return longest
        return min(max(self._smoothed_s + 4 * self._variation_s, longest / 40), longest)

    def has_room(self, now: float) -> bool:
        """Tell whether one more may fly."""
        flight, silent = self._flight, now - self.patience_s
        while flight and (not flight[0].flying or flight[0].sent_s <= silent):
            self.leave(flight.popleft())
        return self.flying < min(self.size, self.most)

    def room_at(self) -> float:
        """Return when there will be room at the latest, if nothing comes."""
        return self._flight[0].sent_s + self.patience_s if self._flight else -math.inf

    def enter(self, exchange: Exchange) -> None:
        """Let one fly."""
        self._flight.append(exchange)
        self.flying += 1

    def leave(self, exchange: Exchange) -> None:
        """Wait for one no more."""
        self.flying -= exchange.flying
        exchange.flying = False

    def acknowledged(self, took_s: float, *, busy: bool) -> None:
        """Learn from an ACK of what was sent once.

        Args:
            took_s: Seconds.
            busy: Whether more could have been sent.
        """
        if self._smoothed_s is None:
            self._smoothed_s, self._variation_s = took_s, took_s / 2
        else:
            self._variation_s += (abs(self._smoothed_s - took_s) - self._variation_s) / 4
            self._smoothed_s += (took_s - self._smoothed_s) / 8
        self._quickest_s = min(self._quickest_s, took_s)
        queued = took_s > 2 * self._quickest_s + self.timing.ack_timeout_s / 1_000
        if busy and not queued and self.size < self.most:
            self.size += 1 if self.size < self._threshold else 1 / self.size

    def lost(self, now: float) -> None:
        """Learn from something that was not acknowledged in time."""
        if now - self._halved_s >= self.patience_s:
            self.size = self._threshold = max(self.size / 2, _LEAST_OPEN)
            self._halved_s = now
