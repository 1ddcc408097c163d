"""Fetches the blobs that are needed here, each once, and goes on where it was interrupted.

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

from netota_coap.client.download import Limit, download
from netota_coap.errors import ConfigError, IntegrityError, RepositoryError, TransferError
from netota_coap.files import Progress, open_nofollow, writing
from netota_coap.model.values import Archive, Envelope, Stream
from netota_coap.repository.blobs import INCOMING, Blobs
from netota_coap.repository.lock import require_repository

_log = logging.getLogger(__name__)

_AT_ONCE = 2
_MOST_BEGUN = 64  # each has sockets and a file open, also while it waits for its server
_TIMEOUT_S = 30.0
_PATIENCE_S = 3_600.0
_LOOK_S = 1.0
_STALE_S = 7 * 86_400.0
_HELD_S = 86_400.0  # the same of what only keeps a blob


class SupersededError(Exception):
    """What is being fetched is not wanted any more."""


@attrs.define
class Incoming:
    """What is on its way into the blobs of a repository.

    Attributes:
        root: Of the repository.
        limit_bytes_s: Of all downloads together, bytes per second; None: none.
        keep_free: What is to stay free on the disk, bytes.
        size_cap: Of all blobs together, bytes, as far as the streams hold no more; None: none.
        in_flight: Blocks that are asked for at a time over CoAP, 1 to 64.
        received: Bytes that came so far.
    """

    root: Path
    limit_bytes_s: int | None = None
    keep_free: int = 0
    size_cap: int | None = None
    in_flight: int = 1
    received: int = attrs.field(init=False, default=0)
    _limit: Limit | None = attrs.field(init=False)
    _slots: asyncio.Semaphore = attrs.field(
        init=False, factory=lambda: asyncio.Semaphore(_AT_ONCE)
    )
    _begun: asyncio.Semaphore = attrs.field(
        init=False, factory=lambda: asyncio.Semaphore(_MOST_BEGUN)
    )
    _locks: weakref.WeakValueDictionary[bytes, asyncio.Lock] = attrs.field(
        init=False, factory=weakref.WeakValueDictionary
    )
    _needed: Counter[bytes] = attrs.field(init=False, factory=Counter)
    _marked: set[bytes] = attrs.field(init=False, factory=set)  # names here that are our own
    _expected: int = attrs.field(init=False, default=0)  # bytes of those that are under way

    @_limit.default
    def _limited(self) -> Limit | None:
        return Limit(self.limit_bytes_s) if self.limit_bytes_s else None

    @contextlib.asynccontextmanager
    async def fetched(
        self,
        archives: Collection[Archive],
        is_superseded: Callable[[], bool],
        progress: Progress = lambda _: None,
    ) -> AsyncIterator[None]:
        """Fetch what is not held yet, and keep all of it for as long as the block takes.

        What has arrived of a file stays, whatever happens.

        Args:
            archives: That are needed.
            is_superseded: Asked again and again; once it is so, nothing more is fetched.
            progress: Called as that of `download`, of all of them together.

        Raises:
            SupersededError: It is.
            TransferError: One of them cannot be had now.
            RepositoryError: It cannot be stored, or the disk would be too full.
        """
        wanted = {archive.envelope.sha256: archive for archive in archives}
        self._needed.update(wanted.keys())
        try:
            missing = await asyncio.to_thread(self._missing, wanted.values())
            fetching = (self._one(each, is_superseded, progress) for each in missing)
            for error in await asyncio.gather(*fetching, return_exceptions=True):
                if error is not None:
                    raise error
            yield
        finally:
            self._needed.subtract(wanted.keys())
            done = [each.envelope for each in archives if not self._needed[each.envelope.sha256]]
            self._needed = +self._needed
            await asyncio.to_thread(self._clear, done)

    async def _one(
        self, archive: Archive, is_superseded: Callable[[], bool], progress: Progress
    ) -> None:
        envelope = archive.envelope

        async def pace(count: int) -> None:
            if is_superseded():
                raise SupersededError
            self.received += count
            if self._limit:
                await self._limit(count)

        async def idle(seconds: float) -> None:
            """Wait for a server, and let others have its time."""
            await slot.aclose()
            while seconds > 0:
                if is_superseded():
                    raise SupersededError
                await asyncio.sleep(min(seconds, _LOOK_S))
                seconds -= _LOOK_S
            await slot.enter_async_context(self._slots)

        # Two streams may hold the same file.
        lock = self._locks.setdefault(envelope.sha256, asyncio.Lock())
        async with lock, self._begun, contextlib.AsyncExitStack() as slot:
            await slot.enter_async_context(self._slots)
            if await asyncio.to_thread(self._holds, envelope):
                return
            if is_superseded():
                raise SupersededError
            self._expected += envelope.size
            _log.info("fetching %s, %d bytes", archive.name, envelope.size)
            try:
                target = await asyncio.to_thread(self._place, envelope)
                await download(
                    *(archive, target),
                    timeout_s=_TIMEOUT_S,
                    progress=progress,
                    pace=pace,
                    in_flight=self.in_flight,
                    patience_s=_PATIENCE_S,
                    idle=idle,
                )
                self._marked.add(envelope.sha256)
            except IntegrityError as error:
                # Not of the upstream, which may have a better offer soon.
                detail = error.detail.removeprefix(f"{error.uri}: ")
                raise TransferError(detail, uri=error.uri, hint=error.hint) from error
            except ConfigError as error:
                # Of this machine's proxies, or what lies in the way here.
                raise RepositoryError(error.detail, hint=error.hint) from error
            except OSError as error:
                raise RepositoryError(f"{self.root}: cannot be written: {error}") from error
            finally:
                self._expected -= envelope.size
            await asyncio.to_thread(Blobs(self.root).add, target, envelope, link=True)

    @property
    def _places(self) -> tuple[Path, Path]:
        return (self.root / INCOMING).parent, self.root / INCOMING

    def _holds(self, envelope: Envelope) -> bool:
        return bool(Blobs(self.root).held((envelope,)))

    def _missing(self, archives: Collection[Archive]) -> list[Archive]:
        """Return what is not held; until it is, `blob gc` leaves alone what is."""
        missing = [each for each in archives if not self._holds(each.envelope)]
        if missing:
            require_repository(self.root)
            with writing(self.root):
                for place in self._places:
                    place.mkdir(exist_ok=True)
                    if place.is_symlink():
                        raise RepositoryError(f"{place}: is a link, which is not followed")
                for each in archives:
                    self._mark(each.envelope.sha256)
            missing = [each for each in archives if not self._holds(each.envelope)]
        return missing

    def _mark(self, sha256: bytes) -> None:
        # One that is there may be another process's, which removes it when it is done.
        with contextlib.suppress(FileExistsError):
            (self.root / INCOMING / sha256.hex()).touch(exist_ok=False)
            self._marked.add(sha256)

    def _place(self, envelope: Envelope) -> Path:
        """Return where a file is to arrive, if there is room for it."""
        target = self.root / INCOMING / envelope.sha256.hex()
        with writing(self.root):
            there = sum(part.stat().st_size for part in target.parent.glob(f".{target.name}.*"))
            left = shutil.disk_usage(target.parent).free + there - self._expected
        if left < self.keep_free:
            raise RepositoryError(
                f"{self.root}: {envelope.size} bytes would leave less than {self.keep_free} free",
                hint=f"Make room on the disk: netota-coap blob gc {self.root}",
            )
        return target

    def _clear(self, envelopes: Iterable[Envelope]) -> None:
        """Remove what told `blob gc` that blobs were wanted here."""
        for envelope in envelopes:
            if envelope.sha256 in self._marked:
                target = self.root / INCOMING / envelope.sha256.hex()
                with writing(self.root), contextlib.suppress(FileNotFoundError):
                    if target.stat().st_size == 0 or self._holds(envelope):
                        target.unlink()
                self._marked.discard(envelope.sha256)

    def let_go(self, state: Stream) -> None:
        """Take note that a state is over, and let the oldest blobs leave if there are too many."""
        if self.size_cap is not None:
            Blobs(self.root).renew(archive.envelope for archive in state.archives or ())
            self.make_room()

    def make_room(self) -> None:
        """Let the oldest blobs leave, if there are too many."""
        if self.size_cap is not None:
            Blobs(self.root).shrink(self.size_cap, tuple(self._needed))

    def tidy(self) -> None:
        """Remove what nobody went on with for a week; what cannot be removed stays."""
        if any(place.is_symlink() for place in self._places):
            return
        needed = {sha256.hex() for sha256 in tuple(self._needed)}
        with contextlib.suppress(OSError):
            for file in tuple((self.root / INCOMING).iterdir()):
                if file.name not in needed:
                    with contextlib.suppress(OSError):
                        self._tidy(file)

    def _tidy(self, file: Path) -> None:
        # A name whose blob is there was left between two steps, or waits for others elsewhere.
        held = (self.root / "blobs/sha256" / file.name[:2] / file.name).exists()
        if file.lstat().st_mtime < time.time() - (_HELD_S if held else _STALE_S):
            with open(file, "rb", opener=open_nofollow) as stream:
                # Whoever writes to it holds this lock.
                fcntl.flock(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
                file.unlink()
