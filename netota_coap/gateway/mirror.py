"""Follows an upstream: adopts the states of its streams, with their files, into a repository.

Invariants:
* A stream on disk always has a whole state. `adopt` is asked twice: before the files are fetched,
  to refuse early, and under the repository's lock, from what the stream has then.
* Files come first: a state is written once all files that it needs are blobs. It is written
  before its files if the stream is closed, and with `announce_at_once` or without `ahead`.
* The author `mirror of URI` owns a stream. Only streams of this upstream are changed or removed.
* A state is refused if it is malformed, incomplete, of another author's stream, below the last
  sequence, or different under the same one. The old state stays. A refusal counts as processed,
  so the state is requested again only after news.
* A kill leaves the old state or the new one, partial downloads, and names in `blobs/.incoming`
  that protect blobs from `blob gc`. The next run asks for every stream, and resumes.

News: an observation (CoAP) or an event stream (HTTP) yields an ETag over everything upstream.
After a new ETag, or without any, the lists are read, every `retry_s` at most, and the streams
whose entries were not processed are updated; all streams if there is no such entry. If the first
ETag of an observation is not new, only missing blobs are looked for. One task updates a stream;
news makes it start again, and ends downloads for a state that is no longer listed.

Retries: the wait for the upstream, and that for each stream, begins at `retry_s` and doubles up to
5 minutes. It is reset by an observation that lasted as long as the wait; news wakes a stream.
Source: `spec/mirror.md`.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import math
from collections.abc import AsyncIterator, Callable, Collection, Iterator
from datetime import UTC, datetime
from functools import partial
from pathlib import Path

import attrs

from netota_coap.client.back_off import BackOff, jittered
from netota_coap.encoding.addresses import author_of, canonical
from netota_coap.errors import (
    ConfigError,
    IntegrityError,
    InvalidDataError,
    NetotaError,
    PeerError,
    RepositoryConflictError,
    RepositoryError,
    RollbackError,
    TransferError,
)
from netota_coap.gateway.adoption import Choice, Decide, adopt, take_over
from netota_coap.gateway.blob_fetcher import BlobFetcher, ObsoleteError
from netota_coap.gateway.upstreams import Upstream, reason_of, upstream_of
from netota_coap.model.values import UPSTREAM_POLL_S, Stream, StreamEntry, StreamName
from netota_coap.monitoring import UpstreamStatus
from netota_coap.repository import loading
from netota_coap.repository.blobs import Blobs
from netota_coap.repository.store import DirectoryStore, Store

_log = logging.getLogger(__name__)

_LONGEST_RETRY_S = 300.0
_REQUESTS_IN_FLIGHT = 4
MOST_STREAMS = 10_000
_NOT_FOUND = ("4.04", "404")
_REFUSED = (IntegrityError, RollbackError, RepositoryConflictError)
"""Errors of an offered state, which a retry does not mend."""
_TROUBLES = (TransferError, RepositoryError, InvalidDataError)
"""Errors that a retry may mend; `InvalidDataError` is raised by local files."""


@attrs.frozen(kw_only=True)
class Terms:
    """How an upstream is followed."""

    poll_s: float = UPSTREAM_POLL_S  # the upstream is asked after so much silence
    timeout_s: float = 30.0  # for one response
    retry_s: float = 2.0  # first wait before a retry, and least time between readings of the lists
    announce_at_once: bool = False  # whether a state is written before its files were fetched
    ahead: bool = True  # whether files are fetched before a device asks for them


@attrs.define
class Mirror:
    """Follows one upstream; all mirrors of a repository share one fetcher."""

    fetcher: BlobFetcher
    uri: str
    choice: Choice = Choice()
    terms: Terms = Terms()
    _requests: asyncio.Semaphore = attrs.field(init=False)
    _listed: dict[StreamName, StreamEntry] = attrs.field(init=False, factory=dict)
    _processed: dict[StreamName, StreamEntry] = attrs.field(init=False, factory=dict)
    _updating: dict[StreamName, asyncio.Event] = attrs.field(init=False, factory=dict)
    _problems: dict[str, str] = attrs.field(init=False, factory=dict)  # by stream; "": upstream
    _refused: int = attrs.field(init=False, default=0)
    _contact: datetime | None = attrs.field(init=False, default=None)
    _last_tag: bytes | None = attrs.field(init=False, default=None)
    _listed_s: float = attrs.field(init=False, default=-math.inf)
    _loader: loading.Loader = attrs.field(init=False)

    def __attrs_post_init__(self) -> None:
        self.uri = self.uri.rstrip("/")
        self._requests = asyncio.Semaphore(_REQUESTS_IN_FLIGHT)
        self._loader = loading.Loader(self.root)
        try:
            canonical(self.uri)
        except InvalidDataError as error:
            raise ConfigError(f"{self.uri}: cannot be an upstream: {error.detail}") from error

    @property
    def root(self) -> Path:
        """The directory of the repository."""
        return self.fetcher.root

    @property
    def store(self) -> Store:
        """What adopted states are written to."""
        return DirectoryStore(self.root)

    @property
    def status(self) -> UpstreamStatus:
        """Contact, streams that are behind, and the first problem."""
        behind = {
            name
            for name, entry in self._listed.items()
            if self._processed.get(name) != entry or "/".join(name) in self._problems
        }
        return UpstreamStatus(
            uri=self.uri,
            last_contact=self._contact,
            behind=len(behind),
            refused=self._refused,
            error=next((": ".join(filter(None, each)) for each in self._problems.items()), ""),
        )

    async def once(self) -> UpstreamStatus:
        """Update all streams once, and report which are still behind.

        Raises:
            ConfigError: The proxy settings of the environment are invalid.
            TransferError: The upstream is unreachable.
            RepositoryError: The repository cannot be written.
            InvalidDataError: The repository is malformed.
        """
        async with upstream_of(self.uri, self.terms.timeout_s) as upstream:
            names = await self._list(upstream)
            await asyncio.gather(*(self._update(upstream, name) for name in names))
        return self.status

    async def run(self) -> None:
        """Follow the upstream until cancelled; problems are logged and retried.

        Raises:
            ConfigError: The proxy settings of the environment are invalid.
        """
        back_off, now = self._back_off(), asyncio.get_running_loop().time
        async with upstream_of(self.uri, self.terms.timeout_s) as upstream, task_group() as group:
            while True:
                first_s = math.inf  # when this observation yielded its first tag
                try:
                    changes = upstream.changes(jittered(self.terms.poll_s))
                    async with contextlib.aclosing(changes):
                        async for tag in changes:
                            for name in await self._outdated(upstream, tag, first_s < math.inf):
                                self._start_update(upstream, name, group)
                            self._report_recovery("")
                            first_s = min(first_s, now())
                except IntegrityError as error:
                    self._refuse("", error)
                except _TROUBLES as error:
                    self._report("", error)
                # An upstream that ends each observation at once is asked ever more rarely.
                if now() - first_s >= min(back_off.wait_s, self.terms.poll_s):
                    back_off.reset()
                await asyncio.sleep(back_off.next_s())

    def _back_off(self) -> BackOff:
        return BackOff(self.terms.retry_s, _LONGEST_RETRY_S)

    async def _outdated(
        self, upstream: Upstream, tag: bytes | None, begun: bool
    ) -> list[StreamName]:
        """Return the streams to update after a tag; `begun`: it is not the observation's first."""
        if tag is None or tag != self._last_tag:
            now = asyncio.get_running_loop().time
            await asyncio.sleep(self._listed_s + self.terms.retry_s - now())
            names = await self._list(upstream)
            self._last_tag = tag
            return names
        self._contact = datetime.now(UTC)
        return [] if begun else await asyncio.to_thread(self._streams_with_missing_blobs)

    def _streams_with_missing_blobs(self) -> list[StreamName]:
        """Return streams that have lost blobs, to the quarantine of damaged ones, say."""
        lost = []
        for name, stream in self._own_streams():
            if self.terms.ahead and name in self._listed:
                envelopes = [archive.envelope for archive in self.choice.archives(stream)]
                if {each.sha256 for each in envelopes} - Blobs(self.root).held(envelopes):
                    lost.append(name)
        return lost

    def _own_streams(self) -> Iterator[tuple[StreamName, Stream]]:
        """Yield the streams here that belong to this upstream."""
        for package_name, package in self._loader.load().packages.items():
            for stream_name, stream in package.streams.items():
                if stream.author == author_of(self.uri):
                    yield (package_name, stream_name), stream

    async def _list(self, upstream: Upstream) -> list[StreamName]:
        """Read the upstream's lists, remove vanished streams, and return the outdated ones.

        All streams are returned if no entry changed, because offers may have changed.
        """
        await asyncio.to_thread(self.fetcher.remove_stale)
        self._listed_s = asyncio.get_running_loop().time()
        try:
            listed = await self._read_lists(upstream)
        except PeerError as error:
            if error.code not in _NOT_FOUND:
                raise
            listed = await self._read_lists(upstream)  # a package was removed meanwhile
        self._listed, self._contact = listed, datetime.now(UTC)
        for name in self._processed.keys() - listed:
            del self._processed[name]
            self._problems.pop("/".join(name), None)
        await asyncio.to_thread(self._drop_vanished, listed.keys())
        return [name for name in listed if self._processed.get(name) != listed[name]] or [*listed]

    async def _read_lists(self, upstream: Upstream) -> dict[StreamName, StreamEntry]:
        listed: dict[StreamName, StreamEntry] = {}
        for package in filter(self.choice.has_package, await upstream.packages()):
            for stream, entry in (await upstream.streams(package)).items():
                if self.choice.has((package, stream)):
                    listed[package, stream] = entry
            if len(listed) > MOST_STREAMS:
                detail = f"has more than {MOST_STREAMS} streams that are chosen here"
                hint = "Choose fewer by patterns of packages and streams."
                raise IntegrityError(detail, uri=self.uri, hint=hint)
        return listed

    def _drop_vanished(self, listed: Collection[StreamName]) -> None:
        for name, stream in self._own_streams():
            if name not in listed:
                self.store.drop(name)
                _log.info("%s: removed %s/%s, which is gone upstream", self.uri, *name)
                self.fetcher.release(stream)

    def _start_update(
        self, upstream: Upstream, name: StreamName, group: asyncio.TaskGroup
    ) -> None:
        """Update a stream in a task of its own, or wake the task that does so."""
        if name in self._updating:
            self._updating[name].set()
            return
        self._updating[name] = asyncio.Event()
        group.create_task(self._keep_updating(upstream, name))

    async def _keep_updating(self, upstream: Upstream, name: StreamName) -> None:
        """Update a stream until it succeeds and there is no news."""
        back_off, news = self._back_off(), self._updating[name]
        try:
            while True:
                news.clear()
                if await self._update(upstream, name):
                    if not news.is_set():
                        return
                    continue
                with contextlib.suppress(TimeoutError):
                    async with asyncio.timeout(back_off.next_s()):
                        await news.wait()
        finally:
            # There must be no `await` after the last look at `news`, or some of it would be lost.
            del self._updating[name]

    async def _update(self, upstream: Upstream, name: StreamName) -> bool:
        """Adopt or refuse the listed state of a stream; return False if it is to be retried."""
        label = "/".join(name)
        while entry := self._listed.get(name):
            try:
                await self._adopt(upstream, name, partial(self._is_obsolete, name, entry))
            except ObsoleteError:
                continue
            except _REFUSED as error:
                self._refuse(label, error)
            except _TROUBLES as error:
                self._report(label, error)
                return False
            else:
                self._report_recovery(label)
            self._processed[name] = entry
            if not self._is_obsolete(name, entry):
                break
        return True

    def _is_obsolete(self, name: StreamName, entry: StreamEntry) -> bool:
        return self._listed.get(name) != entry

    async def _adopt(
        self, upstream: Upstream, name: StreamName, is_obsolete: Callable[[], bool]
    ) -> None:
        """Fetch a state and its files, and write it."""
        async with self._requests:
            offered = await upstream.stream(name)

        def decide(known: Stream | None) -> Stream | None:
            if is_obsolete():
                raise ObsoleteError
            return adopt(known, offered, self.uri)

        present, state = await asyncio.to_thread(self._states, name, decide)
        # No device waits for the files of a closed stream.
        at_once = self.terms.announce_at_once or not self.terms.ahead or state.closed
        if at_once and state is not present:
            await asyncio.to_thread(self._swap, name, present, decide)
        if not self.terms.ahead:
            return
        async with self.fetcher.fetched(self.choice.archives(state), is_obsolete):
            if not at_once and state is not present:
                await asyncio.to_thread(self._swap, name, present, decide)

    def _states(self, name: StreamName, decide: Decide) -> tuple[Stream | None, Stream]:
        """Return the present state of a stream, and the one that it is to have."""
        here = self.store.read(name)
        state = decide(here.last) or here.last
        assert state is not None
        return here.present, state

    def _swap(self, name: StreamName, before: Stream | None, decide: Decide) -> None:
        taken = take_over(self.store, name, decide)
        if taken:
            what = ("/".join(name), taken.version, taken.sequence)
            _log.info("%s: adopted %s %s, sequence %d", self.uri, *what)
        if before:
            self.fetcher.release(before)

    def _refuse(self, label: str, error: NetotaError) -> None:
        self._refused += 1
        self._report(label, error)

    def _report(self, label: str, error: NetotaError) -> None:
        """Log a problem of a stream, or of the upstream, unless it is the same as before."""
        reason = reason_of(error.detail)
        if self._problems.get(label) != reason:
            self._problems[label] = reason
            subject = "" if reason.startswith(self.uri) else self.uri
            what = ": ".join(part for part in (subject, label, reason) if part)
            _log.warning("%s%s", what, f" ({error.hint})" if error.hint else "")

    def _report_recovery(self, label: str) -> None:
        if self._problems.pop(label, None):
            what = ": ".join(part for part in (self.uri, label, "the problem is over") if part)
            _log.info("%s", what)


@contextlib.asynccontextmanager
async def task_group() -> AsyncIterator[asyncio.TaskGroup]:
    """Group tasks, and raise a `ConfigError` of one of them without the group around it."""
    try:
        async with asyncio.TaskGroup() as group:
            yield group
    except ExceptionGroup as failed:
        refused = failed.subgroup(ConfigError)
        if refused is None:
            raise
        raise refused.exceptions[0] from failed
