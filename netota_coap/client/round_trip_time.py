"""Decides from the round-trip times of a server when a request to it is retransmitted.

Source: RFC 6298, section 2; RFC 7252, section 4.2.
"""

from __future__ import annotations

import random
from typing import Any

import attrs
from aiocoap.message import Message
from aiocoap.numbers.constants import TransportTuning

_SHORTEST_S = 0.2  # above the jitter of a network and the pauses of a server


@attrs.define
class ServerTiming:
    """The retransmission timer of a server, for several requests in flight.

    Attributes:
        remote: aiocoap's endpoint that answered; None before the first response.
    """

    remote: Any = None
    _repeat_s: float = TransportTuning.ACK_TIMEOUT
    _smoothed_s: float = 0.0
    _variation_s: float = 0.0

    def repeat_s(self) -> float:
        """Return how long to wait before a retransmission, seconds, with jitter."""
        return self._repeat_s * random.uniform(1.0, TransportTuning.ACK_RANDOM_FACTOR)  # noqa: S311

    def answered(self, response: Message, took_s: float) -> None:
        """Learn from the response to one transmission and its round-trip time, seconds."""
        if self.remote is None:
            self._smoothed_s, self._variation_s = took_s, took_s / 2
        else:
            self._variation_s += (abs(self._smoothed_s - took_s) - self._variation_s) / 4
            self._smoothed_s += (took_s - self._smoothed_s) / 8
        self.remote = response.remote
        self._repeat_s = max(self._smoothed_s + 4 * self._variation_s, _SHORTEST_S)
