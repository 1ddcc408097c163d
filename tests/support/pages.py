"""Pages, for those who look at them: a site whose service is made up, and an HTML parser."""

from __future__ import annotations

from collections import Counter
from datetime import UTC, datetime
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import attrs
import httpx2

from netota_coap.catalog.catalog import Catalog
from netota_coap.http.server import HttpSite
from netota_coap.monitoring import FanOut, Metrics, Status
from netota_coap.repository.loading import Loader

_VOID = {"link", "meta", "img"}


@attrs.define(eq=False)
class Shown:
    """A site, and what its service would tell.

    Attributes:
        root: Of the repository.
        observers: By path.
        told: Of the last change.
        issues: Why what is on disk is refused.
        troubles: What else is wrong.
        options: Of the site.
    """

    root: Path
    observers: Counter[tuple[str, ...]] = attrs.field(factory=Counter)
    told: int = 0
    issues: tuple[str, ...] = ()
    troubles: tuple[str, ...] = ()
    options: dict[str, Any] = attrs.field(factory=dict)
    site: HttpSite = attrs.field(init=False)
    _loader: Loader = attrs.field(init=False)
    _loaded: datetime = attrs.field(init=False, factory=lambda: datetime.now(UTC))

    def __attrs_post_init__(self) -> None:
        self._loader = Loader(self.root)
        catalog = Catalog.of(self._loader.load())
        given = {"root": self.root} | self.options
        self.site = HttpSite(
            catalog,
            status=self.status,
            metrics=Metrics(),
            observers_of=self.observers.__getitem__,
            **given,
        )

    def reload(self) -> None:
        self.site.swap(Catalog.of(self._loader.load(), self.site.catalog))

    def status(self) -> Status:
        paths = self.site.catalog.resources
        return Status(
            version="1.2.3",
            uptime_s=7_200,
            packages=sum(len(path) == 2 and path[0] == "p" for path in paths),
            streams=sum(len(path) == 4 for path in paths),
            observers=self.observers.total(),
            reloaded=self._loaded,
            issues=self.issues,
            fan_out=FanOut(self.told, 0.1) if self.told else None,
            troubles=self.troubles,
        )

    async def get(
        self, path: str, accept: str = "text/html", method: str = "GET", **headers: str
    ) -> httpx2.Response:
        """Ask the site, without sockets."""
        transport = httpx2.ASGITransport(self.site.application, raise_app_exceptions=True)
        named = {name.replace("_", "-"): value for name, value in headers.items()}
        async with httpx2.AsyncClient(transport=transport, base_url="http://gateway") as client:
            return await client.request(method, path, headers={"Accept": accept} | named)

    async def page(self, path: str) -> Element:
        """Return a page, parsed."""
        return parse((await self.get(path)).text)


@attrs.define(eq=False)
class Element:
    """An element of a document."""

    tag: str
    attributes: dict[str, str | None]
    children: list[Element | str] = attrs.field(factory=list)

    def all(self, tag: str, **wanted: str) -> list[Element]:
        """Return the elements below with a tag, and with attributes (`class_` has a word)."""
        found = []
        for child in self.children:
            if isinstance(child, Element):
                if child.tag == tag and all(child._has(*each) for each in wanted.items()):
                    found.append(child)
                found += child.all(tag, **wanted)
        return found

    def one(self, tag: str, **wanted: str) -> Element:
        (found,) = self.all(tag, **wanted)
        return found

    def _has(self, name: str, value: str) -> bool:
        said = self.attributes.get(name.rstrip("_").replace("_", "-")) or ""
        return value in said.split() if name == "class_" else said == value

    @property
    def text(self) -> str:
        """The text, with its spaces as they are shown."""
        return " ".join(self._raw().split())

    def _raw(self) -> str:
        return "".join(c if isinstance(c, str) else c._raw() for c in self.children)

    def tags(self) -> set[str]:
        below = [child for child in self.children if isinstance(child, Element)]
        return {self.tag}.union(*(child.tags() for child in below))

    def attribute_names(self) -> set[str]:
        below = [child for child in self.children if isinstance(child, Element)]
        return set(self.attributes).union(*(child.attribute_names() for child in below))


class _Parser(HTMLParser):
    def __init__(self) -> None:
        super().__init__()
        self.open = [Element("", {})]

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        element = Element(tag, dict(attributes))
        self.open[-1].children.append(element)
        if tag not in _VOID:
            self.open.append(element)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop().tag == tag, f"</{tag}> ends another element"

    def handle_data(self, data: str) -> None:
        self.open[-1].children.append(data)


def parse(text: str) -> Element:
    """Parse a document; each element must be ended."""
    parser = _Parser()
    parser.feed(text)
    parser.close()
    (document,) = parser.open
    return document
