"""Constants and estimates of CoAP that clients and servers share.

Clients import this module and `options`, and nothing else of `netota_coap.coap`.
Source: RFC 7252, sections 3, 4.8, 8 and 12.8; RFC 6298.
"""

from __future__ import annotations

import math
import socket

import attrs

from netota_coap.errors import ConfigError

DEFAULT_PORT = 5683
CON, NON, ACK, RST = range(4)
"""Message types."""
GROUPS = ("ff02::fd", "ff05::fd", "224.0.1.187")
"""Multicast addresses of all CoAP nodes: link-local, site-local and IPv4."""
LEISURE_S = 5.0
"""Longest delay of a response to a multicast request."""


def interface_index(name: str) -> int:
    """Return the index of a network interface.

    Raises:
        ConfigError: No interface has this name.
    """
    try:
        return socket.if_nametoindex(name)
    except OSError as error:
        known = ", ".join(name for _, name in socket.if_nameindex())
        raise ConfigError(f"{name}: no such interface; there is {known}") from error


@attrs.frozen
class Timing:
    """Transmission parameters.

    Attributes:
        ack_timeout_s: Shortest time until the first retransmission, seconds; it doubles with each.
        ack_random_factor: The initial timeout is longer by a random factor up to this one.
        max_retransmit: Number of retransmissions.
    """

    ack_timeout_s: float = 2.0
    ack_random_factor: float = 1.5
    max_retransmit: int = 4


@attrs.define(eq=False)
class RoundTripTime:
    """Estimates how long a response may take (RFC 6298, section 2).

    Attributes:
        timeout_s: The estimate, seconds; before the first measurement, the initial value.
        shortest_s: Lower bound of the estimate.
        longest_s: Upper bound of the estimate.
    """

    timeout_s: float
    shortest_s: float
    longest_s: float = math.inf
    _smoothed_s: float | None = attrs.field(init=False, default=None)
    _variation_s: float = attrs.field(init=False, default=0.0)

    def measured(self, took_s: float) -> None:
        """Learn from a message that was sent once: an ACK does not say which copy it is for."""
        if self._smoothed_s is None:
            self._smoothed_s, self._variation_s = took_s, took_s / 2
        else:
            self._variation_s += (abs(self._smoothed_s - took_s) - self._variation_s) / 4
            self._smoothed_s += (took_s - self._smoothed_s) / 8
        timeout_s = max(self._smoothed_s + 4 * self._variation_s, self.shortest_s)
        self.timeout_s = min(timeout_s, self.longest_s)
