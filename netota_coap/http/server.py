"""The HTTP server: an ASGI application, and uvicorn that runs it.

Source: `spec/http.md`.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import resource
import socket
import time
from collections.abc import AsyncIterator, Callable, Mapping
from email.utils import formatdate
from functools import partial
from http import HTTPStatus
from urllib.parse import unquote

import attrs
from h11 import LocalProtocolError
from starlette.datastructures import MutableHeaders
from starlette.requests import Request
from starlette.responses import PlainTextResponse, RedirectResponse, Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send
from uvicorn import Config, Server
from uvicorn.protocols.http.h11_impl import H11Protocol

from netota_coap.catalog.resources import (
    BlobRepresentation,
    Representation,
    Resource,
    ResourcePath,
)
from netota_coap.coap.sockets import open_sockets, uri_of
from netota_coap.encoding.content_formats import ContentFormat
from netota_coap.errors import NetotaError
from netota_coap.http import event_stream
from netota_coap.http.negotiation import chosen, is_current, joined, parameters_of, path_of
from netota_coap.http.page import Page
from netota_coap.http.prometheus import MetricsCollector
from netota_coap.http.ranges import respond
from netota_coap.http.site import HttpError, Site, problem, problem_of
from netota_coap.monitoring import Metrics, resource_class

_log = logging.getLogger("netota_coap.http")

_METHODS = ("GET", "HEAD")
# In order of preference.
_FORMATS = (ContentFormat.JSON, ContentFormat.CBOR, ContentFormat.LINK, ContentFormat.OCTETS)
_LONGEST_HEAD = 8_192  # bytes of a request without its body
_DEFAULTS = {
    "Vary": "Accept",
    "Cache-Control": "no-store",
    "X-Content-Type-Options": "nosniff",
    "Content-Security-Policy": "default-src 'none'; frame-ancestors 'none'",
}
"""Headers of each response that does not set them itself."""


@attrs.define(eq=False)
class HttpSite(Site):
    """Everything that is served over HTTP, as one ASGI application."""

    page: Page = attrs.field(init=False, default=attrs.Factory(Page, takes_self=True))

    async def application(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer one request (the ASGI application)."""
        request, start_ns = Request(scope), time.perf_counter_ns()
        try:
            answer = await self._answer(request)
        except NetotaError as error:
            answer = problem(error)
        except Exception:  # noqa: BLE001 - a traceback must not reach the client
            _log.exception("a bug: %s %s", request.method, scope["path"])
            answer = problem_of(HTTPStatus.INTERNAL_SERVER_ERROR, "a bug; it was logged")
        try:
            await answer(scope, receive, partial(self._send, request, start_ns, send))
        except NetotaError as error:
            _log.debug("a response ended early: %s", error)
            raise
        except Exception:
            _log.exception("a bug: %s %s", request.method, scope["path"])
            raise

    async def _answer(self, request: Request) -> ASGIApp:
        if request.method not in _METHODS:
            allowed = "only GET and HEAD are supported: nothing can be changed over the network"
            raise HttpError(HTTPStatus.METHOD_NOT_ALLOWED, allowed, Allow=", ".join(_METHODS))
        # uvicorn does not check the length of a request that arrives all at once.
        if _length(request.scope) > _LONGEST_HEAD:
            detail = f"a request must have at most {_LONGEST_HEAD} bytes without its body"
            raise HttpError(HTTPStatus.REQUEST_HEADER_FIELDS_TOO_LARGE, detail)
        path = path_of(request.scope["raw_path"])
        page = await self.page.answer(request, path)
        if page:
            return page
        if path in _OWN:
            return _OWN[path](self, request)
        return self._of_catalog(request, path)

    def _of_catalog(self, request: Request, path: ResourcePath) -> ASGIApp:
        found = self.catalog.find(path)
        formats = {fmt.media_type: fmt for fmt in _FORMATS if fmt in found.formats}
        offered = [*formats, *[event_stream.MEDIA_TYPE] * found.observable]
        media_type = chosen(joined(request, "accept"), offered)
        if media_type is None:
            detail = f"the resource offers only {', '.join(offered)}"
            raise HttpError(HTTPStatus.NOT_ACCEPTABLE, detail)
        parameters = parameters_of(request.scope["query_string"])
        fmt = formats.get(media_type, ContentFormat.JSON)
        representation = self.represent(found, parameters, fmt, request.scope["scheme"])
        if media_type != event_stream.MEDIA_TYPE:
            return self._respond(request, found, representation)
        state = partial(self.state, path, parameters, request.scope["scheme"])
        return self.follow(path, state, joined(request, "last-event-id"))

    def _respond(
        self, request: Request, found: Resource, representation: Representation
    ) -> Response:
        etag = representation.etag.hex()
        cache_control = f"public, max-age={self.max_age_s}"
        if found.max_age_s is not None:
            cache_control = f"public, max-age={found.max_age_s}, immutable"
        headers = {"ETag": f'"{etag}"', "Cache-Control": cache_control}
        if is_current(joined(request, "if-none-match"), etag):
            return Response(None, HTTPStatus.NOT_MODIFIED, headers)
        if isinstance(representation, BlobRepresentation):
            requested, if_range = (joined(request, name) for name in ("range", "if-range"))
            return respond(representation, headers, requested=requested, if_range=if_range)
        media_type = representation.format.media_type
        return Response(representation.payload, HTTPStatus.OK, headers, media_type)

    async def _send(self, request: Request, start_ns: int, send: Send, message: Message) -> None:
        """Send a part of a response with the common headers, and count it."""
        if message["type"] == "http.response.start":
            headers = MutableHeaders(scope=message)
            headers["Date"] = formatdate(usegmt=True)
            for name, value in _DEFAULTS.items():
                headers.setdefault(name, value)
            if {"content-length", "transfer-encoding"} & set(request.headers):
                headers["Connection"] = "close"  # the body of the request is not read
            kind = _class(request, headers.get("content-type", ""))
            self.metrics.answered("http", kind, str(int(message["status"])), 0)
            if self.metrics.listener:
                _report(self.metrics, request, message["status"], headers, start_ns)
        elif request.method != "HEAD":
            self.metrics.sent_bytes["http"] += len(message.get("body", b""))
        # uvicorn itself has already answered a request whose rest is malformed.
        with contextlib.suppress(LocalProtocolError):
            await send(message)


