"""Answers that are ready, by the bytes that ask for them."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Mapping
from typing import Protocol

import attrs
from aiocoap.numbers.codes import Code

from netota_coap.catalog.local_blobs import OpenBlobs
from netota_coap.coap import options as coap
from netota_coap.monitoring import Tally

_CON, _, _ACK = range(3)

_READY_ENTRIES = 16_384
_READY_BYTES = 16 * 2**20
_ENTRY_BYTES = 300  # that an entry takes besides its key and its tail

Ready = tuple[Mapping[int, bytes], bytes, Tally]
"""Of an answer: the first two bytes, by the first one of the request; all after the token; where
to count it."""

HEADS: Mapping[Code, Mapping[int, bytes]] = {
    code: {
        0x40 | _CON << 4 | length: bytes((0x40 | _ACK << 4 | length, code)) for length in range(9)
    }
    for code in (Code.CONTENT, Code.VALID)
}


class Answering(Protocol):
    """What answers requests, as `server.Responder` does."""

    def answer(
        self, options: tuple[coap.Option, ...], payload: bytes | None
    ) -> tuple[Code, bytes]:
        """Return response code, and the bytes of options and payload."""

    @property
    def files(self) -> OpenBlobs | None:
        """The bytes of files that are served."""


@attrs.define(eq=False)
class ReadyAnswers:
    """Answers to plain GETs, by the bytes of their options; the least recently used leave.

    Bounded in entries and in bytes, and filled with successful answers only: asking for what does
    not exist pushes nothing out.
    """

    _table: OrderedDict[bytes, Ready] = attrs.field(init=False, factory=OrderedDict)
    _bytes: int = attrs.field(init=False, default=0)
    _answering: Answering | None = attrs.field(init=False, default=None)

    def of(self, answering: Answering) -> OrderedDict[bytes, Ready]:
        """Return the answers of what answers now: none of before a swap.

        What is used is to be moved to the end of the table.
        """
        if answering is not self._answering:
            self._answering = answering
            self._table.clear()
            self._bytes = 0
        return self._table

    def put(self, key: bytes, code: Code, tail: bytes, tally: Tally) -> None:
        """Keep an answer."""
        if key in self._table:
            return
        self._table[key] = (HEADS[code], tail, tally)
        self._bytes += len(key) + len(tail) + _ENTRY_BYTES
        while len(self._table) > _READY_ENTRIES or self._bytes > _READY_BYTES:
            dropped, (_, its_tail, _) = self._table.popitem(last=False)
            self._bytes -= len(dropped) + len(its_tail) + _ENTRY_BYTES
