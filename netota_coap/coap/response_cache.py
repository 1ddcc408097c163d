"""Caches responses to plain GETs, so that the same bytes are answered without being decoded."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Mapping

import attrs
from aiocoap.numbers.codes import Code

from netota_coap.coap.protocol import ACK, CON
from netota_coap.coap.responder import Responder
from netota_coap.monitoring import Tally

MOST_ENTRIES = 16_384
MOST_BYTES = 16 * 2**20
_ENTRY_BYTES = 300  # overhead of an entry besides its key and tail

CachedResponse = tuple[Mapping[int, bytes], bytes, Tally]
"""The first two bytes, by the first byte of the request; all that follows the token; where to
count it."""

HEADS: Mapping[Code, Mapping[int, bytes]] = {
    code: {
        0x40 | CON << 4 | length: bytes((0x40 | ACK << 4 | length, code)) for length in range(9)
    }
    for code in (Code.CONTENT, Code.VALID)
}
"""The first two bytes of a response, by code and by the first byte of a confirmable request."""


@attrs.define(eq=False)
class ResponseCache:
    """An LRU cache of responses, keyed by the bytes that follow the token of the request.

    It is bounded in entries and bytes. Only successful responses are cached, so that requests for
    what does not exist evict nothing.
    """

    _table: OrderedDict[bytes, CachedResponse] = attrs.field(init=False, factory=OrderedDict)
    _bytes: int = attrs.field(init=False, default=0)
    _responder: Responder | None = attrs.field(init=False, default=None)

    def of(self, responder: Responder) -> OrderedDict[bytes, CachedResponse]:
        """Return the responses of this responder; those of any other are dropped.

        Whoever uses an entry moves it to the end of the table.
        """
        if responder is not self._responder:
            self._responder = responder
            self._table.clear()
            self._bytes = 0
        return self._table

    def put(self, key: bytes, code: Code, tail: bytes, tally: Tally) -> None:
        """Add a response, and evict the least recently used ones beyond the bounds."""
        if key in self._table:
            return
        self._table[key] = (HEADS[code], tail, tally)
        self._bytes += len(key) + len(tail) + _ENTRY_BYTES
        while len(self._table) > MOST_ENTRIES or self._bytes > MOST_BYTES:
            evicted, (_, its_tail, _) = self._table.popitem(last=False)
            self._bytes -= len(evicted) + len(its_tail) + _ENTRY_BYTES
