"""Who and what is let in.

`vet` judges a datagram by itself, so that nothing malformed reaches aiocoap. `Doorkeeper` judges
how much of what is well-formed aiocoap has to remember.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence

import attrs
from aiocoap.numbers.codes import Code

from netota_coap.coap import options as coap

_CON, _NON, _ACK, _RST = range(4)
_RESERVED_CLASSES = (1, 6, 7)
_FIRST_RESPONSE = 64  # of the codes
NO_RESPONSE = 258  # RFC 7967; aiocoap keeps to it
_MOST_OPTIONS = 64
# aiocoap decodes these before anybody can object: Uri-Host, Location-Path, Uri-Path, Uri-Query,
# Location-Query, Proxy-Uri, Proxy-Scheme.
_TEXT_OF_AIOCOAP = (3, 8, 11, 15, 20, 35, 39)


METHOD_REFUSED = (
    Code.METHOD_NOT_ALLOWED,
    coap.problem(
        Code.METHOD_NOT_ALLOWED.name_printable,
        "GET and FETCH are all there is: nothing can be changed over the network",
    ),
)
"""The answer to whatever is neither."""


@attrs.frozen
class Verdict:
    """What becomes of a datagram that aiocoap must not see.

    Attributes:
        code: To answer with; EMPTY stands for a reset, None for silence.
        reason: For the log, and for the answer.
    """

    code: Code | None
    reason: str


def vet(data: bytes, *, truncated: bool = False) -> Verdict | bytes:
    """Judge a datagram.

    Returns:
        What may be handed on if it is well-formed: itself, without elective options that are to be
        ignored.

    Source: RFC 7252, sections 3, 4.2, 4.3 and 5.4; rules C-50 to C-52.
    """
    if len(data) < 4 or data[0] >> 6 != 1:
        return Verdict(None, "not CoAP version 1")
    kind, token_length, code = data[0] >> 4 & 3, data[0] & 15, data[1]
    reset = Verdict(Code.EMPTY if kind == _CON else None, "")
    if truncated or token_length > 8 or len(data) < 4 + token_length:
        return attrs.evolve(reset, reason="malformed token, or too long")
    if code >> 5 in _RESERVED_CLASSES:
        return attrs.evolve(reset, reason="reserved code class")
    if code == 0:
        # A Zephyr 1.14 device acknowledges with a token in the empty message: let it.
        empty = len(data) == (4 if kind in (_CON, _NON) else 4 + token_length)
        return data if empty else attrs.evolve(reset, reason="empty message that is not")
    if code >= _FIRST_RESPONSE:
        # aiocoap would look for who asked, and keep for ever what numbers it has not seen before.
        return attrs.evolve(reset, reason="a response, where nothing was asked")
    if kind in (_ACK, _RST):
        return Verdict(None, "code that does not go with the type")
    try:
        found, payload = coap.decode(data[4 + token_length :])
    except ValueError as error:
        return attrs.evolve(reset, reason=str(error))
    reason = _stumbling_block(found)
    if reason is not None:
        return Verdict(Code.BAD_OPTION, reason)
    kept = [option for option in found if _is_kept(option)]
    if len(kept) == len(found):
        return data
    return data[: 4 + token_length] + coap.encode(kept, payload)


def _is_kept(option: coap.Option) -> bool:
    """Tell whether an option is handed on: elective ones that mean nothing here are ignored.

    aiocoap keeps the requests of observers, with all their options, and would not ignore those of
    a length that they cannot have.
    """
    return coap.is_critical(option[0]) or coap.fits(option) or option[0] == NO_RESPONSE


def _stumbling_block(found: Sequence[coap.Option]) -> str | None:
    """Say what aiocoap would stumble over or hide; what else is wrong `Responder` refuses."""
    if len(found) > _MOST_OPTIONS:
        return f"{len(found)} options are more than {_MOST_OPTIONS}"
    for number, value in found:
        if number in _TEXT_OF_AIOCOAP and not coap.is_text(value):
            return f"option {number} is not UTF-8"
    # aiocoap forgets how long numbers were, and keeps for ever what options it has seen. That
    # there is no proxy here, `Responder` says.
    return coap.refusal(
        option for option in found if option[0] not in (coap.PROXY_URI, coap.PROXY_SCHEME)
    )


# ----------------------------------------------------------------------------------------------
# How much

_MOST_REMEMBERED = 16_384  # requests, which aiocoap keeps for 247 s each
_BUSY_S = 10  # until who is turned away should ask again
_MOST_OF_SOURCE = 1_024  # in a period
_PERIOD_S = 60.0


@attrs.define(eq=False)
class Doorkeeper:
    """Bounds what aiocoap has to remember: in all, and of one source in each minute.

    A source is an IPv4 address, a /64 of the Internet's IPv6 (which one host may have to itself),
    or any other address.
    """

    _counts: Counter[bytes] = attrs.field(init=False, factory=Counter)
    _since_s: float = attrs.field(init=False, default=-math.inf)

    def turns_away(self, now: float, address: bytes, remembered: int) -> tuple[Code, int] | None:
        """Tell whether a request that has to be remembered is turned away.

        Args:
            now: Seconds, of any clock that never goes back.
            address: Where it came from, 16 bytes.
            remembered: How many aiocoap has to remember now.

        Returns:
            What to answer, and after how many seconds to ask again; None: it may come in.

        Source: rule C-54.
        """
        if remembered >= _MOST_REMEMBERED:
            return Code.SERVICE_UNAVAILABLE, _BUSY_S
        if now - self._since_s >= _PERIOD_S:
            self._counts.clear()
            self._since_s = now
        source = address[:8] if address[0] >> 5 == 1 else address
        if self._counts[source] >= _MOST_OF_SOURCE:
            return Code.TOO_MANY_REQUESTS, math.ceil(self._since_s + _PERIOD_S - now)
        self._counts[source] += 1
        return None
