"""The root resource: answers the requests of sockets, aiocoap and observers from the catalog."""

from __future__ import annotations

import ipaddress
import time
from collections.abc import Callable, Sequence

import attrs
from aiocoap.message import Message
from aiocoap.numbers.codes import Code
from aiocoap.pipe import Pipe
from aiocoap.util import hostportsplit

from netota_coap.catalog.catalog import Catalog
from netota_coap.catalog.render_cache import RenderCache
from netota_coap.catalog.resources import Representation, Resource, etag_of
from netota_coap.coap import options as coap
from netota_coap.coap.observe.entries import Request
from netota_coap.coap.observe.journal import Journal
from netota_coap.coap.observe.table import Observers
from netota_coap.coap.responder import METHODS, SCHEME, Responder, ResponseCodeError, problem
from netota_coap.coap.vetting import METHOD_REFUSED
from netota_coap.encoding.codecs import dump
from netota_coap.encoding.content_formats import CODECS, ContentFormat
from netota_coap.model.values import STATUS_READERS
from netota_coap.monitoring import Metrics, Status, resource_class

STATUS_PATH = ("status",)
_STATUS_S = 1.0  # for which a status stays the same, so that all its blocks can be fetched


@attrs.define(eq=False)
class StatusResource(Resource):
    """The status of the service, for its operator; no list names it."""

    status: Callable[[], Status] = attrs.field(kw_only=True)
    _shown: Status | None = attrs.field(init=False, default=None)

    def represent(
        self, parameters: Sequence[str], fmt: ContentFormat, scheme: str
    ) -> Representation:
        """Return the status, at most a second old."""
        status = self.status()
        if self._shown is None or not 0 <= status.uptime_s - self._shown.uptime_s < _STATUS_S:
            self._shown = status
        payload = dump(self._shown.to_plain(), CODECS[fmt])
        return Representation(fmt, payload, etag_of(payload))


@attrs.define
class CoapSite:
    """The root resource.

    Attributes:
        responder: `swap` replaces it.
        status: Returns the present status; None: there is no such resource.
        status_readers: Networks that may read the status.
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
        if self.status is None:
            return None
        formats = (ContentFormat.JSON, ContentFormat.CBOR)
        resource = StatusResource(STATUS_PATH, "netota.status", formats, status=self.status)
        return Responder(Catalog({STATUS_PATH: resource}, RenderCache()), max_age_s=0)

    def swap(self, catalog: Catalog) -> None:
        """Serve another catalog from now on, and notify the observers of what differs."""
        differing = catalog.differing(self.responder.catalog)
        self.responder = attrs.evolve(self.responder, catalog=catalog)
        catalog.trim_cache()
        self.observers.notify(differing)

    def answer(self, request: Request) -> tuple[bool, int, bytes]:
        """Answer for the table of observers; see `table.AnswerRequest`."""
        options, payload = coap.decode(request[1:])
        selection = payload if request[0] == Code.FETCH else None
        code, tail = self.responder.answer(options, selection)
        return self.responder.observed(options) is not None, code, tail

    async def render_to_pipe(self, pipe: Pipe) -> None:
        """Answer one request (aiocoap's interface)."""
        pipe.add_response(message_of(*self._respond(pipe.request)), is_last=True)

    def _respond(self, request: Message) -> tuple[Code, bytes]:
        assert request.remote
        start_ns = time.perf_counter_ns()
        path = request.opt.uri_path
        # `udp` registers observers itself: a request that gets here registers none.
        options = tuple(
            (int(option.number), option.encode())
            for option in request.opt.option_list()
            if option.number != coap.OBSERVE
        )
        payload = request.payload if request.code is Code.FETCH else None
        if request.code not in METHODS:
            code, tail = METHOD_REFUSED
        elif path == STATUS_PATH and self._operator:
            if self._is_reader(request.remote.hostinfo):
                code, tail = self._operator.answer(options, payload)
            else:
                readers = ", ".join(self.status_readers)
                forbidden = ResponseCodeError(Code.FORBIDDEN, f"only {readers} may read it")
                code, tail = problem(forbidden)
        else:
            code, tail = self.responder.answer(options, payload)
        self.metrics.answered(SCHEME, resource_class(path), code.dotted, len(tail))
        self.metrics.exchanged(
            SCHEME,
            Code(int(request.code or 0)).name,
            path,
            request.opt.uri_query,
            code.dotted,
            len(tail),
            request.remote.hostinfo,
            start_ns,
        )
        return code, tail

    def _is_reader(self, hostinfo: str) -> bool:
        host: str = hostportsplit(hostinfo)[0]
        address = ipaddress.ip_address(host.partition("%")[0])
        return any(address in ipaddress.ip_network(network) for network in self.status_readers)


def message_of(code: Code, tail: bytes) -> Message:
    """Build an aiocoap message; a new one for each response, since aiocoap changes it."""
    message = Message(code=code)
    message.payload = message.opt.decode(tail)
    return message
