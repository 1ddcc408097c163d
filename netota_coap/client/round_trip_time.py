"""Decides from the round-trip times of a server when a request to it is retransmitted.

Source: RFC 6298, section 2; RFC 7252, section 4.2.
"""

from __future__ import annotations

import random
from typing import Any

import attrs
from aiocoap.message import Message
from aiocoap.numbers.constants import TransportTuning

from netota_coap.coap.protocol import RoundTripTime

_SHORTEST_S = 0.2  # above the jitter of a network and the pauses of a server


@attrs.define
class ServerTiming:
    """The retransmission timer of a server, for several requests in flight."""

    remote: Any = None  # aiocoap's endpoint that answered
    _round_trip: RoundTripTime = attrs.field(
        factory=lambda: RoundTripTime(TransportTuning.ACK_TIMEOUT, _SHORTEST_S)
    )

    def repeat_s(self) -> float:
        """Return how long to wait before a retransmission, seconds, with jitter."""
        factor = random.uniform(1.0, TransportTuning.ACK_RANDOM_FACTOR)  # noqa: S311 - no secret
        return self._round_trip.timeout_s * factor

    def answered(self, response: Message, took_s: float) -> None:
        """Learn from the response to one transmission and its round-trip time, seconds."""
        self._round_trip.measured(took_s)
        self.remote = response.remote
