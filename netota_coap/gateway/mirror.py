"""Keeps a local repository level with an upstream: follows, adopts, fetches, and only then swaps.

`adoption.py` decides, without I/O; `upstreams.py` asks the other server; `incoming.py` fetches
blobs. What is written goes through `repository.py`, so a server of the same directory learns of it
as of any publish.
Source: `spec/mirror.md`.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import math
import random
from collections.abc import AsyncIterator, Callable, Collection
from datetime import UTC, datetime
from functools import partial
from pathlib import Path

import attrs

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
from netota_coap.gateway.blob_fetcher import Incoming, SupersededError
from netota_coap.gateway.upstream_uri import author_of, canonical
from netota_coap.gateway.upstreams import Upstream, reason_of, upstream_of
from netota_coap.model.values import Stream, StreamEntry, StreamName
from netota_coap.monitoring import UpstreamStatus
from netota_coap.repository import loading
from netota_coap.repository.blobs import Blobs
from netota_coap.repository.store import DirectoryStore, Store

_log = logging.getLogger(__name__)

DEFAULT_POLL_S = 300.0
_LONGEST_RETRY_S = 300.0
_ASKED_AT_ONCE = 4
_MOST_STREAMS = 10_000
_NOT_FOUND = ("4.04", "404")
_REFUSED = (IntegrityError, RollbackError, RepositoryConflictError)
"""What is wrong with an offered state, and does not become right by trying again."""
_TROUBLES = (TransferError, RepositoryError, InvalidDataError)
"""What may be over soon: the last is of the files here."""


@attrs.frozen(kw_only=True)
class Terms:
    """How an upstream is followed.

    Attributes:
        poll_s: After so many seconds of silence it is asked, too.
        timeout_s: How long to wait for an answer, seconds.
        retry_s: How long to wait before the first retry, seconds, which doubles up to 5 minutes;
            and from one look at its lists to the next, at least.
        announce_at_once: Whether devices hear of a state before its blobs are here.
        ahead: Whether blobs are fetched at all before a device asks for them.
    """

    poll_s: float = DEFAULT_POLL_S
    timeout_s: float = 30.0
    retry_s: float = 2.0
    announce_at_once: bool = False
    ahead: bool = True


def _without_slash(uri: str) -> str:
    return uri.rstrip("/")


@attrs.define
class Mirror:
    """Follows one upstream.

    Attributes:
        incoming: Fetches files into the repository; one for all mirrors of that.
        uri: Of the upstream: `coap://HOST`, or of HTTP with the prefix if it has one.
        choice: What is mirrored.
        terms: How.
    """

    incoming: Incoming
    uri: str = attrs.field(converter=_without_slash)
    choice: Choice = Choice()
    terms: Terms = Terms()
    _asking: asyncio.Semaphore = attrs.field(
        init=False, factory=lambda: asyncio.Semaphore(_ASKED_AT_ONCE)
    )
    _offered: dict[StreamName, StreamEntry] = attrs.field(init=False, factory=dict)
    _settled: dict[StreamName, StreamEntry] = attrs.field(init=False, factory=dict)
    _following: dict[StreamName, asyncio.Event] = attrs.field(init=False, factory=dict)
    _reasons: dict[str, str] = attrs.field(init=False, factory=dict)
    _refused: int = attrs.field(init=False, default=0)
    _contact: datetime | None = attrs.field(init=False, default=None)
    _seen: bytes | None = attrs.field(init=False, default=None)
    _surveyed_s: float = attrs.field(init=False, default=-math.inf)
    _loader: loading.Loader = attrs.field(init=False)

    @_loader.default
    def _of_repository(self) -> loading.Loader:
        return loading.Loader(self.root)

    def __attrs_post_init__(self) -> None:
        try:
            canonical(self.uri)
        except InvalidDataError as error:
            raise ConfigError(f"{self.uri}: cannot be an upstream: {error.detail}") from error

    @property
    def root(self) -> Path:
        """Of the repository."""
        return self.incoming.root

    @property
    def store(self) -> Store:
        """What adopted states are written to."""
        return DirectoryStore(self.root)

    @property
    def status(self) -> UpstreamStatus:
        """How it stands."""
        behind = {
            name for name, entry in self._offered.items() if self._settled.get(name) != entry
        }
        behind |= {name for name in self._offered if "/".join(name) in self._reasons}
        return UpstreamStatus(
            uri=self.uri,
            last_contact=self._contact,
            behind=len(behind),
            refused=self._refused,
            error=next((": ".join(filter(None, each)) for each in self._reasons.items()), ""),
        )

    async def once(self) -> UpstreamStatus:
        """Become level with the upstream, as far as that can be done now.

        Raises:
            ConfigError: What the environment says of proxies cannot be used.
            TransferError: The upstream cannot be asked.
            RepositoryError: The repository cannot be written.
            InvalidDataError: It is malformed.
        """
        async with upstream_of(self.uri, self.terms.timeout_s) as upstream:
            due = await self._survey(upstream)
            await asyncio.gather(*(self._settle(upstream, name) for name in due))
        return self.status

    async def run(self) -> None:
        """Stay level with the upstream until cancelled; what goes wrong is logged and tried again.

        Raises:
            ConfigError: What the environment says of proxies cannot be used.
        """
        retry_s, now = self.terms.retry_s, asyncio.get_running_loop().time
        async with (
            upstream_of(self.uri, self.terms.timeout_s) as upstream,
            tasks() as group,
        ):
            while True:
                heard_s = math.inf  # for the first time
                try:
                    changes = upstream.changes(_jittered(self.terms.poll_s))
                    async with contextlib.aclosing(changes):
                        async for tag in changes:
                            for name in await self._due(upstream, tag, heard_s < math.inf):
                                self._follow(upstream, name, group)
                            self._is_well("")
                            heard_s = min(heard_s, now())
                except IntegrityError as error:
                    self._refuse("", error)
                except _TROUBLES as error:
                    self._complain("", error)
                # Whoever begins again and again must not be asked as often.
                if now() - heard_s >= min(retry_s, self.terms.poll_s):
                    retry_s = self.terms.retry_s
                await asyncio.sleep(_jittered(retry_s))
                retry_s = min(retry_s * 2, _LONGEST_RETRY_S)

    # ------------------------------------------------------------------------------------------
    # What there is

    async def _due(self, upstream: Upstream, tag: bytes | None, begun: bool) -> list[StreamName]:
        """Return the streams that are to be made level, now that the upstream has said something.

        Args:
            upstream: That is followed.
            tag: What all that it has is known by.
            begun: Whether it has said something before in this observation.
        """
        if tag is None or tag != self._seen:
            now = asyncio.get_running_loop().time
            await asyncio.sleep(self._surveyed_s + self.terms.retry_s - now())
            due = await self._survey(upstream)
            self._seen = tag
            return due
        self._contact = datetime.now(UTC)
        return [] if begun else await asyncio.to_thread(self._bereft)

    def _bereft(self) -> list[StreamName]:
        """Return the streams that have lost files: damaged ones that were set aside, say."""
        lost = []
        for package_name, package in self._loader.load().packages.items():
            for stream_name, stream in package.streams.items():
                name, archives = (package_name, stream_name), self.choice.archives(stream)
                if self.terms.ahead and name in self._offered and self._is_ours(stream):
                    digests = {archive.envelope.sha256 for archive in archives}
                    if digests - Blobs(self.root).held(each.envelope for each in archives):
                        lost.append(name)
        return lost

    def _is_ours(self, stream: Stream) -> bool:
        return stream.author == author_of(self.uri)

    async def _survey(self, upstream: Upstream) -> list[StreamName]:
        """Learn what the upstream has, and drop what it has no more; return what is to be asked.

        That is what its lists tell, or all if they tell nothing: offers may have changed.
        """
        await asyncio.to_thread(self.incoming.tidy)
        self._surveyed_s = asyncio.get_running_loop().time()
        try:
            offered = await self._lists(upstream)
        except PeerError as error:
            if error.code not in _NOT_FOUND:
                raise
            offered = await self._lists(upstream)  # a package went between two questions
        self._offered, self._contact = offered, datetime.now(UTC)
        for name in self._settled.keys() - offered:
            del self._settled[name]
            self._reasons.pop("/".join(name), None)
        await asyncio.to_thread(self._drop_vanished, offered.keys())
        return [name for name in offered if self._settled.get(name) != offered[name]] or [*offered]

    async def _lists(self, upstream: Upstream) -> dict[StreamName, StreamEntry]:
        offered: dict[StreamName, StreamEntry] = {}
        for package in filter(self.choice.has_package, await upstream.packages()):
            for stream, entry in (await upstream.streams(package)).items():
                if self.choice.has((package, stream)):
                    offered[package, stream] = entry
            if len(offered) > _MOST_STREAMS:
                detail = f"has more than {_MOST_STREAMS} streams that are wanted here"
                hint = "Choose fewer, by patterns of packages and streams."
                raise IntegrityError(detail, uri=self.uri, hint=hint)
        return offered

    def _drop_vanished(self, offered: Collection[StreamName]) -> None:
        for package_name, package in self._loader.load().packages.items():
            for stream_name, stream in package.streams.items():
                name = (package_name, stream_name)
                if self._is_ours(stream) and name not in offered:
                    self.store.drop(name)
                    _log.info("%s: %s/%s is gone", self.uri, *name)
                    self.incoming.let_go(stream)

    # ------------------------------------------------------------------------------------------
    # One stream

    def _follow(self, upstream: Upstream, name: StreamName, group: asyncio.TaskGroup) -> None:
        """See to it that somebody makes a stream level, and does not wait with it."""
        if name in self._following:
            self._following[name].set()
            return
        self._following[name] = asyncio.Event()
        group.create_task(self._until_settled(upstream, name))

    async def _until_settled(self, upstream: Upstream, name: StreamName) -> None:
        retry_s, news = self.terms.retry_s, self._following[name]
        try:
            while True:
                news.clear()
                if await self._settle(upstream, name):
                    if not news.is_set():
                        return
                    continue
                with contextlib.suppress(TimeoutError):
                    async with asyncio.timeout(_jittered(retry_s)):
                        await news.wait()
                retry_s = min(retry_s * 2, _LONGEST_RETRY_S)
        finally:
            # At once: what is news from here on is somebody else's.
            del self._following[name]

    async def _settle(self, upstream: Upstream, name: StreamName) -> bool:
        """Make a stream level, or refuse it; tell whether there is nothing to be tried again."""
        label = "/".join(name)
        while entry := self._offered.get(name):
            try:
                await self._make_level(upstream, name, partial(self._is_superseded, name, entry))
            except SupersededError:
                continue
            except _REFUSED as error:
                self._refuse(label, error)
            except _TROUBLES as error:
                self._complain(label, error)
                return False
            else:
                self._is_well(label)
            self._settled[name] = entry
            if not self._is_superseded(name, entry):
                break
        return True

    def _is_superseded(self, name: StreamName, entry: StreamEntry) -> bool:
        return self._offered.get(name) != entry

    async def _make_level(
        self, upstream: Upstream, name: StreamName, is_superseded: Callable[[], bool]
    ) -> None:
        async with self._asking:
            offered = await upstream.stream(name)

        def decide(known: Stream | None) -> Stream | None:
            if is_superseded():
                raise SupersededError
            return adopt(known, offered, self.uri)

        present, state = await asyncio.to_thread(self._states, name, decide)
        # What is closed is nobody's to wait for.
        at_once = self.terms.announce_at_once or not self.terms.ahead or state.closed
        if at_once and state is not present:
            await asyncio.to_thread(self._swap, name, present, decide)
        if not self.terms.ahead:
            return
        async with self.incoming.fetched(self.choice.archives(state), is_superseded):
            if not at_once and state is not present:
                await asyncio.to_thread(self._swap, name, present, decide)

    def _states(self, name: StreamName, decide: Decide) -> tuple[Stream | None, Stream]:
        """Return the state that a stream holds here, and that which it is to hold."""
        here = self.store.read(name)
        state = decide(here.last) or here.last
        assert state is not None
        return here.present, state

    def _swap(self, name: StreamName, before: Stream | None, decide: Decide) -> None:
        taken = take_over(self.store, name, decide)
        if taken:
            told = ("/".join(name), taken.version, taken.sequence)
            _log.info("%s: took %s %s, sequence %d", self.uri, *told)
        if before:
            self.incoming.let_go(before)

    # ------------------------------------------------------------------------------------------
    # What is wrong

    def _refuse(self, label: str, error: NetotaError) -> None:
        self._refused += 1
        self._complain(label, error)

    def _complain(self, label: str, error: NetotaError) -> None:
        """Log what is wrong with a stream, or with all of them, once while it stays so."""
        reason = reason_of(error.detail)
        if self._reasons.get(label) != reason:
            self._reasons[label] = reason
            subject = "" if reason.startswith(self.uri) else self.uri
            what = ": ".join(part for part in (subject, label, reason) if part)
            _log.warning("%s%s", what, f" ({error.hint})" if error.hint else "")

    def _is_well(self, label: str) -> None:
        if self._reasons.pop(label, None):
            _log.info("%s", ": ".join(part for part in (self.uri, label, "is well again") if part))


@contextlib.asynccontextmanager
async def tasks() -> AsyncIterator[asyncio.TaskGroup]:
    """Group tasks; what ends the group as a `ConfigError` of one of them is that by itself."""
    try:
        async with asyncio.TaskGroup() as group:
            yield group
    except ExceptionGroup as failed:
        refused = failed.subgroup(ConfigError)
        if refused is None:
            raise
        raise refused.exceptions[0] from failed


def _jittered(seconds: float) -> float:
    """Keep gateways that lost one upstream from asking it at one moment."""
    return seconds * random.uniform(1.0, 1.5)  # noqa: S311
