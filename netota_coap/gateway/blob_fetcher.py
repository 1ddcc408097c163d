"""Downloads blobs into a repository, each once, and resumes interrupted downloads.

Source: `spec/mirror.md`, rules M-30 to M-36.
"""

from __future__ import annotations

import asyncio
import contextlib
import fcntl
import logging
import shutil
import time
import weakref
from collections import Counter
from collections.abc import AsyncIterator, Callable, Collection, Iterable
from pathlib import Path

import attrs

from netota_coap.client.downloads import RateLimit, download
from netota_coap.errors import ConfigError, IntegrityError, RepositoryError, TransferError
from netota_coap.files import Progress, open_nofollow, writing
from netota_coap.model.values import Archive, Envelope, Stream
from netota_coap.repository.blobs import INCOMING, Blobs
from netota_coap.repository.lock import require_repository

_log = logging.getLogger(__name__)

_AT_ONCE = 2
MOST_BEGUN = 64  # each has sockets and a file open, even while it waits for its server
_TIMEOUT_S = 30.0
_PATIENCE_S = 3_600.0
CHECK_S = 1.0  # how often a wait checks whether it is obsolete
_STALE_S = 7 * 86_400.0
_STALE_CLAIM_S = 86_400.0


class ObsoleteError(Exception):
    """The file is no longer needed."""


