"""Answers CoAP requests from the catalog, by a pure function of their options and payload.

Source: `spec/resources.md`.
"""

from __future__ import annotations

import attrs
from aiocoap.numbers.codes import Code

from netota_coap.catalog.catalog import Catalog
from netota_coap.catalog.resources import Representation, Resource, ResourcePath, StreamResource
from netota_coap.catalog.stream_query import StreamQuery
from netota_coap.coap import options as coap
from netota_coap.coap.options import Block, Option
from netota_coap.encoding.content_formats import ContentFormat
from netota_coap.errors import (
    InvalidDataError,
    NetotaError,
    NotFetchedError,
    NotFoundError,
    NotYetError,
)
from netota_coap.model.values import DEFAULT_MAX_AGE_S, LIMITS

SCHEME = "coap"
METHODS = (Code.GET, Code.FETCH)
DEFAULT_SZX = 4  # 256 bytes: as much as the receive buffer of a stock Zephyr client holds


class ResponseCodeError(NetotaError):
    """A refusal with a response code of its own."""

    def __init__(self, code: Code, detail: str) -> None:
        super().__init__(detail)
        self.code = code


CODES: dict[type[NetotaError], Code] = {
    NotFoundError: Code.NOT_FOUND,
    NotYetError: Code.SERVICE_UNAVAILABLE,
    NotFetchedError: Code.BAD_GATEWAY,
    InvalidDataError: Code.BAD_REQUEST,
    NetotaError: Code.INTERNAL_SERVER_ERROR,
}
"""Response codes by class of error; a class without an entry has that of its base."""


@attrs.frozen
class _Request:
    """The options of a request, decoded."""

    path: ResourcePath
    query: tuple[str, ...]
    etags: tuple[bytes, ...]
    observe: int | None
    accept: int | None
    content_format: int | None
    block: Block | None

    @classmethod
    def of(cls, options: tuple[Option, ...]) -> _Request:
        values: dict[int, list[bytes]] = {}
        for number, value in options:
            if number in (coap.PROXY_URI, coap.PROXY_SCHEME):
                raise ResponseCodeError(Code.PROXYING_NOT_SUPPORTED, "this server is no proxy")
            if coap.fits((number, value)):
                values.setdefault(number, []).append(value)
        reason = coap.refusal(options)
        if reason is not None:
            raise ResponseCodeError(Code.BAD_OPTION, reason)

        def uint(number: int) -> int | None:
            return coap.decode_uint(values[number][0]) if number in values else None

        if (uint(coap.BLOCK1) or 0) >> 3:
            detail = f"a selection must fit in one block of {LIMITS['selection'].value} bytes"
            raise ResponseCodeError(Code.REQUEST_ENTITY_TOO_LARGE, detail)
        try:
            block = Block.decode(values[coap.BLOCK2][0]) if coap.BLOCK2 in values else None
        except ValueError as error:
            raise ResponseCodeError(Code.BAD_REQUEST, str(error)) from error
        return cls(
            tuple(value.decode() for value in values.get(coap.URI_PATH, ())),
            tuple(value.decode() for value in values.get(coap.URI_QUERY, ())),
            tuple(values.get(coap.ETAG, ())),
            uint(coap.OBSERVE),
            uint(coap.ACCEPT),
            uint(coap.CONTENT_FORMAT),
            block,
        )

    def registers(self, resource: Resource) -> bool:
        return self.observe == 0 and resource.observable and not (self.block and self.block.number)


@attrs.frozen
class Responder:
    """Answers requests from a catalog.

    Attributes:
        max_age_s: Max-Age of responses, seconds, unless a resource has its own.
    """

    catalog: Catalog
    max_age_s: int = DEFAULT_MAX_AGE_S

    def answer(self, options: tuple[Option, ...], payload: bytes | None) -> tuple[Code, bytes]:
        """Answer a GET, without payload, or a FETCH.

        Returns:
            Response code, and the encoded options and payload, without Observe. The payload is at
            most one block, of 256 bytes unless the client asked for another size.

        Source: rules C-1 to C-13.
        """
        try:
            request = _Request.of(options)
            resource = self.catalog.find(request.path)
            representation = _represent(request, resource, payload)
            return self._respond(request, resource, representation)
        except NetotaError as error:
            return problem(error)

    def observed(self, options: tuple[Option, ...]) -> ResourcePath | None:
        """Return the path that a request would observe; None if it cannot be observed."""
        try:
            request = _Request.of(options)
            resource = self.catalog.find(request.path)
        except NetotaError:
            return None
        return resource.path if request.registers(resource) else None

    def _respond(
        self, request: _Request, resource: Resource, representation: Representation
    ) -> tuple[Code, bytes]:
        max_age_s = self.max_age_s if resource.max_age_s is None else resource.max_age_s
        if request.registers(resource):
            max_age_s = resource.poll_s
        head = [(coap.ETAG, representation.etag), (coap.MAX_AGE, coap.encode_uint(max_age_s))]
        if representation.etag in request.etags:
            return Code.VALID, coap.encode(head)
        head.append((coap.CONTENT_FORMAT, coap.encode_uint(representation.format)))
        size = representation.size
        asked = request.block or Block(0, more=False, szx=DEFAULT_SZX)
        if asked.number and asked.offset >= size:
            detail = f"block {asked.number} is past the end of {size} bytes"
            raise ResponseCodeError(Code.BAD_REQUEST, detail)
        part = representation.part(asked.offset, asked.size)
        more = asked.offset + len(part) < size
        if request.block or more:
            head.append((coap.BLOCK2, Block(asked.number, more, asked.szx).encode()))
        if more and asked.number == 0:
            head.append((coap.SIZE2, coap.encode_uint(size)))
        return Code.CONTENT, coap.encode(head, part)


def _represent(request: _Request, resource: Resource, payload: bytes | None) -> Representation:
    if payload is None:
        fmt = _accepted(request, resource.formats)
        return resource.represent(request.query, fmt, SCHEME)
    if not isinstance(resource, StreamResource):
        raise ResponseCodeError(Code.METHOD_NOT_ALLOWED, "only streams answer FETCH")
    if request.content_format != ContentFormat.CBOR:
        detail = "a selection must be CBOR, Content-Format 60"
        raise ResponseCodeError(Code.UNSUPPORTED_CONTENT_FORMAT, detail)
    bound = LIMITS["selection"].value
    if len(payload) > bound:
        detail = f"a selection has at most {bound} bytes, not {len(payload)}"
        raise ResponseCodeError(Code.REQUEST_ENTITY_TOO_LARGE, detail)
    fmt = _accepted(request, (ContentFormat.CBOR,))
    return resource.answer(StreamQuery.from_fetch(payload), fmt, SCHEME)


def _accepted(request: _Request, formats: tuple[ContentFormat, ...]) -> ContentFormat:
    accept = formats[0] if request.accept is None else request.accept
    if accept not in formats:
        known = ", ".join(f"{fmt} ({fmt.media_type})" for fmt in formats)
        raise ResponseCodeError(Code.NOT_ACCEPTABLE, f"available: {known}")
    return ContentFormat(accept)


def problem(error: NetotaError) -> tuple[Code, bytes]:
    """Return the response to an error: code, and concise problem details (RFC 9290)."""
    code = (
        error.code
        if isinstance(error, ResponseCodeError)
        else next(CODES[cls] for cls in type(error).__mro__ if cls in CODES)
    )
    after_s = error.after_s if isinstance(error, NotYetError) else None
    return code, coap.problem(code.name_printable, error.detail, after_s)
