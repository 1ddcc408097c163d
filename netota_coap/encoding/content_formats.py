"""Content formats, and which of them carry values."""

from __future__ import annotations

import enum

from netota_coap.encoding.codecs import Format


class ContentFormat(enum.IntEnum):
    """Content formats by their CoAP number (RFC 7252, section 12.3)."""

    LINK = 40
    OCTETS = 42
    JSON = 50
    CBOR = 60

    @property
    def media_type(self) -> str:
        """The media type for HTTP."""
        return _MEDIA_TYPES[self]


_MEDIA_TYPES = {
    ContentFormat.LINK: "application/link-format",
    ContentFormat.OCTETS: "application/octet-stream",
    ContentFormat.JSON: "application/json",
    ContentFormat.CBOR: "application/cbor",
}
CODECS = {ContentFormat.JSON: Format.JSON, ContentFormat.CBOR: Format.CBOR}
