"""What is served over HTTP: a catalog, and what the service tells of itself."""

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
from netota_coap.monitoring import Metrics, Status

DEFAULT_MAX_AGE_S = 60

STATUSES: dict[type[NetotaError], HTTPStatus] = {
    NotFoundError: HTTPStatus.NOT_FOUND,
    NotYetError: HTTPStatus.SERVICE_UNAVAILABLE,
    NotFetchedError: HTTPStatus.BAD_GATEWAY,
    InvalidDataError: HTTPStatus.BAD_REQUEST,
    NetotaError: HTTPStatus.INTERNAL_SERVER_ERROR,
}
"""Status codes of errors, looked up along the class hierarchy."""


class RefusedError(NetotaError):
    """A request that HTTP itself refuses."""

    def __init__(self, status: HTTPStatus, detail: str, **headers: str) -> None:
        super().__init__(detail)
        self.status = status
        self.headers = {name.replace("_", "-"): value for name, value in headers.items()}


def problem(error: NetotaError) -> Response:
    """Turn an error into an answer: problem details (RFC 9457)."""
    if isinstance(error, RefusedError):
        return problem_of(error.status, error.detail, error.headers)
    status = next(STATUSES[cls] for cls in type(error).__mro__ if cls in STATUSES)
    headers = {"Retry-After": str(error.after_s)} if isinstance(error, NotYetError) else None
    return problem_of(status, error.detail, headers)


def problem_of(
    status: HTTPStatus, detail: str, headers: Mapping[str, str] | None = None, **more: object
) -> Response:
    """Return problem details (RFC 9457).

    Args:
        status: Of the answer.
        detail: One sentence for a person.
        headers: Of the answer.
        more: Members besides those of the RFC.
    """
    return Response(_details(status, detail, **more), status, headers, "application/problem+json")


def _details(status: HTTPStatus, detail: str, **more: object) -> bytes:
    members = {"title": status.phrase, "status": int(status), "detail": detail, **more}
    return json.dumps(members, ensure_ascii=False, separators=(",", ":")).encode()


# A quoted text of a link, which stays; or where a target begins.
_TARGET = re.compile(rb'("(?:[^"\\]|\\.)*")|<')


@attrs.define(eq=False)
class Site:
    """What all that answers over HTTP is made from.

    Attributes:
        catalog: Replaced by `swap`.
        status: What the service does now.
        metrics: What is counted goes there.
        root: Of the repository; None: there is no history to be shown.
        prefix: Of all paths where clients see them, as a reverse proxy has it; "" or `/ota`.
        max_age_s: How long caches may keep an answer, seconds.
        observers_of: Tells how many observe a resource over CoAP.
        events: Who follows what.
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
        """Serve another catalog from now on, and tell those who follow what differs."""
        differing = catalog.differing(self.catalog)
        self.catalog = catalog
        self.events.notify(differing)

    def follow(
        self, path: ResourcePath, state: Callable[[], Event], seen: str = ""
    ) -> EventStream:
        """Return the answer to one who follows a resource; arguments as in `EventStream`.

        Raises:
            RefusedError: There are too many.
        """
        if self.events.is_full:
            detail = f"there are {self.events.most} event streams, and no more are taken"
            raise RefusedError(HTTPStatus.SERVICE_UNAVAILABLE, detail, Retry_After="60")
        return EventStream(self.events, path, state, seen)

    def represent(
        self, resource: Resource, parameters: Sequence[str], fmt: ContentFormat, scheme: str
    ) -> Representation:
        """Return a resource in one format, always full.

        Args:
            resource: Of the catalog.
            parameters: Of the query.
            fmt: One of the resource's.
            scheme: Of the request, for relative offers.

        Raises:
            NotFoundError: The state that the query continues is gone.
            InvalidDataError: The query cannot be read.

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
        """Return the state of an observable resource, or that it is gone.

        Source: rules H-31 and H-33.
        """
        try:
            resource = self.catalog.find(path)
            representation = self.represent(resource, parameters, ContentFormat.JSON, scheme)
        except NetotaError as error:
            return Event("gone", "gone", _details(HTTPStatus.NOT_FOUND, error.detail), last=True)
        etag = representation.etag.hex()
        id_ = (
            f"{resource.stream.sequence}-{etag}" if isinstance(resource, StreamResource) else etag
        )
        return Event(id_, resource.rt.removeprefix("netota."), representation.payload)
