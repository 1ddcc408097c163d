"""The resources of a repository, each rendered into ready bytes per content format.

Sources: `spec/resources.md`, `spec/wire.md`.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence

import attrs

from netota_coap.catalog.local_blobs import NO_BLOBS, LocalBlobs, OpenBlobs, prefix_own_offers
from netota_coap.catalog.render_cache import RenderCache
from netota_coap.catalog.stream_query import StreamQuery
from netota_coap.encoding.codecs import Format
from netota_coap.encoding.content_formats import CODECS, ContentFormat
from netota_coap.encoding.datagram_fit import fit
from netota_coap.encoding.documents import StreamEncoder, encode, encode_list
from netota_coap.errors import DamagedError, NotFoundError
from netota_coap.model.selection import Index, Selection
from netota_coap.model.values import (
    DEFAULT_POLL_S,
    LIMITS,
    Archive,
    Package,
    PackageEntry,
    Repository,
    Stream,
    StreamEntry,
    Value,
)
from netota_coap.repository.blobs import Key, digest_of, key_of

ResourcePath = tuple[str, ...]
"""The segments of a path."""

_FILTERED_LISTS = 16
"""How many filtered responses of discovery are cached."""


@attrs.frozen
class Representation:
    """A resource's bytes in one content format, with an ETag of 8 bytes."""

    format: ContentFormat
    payload: bytes
    etag: bytes

    @property
    def size(self) -> int:
        """The size of the whole in bytes."""
        return len(self.payload)

    def part(self, offset: int, size: int) -> bytes:
        """Return a part of the bytes, shorter at their end.

        Raises:
            NotFoundError: The file of a blob is gone.
        """
        return self.payload[offset : offset + size]


@attrs.frozen
class BlobRepresentation(Representation):
    """A blob's bytes, read on request; `payload` is empty."""

    sha256: bytes
    files: OpenBlobs

    @property
    def size(self) -> int:
        """The size of the file in bytes."""
        return self.files.size(self.sha256)

    def part(self, offset: int, size: int) -> bytes:
        """Return a part of the file, shorter at its end; raises like `OpenBlobs.block`."""
        return self.files.read(self.sha256, offset, size)


def etag_of(payload: bytes) -> bytes:
    """Return the ETag of a payload: the first 8 bytes of its SHA-256. Source: rule C-8."""
    return hashlib.sha256(payload).digest()[:8]


def _represent(fmt: ContentFormat, payload: bytes) -> Representation:
    return Representation(fmt, payload, etag_of(payload))


@attrs.define(eq=False)
class Resource:
    """Something that a path names.

    Attributes:
        rt: Resource type (RFC 6690).
        formats: Content formats of its representations, the default first.
        poll_s: Seconds until an observer should ask again even if it was not notified.
        max_age_s: How long caches may keep a response; None: the server's default.
    """

    path: ResourcePath
    rt: str
    formats: tuple[ContentFormat, ...]
    title: str | None = None
    observable: bool = False
    poll_s: int = DEFAULT_POLL_S
    max_age_s: int | None = None

    def represent(self, query: Sequence[str], fmt: ContentFormat, scheme: str) -> Representation:
        """Return the representation that a query asks for.

        Args:
            query: Its parameters.
            fmt: One of `formats`.
            scheme: Scheme of the request; offers that are paths have it, too.

        Raises:
            NotFoundError: The state that the query continues is gone.
            InvalidDataError: The query is malformed.
        """
        raise NotImplementedError

    def entry(self) -> Value:
        """Return this resource's entry in the list of which it is a member."""
        raise NotImplementedError

    def link(self) -> str:
        """Return the link to this resource (RFC 6690)."""
        formats = " ".join(str(int(fmt)) for fmt in sorted(self.formats))
        parts = [f"</{'/'.join(self.path)}>", f'rt="{self.rt}"', f'ct="{formats}"']
        if self.observable:
            parts.append("obs")
        if self.title:
            parts.append('title="{}"'.format(self.title.replace("\\", "\\\\").replace('"', '\\"')))
        return ";".join(parts)


_DEFAULT = StreamQuery()

OwnOffers = tuple[frozenset[Key], int]
"""The blobs of a stream that this server offers, and the metric of these offers."""


def own_offers(source: Stream, blobs: LocalBlobs) -> OwnOffers:
    """Return the blobs of a stream that this server offers, and their metric."""
    own = blobs.offered.intersection(map(key_of, source.archives or ()))
    return own, blobs.metric if own else 0


