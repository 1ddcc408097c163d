"""How long the answers of a server take, and so when it is time to ask again.

Source: RFC 6298, section 2; RFC 7252, section 4.2.
"""

from __future__ import annotations

import random
from typing import Any

import attrs
from aiocoap.message import Message
from aiocoap.numbers.constants import TransportTuning

from netota_coap.coap.protocol import RoundTripTime

_SHORTEST_S = 0.2  # the network's jitter and the server's pauses are below that


@attrs.define
class Peer:
    """A server that is asked for much.

    Attributes:
        remote: The endpoint that answered, as aiocoap has it; None: not known yet.
    """

    remote: Any = None
    _round_trip: RoundTripTime = attrs.field(
        factory=lambda: RoundTripTime(TransportTuning.ACK_TIMEOUT, _SHORTEST_S)
    )

    def repeat_s(self) -> float:
        """Return how long to wait for an answer before asking again, seconds, with jitter."""
        factor = random.uniform(1.0, TransportTuning.ACK_RANDOM_FACTOR)  # noqa: S311 - no secret
        return self._round_trip.timeout_s * factor

    def answered(self, response: Message, took_s: float) -> None:
        """Learn from the answer to one transmission, and how long it took, seconds."""
        self._round_trip.measured(took_s)
        self.remote = response.remote
