"""Asks offers whether they hold what they promise, and downloads archives: CoAP, HTTP, HTTPS.

A source (`transports.py`) speaks a protocol; a sink takes what comes, to a file or to nowhere.
Between them stands the one loop that resumes, starts over and verifies, so that a check with
digest takes the way that a download takes. What is kept of a file in memory is its size and hash.
"""

from __future__ import annotations

import asyncio
import contextlib
import fcntl
import hashlib
import os
import random
from collections.abc import Awaitable, Callable, Iterable, Mapping
from pathlib import Path
from typing import Any, BinaryIO
from urllib.parse import urlsplit

import attrs

from netota_coap.client.transports import ChangedError, Source, sources_of, spoken
from netota_coap.errors import (
    ConfigError,
    IntegrityError,
    NetotaError,
    PeerError,
    TransferError,
    printable,
)
from netota_coap.files import Progress, open_nofollow, sync_directory
from netota_coap.model.values import Archive, Envelope, Offer

DEFAULT_TIMEOUT_S = 30.0
_PATIENCE_S = 600.0  # in all, with the server of one offer
_AT_IT_S = 60.0  # a server that says at most that is fetching the file: M-41
_PATIENCE_AT_IT_S = 86_400.0  # with such a one
_PROGRESS = 1024  # what counts as progress: fewer bytes at a time would take for ever
_SHORTEST_WAIT_S = 1.0  # whatever a server says
_CREDIT_S = 0.5  # that a limit makes up for: the time until a server answers
_STARTS = 3  # from the first byte, at a file that changes while it is downloaded

Pace = Callable[[int], Awaitable[object]]
"""Called with each number of bytes received, and with 0 after a wait for the server; nothing more
is asked for until it returns, but for the blocks in flight."""
Idle = Callable[[float], Awaitable[object]]
"""Called with the seconds to wait for a server; that is asked again when it returns. What it
raises ends the download; a `NetotaError` only goes on to the next offer."""


@attrs.define
class Limit:
    """A pace of so many bytes a second, of all downloads together that keep it.

    Time in which nothing came is made up for, as far as it was short.

    Attributes:
        bytes_s: Bytes per second, above 0.
    """

    bytes_s: int
    _due_s: float | None = attrs.field(init=False, default=None)

    async def __call__(self, count: int) -> None:
        """Wait until so many bytes may have come."""
        now = asyncio.get_running_loop().time()
        before_s = now if self._due_s is None else max(self._due_s, now - _CREDIT_S)
        self._due_s = before_s + count / self.bytes_s
        if self._due_s > now:
            await asyncio.sleep(self._due_s - now)


@attrs.frozen
class Report:
    """What one offer turned out to be.

    Attributes:
        url: Absolute, as asked.
        envelope: What it promises.
        size: What its server told, bytes; None if it did not.
        problem: "" if it is fine; else what is wrong, one line.
    """

    url: str
    envelope: Envelope
    size: int | None = None
    problem: str = ""


def resolve(url: str, server: str | None) -> str:
    """Return the absolute form of an offer's URL.

    Args:
        url: Of the offer.
        server: URI of the server that a relative reference (`/…`) means; its path is ignored.

    Raises:
        ConfigError: The URL is relative, and the server is not given or no URI.
    """
    if not url.startswith("/"):
        return url
    if server is None:
        raise ConfigError(f"{url}: relative to a server", hint="Say which: --server URI")
    try:
        parts = urlsplit(server)
    except ValueError:
        parts = urlsplit("")
    if not parts.scheme or not parts.netloc:
        raise ConfigError(f"{server}: not the URI of a server", hint="As in coap://[::1]")
    return f"{parts.scheme}://{parts.netloc}{url}"


async def check_offers(
    wanted: Iterable[tuple[str, Envelope]],
    *,
    digest: bool = False,
    concurrency: int = 8,
    timeout_s: float = DEFAULT_TIMEOUT_S,
    on_report: Callable[[Report], object] = lambda _: None,
    progress: Progress = lambda _: None,
) -> list[Report]:
    """Ask offers whether they exist, and have the size or the bytes that they promise.

    Without `digest`, a server that tells no size passes: `Report.size` is None then.

    Args:
        wanted: Absolute URLs and what they promise; those that are there twice are asked once.
        digest: Whether to download each, and compare SHA-256. Nothing is stored.
        concurrency: How many to ask at a time.
        timeout_s: How long to wait for an answer, and for each next KiB of it, seconds.
        on_report: Called with each report as it comes.
        progress: Called with the number of bytes received, again and again; below 0 where an
            offer is begun anew.

    Returns:
        One report per distinct pair, in the order given.
    """
    distinct = list(dict.fromkeys(wanted))
    reports: dict[int, Report] = {}
    todo = enumerate(distinct)

    async def work(sources: Mapping[str, Source]) -> None:
        for index, (url, envelope) in todo:
            report = await _checked(sources, url, envelope, digest, timeout_s, progress)
            reports[index] = report
            on_report(report)

    async with sources_of((url for url, _ in distinct), timeout_s) as sources:
        workers = [asyncio.create_task(work(sources)) for _ in range(concurrency)]
        try:
            await asyncio.gather(*workers)
        finally:
            for worker in workers:
                worker.cancel()
    return [reports[index] for index in range(len(distinct))]


