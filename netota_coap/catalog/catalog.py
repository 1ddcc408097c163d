"""All resources of a repository, rendered for serving.

A catalog is made once per change of the repository; unchanged streams are taken over from the
previous one with their ready bytes. Sources: `spec/resources.md`, `spec/wire.md`.
"""

from __future__ import annotations

import hashlib
import time
from collections.abc import Iterable, Iterator, Mapping
from typing import Any, TypeGuard

import attrs

from netota_coap.catalog.local_blobs import NO_BLOBS, LocalBlobs, OpenBlobs
from netota_coap.catalog.render_cache import RenderCache
from netota_coap.catalog.resources import (
    COLLECTION_FORMATS,
    BlobResource,
    CollectionResource,
    DiscoveryResource,
    Representation,
    Resource,
    ResourcePath,
    StreamResource,
    own_offers,
)
from netota_coap.encoding.content_formats import ContentFormat
from netota_coap.errors import NotFoundError
from netota_coap.model.values import Package, Repository, Stream


@attrs.frozen
class Catalog:
    """All resources of a repository by path.

    Attributes:
        cache: Rendered streams, shared with the catalogs before and after this one.
        files: Serves blobs; None: there are none to serve.
    """

    resources: Mapping[ResourcePath, Resource]
    cache: RenderCache[Representation]
    files: OpenBlobs | None = None

    @classmethod
    def of(
        cls, repository: Repository, previous: Catalog | None = None, blobs: LocalBlobs = NO_BLOBS
    ) -> Catalog:
        """Render a repository; streams that are as in the previous catalog are taken over."""
        before, cache = (previous.resources, previous.cache) if previous else ({}, RenderCache())
        packages: list[Resource] = []
        streams: list[Resource] = []
        everything = hashlib.sha256((repository.title or "").encode())
        for name, package in sorted(repository.packages.items()):
            own = []
            for stream_name, source in sorted(package.streams.items()):
                path = ("p", name, "s", stream_name)
                poll_s = source.poll_s or package.poll_s
                old = stream = before.get(path)
                if not _is_unchanged(stream, source, poll_s, blobs):
                    stream = StreamResource.of(path, source, poll_s, cache, blobs)
                    if _could_mix(old, stream):
                        # The copy drops its own `previous`, so no chain grows.
                        stream.previous, stream.replaced_s = attrs.evolve(old), time.monotonic()
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
        return cls(resources, cache, blobs.files)

    def find(self, path: ResourcePath) -> Resource:
        """Return the resource at a path.

        Raises:
            NotFoundError: The path names nothing.
            NotYetError: The path names a blob that is being fetched.
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

    def forget_previous(self, before_s: float) -> tuple[bool, float | None]:
        """Drop previous representations that were replaced at `before_s` (monotonic) or earlier.

        Returns:
            Whether any was dropped, and when the oldest of those that remain was replaced.
        """
        resumable = [stream for stream in self._streams if stream.previous]
        old = [stream for stream in resumable if stream.replaced_s <= before_s]
        for stream in old:
            stream.previous = None
        others = (stream.replaced_s for stream in resumable if stream.previous)
        return bool(old), min(others, default=None)

    def trim_cache(self) -> None:
        """Drop rendered streams that this catalog does not serve any more."""
        streams = list(self._streams)
        streams += [stream.previous for stream in streams if stream.previous]
        self.cache.retain({stream.fingerprint for stream in streams})

    def differing(self, other: Catalog) -> set[ResourcePath]:
        """Return the paths whose resources are not the same object in both."""
        paths = self.resources.keys() | other.resources.keys()
        return {p for p in paths if self.resources.get(p) is not other.resources.get(p)}


def _collection(
    path: ResourcePath,
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


def _could_mix(old: Resource | None, new: StreamResource) -> TypeGuard[StreamResource]:
    """Return whether a transfer that names the sequence could get blocks of both states."""
    return (
        isinstance(old, StreamResource)
        and old.source.sequence == new.source.sequence
        and old.fingerprint != new.fingerprint
    )


def _is_unchanged(
    old: Resource | None, source: Stream, poll_s: int | None, blobs: LocalBlobs
) -> TypeGuard[StreamResource]:
    return (
        isinstance(old, StreamResource)
        and old.source is source
        and old.stream.poll_s == poll_s
        and old.own == own_offers(source, blobs)
    )
