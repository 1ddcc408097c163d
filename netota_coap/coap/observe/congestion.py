"""Congestion control: how many notifications may be in flight at a time.

Source: RFC 7252, sections 4.7 and 4.8.
"""

from __future__ import annotations

import math
from collections import deque

import attrs

from netota_coap.coap.observe.entries import NotificationExchange
from netota_coap.coap.protocol import RoundTripTime, Timing

MOST_IN_FLIGHT = 128
"""As many ACKs fit into half of a receive buffer of 208 KiB, Linux's default."""

_SMALLEST = 16
_INITIAL = 64


@attrs.define(eq=False)
class CongestionWindow:
    """Bounds the notifications in flight.

    It grows by one with each ACK up to the size at which it was last halved, and by one in each
    round trip beyond. It does not grow with ACKs that take more than twice the shortest round
    trip, since something on the way queues them already. The first retransmission of a
    notification halves it, at most once in a round trip.
    What is not acknowledged within a round trip counts as lost: dead devices do not fill the
    window.

    Attributes:
        most: How many ACKs the receive buffer holds.
        timing: Bounds the round-trip time.
        size: The current bound, at most `most`.
        in_flight: Notifications that may still be acknowledged within a round trip.
        round_trip: Estimated from ACKs.
    """

    most: int
    timing: Timing
    size: float = attrs.field(init=False, default=_INITIAL)
    in_flight: int = attrs.field(init=False, default=0)
    round_trip: RoundTripTime = attrs.field(init=False)
    _threshold: float = attrs.field(init=False, default=math.inf)
    _shortest_s: float = attrs.field(init=False, default=math.inf)
    _halved_s: float = attrs.field(init=False, default=-math.inf)
    _exchanges: deque[NotificationExchange] = attrs.field(init=False, factory=deque)

    @round_trip.default
    def _unmeasured(self) -> RoundTripTime:
        longest_s = self.timing.ack_timeout_s
        return RoundTripTime(longest_s, longest_s / 40, longest_s)

    def has_room(self, now: float) -> bool:
        """Tell whether one more may be sent."""
        exchanges, silent = self._exchanges, now - self.round_trip.timeout_s
        while exchanges and (not exchanges[0].in_flight or exchanges[0].sent_s <= silent):
            self.remove(exchanges.popleft())
        return self.in_flight < min(self.size, self.most)

    def room_at(self) -> float:
        """Return when there will be room, if no ACK arrives before."""
        if not self._exchanges:
            return -math.inf
        return self._exchanges[0].sent_s + self.round_trip.timeout_s

    def add(self, exchange: NotificationExchange) -> None:
        """Count an exchange whose notification is about to be sent."""
        self._exchanges.append(exchange)
        self.in_flight += 1

    def remove(self, exchange: NotificationExchange) -> None:
        """Stop counting an exchange; it may have been removed already."""
        self.in_flight -= exchange.in_flight
        exchange.in_flight = False

    def acknowledged(self, took_s: float, *, busy: bool) -> None:
        """Learn from the ACK of a notification that was sent once.

        Args:
            took_s: The round-trip time, seconds.
            busy: Whether more notifications wait to be sent; otherwise the window does not grow.
        """
        self.round_trip.measured(took_s)
        self._shortest_s = min(self._shortest_s, took_s)
        queued = took_s > 2 * self._shortest_s + self.timing.ack_timeout_s / 1_000
        if busy and not queued and self.size < self.most:
            self.size += 1 if self.size < self._threshold else 1 / self.size

    def lost(self, now: float) -> None:
        """Learn that a notification was not acknowledged in time."""
        if now - self._halved_s >= self.round_trip.timeout_s:
            self.size = self._threshold = max(self.size / 2, _SMALLEST)
            self._halved_s = now
