"""The repository rendered for serving: path + view + format → ready bytes.

A catalog is made once per change of the repository; what did not change is taken over from the one
before it, ready bytes included. It knows no transport: CoAP and HTTP ask it the same questions.
Sources: `spec/resources.md`, `spec/wire.md`.
"""

from __future__ import annotations

import hashlib
import time
from collections.abc import Iterable, Iterator, Mapping
from typing import Any, TypeGuard

import attrs

from netota_coap.catalog.local_blobs import NOTHING, Holding, OpenBlobs
from netota_coap.catalog.render_cache import Shelf
from netota_coap.catalog.resources import (
    COLLECTION_FORMATS,
    BlobResource,
    CollectionResource,
    DiscoveryResource,
    Path,
    Representation,
    Resource,
    StreamResource,
    own_offers,
)
from netota_coap.encoding.content_formats import ContentFormat
from netota_coap.errors import NotFoundError
from netota_coap.model.values import Package, Repository, Stream

# ----------------------------------------------------------------------------------------------
# The catalog


@attrs.frozen
class Catalog:
    """All resources of a repository.

    Attributes:
        resources: By path.
        shelf: Of its streams, and of those of the catalogs before and after.
        files: That are served themselves.
    """

    resources: Mapping[Path, Resource]
    shelf: Shelf[Representation]
    files: OpenBlobs | None = None

    @classmethod
    def of(
        cls,
        repository: Repository,
        previous: Catalog | None = None,
        holding: Holding = NOTHING,
    ) -> Catalog:
        """Render a repository.

        Args:
            repository: Loaded and checked.
            previous: The catalog before it; streams that did not change are taken over.
            holding: What the server offers itself.
        """
        before, shelf = (previous.resources, previous.shelf) if previous else ({}, Shelf())
        packages: list[Resource] = []
        streams: list[Resource] = []
        everything = hashlib.sha256((repository.title or "").encode())
        for name, package in sorted(repository.packages.items()):
            own = []
            for stream_name, source in sorted(package.streams.items()):
                path = ("p", name, "s", stream_name)
                poll_s = source.poll_s or package.poll_s
                old = stream = before.get(path)
                if not _still(stream, source, poll_s, holding):
                    stream = StreamResource.of(path, source, poll_s, shelf, holding)
                    if _glues(old, stream):
                        # Without what that was pinned to itself.
                        stream.pinned, stream.pinned_s = attrs.evolve(old), time.monotonic()
                own.append(stream)
                everything.update("/".join(path).encode() + stream.fingerprint)
            packages.append(_collection(("p", name), "netota.package", own, package))
            streams += own
        top = _collection(
            ("p",),
            "netota.packages",
            packages,
            repository,
            observable=True,
            salt=everything.digest(),
        )
        listed = (top, *packages, *streams)
        core = DiscoveryResource(
            (".well-known", "core"), "core", (ContentFormat.LINK,), members=listed
        )
        resources = {resource.path: resource for resource in (core, *listed)}
        return cls(resources, shelf, holding.files)

    def find(self, path: Path) -> Resource:
        """Return the resource at a path.

        Raises:
            NotFoundError: There is none.
            NotYetError: It is a file that comes.
        """
        resource = self.resources.get(path)
        if resource is None and self.files and path[:1] == ("b",) and len(path) == 2:
            return BlobResource.of(path, self.files)
        if resource is None:
            raise NotFoundError(f"there is nothing at /{'/'.join(path)}")
        return resource

    @property
    def _streams(self) -> Iterator[StreamResource]:
        return (each for each in self.resources.values() if isinstance(each, StreamResource))

    def unpin(self, before_s: float) -> tuple[bool, float | None]:
        """Let full views go on with the present state where it was pinned before some time.

        Returns:
            Whether there was such a one; and since when the oldest of the others is pinned, if
            there are any.
        """
        pinned = [stream for stream in self._streams if stream.pinned]
        old = [stream for stream in pinned if stream.pinned_s <= before_s]
        for stream in old:
            stream.pinned = None
        others = (stream.pinned_s for stream in pinned if stream.pinned)
        return bool(old), min(others, default=None)

    def tidy(self) -> None:
        """Let go of the views of states that are not served any more."""
        streams = list(self._streams)
        streams += [stream.pinned for stream in streams if stream.pinned]
        self.shelf.keep({stream.fingerprint for stream in streams})

    def differing(self, other: Catalog) -> set[Path]:
        """Return the paths whose resources are not the very same in both."""
        paths = self.resources.keys() | other.resources.keys()
        return {p for p in paths if self.resources.get(p) is not other.resources.get(p)}


def _collection(
    path: Path,
    rt: str,
    members: Iterable[Resource],
    source: Package | Repository,
    **options: Any,
) -> CollectionResource:
    return CollectionResource(
        *(path, rt, COLLECTION_FORMATS, source.title),
        members=tuple(members),
        source=source,
        **options,
    )


def _glues(old: Resource | None, new: StreamResource) -> TypeGuard[StreamResource]:
    """Tell whether a transfer of the state with a sequence would get parts of both."""
    return (
        isinstance(old, StreamResource)
        and old.source.sequence == new.source.sequence
        and old.fingerprint != new.fingerprint
    )


def _still(
    old: Resource | None, source: Stream, poll_s: int | None, holding: Holding
) -> TypeGuard[StreamResource]:
    return (
        isinstance(old, StreamResource)
        and old.source is source
        and old.stream.poll_s == poll_s
        and old.own == own_offers(source, holding)
    )
