"""What HTTP serves: the catalog, and the state of the service."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping, Sequence
from http import HTTPStatus
from pathlib import Path

import attrs
from starlette.responses import Response

from netota_coap.catalog.catalog import Catalog
from netota_coap.catalog.resources import Representation, Resource, ResourcePath, StreamResource
from netota_coap.catalog.stream_query import StreamQuery
from netota_coap.encoding.content_formats import ContentFormat
from netota_coap.errors import (
    InvalidDataError,
    NetotaError,
    NotFetchedError,
    NotFoundError,
    NotYetError,
)
from netota_coap.http.event_stream import Event, Events, EventStream
from netota_coap.model.values import DEFAULT_MAX_AGE_S
from netota_coap.monitoring import Metrics, Status

STATUSES: dict[type[NetotaError], HTTPStatus] = {
    NotFoundError: HTTPStatus.NOT_FOUND,
    NotYetError: HTTPStatus.SERVICE_UNAVAILABLE,
    NotFetchedError: HTTPStatus.BAD_GATEWAY,
    InvalidDataError: HTTPStatus.BAD_REQUEST,
    NetotaError: HTTPStatus.INTERNAL_SERVER_ERROR,
}
"""Status codes of errors, looked up along the class hierarchy."""


class HttpError(NetotaError):
    """A request that is refused with a status code of its own; keywords are headers."""

    def __init__(self, status: HTTPStatus, detail: str, **headers: str) -> None:
        super().__init__(detail)
        self.status = status
        self.headers = {name.replace("_", "-"): value for name, value in headers.items()}


def problem(error: NetotaError) -> Response:
    """Return the response that reports an error."""
    if isinstance(error, HttpError):
        return problem_of(error.status, error.detail, error.headers)
    status = next(STATUSES[cls] for cls in type(error).__mro__ if cls in STATUSES)
    headers = {"Retry-After": str(error.after_s)} if isinstance(error, NotYetError) else None
    return problem_of(status, error.detail, headers)


def problem_of(
    status: HTTPStatus, detail: str, headers: Mapping[str, str] | None = None, **more: object
) -> Response:
    """Return problem details (RFC 9457); `more` are members besides the standard ones."""
    return Response(_details(status, detail, **more), status, headers, "application/problem+json")


def _details(status: HTTPStatus, detail: str, **more: object) -> bytes:
    members = {"title": status.phrase, "status": int(status), "detail": detail, **more}
    return json.dumps(members, ensure_ascii=False, separators=(",", ":")).encode()


# It matches a quoted attribute, which is kept as it is, or the start of a link's target.
_TARGET = re.compile(rb'("(?:[^"\\]|\\.)*")|<')


@attrs.define(eq=False)
class Site:
    """What HTTP and the pages serve; `swap` replaces the catalog.

    Attributes:
        root: The repository's directory; None hides the history.
        prefix: Path under which a reverse proxy offers the service, as `/ota`, or "".
        observers_of: Returns the number of CoAP observers of a resource.
    """

    catalog: Catalog
    status: Callable[[], Status] = attrs.field(kw_only=True)
    metrics: Metrics = attrs.field(kw_only=True)
    root: Path | None = attrs.field(kw_only=True)
    prefix: str = attrs.field(kw_only=True, default="")
    max_age_s: int = attrs.field(kw_only=True, default=DEFAULT_MAX_AGE_S)
    observers_of: Callable[[ResourcePath], int] = attrs.field(kw_only=True, default=lambda _: 0)
    events: Events = attrs.field(kw_only=True, factory=Events)

    def swap(self, catalog: Catalog) -> None:
        """Serve another catalog, and send event streams what differs."""
        differing = catalog.differing(self.catalog)
        self.catalog = catalog
        self.events.notify(differing)

    def follow(
        self, path: ResourcePath, state: Callable[[], Event], seen: str = ""
    ) -> EventStream:
        """Return an event stream of a resource; arguments as in `EventStream`.

        Raises:
            HttpError: There are too many event streams.
        """
        if self.events.is_full:
            detail = f"the limit of {self.events.most} event streams is reached"
            raise HttpError(HTTPStatus.SERVICE_UNAVAILABLE, detail, Retry_After="60")
        return EventStream(self.events, path, state, seen)

    def represent(
        self, resource: Resource, parameters: Sequence[str], fmt: ContentFormat, scheme: str
    ) -> Representation:
        """Return a resource in one format; a stream is never cut down to fit a datagram.

        Raises:
            NotFoundError: The stream no longer has the sequence that the query names.
            InvalidDataError: The query is invalid.

        Source: rules H-11 to H-13.
        """
        if isinstance(resource, StreamResource):
            view = StreamQuery.from_query(parameters)
            return resource.answer(
                attrs.evolve(view, full=not view.head, prefix=self.prefix), fmt, scheme
            )
        representation = resource.represent(parameters, fmt, scheme)
        if fmt is ContentFormat.LINK and self.prefix:
            target = b"<" + self.prefix.encode()
            links = _TARGET.sub(lambda match: match[1] or target, representation.payload)
            return attrs.evolve(representation, payload=links)
        return representation

    def state(self, path: ResourcePath, parameters: Sequence[str], scheme: str) -> Event:
        """Return the present state of an observable resource, or `gone` (H-31, H-33)."""
        try:
            resource = self.catalog.find(path)
            representation = self.represent(resource, parameters, ContentFormat.JSON, scheme)
        except NetotaError as error:
            return Event("gone", "gone", _details(HTTPStatus.NOT_FOUND, error.detail), last=True)
        etag = representation.etag.hex()
        if isinstance(resource, StreamResource):
            etag = f"{resource.stream.sequence}-{etag}"
        return Event(etag, resource.rt.removeprefix("netota."), representation.payload)