@attrs.define(eq=False)
class StreamResource(Resource):
    """A stream, which is narrowed and rendered for each distinct query.

    Attributes:
        source: The stream in the repository.
        stream: The stream as it is served: archives and offers in order, own offers added, poll_s
            from the package.
        default: The representation for a request without parameters.
        fingerprint: ETag over everything that a client can learn of the stream.
        previous: Previous representation of this sequence; running `?full` transfers continue
            from it.
        replaced_s: When `previous` was replaced, on the clock of `time.monotonic`.
    """

    source: Stream = attrs.field(kw_only=True)
    stream: Stream = attrs.field(kw_only=True)
    own: OwnOffers = attrs.field(kw_only=True)
    default: Representation = attrs.field(kw_only=True)
    fingerprint: bytes = attrs.field(kw_only=True)
    cache: RenderCache[Representation] = attrs.field(kw_only=True)
    previous: StreamResource | None = attrs.field(init=False, default=None)
    replaced_s: float = attrs.field(init=False, default=0.0)
    _indexes: dict[str, Index] = attrs.field(init=False, factory=dict)
    _encoder: StreamEncoder | None = attrs.field(init=False, default=None)

    @classmethod
    def of(
        cls,
        path: ResourcePath,
        source: Stream,
        poll_s: int | None,
        cache: RenderCache[Representation],
        blobs: LocalBlobs = NO_BLOBS,
    ) -> StreamResource:
        """Render a stream; `poll_s` is its own or its package's."""
        offered = tuple(blobs.add_offer(archive) for archive in source.archives or ())
        archives = Selection().narrow(offered, "")
        stream = attrs.evolve(source, archives=archives, poll_s=poll_s)
        whole = encode(stream, Format.CBOR)
        return cls(
            path,
            "netota.stream",
            (ContentFormat.CBOR, ContentFormat.JSON),
            source.title,
            observable=True,
            poll_s=poll_s or DEFAULT_POLL_S,
            source=source,
            stream=stream,
            own=own_offers(source, blobs),
            default=_represent(ContentFormat.CBOR, fit(stream, whole)),
            fingerprint=etag_of(whole + (source.title or "").encode()),  # the link has the title
            cache=cache,
        )

    def represent(self, query: Sequence[str], fmt: ContentFormat, scheme: str) -> Representation:
        """Return the response to a GET."""
        return self.answer(StreamQuery.from_query(query), fmt, scheme)

    def answer(self, query: StreamQuery, fmt: ContentFormat, scheme: str) -> Representation:
        """Return the stream narrowed to a device; raises like `represent`."""
        if query.sequence is not None and query.sequence != self.stream.sequence:
            raise NotFoundError(
                f"the stream does not hold sequence {query.sequence} any more, "
                f"but {self.stream.sequence}"
            )
        continued = self.previous if query.sequence is not None else None
        return (continued or self).answer_now(query, fmt, scheme)

    def answer_now(self, query: StreamQuery, fmt: ContentFormat, scheme: str) -> Representation:
        """Answer from this state, whatever sequence the query continues."""
        if query == _DEFAULT and fmt is ContentFormat.CBOR:
            return self.default
        full = query.full or fmt is not ContentFormat.CBOR
        if scheme not in self._indexes:
            self._indexes[scheme] = Index.of(self.stream.archives or (), scheme)
        index = self._indexes[scheme]
        # Values that no archive has make no difference, and clients can make up any number.
        selection = query.selection.within(index.vocabulary)

        def render() -> Representation:
            if query.head:
                return _represent(fmt, encode(self._with(None), CODECS[fmt]))
            suiting = index.narrow(selection)
            narrowed = tuple(prefix_own_offers(query.prefix, each) for each in suiting)
            if full:
                return _represent(fmt, encode(self._with(narrowed), CODECS[fmt]))
            if self._encoder is None:
                self._encoder = StreamEncoder(self.stream)
            whole = self._encoder.encode(narrowed)
            if len(whole) > LIMITS["datagram"].value:
                whole = fit(self._with(narrowed), whole)
            return _represent(fmt, whole)

        scheme_key = scheme if selection.schemes else ""
        key = "head" if query.head else (selection, full, scheme_key, query.prefix)
        return self.cache.get((self.path, self.fingerprint, fmt, key), render)

    def entry(self) -> StreamEntry:
        """Return the stream's entry in the list of its package."""
        stream = self.stream
        return StreamEntry(version=stream.version, sequence=stream.sequence, closed=stream.closed)

    def link(self) -> str:
        """Return the link, with the size of the default representation."""
        return f"{Resource.link(self)};sz={len(self.default.payload)}"

    def _with(self, archives: tuple[Archive, ...] | None) -> Stream:
        return attrs.evolve(self.stream, archives=archives)