async def _checked(
    sources: Mapping[str, Source],
    url: str,
    envelope: Envelope,
    digest: bool,
    timeout_s: float,
    progress: Progress,
) -> Report:
    sink = _Sink(envelope, progress)
    try:
        source = spoken(sources, url)
        if digest:
            await _fetch(source, url, sink, timeout_s, _Patience(0.0))
        else:
            try:
                async with asyncio.timeout(timeout_s):
                    sink.told = await source.size(url, envelope.size)
            except TimeoutError:
                raise TransferError(f"no answer in {timeout_s:g} s", uri=url) from None
            _require_size(url, sink)
    except NetotaError as error:
        return Report(url, envelope, sink.told, _reason(url, error))
    return Report(url, envelope, sink.told)


async def download(
    archive: Archive,
    target: Path,
    *,
    server: str | None = None,
    timeout_s: float = DEFAULT_TIMEOUT_S,
    progress: Progress = lambda _: None,
    pace: Pace | None = None,
    in_flight: int = 1,
    patience_s: float | None = None,
    on_trouble: Callable[[TransferError], object] = lambda _: None,
    idle: Idle = asyncio.sleep,
) -> Offer | None:
    """Download an archive from the first of its offers that holds what it promises.

    What has arrived is kept beside the target, as `.NAME.<16 digits of SHA-256>.part`; the next
    call, or the next offer, goes on from there. The target is put in place in one step, when its
    size and SHA-256 are right, and is never anything else.

    A server that says when it will have the file (5.03 with Max-Age, 503 with Retry-After) is
    waited for: it fetches the file itself, and to go round it would be to ask for it twice.

    Args:
        archive: What to download.
        target: The file to make or to replace.
        server: URI of the server that relative offers mean.
        timeout_s: How long to wait for an answer, and for each next KiB of it, seconds.
        progress: Called with the number of bytes by which the file grew, again and again; the
            first time with those that were there, below 0 where it is begun anew.
        pace: Keeps the sources waiting; None: all comes as fast as it can.
        in_flight: Blocks that are asked for at a time over CoAP, 1 to 64.
        patience_s: How long to wait in all for the server of one offer, seconds; None: a day for
            one that says each time that it takes a minute at most, and so is at it; 10 minutes for
            one that says more.
        on_trouble: Called with each answer that makes it wait.
        idle: Waits, in whatever way.

    Returns:
        The offer that the last bytes came from; None if all of them were there already.

    Raises:
        ConfigError: The target is there, and no regular file.
        IntegrityError: No offer worked, and at least one holds something else.
        TransferError: No offer worked; or another process downloads the same to the same place.
        OSError: The file cannot be written.
    """
    if await asyncio.to_thread(_holds, target, archive.envelope):
        return None
    part = await _opened(target, archive.envelope, progress, pace)
    with contextlib.closing(part):
        progress(part.size)
        offer = None
        if not part.is_right():
            if part.size == archive.envelope.size:
                part.restart()
            urls = [server or "", *(offer.url for offer in archive.offers)]
            paced = pace is not None
            async with sources_of(urls, timeout_s, paced=paced, in_flight=in_flight) as sources:
                patience = _Patience(patience_s, on_trouble, idle)
                offer = await _first(archive, part, server, sources, timeout_s, patience)
        await asyncio.to_thread(part.finish, target)
    return offer


async def _opened(
    target: Path, envelope: Envelope, progress: Progress, pace: Pace | None
) -> _Part:
    """Open a part; who stops meanwhile does not keep it locked."""
    loop = asyncio.get_running_loop()
    opening = loop.run_in_executor(None, _Part.open, target, envelope, progress, pace)

    def close(_: object) -> None:
        if opening.exception() is None:
            opening.result().close()

    try:
        await asyncio.wait((opening,))
    except asyncio.CancelledError:
        opening.add_done_callback(close)
        raise
    return opening.result()


