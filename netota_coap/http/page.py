"""The page for people: what is served, in a browser.

It can only be looked at, works without JavaScript but for what is live, and takes nothing from
elsewhere. Texts of publishers are escaped in one place: the environment of the templates.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Callable, Mapping
from datetime import UTC, datetime, timedelta
from functools import cached_property, partial
from http import HTTPStatus
from importlib.resources import files
from typing import Any

import attrs
from jinja2 import Environment, PackageLoader, StrictUndefined
from starlette.requests import Request
from starlette.responses import Response
from starlette.types import ASGIApp

from netota_coap.catalog.resources import ResourcePath, StreamResource, etag_of
from netota_coap.errors import NetotaError, NotFoundError
from netota_coap.http import page_content, page_updates
from netota_coap.http.negotiation import chosen, has
from netota_coap.http.page_updates import Live
from netota_coap.http.site import Site
from netota_coap.model.selection import text_form
from netota_coap.model.values import LIMITS
from netota_coap.publishing.diff import archives_of
from netota_coap.repository import history

MEDIA_TYPE = "text/html"
_OTHERS = ("application/json", "application/cbor", "text/event-stream")  # at the same paths
_HEADERS = {
    "Cache-Control": "no-cache",
    "Content-Security-Policy": "default-src 'none'; style-src 'self'; script-src 'self'; "
    "connect-src 'self'; img-src 'self'; base-uri 'none'; form-action 'none'; "
    "frame-ancestors 'none'",
    "Referrer-Policy": "no-referrer",
    "Vary": "Accept",
}
# The URL of a static file changes with its bytes.
_FOR_EVER = {"Cache-Control": "public, max-age=31536000, immutable"}
_MEDIA_TYPES = {"css": "text/css", "js": "text/javascript", "svg": "image/svg+xml"}


@attrs.frozen
class _File:
    """A static file."""

    media_type: str
    payload: bytes
    etag: str


def _files() -> dict[str, _File]:
    found = {}
    for path in (files("netota_coap.http") / "static").iterdir():
        payload = path.read_bytes()
        media_type = _MEDIA_TYPES[path.name.rpartition(".")[2]]
        found[path.name] = _File(media_type, payload, etag_of(payload).hex())
    return found


def _templates() -> Environment:
    made = Environment(
        loader=PackageLoader("netota_coap.http"),
        autoescape=True,
        undefined=StrictUndefined,
        finalize=page_content.shown,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    made.filters |= {
        "attribute": text_form,
        "author": page_content.name_of,
        "duration": page_content.duration,
        "size": page_content.readable_size,
    }
    made.tests["web"] = page_content.is_web
    return made


@attrs.define(eq=False)
class Page:
    """The page for people.

    Attributes:
        site: What it shows.
        live: What it shows live.
    """

    site: Site
    live: Live = attrs.field()
    _files: Mapping[str, _File] = attrs.field(init=False, factory=_files)
    _templates: Environment = attrs.field(init=False, factory=_templates)

    @cached_property
    def _started(self) -> datetime:
        # Computed anew, its second would flip now and then, and with it the ETag.
        uptime = timedelta(seconds=self.site.status().uptime_s)
        return (datetime.now(UTC) - uptime).replace(microsecond=0)

    @live.default
    def _of_site(self) -> Live:
        return Live(self.site)

    async def answer(self, request: Request, path: ResourcePath) -> ASGIApp | None:
        """Answer a browser, or what its pages need.

        Args:
            request: A GET or HEAD.
            path: Of the request.

        Returns:
            The answer; None: it is for somebody else.

        Raises:
            NotFoundError: There is no such file.
        """
        if path[:1] == ("static",):
            return self._file(path)
        if path == page_updates.PATH:
            page = request.query_params.get("page", "")
            return self.live.follow(tuple(page.split("/")) if page else ())
        is_shown = not path or (len(path) == 4 and path[::2] == ("p", "s"))
        accept = ", ".join(request.headers.getlist("accept"))
        # Who takes anything gets what programs get.
        if not is_shown or chosen(accept, (*_OTHERS, MEDIA_TYPE)) != MEDIA_TYPE:
            return None
        status, payload = await self._render(path, request.headers.get("host", ""))
        etag = etag_of(payload).hex()
        headers = _HEADERS | {"ETag": f'"{etag}"'}
        if has(", ".join(request.headers.getlist("if-none-match")), etag):
            return Response(None, HTTPStatus.NOT_MODIFIED, headers)
        return Response(payload, status, headers, MEDIA_TYPE)

    def _file(self, path: ResourcePath) -> Response:
        found = self._files.get("/".join(path[1:]))
        if found is None:
            raise NotFoundError(f"there is nothing at /{'/'.join(path)}")
        return Response(found.payload, HTTPStatus.OK, _FOR_EVER, found.media_type)

    async def _render(self, path: ResourcePath, host: str) -> tuple[HTTPStatus, bytes]:
        shown = self._common(path)
        resource = self.site.catalog.resources.get(path or ("p",))
        more: Callable[[], dict[str, Any]] = dict
        if resource is None:
            template, status = "gone.html", HTTPStatus.NOT_FOUND
        elif isinstance(resource, StreamResource):
            template, status = "stream.html", HTTPStatus.OK
            shown |= self._stream(resource, host)
            more = partial(self._history, resource)
        else:
            template, status = "index.html", HTTPStatus.OK

        def render() -> bytes:
            return self._templates.get_template(template).render(shown | more()).encode()

        # Files are read, and 1,000 archives are many: devices must not wait for it.
        return status, await asyncio.to_thread(render)

    def _common(self, path: ResourcePath) -> dict[str, Any]:
        """Return what all pages show."""
        now, status, resources = datetime.now(UTC), self.site.status(), self.site.catalog.resources
        return {
            "age": partial(page_content.age, now=now),
            "etags": {name: file.etag for name, file in self._files.items()},
            "mark": self.live.mark(path, page_updates.troubles_of(status)),
            "observers_of": self.site.observers_of,
            "path": path,
            "resources": resources,
            "root": self.site.prefix,
            "started": self._started,
            "status": status,
            "top": resources["p",],
        }

    def _stream(self, resource: StreamResource, host: str) -> dict[str, Any]:
        archives = archives_of(resource.stream)
        return {
            "archives": archives,
            "columns": page_content.columns(archives),
            "datagram": LIMITS["datagram"].value,
            "kinds": page_content.kinds(resource, page_content.host_of(host)),
            "most_kinds": page_content.MOST_KINDS,
            "package": self.site.catalog.resources[resource.path[:2]],
            "resource": resource,
            "stream": resource.stream,
        }

    def _history(self, resource: StreamResource) -> dict[str, Any]:
        name, states = (resource.path[1], resource.path[3]), []
        if self.site.root:
            # What is wrong with it is for the operator: a page may be anybody's.
            with contextlib.suppress(NetotaError, OSError):
                states = history.history(self.site.root, name, page_content.MOST_STATES + 1)
        return {
            "has_history": self.site.root is not None,
            "history": tuple(page_content.history(name, states)),
            "older": len(states) > page_content.MOST_STATES,
        }
