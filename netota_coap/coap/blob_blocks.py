"""Answers requests for blocks of blobs without decoding them.

A device asks for each block of a blob once, so a response cache does not help. But these requests
are all alike: `/b/<digest>` and Block2, and nothing else.
"""

from __future__ import annotations

import attrs

from netota_coap.catalog.local_blobs import OpenBlobs
from netota_coap.catalog.resources import BLOB_MAX_AGE_S
from netota_coap.coap import options as coap
from netota_coap.encoding.content_formats import ContentFormat
from netota_coap.errors import NetotaError, NotFoundError
from netota_coap.repository.blobs import digest_of

_NAME = 43  # characters of a digest in a path
_BEGIN = coap.encode([(coap.URI_PATH, b"b"), (coap.URI_PATH, bytes(_NAME))])[:-_NAME]
_END = len(_BEGIN) + _NAME
# The first byte of Block2 without its length: in the request and in the response.
_REQUESTED = coap.BLOCK2 - coap.URI_PATH << 4
_ANSWERED = coap.BLOCK2 - coap.MAX_AGE << 4
_MORE = 8
_MOST_BLOBS = 1_024


@attrs.define(eq=False)
class BlobBlocks:
    """Answers plain GETs of any block but the first, byte for byte as the responder would."""

    _blobs: dict[bytes, tuple[bytes, bytes]] = attrs.field(init=False, factory=dict)

    def find(self, files: OpenBlobs | None, key: bytes) -> bytes | None:
        """Return what follows the token of the response.

        Args:
            files: The blobs of the catalog.
            key: What follows the token of the request.

        Returns:
            None if the responder has to answer: the request is for something else, for a block
            past the end, or for a blob that is not stored.
        """
        size = len(key) - _END - 1  # of the value of Block2
        if not 0 < size < 4 or key[_END] != _REQUESTED | size or files is None:
            return None
        value = int.from_bytes(key[_END + 1 :], "big")
        szx = value & 7
        if value < 16 or value & _MORE or szx == 7 or not key[_END + 1]:
            return None
        try:
            sha256, head = self._blobs.get(key[:_END]) or self._learn(key)
            part, more = files.block(sha256, value >> 4 << szx + 4, 16 << szx)
        except NetotaError:
            return None
        if not part:
            return None
        if more:
            value |= _MORE
        word = (_ANSWERED | size) << 8 * size | value
        return head + (word << 8 | 0xFF).to_bytes(size + 2, "big") + part

    def _learn(self, key: bytes) -> tuple[bytes, bytes]:
        """Decode the path of a blob: its SHA-256, and the options common to all its blocks.

        Raises:
            NotFoundError: The request is for something else.
        """
        if not key.startswith(_BEGIN):
            raise NotFoundError("not the path of a blob")
        sha256 = digest_of(key[len(_BEGIN) : _END].decode("latin-1"))
        octets, max_age = map(coap.encode_uint, (ContentFormat.OCTETS, BLOB_MAX_AGE_S))
        etag = (coap.ETAG, sha256[:8])
        head = coap.encode([etag, (coap.CONTENT_FORMAT, octets), (coap.MAX_AGE, max_age)])
        if len(self._blobs) >= _MOST_BLOBS:
            self._blobs.clear()
        self._blobs[key[:_END]] = sha256, head
        return sha256, head