async def _first(
    archive: Archive,
    part: _Part,
    server: str | None,
    sources: Mapping[str, Source],
    timeout_s: float,
    patience: _Patience,
) -> Offer:
    """Complete a part from the first offer that can; return that."""
    failed: list[NetotaError] = []
    reasons: list[str] = []
    for offer in sorted(archive.offers, key=lambda offer: offer.metric):
        url = offer.url
        try:
            url = resolve(url, server)
            source, its_own = spoken(sources, url), attrs.evolve(patience)
            await _fetch(source, url, part, timeout_s, its_own)
        except NetotaError as error:
            failed.append(error)
            reasons.append(f"{url}: {_reason(url, error)}")
        else:
            return offer
    wrong = any(isinstance(error, IntegrityError) for error in failed)
    raise (IntegrityError if wrong else TransferError)(
        "; ".join(reasons) or "has no offer",
        uri=archive.name,
        hint=next((error.hint for error in failed if error.hint), ""),
    )


def _reason(url: str, error: NetotaError) -> str:
    return printable(error.detail.removeprefix(f"{url}: "))


# ----------------------------------------------------------------------------------------------
# From a source to a sink


@attrs.define
class _Patience:
    """With the server of one offer, which says when it will have the file.

    Attributes:
        bound_s: For how long it is waited for in all, seconds; None: depends on what it says.
        on_wait: Called with what it says each time.
        idle: Waits.
    """

    bound_s: float | None
    on_wait: Callable[[TransferError], object] = lambda _: None
    idle: Idle = asyncio.sleep
    _waited_s: float = attrs.field(init=False, default=0.0)

    async def wait(self, error: PeerError) -> None:
        """Wait for as long as an answer says; raise that if it does not, or for too long."""
        if error.retry_after_s is None:
            raise error
        wait_s = max(error.retry_after_s, _SHORTEST_WAIT_S)
        bound_s = self.bound_s
        if bound_s is None:
            bound_s = _PATIENCE_AT_IT_S if wait_s <= _AT_IT_S else _PATIENCE_S
        if self._waited_s + wait_s > bound_s:
            raise error
        # All that wait for one file would else come back at one moment.
        wait_s *= random.uniform(1.0, 1.1)  # noqa: S311
        self._waited_s += wait_s
        self.on_wait(error)
        await self.idle(wait_s)


async def _fetch(
    source: Source, url: str, sink: _Sink, timeout_s: float, patience: _Patience
) -> None:
    """Complete a sink from one URL, and verify it."""
    sink.tag = None
    for _ in range(_STARTS):
        with contextlib.suppress(ChangedError):
            return await _complete(source, url, sink, timeout_s, patience)
        sink.restart()
    raise IntegrityError("changed again and again while it was downloaded", uri=url)


async def _complete(
    source: Source, url: str, sink: _Sink, timeout_s: float, patience: _Patience
) -> None:
    """Receive until nothing is missing; resume as long as each time brings something new."""
    furthest = sink.size
    while True:
        try:
            start = await _receive(source, url, sink, timeout_s)
        except PeerError as error:
            await patience.wait(error)
            if sink.pace:
                await sink.pace(0)
        except IntegrityError:
            raise
        except TransferError:
            if sink.size < furthest + _PROGRESS:
                raise
            furthest = sink.size
        else:
            return _verify(url, sink, start)


def _verify(url: str, sink: _Sink, start: int) -> None:
    """Refuse what is wrong; `start` is where the last piece of it began."""
    if sink.is_right():
        return
    if start > 0:
        # What was there before may be the wrong half, and somebody else's.
        raise ChangedError
    digest = sink.digest().hex()
    sink.restart()
    raise IntegrityError(f"SHA-256 is {digest}, not {sink.envelope.sha256.hex()}", uri=url)


async def _receive(source: Source, url: str, sink: _Sink, timeout_s: float) -> int:
    """Receive what is missing; return the offset that the source began at."""
    now, awaited = asyncio.get_running_loop().time, "answer"
    deadline = now() + timeout_s
    try:
        async with (
            asyncio.timeout_at(deadline) as patience,
            source.open(url, sink.size, sink.tag, sink.envelope.size) as body,
            contextlib.aclosing(body.chunks),
        ):
            awaited, sink.told = "progress", body.size
            _require_size(url, sink)
            if body.start != sink.size:
                sink.restart()
            sink.tag = body.tag
            last = sink.size
            async for chunk in body.chunks:
                if sink.size + len(chunk) > sink.envelope.size:
                    sink.restart()
                    raise IntegrityError(f"has more than {sink.envelope.size} bytes", uri=url)
                sink.write(chunk)
                if sink.pace:
                    begun = now()
                    patience.reschedule(None)
                    await sink.pace(len(chunk))
                    deadline += now() - begun  # that wait was not the server's
                    patience.reschedule(deadline)
                if sink.size >= last + _PROGRESS:
                    last, deadline = sink.size, now() + timeout_s
                    patience.reschedule(deadline)
    except TimeoutError:
        raise TransferError(f"no {awaited} in {timeout_s:g} s", uri=url) from None
    if sink.size < sink.envelope.size:
        detail = f"ended after {sink.size} of {sink.envelope.size} bytes"
        raise TransferError(detail, uri=url)
    return body.start


