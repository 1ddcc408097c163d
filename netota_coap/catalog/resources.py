"""The resources of a repository, each rendered into ready bytes per content format.

Sources: `spec/resources.md`, `spec/wire.md`.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence

import attrs

from netota_coap.catalog.local_blobs import NOTHING, Holding, OpenBlobs, own_below
from netota_coap.catalog.render_cache import Shelf
from netota_coap.catalog.stream_query import View
from netota_coap.encoding.codecs import Format
from netota_coap.encoding.content_formats import CODECS, ContentFormat
from netota_coap.encoding.datagram_fit import fitting
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

Path = tuple[str, ...]
_FILTERED_LISTS = 16  # of discovery that are kept


@attrs.frozen
class Representation:
    """A resource's bytes in one content format.

    Attributes:
        format: Of the payload.
        payload: The bytes.
        etag: 8 bytes.
    """

    format: ContentFormat
    payload: bytes
    etag: bytes

    @property
    def size(self) -> int:
        """Of the whole, bytes."""
        return len(self.payload)

    def part(self, offset: int, size: int) -> bytes:
        """Return a part of the bytes; less than was asked for at the end.

        Raises:
            NotFoundError: They are not to be had any more.
        """
        return self.payload[offset : offset + size]


@attrs.frozen
class BlobRepresentation(Representation):
    """A file's bytes, which are read when they are asked for; there is no `payload`.

    Attributes:
        sha256: Of the file.
        files: Reads them.
    """

    sha256: bytes
    files: OpenBlobs

    @property
    def size(self) -> int:
        """Of the file, bytes."""
        return self.files.size(self.sha256)

    def part(self, offset: int, size: int) -> bytes:
        """Return a part of the file."""
        return self.files.read(self.sha256, offset, size)


def etag_of(payload: bytes) -> bytes:
    """Return the ETag of a payload: the first 8 bytes of its SHA-256. Source: rule C-8."""
    return hashlib.sha256(payload).digest()[:8]


def _represent(fmt: ContentFormat, payload: bytes) -> Representation:
    return Representation(fmt, payload, etag_of(payload))


@attrs.define(eq=False)
class Resource:
    """What all resources have in common.

    Attributes:
        path: Segments.
        rt: Resource type (RFC 6690).
        formats: That it can be had in, the default first.
        observable: Whether a client can ask to be notified.
        poll_s: Seconds until a client that observes should ask again anyway.
        max_age_s: For how long caches may keep an answer; None: as the server says of all.
        title: For people, or None.
    """

    path: Path
    rt: str
    formats: tuple[ContentFormat, ...]
    title: str | None = None
    observable: bool = False
    poll_s: int = DEFAULT_POLL_S
    max_age_s: int | None = None

    def represent(
        self, parameters: Sequence[str], fmt: ContentFormat, scheme: str
    ) -> Representation:
        """Return the resource in one format, as a query wants to see it.

        Args:
            parameters: Of the query.
            fmt: One of `formats`.
            scheme: Of the request, for relative offers.

        Raises:
            NotFoundError: The state that the query continues is gone.
            InvalidDataError: The query cannot be read.
        """
        raise NotImplementedError

    def entry(self) -> Value:
        """Return what the collection that this resource is a member of says about it."""
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


# ----------------------------------------------------------------------------------------------
# A stream

_DEFAULT = View()

Own = tuple[frozenset[Key], int]
"""What of a stream the server offers itself, and by which metric."""


def own_offers(source: Stream, holding: Holding) -> Own:
    """Return the files of a stream that this server offers itself, and their metric."""
    own = holding.offered.intersection(map(key_of, source.archives or ()))
    return own, holding.metric if own else 0


@attrs.define(eq=False)
class StreamResource(Resource):
    """A stream.

    Attributes:
        source: As the repository has it.
        stream: As it is served: archives and offers in order, poll_s from the package.
        own: Offers that the server adds itself: of which files, and their metric.
        default: Its representation for those who ask for nothing special.
        fingerprint: ETag of everything that a client could learn of it.
        shelf: Where its other representations are kept.
        pinned: What it was under the same sequence, which a full view goes on with.
        pinned_s: Since when, on the clock of `time.monotonic`.
    """

    source: Stream = attrs.field(kw_only=True)
    stream: Stream = attrs.field(kw_only=True)
    own: Own = attrs.field(kw_only=True)
    default: Representation = attrs.field(kw_only=True)
    fingerprint: bytes = attrs.field(kw_only=True)
    shelf: Shelf[Representation] = attrs.field(kw_only=True)
    pinned: StreamResource | None = attrs.field(init=False, default=None)
    pinned_s: float = attrs.field(init=False, default=0.0)
    _indexes: dict[str, Index] = attrs.field(init=False, factory=dict)
    _encoder: StreamEncoder | None = attrs.field(init=False, default=None)

    @classmethod
    def of(
        cls,
        path: Path,
        source: Stream,
        poll_s: int | None,
        shelf: Shelf[Representation],
        holding: Holding = NOTHING,
    ) -> StreamResource:
        """Render a stream; `poll_s` is its own or its package's."""
        offered = tuple(holding.offers(archive) for archive in source.archives or ())
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
            own=own_offers(source, holding),
            default=_represent(ContentFormat.CBOR, fitting(stream, whole)),
            fingerprint=etag_of(whole + (source.title or "").encode()),  # the link has the title
            shelf=shelf,
        )

    def represent(
        self, parameters: Sequence[str], fmt: ContentFormat, scheme: str
    ) -> Representation:
        """Return what a GET asks for."""
        return self.view(View.from_query(parameters), fmt, scheme)

    def view(self, view: View, fmt: ContentFormat, scheme: str) -> Representation:
        """Return the stream narrowed to a device, in one datagram or in full.

        Raises:
            NotFoundError: The state that a full view continues is gone.
        """
        if view.sequence is not None and view.sequence != self.stream.sequence:
            raise NotFoundError(
                f"the stream does not hold sequence {view.sequence} any more, "
                f"but {self.stream.sequence}"
            )
        continued = self.pinned if view.sequence is not None else None
        return (continued or self).present(view, fmt, scheme)

    def present(self, view: View, fmt: ContentFormat, scheme: str) -> Representation:
        """Return what `view` does, but always of the present state."""
        if view == _DEFAULT and fmt is ContentFormat.CBOR:
            return self.default
        full = view.full or fmt is not ContentFormat.CBOR
        if scheme not in self._indexes:
            self._indexes[scheme] = Index.of(self.stream.archives or (), scheme)
        index = self._indexes[scheme]
        # What a client says beyond the vocabulary makes no difference, and has no bound.
        selection = view.selection.within(index.vocabulary)

        def render() -> Representation:
            if view.head:
                return _represent(fmt, encode(self._with(None), CODECS[fmt]))
            narrowed = tuple(own_below(view.prefix, each) for each in index.narrow(selection))
            if full:
                return _represent(fmt, encode(self._with(narrowed), CODECS[fmt]))
            if self._encoder is None:
                self._encoder = StreamEncoder(self.stream)
            whole = self._encoder.encode(narrowed)
            if len(whole) > LIMITS["datagram"].value:
                whole = fitting(self._with(narrowed), whole)
            return _represent(fmt, whole)

        view_key = (
            "head"
            if view.head
            else (*(selection, full, scheme if selection.schemes else "", view.prefix),)
        )
        return self.shelf.get((self.path, self.fingerprint, fmt, view_key), render)

    def entry(self) -> StreamEntry:
        """Return version, sequence and whether it is closed."""
        stream = self.stream
        return StreamEntry(version=stream.version, sequence=stream.sequence, closed=stream.closed)

    def link(self) -> str:
        """Return the link, with the size of the default representation."""
        return f"{Resource.link(self)};sz={len(self.default.payload)}"

    def _with(self, archives: tuple[Archive, ...] | None) -> Stream:
        return attrs.evolve(self.stream, archives=archives)


