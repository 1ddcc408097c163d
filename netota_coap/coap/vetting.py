"""Lets only well-formed datagrams (`vet`), and not too many (`RequestLimiter`), reach aiocoap."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence

import attrs
from aiocoap.numbers.codes import Code

from netota_coap.coap import options as coap
from netota_coap.coap.protocol import ACK, CON, NON, RST

_RESERVED_CLASSES = (1, 6, 7)
_FIRST_RESPONSE = 64  # the lowest code of a response
NO_RESPONSE = 258  # RFC 7967; aiocoap implements it
_MOST_OPTIONS = 64
# aiocoap decodes these as UTF-8 and fails: Uri-Host, Location-Path, Uri-Path, Uri-Query,
# Location-Query, Proxy-Uri, Proxy-Scheme.
_TEXT_OF_AIOCOAP = (3, 8, 11, 15, 20, 35, 39)

METHOD_REFUSED = (
    Code.METHOD_NOT_ALLOWED,
    coap.problem(
        Code.METHOD_NOT_ALLOWED.name_printable,
        "only GET and FETCH are supported: nothing can be changed over the network",
    ),
)
"""The response to any other method."""


@attrs.frozen
class Verdict:
    """Why a datagram is refused, and how.

    Attributes:
        code: The response code; EMPTY stands for a reset, None for silence.
        reason: Goes into the log and the response.
    """

    code: Code | None
    reason: str


def vet(data: bytes, *, truncated: bool = False) -> Verdict | bytes:
    """Check a datagram.

    Returns:
        The datagram without elective options that are to be ignored, if it is well-formed.

    Source: RFC 7252, sections 3, 4.2, 4.3 and 5.4; rules C-50 to C-52.
    """
    if len(data) < 4 or data[0] >> 6 != 1:
        return Verdict(None, "not CoAP version 1")
    kind, token_length, code = data[0] >> 4 & 3, data[0] & 15, data[1]
    reset = Verdict(Code.EMPTY if kind == CON else None, "")
    if truncated or token_length > 8 or len(data) < 4 + token_length:
        return attrs.evolve(reset, reason="malformed token, or too long")
    if code >> 5 in _RESERVED_CLASSES:
        return attrs.evolve(reset, reason="reserved code class")
    if code == 0:
        # Zephyr 1.14 acknowledges with a token in the empty message.
        empty = len(data) == (4 if kind in (CON, NON) else 4 + token_length)
        return data if empty else attrs.evolve(reset, reason="empty message with content")
    if code >= _FIRST_RESPONSE:
        # aiocoap would look for the request, and keep each unknown option number for ever.
        return attrs.evolve(reset, reason="response without a request")
    if kind in (ACK, RST):
        return Verdict(None, "request code in an ACK or RST")
    try:
        found, payload = coap.decode(data[4 + token_length :])
    except ValueError as error:
        return attrs.evolve(reset, reason=str(error))
    reason = _refusal(found)
    if reason is not None:
        return Verdict(Code.BAD_OPTION, reason)
    # aiocoap would not ignore elective options with a bad length.
    kept = [
        option
        for option in found
        if coap.is_critical(option[0]) or coap.fits(option) or option[0] == NO_RESPONSE
    ]
    if len(kept) == len(found):
        return data
    return data[: 4 + token_length] + coap.encode(kept, payload)


def _refusal(found: Sequence[coap.Option]) -> str | None:
    """Return what aiocoap could not process or would hide; `Responder` refuses the rest."""
    if len(found) > _MOST_OPTIONS:
        return f"{len(found)} options are more than {_MOST_OPTIONS}"
    for number, value in found:
        if number in _TEXT_OF_AIOCOAP and not coap.is_text(value):
            return f"option {number} is not UTF-8"
    # aiocoap hides the length of numbers, and keeps each option number that it has seen for ever.
    # `Responder` answers proxy requests, with 5.05.
    return coap.refusal(
        option for option in found if option[0] not in (coap.PROXY_URI, coap.PROXY_SCHEME)
    )


MOST_REMEMBERED = 16_384  # requests, which aiocoap keeps for 247 s each
_BUSY_S = 10  # Max-Age of a refusal for the whole server
MOST_OF_SOURCE = 1_024  # requests in a period
_PERIOD_S = 60.0


@attrs.define(eq=False)
class RequestLimiter:
    """Bounds the requests that aiocoap remembers: in all, and of one source in each minute.

    A source is an IPv4 address, a /64 of global IPv6 (one host may have all of it), or any other
    address.
    """

    _counts: Counter[bytes] = attrs.field(init=False, factory=Counter)
    _since_s: float = attrs.field(init=False, default=-math.inf)

    def refusal(self, now: float, address: bytes, remembered: int) -> tuple[Code, int] | None:
        """Count a request that aiocoap would remember, or refuse it.

        Args:
            now: Seconds of a monotonic clock.
            address: The sender's, 16 bytes.
            remembered: How many requests aiocoap remembers now.

        Returns:
            Response code, and after how many seconds to ask again; None if it is not refused.

        Source: rule C-54.
        """
        if remembered >= MOST_REMEMBERED:
            return Code.SERVICE_UNAVAILABLE, _BUSY_S
        if now - self._since_s >= _PERIOD_S:
            self._counts.clear()
            self._since_s = now
        source = address[:8] if address[0] >> 5 == 1 else address
        if self._counts[source] >= MOST_OF_SOURCE:
            return Code.TOO_MANY_REQUESTS, math.ceil(self._since_s + _PERIOD_S - now)
        self._counts[source] += 1
        return None