def _require_size(url: str, sink: _Sink) -> None:
    if sink.told not in (None, sink.envelope.size):
        raise IntegrityError(f"has {sink.told} bytes, not {sink.envelope.size}", uri=url)


# ----------------------------------------------------------------------------------------------
# Sinks


@attrs.define
class _Sink:
    """Counts and hashes what arrives.

    Attributes:
        envelope: What is to arrive.
        progress: Called with the change of `size`.
        pace: Keeps the source waiting, or None.
        size: Bytes that have arrived.
        tag: ETag of the file that they are of, by the server that is asked; None: not known.
        told: Size of the whole that the server told last, bytes.
    """

    envelope: Envelope
    progress: Progress
    pace: Pace | None = None
    size: int = 0
    tag: bytes | None = None
    told: int | None = None
    _hash: Any = attrs.field(factory=hashlib.sha256)

    def write(self, chunk: bytes) -> None:
        """Take the next bytes."""
        self._hash.update(chunk)
        self.size += len(chunk)
        self.progress(len(chunk))

    def restart(self) -> None:
        """Forget what has arrived."""
        self.progress(-self.size)
        self.size, self.tag, self._hash = 0, None, hashlib.sha256()

    def digest(self) -> bytes:
        """Return SHA-256 of what has arrived."""
        digest: bytes = self._hash.digest()
        return digest

    def is_right(self) -> bool:
        """Tell whether all has arrived, and nothing else."""
        return self.size == self.envelope.size and self.digest() == self.envelope.sha256


@attrs.define(kw_only=True)
class _Part(_Sink):
    """A sink that keeps what arrives in a file beside the target."""

    _path: Path
    _stream: BinaryIO

    @classmethod
    def open(
        cls, target: Path, envelope: Envelope, progress: Progress, pace: Pace | None
    ) -> _Part:
        """Open the file, with what is there of an earlier time, and let nobody else do so."""
        path = target.with_name(f".{target.name}.{envelope.sha256.hex()[:16]}.part")
        with contextlib.ExitStack() as stack:
            stream = stack.enter_context(open(path, "r+b", opener=_made))
            if not _is_ours(stream, path):
                detail = "is being downloaded by another process"
                raise TransferError(detail, uri=str(target))
            if os.fstat(stream.fileno()).st_size > envelope.size:
                stream.truncate(0)
            hashed = hashlib.file_digest(stream, "sha256")
            stack.pop_all()
        size = stream.tell()
        return cls(envelope, progress, pace, size, hash=hashed, path=path, stream=stream)

    def write(self, chunk: bytes) -> None:
        """Take the next bytes; they are there after this process is killed."""
        self._stream.write(chunk)
        self._stream.flush()
        super().write(chunk)

    def restart(self) -> None:
        """Forget what has arrived."""
        self._stream.seek(0)
        self._stream.truncate()
        super().restart()

    def finish(self, target: Path) -> None:
        """Put the file in place, to stay."""
        os.fsync(self._stream.fileno())
        self._path.replace(target)
        sync_directory(target.parent)

    def close(self) -> None:
        """Let others have the file; one without bytes is of no use to them."""
        if self.size == 0:
            self._path.unlink(missing_ok=True)
        self._stream.close()


def _made(path: str, flags: int) -> int:
    # Its name can be guessed: somebody else's link must not lead elsewhere.
    return open_nofollow(path, flags | os.O_CREAT)


def _is_ours(stream: BinaryIO, path: Path) -> bool:
    """Lock a file, unless somebody else has it, or has put it in place just now."""
    try:
        fcntl.flock(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
        return os.fstat(stream.fileno()).st_ino == path.stat().st_ino
    except (BlockingIOError, FileNotFoundError):
        return False


def _holds(target: Path, envelope: Envelope) -> bool:
    """Tell whether the target is what is wanted already."""
    if not target.exists():
        return False
    if not target.is_file():
        raise ConfigError(f"{target}: is there, and no regular file", hint="Name another file.")
    if target.stat().st_size != envelope.size:
        return False
    with target.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").digest() == envelope.sha256