@attrs.define
class BlobFetcher:
    """Downloads the files of all mirrors of a repository.

    A claim is an empty file in `blobs/.incoming` named by a digest: `blob gc` keeps that blob.
    """

    root: Path
    limit_bytes_s: int | None = None  # for all downloads together; None: unlimited
    keep_free: int = 0  # bytes that stay free on the disk
    size_cap: int | None = None  # bytes of blobs above which unused ones are deleted
    in_flight: int = 1  # blocks requested at a time over CoAP, 1 to 64
    received: int = attrs.field(init=False, default=0)  # bytes downloaded so far
    _limit: RateLimit | None = attrs.field(init=False)
    _slots: asyncio.Semaphore = attrs.field(init=False)
    _begun: asyncio.Semaphore = attrs.field(init=False)
    _locks: weakref.WeakValueDictionary[bytes, asyncio.Lock] = attrs.field(init=False)
    _needed: Counter[bytes] = attrs.field(init=False, factory=Counter)
    _claimed: set[bytes] = attrs.field(init=False, factory=set)  # by this process
    _pending: int = attrs.field(init=False, default=0)  # bytes of all downloads that have begun

    def __attrs_post_init__(self) -> None:
        self._limit = RateLimit(self.limit_bytes_s) if self.limit_bytes_s else None
        self._slots, self._begun = asyncio.Semaphore(_AT_ONCE), asyncio.Semaphore(MOST_BEGUN)
        self._locks = weakref.WeakValueDictionary()

    @contextlib.asynccontextmanager
    async def fetched(
        self,
        archives: Collection[Archive],
        is_obsolete: Callable[[], bool],
        progress: Progress = lambda _: None,
    ) -> AsyncIterator[None]:
        """Download missing blobs, and protect all of them from `blob gc` until the block ends.

        Partial downloads are kept. The downloads end once `is_obsolete` returns True.

        Raises:
            ObsoleteError: The blobs are no longer needed.
            TransferError: A download failed.
            RepositoryError: A blob cannot be stored, or the disk would be too full.
        """
        wanted = {archive.envelope.sha256: archive for archive in archives}
        self._needed.update(wanted.keys())
        try:
            missing = await asyncio.to_thread(self._claim_missing, wanted.values())
            fetching = (self._fetch(each, is_obsolete, progress) for each in missing)
            for error in await asyncio.gather(*fetching, return_exceptions=True):
                if error is not None:
                    raise error
            yield
        finally:
            self._needed.subtract(wanted.keys())
            done = [each.envelope for each in archives if not self._needed[each.envelope.sha256]]
            self._needed = +self._needed
            await asyncio.to_thread(self._unclaim, done)

    async def _fetch(
        self, archive: Archive, is_obsolete: Callable[[], bool], progress: Progress
    ) -> None:
        envelope = archive.envelope

        async def pace(count: int) -> None:
            if is_obsolete():
                raise ObsoleteError
            self.received += count
            if self._limit:
                await self._limit(count)

        async def idle(seconds: float) -> None:
            """Wait for a server, and let another download have the slot meanwhile."""
            await slot.aclose()
            while seconds > 0:
                if is_obsolete():
                    raise ObsoleteError
                await asyncio.sleep(min(seconds, CHECK_S))
                seconds -= CHECK_S
            await slot.enter_async_context(self._slots)

        # Several streams may have the same file.
        lock = self._locks.setdefault(envelope.sha256, asyncio.Lock())
        async with lock, self._begun, contextlib.AsyncExitStack() as slot:
            await slot.enter_async_context(self._slots)
            if await asyncio.to_thread(self._is_stored, envelope):
                return
            if is_obsolete():
                raise ObsoleteError
            self._pending += envelope.size
            _log.info("fetching %s, %d bytes", archive.name, envelope.size)
            try:
                target = await asyncio.to_thread(self._target, envelope)
                await download(
                    *(archive, target),
                    timeout_s=_TIMEOUT_S,
                    progress=progress,
                    pace=pace,
                    in_flight=self.in_flight,
                    patience_s=_PATIENCE_S,
                    idle=idle,
                )
                self._claimed.add(envelope.sha256)
            except IntegrityError as error:
                # The upstream is not to blame, and may have another offer soon.
                detail = error.detail.removeprefix(f"{error.uri}: ")
                raise TransferError(detail, uri=error.uri, hint=error.hint) from error
            except ConfigError as error:
                # The proxy settings are invalid, or something is in the place of the file.
                raise RepositoryError(error.detail, hint=error.hint) from error
            except OSError as error:
                raise RepositoryError(f"{self.root}: cannot be written: {error}") from error
            finally:
                self._pending -= envelope.size
            await asyncio.to_thread(Blobs(self.root).add, target, envelope, link=True)

    @property
    def _directories(self) -> tuple[Path, Path]:
        return (self.root / INCOMING).parent, self.root / INCOMING

    def _is_stored(self, envelope: Envelope) -> bool:
        return bool(Blobs(self.root).held((envelope,)))

    def _claim_missing(self, archives: Collection[Archive]) -> list[Archive]:
        """Return the archives without blobs; if there are any, claim the blobs of all."""
        missing = [each for each in archives if not self._is_stored(each.envelope)]
        if missing:
            require_repository(self.root)
            with writing(self.root):
                for directory in self._directories:
                    directory.mkdir(exist_ok=True)
                    if directory.is_symlink():
                        raise RepositoryError(f"{directory}: is a link, which is not followed")
                for sha256 in (each.envelope.sha256 for each in archives):
                    # An existing claim may be another process's, which removes it.
                    with contextlib.suppress(FileExistsError):
                        self._incoming(sha256).touch(exist_ok=False)
                        self._claimed.add(sha256)
            missing = [each for each in archives if not self._is_stored(each.envelope)]
        return missing

    def _incoming(self, sha256: bytes) -> Path:
        return self.root / INCOMING / sha256.hex()

    def _target(self, envelope: Envelope) -> Path:
        """Return the path to download to, if there is room on the disk."""
        target = self._incoming(envelope.sha256)
        with writing(self.root):
            there = sum(part.stat().st_size for part in target.parent.glob(f".{target.name}.*"))
            left = shutil.disk_usage(target.parent).free + there - self._pending
        if left < self.keep_free:
            raise RepositoryError(
                f"{self.root}: {envelope.size} bytes would leave less than {self.keep_free} free",
                hint=f"Make room on the disk: netota-coap blob gc {self.root}",
            )
        return target

    def _unclaim(self, envelopes: Iterable[Envelope]) -> None:
        for envelope in envelopes:
            if envelope.sha256 in self._claimed:
                target = self._incoming(envelope.sha256)
                with writing(self.root), contextlib.suppress(FileNotFoundError):
                    if target.stat().st_size == 0 or self._is_stored(envelope):
                        target.unlink()
                self._claimed.discard(envelope.sha256)

    def release(self, state: Stream) -> None:
        """Note that the blobs of a state were used until now, and apply `size_cap`."""
        if self.size_cap is not None:
            Blobs(self.root).renew(archive.envelope for archive in state.archives or ())
            self.make_room()

    def make_room(self) -> None:
        """Delete unused blobs above `size_cap`, longest unused first."""
        if self.size_cap is not None:
            Blobs(self.root).shrink(self.size_cap, tuple(self._needed))

    def remove_stale(self) -> None:
        """Remove incoming files untouched for 7 days, or for a day if their blob is stored."""
        if any(directory.is_symlink() for directory in self._directories):
            return
        needed = {sha256.hex() for sha256 in tuple(self._needed)}
        with contextlib.suppress(OSError):
            for file in tuple((self.root / INCOMING).iterdir()):
                if file.name not in needed:
                    with contextlib.suppress(OSError):
                        self._remove_if_stale(file)

    def _remove_if_stale(self, file: Path) -> None:
        # A claim whose blob is stored is another process's, or was left by a kill.
        stored = (self.root / "blobs/sha256" / file.name[:2] / file.name).exists()
        if file.lstat().st_mtime < time.time() - (_STALE_CLAIM_S if stored else _STALE_S):
            with open(file, "rb", opener=open_nofollow) as stream:
                # A download holds this lock while it writes.
                fcntl.flock(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
                file.unlink()