def _report(
    metrics: Metrics, request: Request, status: int, headers: MutableHeaders, start_ns: int
) -> None:
    path = unquote(request.scope["raw_path"].decode("latin-1")).strip("/").split("/")
    parameters = unquote(request.scope["query_string"].decode("latin-1")).split("&")
    metrics.exchanged(
        "http",
        request.method,
        path,
        [*filter(None, parameters)],
        str(int(status)),
        int(headers.get("content-length", 0)),
        ":".join(map(str, request.client or ())),
        start_ns,
    )


def _length(scope: Scope) -> int:
    fields = sum(len(name) + len(value) + 4 for name, value in scope["headers"])
    return fields + len(scope["method"]) + len(scope["raw_path"]) + len(scope["query_string"])


def _class(request: Request, content_type: str) -> str:
    """Return the resource class by which metrics count a request."""
    try:
        path = path_of(request.scope["raw_path"])
    except NetotaError:
        return "other"
    is_page = not path or path[0] == "static" or content_type.startswith("text/html")
    return "page" if is_page else resource_class(path)


def _readyz(site: HttpSite, _request: Request) -> Response:
    status = site.status()
    if status.is_ready:
        return PlainTextResponse("ready\n")
    detail = "the files on disk are refused; an older state is served"
    return problem_of(HTTPStatus.SERVICE_UNAVAILABLE, detail, issues=status.issues)


def _metrics(site: HttpSite, request: Request) -> Response:
    collector = MetricsCollector(site.metrics, site.status)
    content_type, payload = collector.encode(joined(request, "accept"))
    return Response(payload, headers={"Content-Type": content_type})


# Resources besides the catalog. `/` redirects to a relative target, which suits any prefix.
_OWN: Mapping[ResourcePath, Callable[[HttpSite, Request], Response]] = {
    (): lambda _site, _request: RedirectResponse("p", HTTPStatus.FOUND),
    ("healthz",): lambda _site, _request: PlainTextResponse("alive\n"),
    ("readyz",): _readyz,
    ("metrics",): _metrics,
}


