"""CoAP resources over the catalog.

`Responder.answer` decides what is answered: a pure function of a request's options and payload
that returns the ready bytes after header and token. `Site` is the way to it through aiocoap.
Source: `spec/resources.md`.
"""

from __future__ import annotations

import ipaddress
import time
from collections.abc import Callable, Sequence

import attrs
from aiocoap.message import Message
from aiocoap.numbers.codes import Code
from aiocoap.pipe import Pipe
from aiocoap.util import hostportsplit

from netota_coap.catalog.catalog import (
    Catalog,
    Path,
    Representation,
    Resource,
    StreamResource,
    etag_of,
)
from netota_coap.catalog.local_blobs import OpenBlobs
from netota_coap.catalog.render_cache import Shelf
from netota_coap.catalog.stream_query import View
from netota_coap.coap import options as coap
from netota_coap.coap.observe.entries import Request
from netota_coap.coap.observe.journal import Journal
from netota_coap.coap.observe.table import Observers
from netota_coap.coap.options import Block, Option
from netota_coap.coap.vetting import METHOD_REFUSED
from netota_coap.encoding.codecs import dump
from netota_coap.encoding.content_formats import CODECS, ContentFormat
from netota_coap.errors import (
    InvalidDataError,
    NetotaError,
    NotFetchedError,
    NotFoundError,
    NotYetError,
)
from netota_coap.metrics import Heard, Metrics, resource_class
from netota_coap.model.values import LIMITS
from netota_coap.status import Status

DEFAULT_MAX_AGE_S = 60
_SCHEME = "coap"
_METHODS = (Code.GET, Code.FETCH)
DEFAULT_SZX = 4  # 256 bytes: what a stock Zephyr client has room for


class _RefusedError(NetotaError):
    """A request that CoAP itself refuses."""

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
"""Response codes of errors, looked up along the class hierarchy."""


@attrs.frozen
class _Request:
    """The options of a request, read."""

    path: Path
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
                raise _RefusedError(Code.PROXYING_NOT_SUPPORTED, "this server is no proxy")
            if coap.fits((number, value)):
                values.setdefault(number, []).append(value)
        reason = coap.refusal(options)
        if reason is not None:
            raise _RefusedError(Code.BAD_OPTION, reason)

        def uint(number: int) -> int | None:
            return coap.decode_uint(values[number][0]) if number in values else None

        if (uint(coap.BLOCK1) or 0) >> 3:
            detail = f"a selection has at most {LIMITS['selection'].value} bytes, and one block"
            raise _RefusedError(Code.REQUEST_ENTITY_TOO_LARGE, detail)
        try:
            block = Block.decode(values[coap.BLOCK2][0]) if coap.BLOCK2 in values else None
        except ValueError as error:
            raise _RefusedError(Code.BAD_REQUEST, str(error)) from error
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
        catalog: What there is.
        max_age_s: How long caches may keep a plain answer, seconds.
    """

    catalog: Catalog
    max_age_s: int = DEFAULT_MAX_AGE_S

    def answer(self, options: tuple[Option, ...], payload: bytes | None) -> tuple[Code, bytes]:
        """Answer a request.

        Args:
            options: Of the request, in the order of their numbers.
            payload: Of a FETCH; None: it is a GET.

        Returns:
            Response code, and the bytes of options and payload without Observe. The payload is at
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

    @property
    def files(self) -> OpenBlobs | None:
        """The bytes of files that are served."""
        return self.catalog.files

    def observed(self, options: tuple[Option, ...]) -> Path | None:
        """Return the path that a request wants to observe and can, or None."""
        try:
            request = _Request.of(options)
            resource = self.catalog.find(request.path)
        except NetotaError:
            return None
        return resource.path if request.registers(resource) else None

    def _respond(
        self, request: _Request, resource: Resource, representation: Representation
    ) -> tuple[Code, bytes]:
        observed = request.registers(resource)
        max_age_s = self.max_age_s if resource.max_age_s is None else resource.max_age_s
        if observed:
            max_age_s = resource.poll_s
        head = [
            (coap.ETAG, representation.etag),
            (coap.MAX_AGE, coap.encode_uint(max_age_s)),
        ]
        if representation.etag in request.etags:
            return Code.VALID, coap.encode(head)
        head.append((coap.CONTENT_FORMAT, coap.encode_uint(representation.format)))
        size = representation.size
        asked = request.block or Block(0, more=False, szx=DEFAULT_SZX)
        if asked.number and asked.offset >= size:
            raise _RefusedError(
                Code.BAD_REQUEST, f"block {asked.number} is past the end of {size} bytes"
            )
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
        return resource.represent(request.query, fmt, _SCHEME)
    if not isinstance(resource, StreamResource):
        raise _RefusedError(Code.METHOD_NOT_ALLOWED, "only streams answer FETCH")
    if request.content_format != ContentFormat.CBOR:
        detail = "a selection is CBOR, Content-Format 60"
        raise _RefusedError(Code.UNSUPPORTED_CONTENT_FORMAT, detail)
    bound = LIMITS["selection"].value
    if len(payload) > bound:
        detail = f"a selection has at most {bound} bytes, not {len(payload)}"
        raise _RefusedError(Code.REQUEST_ENTITY_TOO_LARGE, detail)
    fmt = _accepted(request, (ContentFormat.CBOR,))
    return resource.view(View.from_fetch(payload), fmt, _SCHEME)


