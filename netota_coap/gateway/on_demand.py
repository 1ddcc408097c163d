"""Fetches files when the first device asks for them: any number of devices, one download.

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
from netota_coap.gateway.blob_fetcher import Incoming, SupersededError
from netota_coap.gateway.upstreams import reason_of
from netota_coap.model.values import LIMITS, Archive, Repository
from netota_coap.repository.blobs import Key, key_of

_log = logging.getLogger(__name__)

_SCHEMES = ("coap://", "http://", "https://")
FIRST_S = 1  # until anything is known of how fast it comes
_LONGEST_S = 60
_RETRY_S = 10.0
_LONGEST_RETRY_S = 300.0


@attrs.frozen
class Fetchable:
    """A file that can be had from elsewhere.

    Attributes:
        label: Of one of the archives that it is: `package/stream: archive`.
        archive: That one, with offers of them all.
    """

    label: str
    archive: Archive

    def joined(self, archive: Archive) -> Fetchable:
        """Return the same with the offers of another archive, the best of all."""
        offers = dict.fromkeys((*self.archive.offers, *archive.offers))
        best = sorted(offers, key=lambda offer: offer.metric)[: LIMITS["offers"].value]
        return attrs.evolve(self, archive=attrs.evolve(self.archive, offers=tuple(best)))


@attrs.define
class _Fetch:
    """A download that devices wait for.

    Attributes:
        task: That does it.
        size: Of the file, bytes.
        arrived: Bytes of it.
        begun: How many of them were there before, and when it went on from there.
    """

    task: asyncio.Task[None]
    size: int = 0
    arrived: int = 0
    begun: tuple[int, float] | None = None

    def begin(self, size: int) -> None:
        self.size, self.arrived, self.begun = size, 0, None

    def progress(self, count: int) -> None:
        self.arrived += count
        if self.begun is None:
            self.begun = self.arrived, time.monotonic()

    def after_s(self) -> int:
        """Return how long it will take, as far as that can be told, in the bounds of reason."""
        before, since_s = self.begun or (0, 0.0)
        come = self.arrived - before
        if come <= 0:
            return FIRST_S
        left_s = (self.size - self.arrived) * (time.monotonic() - since_s) / come
        return min(max(math.ceil(left_s), 1), _LONGEST_S)


@attrs.define
class _Failure:
    """A download that failed.

    Attributes:
        reason: Why.
        wait_s: How long it is left alone.
        until_s: Until when, on the clock of `time.monotonic`.
    """

    reason: str
    wait_s: float
    until_s: float


@attrs.define(eq=False)
class OnDemand:
    """What can be fetched, and is being fetched.

    Attributes:
        incoming: Fetches it.
    """

    incoming: Incoming
    _fetchable: Mapping[bytes, Sequence[Fetchable]] = attrs.field(init=False, factory=dict)
    _fetches: dict[bytes, _Fetch] = attrs.field(init=False, factory=dict)
    _failures: dict[bytes, _Failure] = attrs.field(init=False, factory=dict)

    def offer(self, fetchable: Mapping[Key, Fetchable]) -> None:
        """Fetch these on demand from now on, and nothing else."""
        by_digest: dict[bytes, list[Fetchable]] = {}
        for (sha256, _), each in fetchable.items():
            by_digest.setdefault(sha256, []).append(each)
        self._fetchable = by_digest
        for sha256 in self._failures.keys() - by_digest:
            del self._failures[sha256]

    def fetch(self, sha256: bytes) -> None:
        """See to it that a file comes here, if it can be had.

        Raises:
            NotYetError: It comes.
            NotFetchedError: It could not be had, and is tried again later.
        """
        if sha256 not in self._fetchable:
            return
        failure, now_s = self._failures.get(sha256), time.monotonic()
        if failure and failure.until_s > now_s:
            detail = f"the file could not be fetched: {failure.reason}"
            raise NotFetchedError(detail, after_s=math.ceil(failure.until_s - now_s))
        if sha256 not in self._fetches:
            task = asyncio.get_running_loop().create_task(self._fetched(sha256))
            self._fetches[sha256] = _Fetch(task)
        detail = "the file is being fetched, ask again"
        raise NotYetError(detail, after_s=self._fetches[sha256].after_s())

    async def _fetched(self, sha256: bytes) -> None:
        """Fetch a file as one of the archives that it is; where sizes differ, one of them lies."""
        fetch, failures = self._fetches[sha256], []
        try:
            for wanted in self._fetchable[sha256]:
                fetch.begin(wanted.archive.envelope.size)
                try:
                    await self._as(wanted, fetch)
                except NetotaError as error:
                    failures.append((wanted, error))
                else:
                    return
            self._fail(*failures[-1])
        except SupersededError:
            pass
        finally:
            del self._fetches[sha256]

    async def _as(self, wanted: Fetchable, fetch: _Fetch) -> None:
        sha256 = wanted.archive.envelope.sha256
        is_over = lambda: sha256 not in self._fetchable  # noqa: E731
        async with self.incoming.fetched((wanted.archive,), is_over, fetch.progress):
            pass
        self._failures.pop(sha256, None)
        _log.info("%s: fetched", wanted.label)
        try:
            await asyncio.to_thread(self.incoming.make_room)
        except NetotaError as error:
            _log.warning("no room was made: %s", error.detail)  # the next time will do

    def _fail(self, wanted: Fetchable, error: NetotaError) -> None:
        sha256 = wanted.archive.envelope.sha256
        reason = reason_of(error.detail.removeprefix(f"{wanted.archive.name}: "))
        before = self._failures.get(sha256)
        if before is None or before.reason != reason:
            hint = f" ({error.hint})" if error.hint else ""
            _log.warning("%s: could not be fetched: %s%s", wanted.label, reason, hint)
        wait_s = min(before.wait_s * 2, _LONGEST_RETRY_S) if before else _RETRY_S
        self._failures[sha256] = _Failure(reason, wait_s, time.monotonic() + wait_s)

    async def close(self) -> None:
        """Fetch no more; what has arrived stays."""
        tasks = [fetch.task for fetch in self._fetches.values()]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


def fetchable(state: Repository) -> dict[Key, Fetchable]:
    """Return the files of a repository's streams that others offer, with all of their offers."""
    found: dict[Key, Fetchable] = {}
    for package_name, package in state.packages.items():
        for stream_name, stream in package.streams.items():
            for archive in stream.archives or ():
                if any(offer.url.startswith(_SCHEMES) for offer in archive.offers):
                    key = key_of(archive)
                    label = f"{package_name}/{stream_name}: {archive.name}"
                    one = found.get(key)
                    found[key] = one.joined(archive) if one else Fetchable(label, archive)
    return found