_MOST_CONNECTIONS = 8_192
_SPARE_FILES = 128  # open files, for the rest of the process
_TRUSTED = ["127.0.0.0/8", "::1", "::ffff:127.0.0.0/104"]  # reverse proxies on this machine


def _most_connections() -> int:
    files, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    return min(_MOST_CONNECTIONS, max(files - _SPARE_FILES, 1))


@attrs.frozen
class Bounds:
    """Limits of connections and times."""

    connections: int = attrs.field(factory=_most_connections)  # open at a time
    request_s: float = 30.0  # until the next request of a connection is complete
    stalled_s: float = 60.0  # until a client acknowledges some of what was sent to it
    grace_s: float = 1.0  # for unfinished responses when the server stops


class _Protocol(H11Protocol):
    """uvicorn's protocol, with limits of connections and of the time for each request."""

    _deadline: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        assert self.limit_concurrency is not None
        if len(self.connections) >= self.limit_concurrency:
            transport.abort()
        self._await_request()

    def connection_lost(self, exc: Exception | None) -> None:
        super().connection_lost(exc)
        if self._deadline:
            self._deadline.cancel()

    def data_received(self, data: bytes) -> None:
        try:
            super().data_received(data)
        except LocalProtocolError:  # malformed bytes during a response
            self.transport.abort()
        self._await_request()

    def on_response_complete(self) -> None:
        super().on_response_complete()
        self._await_request()

    def _await_request(self) -> None:
        # uvicorn types it as never None, but before the first request it is.
        waits = self.cycle is None or self.cycle.response_complete  # type: ignore[redundant-expr]
        if waits and self._deadline is None:
            self._deadline = self.loop.call_later(self.timeout_keep_alive, self.transport.abort)
        elif not waits and self._deadline:
            self._deadline.cancel()
            self._deadline = None


@contextlib.asynccontextmanager
async def serving(
    site: HttpSite, bind: str, bounds: Bounds | None = None
) -> AsyncIterator[tuple[str, ...]]:
    """Serve a site until the block ends; then end event streams, and give others `grace_s`.

    Yields:
        The URIs that it listens on, at least one.

    Raises:
        AddressError: The address is in use or does not belong to this machine.
        ConfigError: `bind` is not HOST:PORT.

    Source: rules H-50 to H-52.
    """
    bounds = bounds or Bounds()
    sockets = open_sockets(bind, socket.SOCK_STREAM)
    for each in sockets:
        # Accepted sockets inherit both options. Without this one, a payload waits until the
        # client acknowledges the headers, which it delays by 40 ms.
        each.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        # The kernel also sees what has left this process but was not acknowledged.
        stalled_ms = int(bounds.stalled_s * 1e3)
        each.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, stalled_ms)
    config = Config(
        site.application,
        interface="asgi3",
        http=_Protocol,
        ws="none",
        lifespan="off",
        log_config=None,
        log_level=logging.CRITICAL,  # uvicorn logs hostile requests; `application` logs bugs
        access_log=False,
        date_header=False,  # uvicorn's takes ten wake-ups a second; `_send` sets it
        forwarded_allow_ips=_TRUSTED,
        h11_max_incomplete_event_size=_LONGEST_HEAD,
        limit_concurrency=bounds.connections + 1,  # else uvicorn answers 503 at the limit
        timeout_keep_alive=bounds.request_s,  # type: ignore[arg-type]  # for `call_later`
    )
    config.load()
    server = Server(config)
    server.lifespan = config.lifespan_class(config)
    # `Server.serve` would take over the signals, and poll ten times a second.
    await server.startup(sockets)
    try:
        yield tuple(uri_of(each, "http") for each in sockets)
    finally:
        site.events.end()
        aborting = asyncio.get_running_loop().call_later(bounds.grace_s, _abort, server)
        await server.shutdown(sockets)
        aborting.cancel()


def _abort(server: Server) -> None:
    for connection in tuple(server.server_state.connections):
        connection.transport.abort()
