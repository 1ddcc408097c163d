"""What a request asks of a stream. Source: `spec/wire.md`, narrowing."""

from __future__ import annotations

from collections.abc import Sequence

import attrs

from netota_coap.encoding.documents import selection_from_cbor, selection_from_query
from netota_coap.errors import InvalidDataError, Issue
from netota_coap.model.selection import Selection


@attrs.frozen
class StreamQuery:
    """What a request asks of a stream.

    Attributes:
        head: Leave out the archives.
        full: Leave out nothing, even if the response takes several datagrams.
        sequence: The state that a full transfer continues, or None.
        prefix: Path of the server's root behind a reverse proxy; put before its own offers.
    """

    selection: Selection = Selection()
    head: bool = False
    full: bool = False
    sequence: int | None = None
    prefix: str = ""

    @classmethod
    def from_query(cls, parameters: Sequence[str]) -> StreamQuery:
        """Read the parameters of a query; unknown ones without `=` are ignored.

        Raises:
            InvalidDataError: `sequence` is no number.
        """
        head = "head" in parameters
        full = "full" in parameters and not head
        sequence = None
        for parameter in parameters:
            if full and parameter.startswith("sequence="):
                text = parameter[len("sequence=") :]
                if not (text.isascii() and text.isdecimal() and len(text) <= 10):
                    raise InvalidDataError([Issue("sequence", f"{text!r} is not a number")])
                sequence = int(text)
        return cls(selection_from_query(parameters), head, full, sequence)

    @classmethod
    def from_fetch(cls, payload: bytes) -> StreamQuery:
        """Read the payload of a FETCH.

        Raises:
            InvalidDataError: The payload is no selection.
        """
        return cls(selection_from_cbor(payload))