BLOB_MAX_AGE_S = 31_536_000  # a year: its name is its digest, so it never changes


@attrs.define(eq=False)
class BlobResource(Resource):
    """A blob that the server stores."""

    sha256: bytes = attrs.field(kw_only=True)
    files: OpenBlobs = attrs.field(kw_only=True)

    @classmethod
    def of(cls, path: ResourcePath, files: OpenBlobs) -> BlobResource:
        """Return the blob at a path; raises like `Catalog.find`."""
        formats = (ContentFormat.OCTETS,)
        sha256 = digest_of(path[1])
        try:
            files.size(sha256)
        except DamagedError:
            raise  # an operator must look at the disk before the file is fetched once more
        except NotFoundError:
            files.fetch(sha256)
            raise
        return cls(
            *(path, "netota.blob", formats), max_age_s=BLOB_MAX_AGE_S, sha256=sha256, files=files
        )

    def represent(
        self, query: Sequence[str], fmt: ContentFormat, scheme: str
    ) -> BlobRepresentation:
        """Return the file, whatever the query."""
        return BlobRepresentation(fmt, b"", self.sha256[:8], self.sha256, self.files)


@attrs.define(eq=False)
class CollectionResource(Resource):
    """The list of packages, or of the streams of one package.

    Attributes:
        salt: Other data than the payload whose change changes the ETag.
    """

    members: tuple[Resource, ...] = attrs.field(kw_only=True)
    source: Package | Repository = attrs.field(kw_only=True)
    salt: bytes = attrs.field(kw_only=True, default=b"")
    _ready: dict[ContentFormat, Representation] = attrs.field(init=False, factory=dict)

    def represent(self, query: Sequence[str], fmt: ContentFormat, scheme: str) -> Representation:
        """Return the list, whatever the query."""
        if fmt not in self._ready:
            self._ready[fmt] = self._render(fmt)
        return self._ready[fmt]

    def _render(self, fmt: ContentFormat) -> Representation:
        if fmt is ContentFormat.LINK:
            payload = ",".join(member.link() for member in self.members).encode()
        else:
            entries = {member.path[-1]: member.entry() for member in self.members}
            payload = encode_list(entries, CODECS[fmt])
        return Representation(fmt, payload, etag_of(payload + self.salt))

    def entry(self) -> PackageEntry:
        """Return the package's entry in the list of packages."""
        return PackageEntry(title=self.title or "")


COLLECTION_FORMATS = (ContentFormat.LINK, ContentFormat.JSON, ContentFormat.CBOR)


@attrs.define(eq=False)
class DiscoveryResource(Resource):
    """`/.well-known/core`: links to all other resources, filtered by the query."""

    members: tuple[Resource, ...] = attrs.field(kw_only=True)
    _ready: dict[tuple[str, ...], Representation] = attrs.field(init=False, factory=dict)

    def represent(self, query: Sequence[str], fmt: ContentFormat, scheme: str) -> Representation:
        """Return the links that pass the filters of the query (RFC 6690, section 4.1)."""
        filters = tuple(parameter for parameter in query if "=" in parameter)
        ready = self._ready.get(filters)
        if ready is None:
            links = (m.link() for m in self.members if all(_passes(m, f) for f in filters))
            ready = _represent(fmt, ",".join(links).encode())
            if len(self._ready) >= _FILTERED_LISTS:
                self._ready.clear()
            self._ready[filters] = ready
        return ready


def _passes(resource: Resource, parameter: str) -> bool:
    name, _, pattern = parameter.partition("=")
    values: Mapping[str, tuple[str, ...]] = {
        "href": ("/" + "/".join(resource.path),),
        "rt": (resource.rt,),
        "ct": tuple(str(int(fmt)) for fmt in resource.formats),
        "title": (resource.title,) if resource.title else (),
        "obs": ("",) if resource.observable else (),
    }
    if pattern.endswith("*"):
        return any(value.startswith(pattern[:-1]) for value in values.get(name, ()))
    return pattern in values.get(name, ())
