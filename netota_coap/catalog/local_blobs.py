"""What a server holds of the files that it tells of: which, what it asks of it, and their bytes.

Source: rules C-85 to C-89.
"""

from __future__ import annotations

import logging
import os
import threading
from collections.abc import Callable, Collection, Iterable, Mapping
from os import fstat, pread

import attrs

from netota_coap.errors import DamagedError, NotFoundError
from netota_coap.model.values import LIMITS, Archive, Offer
from netota_coap.repository.blobs import Blobs, Key, blob_name, key_of, path_of

_log = logging.getLogger(__name__)

DEFAULT_METRIC = 10
_MOST_OPEN = 64
_OWN = "/b/"

Fetch = Callable[[bytes], None]
"""Sees to it that a file, by its SHA-256, comes here from elsewhere.

It raises a `NotYetError` if it comes, and returns if it is to be had nowhere.
"""


@attrs.frozen
class _Open:
    """A blob that is being read.

    Attributes:
        descriptor: Is closed with it.
        size: Bytes.
        written_ns: When; a blob is never written again.
    """

    descriptor: int
    size: int
    written_ns: int

    def __del__(self) -> None:
        os.close(self.descriptor)


@attrs.define(eq=False)
class OpenBlobs:
    """The bytes of blobs, by descriptors that are kept; those opened first are closed first.

    May be used by several threads.

    Attributes:
        blobs: Of the repository.
        fetch: Called, in the event loop's thread, with each one that is asked for and not held.
    """

    blobs: Blobs
    fetch: Fetch = lambda _: None
    _promised: Mapping[bytes, Collection[int]] = attrs.field(init=False, factory=dict)
    _damaged: set[bytes] = attrs.field(init=False, factory=set)
    _open: dict[bytes, _Open] = attrs.field(init=False, factory=dict)
    _lock: threading.Lock = attrs.field(init=False, factory=threading.Lock)

    def size(self, sha256: bytes) -> int:
        """Return how many bytes a blob has.

        Raises:
            NotFoundError: It is not held here (any more).
            DamagedError: It was changed since it was opened.
            RepositoryError: It cannot be read.
        """
        return self._of(sha256).size

    def read(self, sha256: bytes, offset: int, size: int) -> bytes:
        """Return a part of a blob: all that was asked for, up to its end.

        Raises:
            NotFoundError: It is not held here (any more).
            DamagedError: It was changed since it was opened.
            RepositoryError: It cannot be read.
        """
        return self.piece(sha256, offset, size)[0]

    def piece(self, sha256: bytes, offset: int, size: int) -> tuple[bytes, bool]:
        """Return what `read` does, and whether more follows."""
        found = self._open.get(sha256) or self._of(sha256)
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
                    _log.warning("%s: changed while it was served: blob verify", path_of(sha256))
            raise _damaged(sha256)
        return part, more

    def refresh(self, promised: Iterable[Key]) -> None:
        """Open all blobs anew from now on.

        Args:
            promised: What some of them must be; where sizes contradict each other, one of them.
        """
        sizes: dict[bytes, set[int]] = {}
        for sha256, size in promised:
            sizes.setdefault(sha256, set()).add(size)
        with self._lock:
            self._open.clear()
            self._damaged.clear()
            self._promised = sizes

    def _of(self, sha256: bytes) -> _Open:
        with self._lock:
            found = self._open.get(sha256)
            if found:
                return found
            if sha256 in self._damaged:
                raise _damaged(sha256)
            descriptor = self.blobs.open(sha256)
            status = fstat(descriptor)
            found = _Open(descriptor, status.st_size, status.st_mtime_ns)
            if found.size not in self._promised.get(sha256, (found.size,)):
                raise NotFoundError(f"the blob {blob_name(sha256)} has a wrong size")
            self._open[sha256] = found
            if len(self._open) > _MOST_OPEN:
                del self._open[next(iter(self._open))]
            return found


def _damaged(sha256: bytes) -> DamagedError:
    return DamagedError(f"the blob {blob_name(sha256)} is damaged")


@attrs.frozen(eq=False)
class Holding:
    """What a server holds, and offers by itself.

    Attributes:
        offered: What it offers.
        files: Bytes of these and others; None: nothing is held.
        metric: Of its offers.
    """

    offered: frozenset[Key] = frozenset()
    files: OpenBlobs | None = None
    metric: int = DEFAULT_METRIC

    def offers(self, archive: Archive) -> Archive:
        """Add the server's own offer to an archive, if it holds the file.

        Of as many offers as there can be, the one of the highest metric makes room.

        Source: rule C-87.
        """
        if key_of(archive) not in self.offered:
            return archive
        own = Offer(url=_OWN + blob_name(archive.envelope.sha256), metric=self.metric)
        others = sorted(
            (offer for offer in archive.offers if offer.url != own.url),
            key=lambda offer: offer.metric,
        )
        return attrs.evolve(archive, offers=(own, *others[: LIMITS["offers"].value - 1]))


def own_below(prefix: str, archive: Archive) -> Archive:
    """Put a prefix before the URLs of what servers offer themselves. Source: rule H-14."""
    if not prefix:
        return archive
    offers = (
        attrs.evolve(offer, url=prefix + offer.url) if offer.url.startswith(_OWN) else offer
        for offer in archive.offers
    )
    return attrs.evolve(archive, offers=tuple(offers))


NOTHING = Holding()
