"""The root resource: where the front door, aiocoap and the observers meet the catalog."""

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
from netota_coap.coap.responder import METHODS, SCHEME, RefusedError, Responder, problem
from netota_coap.coap.vetting import METHOD_REFUSED
from netota_coap.encoding.codecs import dump
from netota_coap.encoding.content_formats import CODECS, ContentFormat
from netota_coap.monitoring import Exchange, Metrics, Status, resource_class

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
    return Responder(Catalog({STATUS_PATH: resource}, RenderCache()), max_age_s=0)


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
        catalog.trim_cache()
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
        if request.code not in METHODS:
            code, tail = METHOD_REFUSED
        elif path == STATUS_PATH and self._operator:
            if self._is_reader(request.remote.hostinfo):
                code, tail = self._operator.answer(options, payload)
            else:
                readers = ", ".join(self.status_readers)
                code, tail = problem(RefusedError(Code.FORBIDDEN, f"only {readers} may read it"))
        else:
            code, tail = self.responder.answer(options, payload)
        self.metrics.answered(SCHEME, resource_class(path), code.dotted, len(tail))
        if self.metrics.listener:
            self.metrics.listener(
                Exchange(
                    SCHEME,
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
