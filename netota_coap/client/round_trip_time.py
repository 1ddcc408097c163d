"""How long the answers of a server take, and so when it is time to ask again.

Source: RFC 6298, section 2; RFC 7252, section 4.2.
"""

from __future__ import annotations

import random
from typing import Any

import attrs
from aiocoap.message import Message
from aiocoap.numbers.constants import TransportTuning

_SHORTEST_S = 0.2  # the network's jitter and the server's pauses are below that


@attrs.define
class Peer:
    """A server that is asked for much.

    Attributes:
        remote: The endpoint that answered, as aiocoap has it; None: not known yet.
    """

    remote: Any = None
    _repeat_s: float = TransportTuning.ACK_TIMEOUT
    _smoothed_s: float = 0.0
    _variation_s: float = 0.0

    def repeat_s(self) -> float:
        """Return how long to wait for an answer before asking again, seconds, with jitter."""
        return self._repeat_s * random.uniform(1.0, TransportTuning.ACK_RANDOM_FACTOR)  # noqa: S311

    def answered(self, response: Message, took_s: float) -> None:
        """Learn from the answer to one transmission, and how long it took, seconds."""
        if self.remote is None:
            self._smoothed_s, self._variation_s = took_s, took_s / 2
        else:
            self._variation_s += (abs(self._smoothed_s - took_s) - self._variation_s) / 4
            self._smoothed_s += (took_s - self._smoothed_s) / 8
        self.remote = response.remote
        self._repeat_s = max(self._smoothed_s + 4 * self._variation_s, _SHORTEST_S)
