"""Downloads a file when the first device asks for it; all devices share the download.

Source: `spec/mirror.md`, rules M-40 to M-45.
"""

from __future__ import annotations

import asyncio
import logging
import math
import time
from collections.abc import Mapping, Sequence

import attrs

from netota_coap.errors import NetotaError, NotFetchedError, NotYetError
from netota_coap.gateway.blob_fetcher import BlobFetcher, ObsoleteError
from netota_coap.gateway.upstreams import reason_of
from netota_coap.model.values import LIMITS, Archive, Repository
from netota_coap.repository.blobs import Key, key_of

_log = logging.getLogger(__name__)

_SCHEMES = ("coap://", "http://", "https://")
FIRST_S = 1  # until the rate of the download is known
_LONGEST_S = 60
RETRY_S = 10.0
_LONGEST_RETRY_S = 300.0


@attrs.frozen
class RemoteFile:
    """A file that other servers offer: an archive, with the offers of all archives of the file."""

    label: str  # names the archive: `package/stream: archive`
    archive: Archive

    def joined(self, archive: Archive) -> RemoteFile:
        """Return the file with the best of its offers and those of another archive."""
        offers = dict.fromkeys((*self.archive.offers, *archive.offers))
        best = sorted(offers, key=lambda offer: offer.metric)[: LIMITS["offers"].value]
        return attrs.evolve(self, archive=attrs.evolve(self.archive, offers=tuple(best)))


@attrs.define
class _Fetch:
    """A download that devices wait for."""

    task: asyncio.Task[None]
    size: int = 0
    arrived: int = 0  # bytes
    begun: tuple[int, float] | None = None  # bytes that were here before; time of resuming

    def begin(self, size: int) -> None:
        self.size, self.arrived, self.begun = size, 0, None

    def progress(self, count: int) -> None:
        self.arrived += count
        if self.begun is None:
            self.begun = self.arrived, time.monotonic()

    def after_s(self) -> int:
        """Estimate the remaining time, 1 to 60 s."""
        before, since_s = self.begun or (0, 0.0)
        gained = self.arrived - before
        if gained <= 0:
            return FIRST_S
        left_s = (self.size - self.arrived) * (time.monotonic() - since_s) / gained
        return min(max(math.ceil(left_s), 1), _LONGEST_S)


@attrs.define
class _Failure:
    """A failed download, which is not retried before `until_s` by `time.monotonic`."""

    reason: str
    wait_s: float
    until_s: float


@attrs.define(eq=False)
class OnDemand:
    """The files that are downloaded when devices ask for them, and the running downloads."""

    fetcher: BlobFetcher
    _files: Mapping[bytes, Sequence[RemoteFile]] = attrs.field(init=False, factory=dict)
    _fetches: dict[bytes, _Fetch] = attrs.field(init=False, factory=dict)
    _failures: dict[bytes, _Failure] = attrs.field(init=False, factory=dict)

    def set_files(self, files: Mapping[Key, RemoteFile]) -> None:
        """Fetch these files on demand from now on, and give up downloads of others."""
        by_digest: dict[bytes, list[RemoteFile]] = {}
        for (sha256, _), each in files.items():
            by_digest.setdefault(sha256, []).append(each)
        self._files = by_digest
        for sha256 in self._failures.keys() - by_digest:
            del self._failures[sha256]

    def fetch(self, sha256: bytes) -> None:
        """Start the download of a file unless it runs; do nothing if nobody offers the file.

        Raises:
            NotYetError: The download runs.
            NotFetchedError: The download failed, and will be retried later.
        """
        if sha256 not in self._files:
            return
        failure, now_s = self._failures.get(sha256), time.monotonic()
        if failure and failure.until_s > now_s:
            detail = f"the file could not be fetched: {failure.reason}"
            raise NotFetchedError(detail, after_s=math.ceil(failure.until_s - now_s))
        if sha256 not in self._fetches:
            task = asyncio.get_running_loop().create_task(self._download(sha256))
            self._fetches[sha256] = _Fetch(task)
        detail = "the file is being fetched, ask again"
        raise NotYetError(detail, after_s=self._fetches[sha256].after_s())

    async def _download(self, sha256: bytes) -> None:
        """Download a file; if streams disagree about its size, try each of the sizes."""
        fetch, failures = self._fetches[sha256], []
        try:
            for file in self._files[sha256]:
                fetch.begin(file.archive.envelope.size)
                try:
                    await self._download_as(file, fetch)
                except NetotaError as error:
                    failures.append((file, error))
                else:
                    return
            self._fail(*failures[-1])
        except ObsoleteError:
            pass
        finally:
            del self._fetches[sha256]

    async def _download_as(self, file: RemoteFile, fetch: _Fetch) -> None:
        sha256 = file.archive.envelope.sha256
        is_obsolete = lambda: sha256 not in self._files  # noqa: E731
        async with self.fetcher.fetched((file.archive,), is_obsolete, fetch.progress):
            pass
        self._failures.pop(sha256, None)
        _log.info("%s: fetched", file.label)
        try:
            await asyncio.to_thread(self.fetcher.make_room)
        except NetotaError as error:
            _log.warning("unused blobs could not be deleted: %s", error.detail)

    def _fail(self, file: RemoteFile, error: NetotaError) -> None:
        sha256 = file.archive.envelope.sha256
        reason = reason_of(error.detail.removeprefix(f"{file.archive.name}: "))
        before = self._failures.get(sha256)
        if before is None or before.reason != reason:
            hint = f" ({error.hint})" if error.hint else ""
            _log.warning("%s: could not be fetched: %s%s", file.label, reason, hint)
        wait_s = min(before.wait_s * 2, _LONGEST_RETRY_S) if before else RETRY_S
        self._failures[sha256] = _Failure(reason, wait_s, time.monotonic() + wait_s)

    async def close(self) -> None:
        """Stop all downloads, and keep what has arrived."""
        tasks = [fetch.task for fetch in self._fetches.values()]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


def remote_files(state: Repository) -> dict[Key, RemoteFile]:
    """Return the files of a repository that other servers offer."""
    found: dict[Key, RemoteFile] = {}
    for package_name, package in state.packages.items():
        for stream_name, stream in package.streams.items():
            for archive in stream.archives or ():
                if any(offer.url.startswith(_SCHEMES) for offer in archive.offers):
                    key = key_of(archive)
                    label = f"{package_name}/{stream_name}: {archive.name}"
                    file = found.get(key)
                    found[key] = file.joined(archive) if file else RemoteFile(label, archive)
    return found