def _accepted(request: _Request, formats: tuple[ContentFormat, ...]) -> ContentFormat:
    accept = formats[0] if request.accept is None else request.accept
    if accept not in formats:
        known = ", ".join(f"{fmt} ({fmt.media_type})" for fmt in formats)
        raise _RefusedError(Code.NOT_ACCEPTABLE, f"there is {known}")
    return ContentFormat(accept)


def problem(error: NetotaError) -> tuple[Code, bytes]:
    """Turn an error into a response: concise problem details (RFC 9290)."""
    code = (
        error.code
        if isinstance(error, _RefusedError)
        else next(CODES[cls] for cls in type(error).__mro__ if cls in CODES)
    )
    after_s = error.after_s if isinstance(error, NotYetError) else None
    return code, coap.problem(code.name_printable, error.detail, after_s)


# ----------------------------------------------------------------------------------------------
# What a service does now

STATUS_PATH = ("status",)
STATUS_READERS = ("127.0.0.0/8", "::1/128")
_STATUS_S = 1.0  # for which blocks of one status can be fetched


@attrs.define(eq=False)
class StatusResource(Resource):
    """What a service does now, for its operator; not listed anywhere.

    Attributes:
        status: Tells it.
    """

    status: Callable[[], Status] = attrs.field(kw_only=True)
    _told: Status | None = attrs.field(init=False, default=None)

    def represent(
        self, parameters: Sequence[str], fmt: ContentFormat, scheme: str
    ) -> Representation:
        """Return the status of now, or of a moment ago."""
        status = self.status()
        if self._told is None or not 0 <= status.uptime_s - self._told.uptime_s < _STATUS_S:
            self._told = status
        payload = dump(self._told.to_plain(), CODECS[fmt])
        return Representation(fmt, payload, etag_of(payload))


def _operator(status: Callable[[], Status]) -> Responder:
    formats = (ContentFormat.JSON, ContentFormat.CBOR)
    resource = StatusResource(STATUS_PATH, "netota.status", formats, status=status)
    return Responder(Catalog({STATUS_PATH: resource}, Shelf()), max_age_s=0)


# ----------------------------------------------------------------------------------------------
# The root resource


@attrs.define
class Site:
    """The root resource: what the door and aiocoap ask.

    Attributes:
        responder: Replaced by `swap`.
        journal: What the observers need to be remembered goes there.
        metrics: What is counted goes there.
        status: What the service does now; None: nobody is told.
        status_readers: Networks that are told.
        observers: Told by `swap`.
    """

    responder: Responder
    journal: Journal = attrs.field(factory=Journal)
    metrics: Metrics = attrs.field(factory=Metrics)
    status: Callable[[], Status] | None = None
    status_readers: Sequence[str] = STATUS_READERS
    observers: Observers = attrs.field(init=False)
    _operator: Responder | None = attrs.field(init=False)

    @observers.default
    def _table(self) -> Observers:
        return Observers(self.answer, self.journal, metrics=self.metrics)

    @_operator.default
    def _of_status(self) -> Responder | None:
        return _operator(self.status) if self.status else None

    def swap(self, catalog: Catalog) -> None:
        """Serve another catalog from now on, and tell those who observe what differs."""
        differing = catalog.differing(self.responder.catalog)
        self.responder = attrs.evolve(self.responder, catalog=catalog)
        catalog.tidy()
        self.observers.notify(differing)

    def answer(self, request: Request) -> tuple[bool, int, bytes]:
        """Answer a request of an observer: whether it can be observed, code, and what follows."""
        options, payload = coap.decode(request[1:])
        selection = payload if request[0] == Code.FETCH else None
        code, tail = self.responder.answer(options, selection)
        return self.responder.observed(options) is not None, code, tail

    async def render_to_pipe(self, pipe: Pipe) -> None:
        """Answer one request (aiocoap's interface)."""
        pipe.add_response(message_of(*self._respond(pipe.request)), is_last=True)

    def _respond(self, request: Message) -> tuple[Code, bytes]:
        """Answer a request, and count it."""
        assert request.remote
        start_ns = time.perf_counter_ns()
        path = request.opt.uri_path
        # The front door keeps the observers: a request that gets here registers nothing.
        options = tuple(
            (int(option.number), option.encode())
            for option in request.opt.option_list()
            if option.number != coap.OBSERVE
        )
        payload = request.payload if request.code is Code.FETCH else None
        if request.code not in _METHODS:
            code, tail = METHOD_REFUSED
        elif path == STATUS_PATH and self._operator:
            if self._is_reader(request.remote.hostinfo):
                code, tail = self._operator.answer(options, payload)
            else:
                readers = ", ".join(self.status_readers)
                code, tail = problem(_RefusedError(Code.FORBIDDEN, f"only {readers} may read it"))
        else:
            code, tail = self.responder.answer(options, payload)
        self.metrics.answered(_SCHEME, resource_class(path), code.dotted, len(tail))
        if self.metrics.listener:
            self.metrics.listener(
                Heard(
                    _SCHEME,
                    Code(int(request.code or 0)).name,
                    path,
                    request.opt.uri_query,
                    code.dotted,
                    len(tail),
                    request.remote.hostinfo,
                    (time.perf_counter_ns() - start_ns) / 1_000,
                )
            )
        return code, tail

    def _is_reader(self, hostinfo: str) -> bool:
        host: str = hostportsplit(hostinfo)[0]
        address = ipaddress.ip_address(host.partition("%")[0])
        return any(address in ipaddress.ip_network(network) for network in self.status_readers)


def message_of(code: Code, tail: bytes) -> Message:
    """Turn an answer into aiocoap's form; a new object each time, since aiocoap changes it."""
    message = Message(code=code)
    message.payload = message.opt.decode(tail)
    return message
