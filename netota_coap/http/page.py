"""The HTML pages for people. They are read-only, and load nothing from other servers.

Without JavaScript they do not update themselves. Texts of publishers are escaped in one place:
the environment of the templates.
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
from netota_coap.http.negotiation import chosen, is_current, joined
from netota_coap.http.page_updates import PageUpdates
from netota_coap.http.site import Site
from netota_coap.model.selection import text_form
from netota_coap.model.values import LIMITS
from netota_coap.publishing.diff import archives_of
from netota_coap.repository import history

MEDIA_TYPE = "text/html"
_FOR_PROGRAMS = ("application/json", "application/cbor", "text/event-stream")  # same paths
_HEADERS = {
    "Cache-Control": "no-cache",
    "Content-Security-Policy": "default-src 'none'; style-src 'self'; script-src 'self'; "
    "connect-src 'self'; img-src 'self'; base-uri 'none'; form-action 'none'; "
    "frame-ancestors 'none'",
    "Referrer-Policy": "no-referrer",
    "Vary": "Accept",
}
# Pages refer to a static file by a URL with its ETag, so the bytes at a URL never change.
_STATIC_HEADERS = {"Cache-Control": "public, max-age=31536000, immutable"}
_MEDIA_TYPES = {"css": "text/css", "js": "text/javascript", "svg": "image/svg+xml"}


@attrs.frozen
class _StaticFile:
    media_type: str
    payload: bytes
    etag: str


def _files() -> dict[str, _StaticFile]:
    found = {}
    for path in (files("netota_coap.http") / "static").iterdir():
        payload = path.read_bytes()
        media_type = _MEDIA_TYPES[path.name.rpartition(".")[2]]
        found[path.name] = _StaticFile(media_type, payload, etag_of(payload).hex())
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
    """The HTML pages of a site, with their static files and updates."""

    site: Site
    updates: PageUpdates = attrs.Factory(lambda self: PageUpdates(self.site), takes_self=True)
    _files: Mapping[str, _StaticFile] = attrs.field(init=False, factory=_files)
    _templates: Environment = attrs.field(init=False, factory=_templates)

    @cached_property
    def _started(self) -> datetime:
        # Cached, since rounding would change the second now and then, and with it the ETag.
        uptime = timedelta(seconds=self.site.status().uptime_s)
        return (datetime.now(UTC) - uptime).replace(microsecond=0)

    async def answer(self, request: Request, path: ResourcePath) -> ASGIApp | None:
        """Answer a GET or HEAD of a page or of something that pages load; else return None.

        Raises:
            NotFoundError: No static file has this name.
        """
        if path[:1] == ("static",):
            return self._file(path)
        if path == page_updates.PATH:
            page = request.query_params.get("page", "")
            return self.updates.follow(tuple(page.split("/")) if page else ())
        is_shown = not path or (len(path) == 4 and path[::2] == ("p", "s"))
        # `Accept: */*` gets JSON: most programs send it, and browsers name HTML first.
        if (
            not is_shown
            or chosen(joined(request, "accept"), (*_FOR_PROGRAMS, MEDIA_TYPE)) != MEDIA_TYPE
        ):
            return None
        status, payload = await self._render(path, request.headers.get("host", ""))
        etag = etag_of(payload).hex()
        headers = _HEADERS | {"ETag": f'"{etag}"'}
        if is_current(joined(request, "if-none-match"), etag):
            return Response(None, HTTPStatus.NOT_MODIFIED, headers)
        return Response(payload, status, headers, MEDIA_TYPE)

    def _file(self, path: ResourcePath) -> Response:
        found = self._files.get("/".join(path[1:]))
        if found is None:
            raise NotFoundError(f"there is nothing at /{'/'.join(path)}")
        return Response(found.payload, HTTPStatus.OK, _STATIC_HEADERS, found.media_type)

    async def _render(self, path: ResourcePath, host: str) -> tuple[HTTPStatus, bytes]:
        shown = self._common(path)
        resource = self.site.catalog.resources.get(path or ("p",))
        more: Callable[[], dict[str, Any]] = dict
        template = "index.html" if resource else "gone.html"
        if isinstance(resource, StreamResource):
            template = "stream.html"
            shown |= self._stream(resource, host)
            more = partial(self._history, resource)

        def render() -> bytes:
            return self._templates.get_template(template).render(shown | more()).encode()

        # A history is read from files, and 1,000 archives take long: devices must not wait.
        payload = await asyncio.to_thread(render)
        return HTTPStatus.OK if resource else HTTPStatus.NOT_FOUND, payload

    def _common(self, path: ResourcePath) -> dict[str, Any]:
        """Return the variables that all templates use."""
        now, status, resources = datetime.now(UTC), self.site.status(), self.site.catalog.resources
        return {
            "age": partial(page_content.age, now=now),
            "etags": {name: file.etag for name, file in self._files.items()},
            "mark": self.updates.mark(path, page_updates.troubles_of(status)),
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
            # The page is public, so the reason is left to `netota-coap check`.
            with contextlib.suppress(NetotaError, OSError):
                states = history.history(self.site.root, name, page_content.MOST_STATES + 1)
        return {
            "has_history": self.site.root is not None,
            "history": tuple(page_content.history(name, states)),
            "older": len(states) > page_content.MOST_STATES,
        }
