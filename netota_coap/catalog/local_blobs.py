"""Blobs that this server stores and offers. Source: rules C-85 to C-89."""

from __future__ import annotations

import logging
import os
import threading
from collections.abc import Callable, Collection, Iterable, Mapping
from os import fstat, pread

import attrs

from netota_coap.errors import DamagedError, NotFoundError
from netota_coap.model.values import BLOB_METRIC, BLOBS_PATH, LIMITS, Archive, Offer
from netota_coap.repository.blobs import Blobs, Key, blob_name, key_of, path_of

_log = logging.getLogger(__name__)

_MOST_OPEN = 64

Fetch = Callable[[bytes], None]
"""Starts to fetch a file by its SHA-256 and raises `NotYetError`; returns if nobody offers it."""


@attrs.frozen
class _OpenBlob:
    """An open blob with its size and time of writing, which never change in a sound one."""

    descriptor: int
    size: int
    written_ns: int

    def __del__(self) -> None:
        os.close(self.descriptor)


@attrs.define(eq=False)
class OpenBlobs:
    """Reads blobs by cached descriptors; the one opened first is closed first. Thread-safe.

    Attributes:
        fetch: Called in the event loop's thread for each blob that is requested and not stored.
    """

    blobs: Blobs
    fetch: Fetch = lambda _: None
    _expected: Mapping[bytes, Collection[int]] = attrs.field(init=False, factory=dict)
    _damaged: set[bytes] = attrs.field(init=False, factory=set)
    _open: dict[bytes, _OpenBlob] = attrs.field(init=False, factory=dict)
    _lock: threading.Lock = attrs.field(init=False, factory=threading.Lock)

    def size(self, sha256: bytes) -> int:
        """Return the size of a blob in bytes; raises like `block`."""
        return self._opened(sha256).size

    def read(self, sha256: bytes, offset: int, size: int) -> bytes:
        """Return a part of a blob, shorter at its end; raises like `block`."""
        return self.block(sha256, offset, size)[0]

    def block(self, sha256: bytes, offset: int, size: int) -> tuple[bytes, bool]:
        """Return a part of a blob, shorter at its end, and whether more follows.

        Raises:
            NotFoundError: The blob is not stored here (any more).
            DamagedError: The blob was changed since it was opened.
            RepositoryError: The blob cannot be read.
        """
        found = self._open.get(sha256) or self._opened(sha256)
        more = offset + size < found.size
        wanted = size if more else max(found.size - offset, 0)
        try:
            part = pread(found.descriptor, wanted, offset)
            written_ns = fstat(found.descriptor).st_mtime_ns
        except OSError:
            part, written_ns = b"", 0
        if len(part) < wanted or written_ns != found.written_ns:
            with self._lock:
                self._open.pop(sha256, None)
                if sha256 not in self._damaged:
                    self._damaged.add(sha256)
                    _log.warning("%s: changed while served; run blob verify", path_of(sha256))
            raise _damaged(sha256)
        return part, more

    def refresh(self, expected: Iterable[Key]) -> None:
        """Close all blobs, so that each is opened and checked anew when it is read next.

        Args:
            expected: Sizes that blobs must have; if one blob has several, any of them.
        """
        sizes: dict[bytes, set[int]] = {}
        for sha256, size in expected:
            sizes.setdefault(sha256, set()).add(size)
        with self._lock:
            self._open.clear()
            self._damaged.clear()
            self._expected = sizes

    def _opened(self, sha256: bytes) -> _OpenBlob:
        with self._lock:
            found = self._open.get(sha256)
            if found:
                return found
            if sha256 in self._damaged:
                raise _damaged(sha256)
            descriptor = self.blobs.open(sha256)
            status = fstat(descriptor)
            found = _OpenBlob(descriptor, status.st_size, status.st_mtime_ns)
            if found.size not in self._expected.get(sha256, (found.size,)):
                raise NotFoundError(f"the blob {blob_name(sha256)} has a wrong size")
            self._open[sha256] = found
            if len(self._open) > _MOST_OPEN:
                del self._open[next(iter(self._open))]
            return found


def _damaged(sha256: bytes) -> DamagedError:
    return DamagedError(f"the blob {blob_name(sha256)} is damaged")


@attrs.frozen(eq=False)
class LocalBlobs:
    """Blobs that this server stores and offers.

    Attributes:
        files: Serves the offered blobs and others; None: there are none.
    """

    offered: frozenset[Key] = frozenset()
    files: OpenBlobs | None = None
    metric: int = BLOB_METRIC

    def add_offer(self, archive: Archive) -> Archive:
        """Add the server's own offer to an archive whose file it offers.

        If the archive has as many offers as it can have, that of the highest metric is left out.
        Source: rule C-87.
        """
        if key_of(archive) not in self.offered:
            return archive
        own = Offer(url=BLOBS_PATH + blob_name(archive.envelope.sha256), metric=self.metric)
        others = sorted(
            (offer for offer in archive.offers if offer.url != own.url),
            key=lambda offer: offer.metric,
        )
        return attrs.evolve(archive, offers=(own, *others[: LIMITS["offers"].value - 1]))


def prefix_own_offers(prefix: str, archive: Archive) -> Archive:
    """Put a prefix before the URLs of offers of this server's blobs. Source: rule H-14."""
    if not prefix:
        return archive
    offers = (
        attrs.evolve(offer, url=prefix + offer.url) if offer.url.startswith(BLOBS_PATH) else offer
        for offer in archive.offers
    )
    return attrs.evolve(archive, offers=tuple(offers))


NO_BLOBS = LocalBlobs()