# ----------------------------------------------------------------------------------------------
# A blob

BLOB_MAX_AGE_S = 31_536_000  # its name says what it is


@attrs.define(eq=False)
class BlobResource(Resource):
    """A file that the server holds.

    Attributes:
        sha256: Of the file.
        files: Reads it.
    """

    sha256: bytes = attrs.field(kw_only=True)
    files: OpenBlobs = attrs.field(kw_only=True)

    @classmethod
    def of(cls, path: Path, files: OpenBlobs) -> BlobResource:
        """Return the blob at a path.

        Raises:
            NotFoundError: There is none.
            NotYetError: It comes.
        """
        formats = (ContentFormat.OCTETS,)
        sha256 = digest_of(path[1])
        try:
            files.size(sha256)
        except DamagedError:
            raise  # to fetch it once more is for those who look at the disk first
        except NotFoundError:
            files.fetch(sha256)
            raise
        return cls(
            *(path, "netota.blob", formats), max_age_s=BLOB_MAX_AGE_S, sha256=sha256, files=files
        )

    def represent(
        self, parameters: Sequence[str], fmt: ContentFormat, scheme: str
    ) -> BlobRepresentation:
        """Return the file; no query makes it another one."""
        return BlobRepresentation(fmt, b"", self.sha256[:8], self.sha256, self.files)


# ----------------------------------------------------------------------------------------------
# Collections


@attrs.define(eq=False)
class CollectionResource(Resource):
    """The packages, or the streams of one.

    Attributes:
        members: What it lists.
        source: As the repository has it.
        salt: What its ETag stands for besides its payload.
    """

    members: tuple[Resource, ...] = attrs.field(kw_only=True)
    source: Package | Repository = attrs.field(kw_only=True)
    salt: bytes = attrs.field(kw_only=True, default=b"")
    _ready: dict[ContentFormat, Representation] = attrs.field(init=False, factory=dict)

    def represent(
        self, parameters: Sequence[str], fmt: ContentFormat, scheme: str
    ) -> Representation:
        """Return the list; no query narrows it."""
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
        """Return the title."""
        return PackageEntry(title=self.title or "")


COLLECTION_FORMATS = (ContentFormat.LINK, ContentFormat.JSON, ContentFormat.CBOR)


@attrs.define(eq=False)
class DiscoveryResource(Resource):
    """`/.well-known/core`: the links of all the others, filtered by the query.

    Attributes:
        members: All the others.
    """

    members: tuple[Resource, ...] = attrs.field(kw_only=True)
    _ready: dict[tuple[str, ...], Representation] = attrs.field(init=False, factory=dict)

    def represent(
        self, parameters: Sequence[str], fmt: ContentFormat, scheme: str
    ) -> Representation:
        """Return the links that pass the filters of the query (RFC 6690, section 4.1)."""
        filters = tuple(parameter for parameter in parameters if "=" in parameter)
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
