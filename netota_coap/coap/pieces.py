"""Blocks of files, by the bytes that ask for them: nothing is decoded or built but what differs.

A device asks for each block of a file once, so that no table of ready answers helps; but all that
it asks are alike: `/b/<digest>` and Block2, and nothing else.
"""

from __future__ import annotations

import attrs

from netota_coap.blobs import digest_of
from netota_coap.catalog import BLOB_MAX_AGE_S, ContentFormat
from netota_coap.coap import options as coap
from netota_coap.errors import NetotaError
from netota_coap.holding import OpenBlobs

_NAME = 43  # characters
_BEGIN = coap.encode([(coap.URI_PATH, b"b"), (coap.URI_PATH, bytes(_NAME))])[:-_NAME]
_END = len(_BEGIN) + _NAME
_BLOCK2 = coap.BLOCK2 - coap.URI_PATH << 4
_AFTER = coap.BLOCK2 - coap.MAX_AGE << 4
_MOST_KNOWN = 1_024


@attrs.define(eq=False)
class Pieces:
    """Answers to plain GETs of blocks but the first, byte for byte as the responder's."""

    _files: OpenBlobs | None = attrs.field(init=False, default=None)
    _known: dict[bytes, tuple[bytes, bytes]] = attrs.field(init=False, factory=dict)

    def find(self, files: OpenBlobs | None, key: bytes) -> bytes | None:
        """Return what follows the token of an answer.

        Args:
            files: That the server holds.
            key: What follows the token of the request.

        Returns:
            None: it is something else that is asked for, or the last block was passed, or there
            is no such file: the responder is to be asked.
        """
        if len(key) <= _END or key[_END] & 0xF0 != _BLOCK2 or not key.startswith(_BEGIN):
            return None
        if len(key) != _END + 1 + (key[_END] & 15):
            return None
        value = int.from_bytes(key[_END + 1 :], "big")
        number, szx = value >> 4, value & 7
        if files is None or not number or szx == 7 or value & 8 or value >> 24:
            return None
        if files is not self._files:
            self._files = files
            self._known.clear()
        try:
            sha256, head = self._known.get(key[len(_BEGIN) : _END]) or self._learn(key)
            part, more = files.piece(sha256, number << szx + 4, 16 << szx)
        except NetotaError:
            return None
        if not part:
            return None
        block = coap.encode_uint(number << 4 | more << 3 | szx)
        return head + bytes((_AFTER | len(block),)) + block + b"\xff" + part

    def _learn(self, key: bytes) -> tuple[bytes, bytes]:
        name = key[len(_BEGIN) : _END]
        sha256 = digest_of(name.decode("latin-1"))
        head = coap.encode(
            [
                (coap.ETAG, sha256[:8]),
                (coap.CONTENT_FORMAT, coap.encode_uint(ContentFormat.OCTETS)),
                (coap.MAX_AGE, coap.encode_uint(BLOB_MAX_AGE_S)),
            ]
        )
        if len(self._known) >= _MOST_KNOWN:
            self._known.clear()
        self._known[name] = sha256, head
        return sha256, head
