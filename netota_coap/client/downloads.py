"""Downloads archives over CoAP, HTTP and HTTPS, and checks whether offers are as promised.

One loop resumes, restarts and verifies; a check with digest is a download that stores nothing.
Memory does not grow with the file, of which only size and hash are kept.
"""

from __future__ import annotations

import asyncio
import contextlib
import fcntl
import hashlib
import os
from collections.abc import Awaitable, Callable, Iterable, Mapping
from pathlib import Path
from typing import Any, BinaryIO
from urllib.parse import urlsplit

import attrs

from netota_coap.client.back_off import jittered
from netota_coap.client.coap_client import ChangedError, within
from netota_coap.client.transports import Source, source_for, sources_of
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
_PATIENCE_S = 600.0  # in total, with the server of one offer
_FETCHING_S = 60.0  # a server that asks for at most this wait is fetching the file: M-41
PATIENCE_FETCHING_S = 86_400.0  # in total, with such a server
_PROGRESS = 1024  # bytes that count as progress; with fewer a download might never end
_SHORTEST_WAIT_S = 1.0  # even if a server says less
_CREDIT_S = 0.5  # idle time that a rate limit makes up for: a server's response time
_STARTS = 3  # of the download of a file that changes meanwhile

Pace = Callable[[int], Awaitable[object]]
"""Called with each number of bytes received, and with 0 after a wait for the server. Until it
returns, nothing is requested except the blocks in flight."""
Idle = Callable[[float], Awaitable[object]]
"""Waits the given seconds before a server is asked again. An exception that it raises ends the
download, except that after a `NetotaError` the next offer is tried."""


@attrs.define
class RateLimit:
    """A `Pace` that bounds the total rate of all downloads that share it."""

    bytes_s: int  # above 0
    _due_s: float | None = attrs.field(init=False, default=None)

    async def __call__(self, count: int) -> None:
        """Count received bytes, and wait until the rate is below the limit."""
        now = asyncio.get_running_loop().time()
        before_s = now if self._due_s is None else max(self._due_s, now - _CREDIT_S)
        self._due_s = before_s + count / self.bytes_s
        if self._due_s > now:
            await asyncio.sleep(self._due_s - now)


@attrs.frozen
class Report:
    """The result of checking one offer."""

    url: str
    envelope: Envelope  # the promised size and digest
    size: int | None = None  # according to the server; None if it sent no size
    problem: str = ""  # one line; "" if the offer is as promised


def resolve(url: str, server: str | None) -> str:
    """Return the absolute form of an offer's URL, which may be a path on a server (`/…`).

    Raises:
        ConfigError: The URL is relative, and `server` is None or not a URI.
    """
    if not url.startswith("/"):
        return url
    if server is None:
        raise ConfigError(f"{url}: relative to a server", hint="Name the server: --server URI")
    try:
        parts = urlsplit(server)
    except ValueError:
        parts = urlsplit("")
    if not parts.scheme or not parts.netloc:
        raise ConfigError(f"{server}: not the URI of a server", hint="Example: coap://[::1]")
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
    """Check whether offers exist with the size, or the bytes, that they promise.

    Without `digest` an offer whose server sends no size passes, with `Report.size` None.

    Args:
        wanted: Absolute URLs and what they promise; duplicates are checked once.
        digest: Whether to download each file, without storing it, and compare its SHA-256.
        concurrency: How many are checked at a time.
        timeout_s: How long to wait for a response, and for each next KiB, seconds.
        on_report: Called as soon as a report is known.
        progress: Called with each number of bytes received; negative at a restart.

    Returns:
        One report per distinct pair, in the order given.
    """
    distinct = dict.fromkeys(wanted)
    slots = asyncio.Semaphore(concurrency)

    async def check(sources: Mapping[str, Source], url: str, envelope: Envelope) -> Report:
        received, problem = _Received(envelope, progress), ""
        async with slots:
            try:
                source = source_for(sources, url)
                if digest:
                    await _fetch(source, url, received, _Patience(timeout_s, 0.0))
                else:
                    async with within(timeout_s, url):
                        received.sent_size = await source.size(url, envelope.size)
                    _require_size(url, received)
            except NetotaError as error:
                problem = _reason(url, error)
            report = Report(url, envelope, received.sent_size, problem)
            on_report(report)
            return report

    async with sources_of((url for url, _ in distinct), timeout_s) as sources:
        checks = [asyncio.create_task(check(sources, *each)) for each in distinct]
        try:
            return await asyncio.gather(*checks)
        finally:
            for each in checks:
                each.cancel()


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
    """Download an archive from the first of its offers that is as promised.

    A partial download is kept beside the target as `.NAME.<16 digits of SHA-256>.part`, and
    resumed by the next offer or the next call. The target appears or is replaced in one step,
    after its size and SHA-256 were verified.

    A server that says when it will have the file (5.03 with Max-Age, 503 with Retry-After) is
    waited for, because it is fetching the file, which another offer would transfer once more.

    Args:
        archive: Its offers are tried in the order of their metric.
        target: The file to make or to replace.
        server: URI of the server for offers that begin with `/`.
        timeout_s: How long to wait for a response, and for each next KiB, seconds.
        progress: Called with each number of bytes by which the file grew: first with those of a
            partial download, negative at a restart.
        pace: Delays further requests; None: unlimited.
        in_flight: Blocks requested at a time over CoAP, 1 to 64.
        patience_s: How long to wait in total for the server of one offer, seconds. None: a day
            if it asks for a minute at most, since it is fetching the file; else 10 minutes.
        on_trouble: Called with each response that causes a wait.
        idle: Waits for a server.

    Returns:
        The offer that completed the file; None if there was nothing left to download.

    Raises:
        ConfigError: The target exists and is not a regular file.
        IntegrityError: No offer worked, and at least one is not as promised.
        TransferError: No offer worked, or another process downloads the same file to `target`.
        OSError: The file cannot be written.
    """
    if await asyncio.to_thread(_is_complete, target, archive.envelope):
        return None
    part = await _open_part(target, archive.envelope, progress, pace)
    with contextlib.closing(part):
        progress(part.size)
        offer = None
        if not part.is_right():
            if part.size == archive.envelope.size:
                part.restart()
            urls = [server or "", *(offer.url for offer in archive.offers)]
            paced = pace is not None
            async with sources_of(urls, timeout_s, paced=paced, in_flight=in_flight) as sources:
                patience = _Patience(timeout_s, patience_s, on_trouble, idle)
                offer = await _download(archive, part, server, sources, patience)
        await asyncio.to_thread(part.finish, target)
    return offer


async def _open_part(
    target: Path, envelope: Envelope, progress: Progress, pace: Pace | None
) -> _Part:
    """Open a partial download in another thread; a cancellation does not leave it locked."""
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


async def _download(
    archive: Archive,
    part: _Part,
    server: str | None,
    sources: Mapping[str, Source],
    patience: _Patience,
) -> Offer:
    """Complete a partial download, and return the offer that did it."""
    failed: list[tuple[str, NetotaError]] = []
    for offer in sorted(archive.offers, key=lambda offer: offer.metric):
        url = offer.url
        try:
            url = resolve(url, server)
            await _fetch(source_for(sources, url), url, part, attrs.evolve(patience))
        except NetotaError as error:
            failed.append((url, error))
        else:
            return offer
    wrong = any(isinstance(error, IntegrityError) for _, error in failed)
    raise (IntegrityError if wrong else TransferError)(
        "; ".join(f"{url}: {_reason(url, error)}" for url, error in failed) or "has no offer",
        uri=archive.name,
        hint=next((error.hint for _, error in failed if error.hint), ""),
    )


def _reason(url: str, error: NetotaError) -> str:
    return printable(error.detail.removeprefix(f"{url}: "))


@attrs.define
class _Patience:
    """How long the server of one offer is waited for: `timeout_s`, `patience_s` of `download`."""

    timeout_s: float
    bound_s: float | None
    on_wait: Callable[[TransferError], object] = lambda _: None
    idle: Idle = asyncio.sleep
    _waited_s: float = 0.0

    async def wait(self, error: PeerError) -> None:
        """Wait as long as an error asks for; raise it if it asks for nothing or for too long."""
        if error.retry_after_s is None:
            raise error
        wait_s = max(error.retry_after_s, _SHORTEST_WAIT_S)
        bound_s = self.bound_s
        if bound_s is None:
            bound_s = PATIENCE_FETCHING_S if wait_s <= _FETCHING_S else _PATIENCE_S
        if self._waited_s + wait_s > bound_s:
            raise error
        wait_s = jittered(wait_s, share=0.1)
        self._waited_s += wait_s
        self.on_wait(error)
        await self.idle(wait_s)


async def _fetch(source: Source, url: str, received: _Received, patience: _Patience) -> None:
    """Receive and verify what is missing from one URL; restart if the file changes meanwhile."""
    received.tag = None
    for _ in range(_STARTS):
        with contextlib.suppress(ChangedError):
            return await _complete(source, url, received, patience)
        received.restart()
    raise IntegrityError("changed again and again while it was downloaded", uri=url)


async def _complete(source: Source, url: str, received: _Received, patience: _Patience) -> None:
    """Receive until nothing is missing; resume as long as each attempt makes progress."""
    furthest = received.size
    while True:
        try:
            start = await _receive(source, url, received, patience.timeout_s)
        except PeerError as error:
            await patience.wait(error)
            if received.pace:
                await received.pace(0)
        except IntegrityError:
            raise
        except TransferError:
            if received.size < furthest + _PROGRESS:
                raise
            furthest = received.size
        else:
            return _verify(url, received, start)


def _verify(url: str, received: _Received, start: int) -> None:
    """Raise if the file, received from offset `start` on, is wrong."""
    if received.is_right():
        return
    if start > 0:
        # The bytes before `start` may be the wrong ones, and from another server.
        raise ChangedError
    digest = received.digest().hex()
    received.restart()
    raise IntegrityError(f"SHA-256 is {digest}, not {received.envelope.sha256.hex()}", uri=url)


async def _receive(source: Source, url: str, received: _Received, timeout_s: float) -> int:
    """Receive what is missing, and return the offset at which the source began."""
    now, awaited = asyncio.get_running_loop().time, "answer"
    deadline = now() + timeout_s
    try:
        async with (
            asyncio.timeout_at(deadline) as patience,
            source.open(url, received.size, received.tag, received.envelope.size) as body,
            contextlib.aclosing(body.chunks),
        ):
            awaited, received.sent_size = "progress", body.size
            _require_size(url, received)
            if body.start != received.size:
                received.restart()
            received.tag = body.tag
            last = received.size
            async for chunk in body.chunks:
                if received.size + len(chunk) > received.envelope.size:
                    received.restart()
                    detail = f"has more than {received.envelope.size} bytes"
                    raise IntegrityError(detail, uri=url)
                received.write(chunk)
                if received.pace:
                    begun = now()
                    patience.reschedule(None)
                    await received.pace(len(chunk))
                    deadline += now() - begun  # the server is not to blame for this wait
                    patience.reschedule(deadline)
                if received.size >= last + _PROGRESS:
                    last, deadline = received.size, now() + timeout_s
                    patience.reschedule(deadline)
    except TimeoutError:
        raise TransferError(f"no {awaited} in {timeout_s:g} s", uri=url) from None
    if received.size < received.envelope.size:
        detail = f"ended after {received.size} of {received.envelope.size} bytes"
        raise TransferError(detail, uri=url)
    return body.start


def _require_size(url: str, received: _Received) -> None:
    if received.sent_size not in (None, received.envelope.size):
        detail = f"has {received.sent_size} bytes, not {received.envelope.size}"
        raise IntegrityError(detail, uri=url)


@attrs.define
class _Received:
    """Counts and hashes the bytes of one file."""

    envelope: Envelope
    progress: Progress
    pace: Pace | None = None
    size: int = 0  # bytes received
    tag: bytes | None = None  # their ETag on the present server
    sent_size: int | None = None  # of the whole file, as the server sent it last
    _hash: Any = attrs.field(factory=hashlib.sha256)

    def write(self, chunk: bytes) -> None:
        self._hash.update(chunk)
        self.size += len(chunk)
        self.progress(len(chunk))

    def restart(self) -> None:
        self.progress(-self.size)
        self.size, self.tag, self._hash = 0, None, hashlib.sha256()

    def digest(self) -> bytes:
        return bytes(self._hash.digest())

    def is_right(self) -> bool:
        return self.size == self.envelope.size and self.digest() == self.envelope.sha256


@attrs.define(kw_only=True)
class _Part(_Received):
    """A partial download, stored in a locked file beside the target."""

    _path: Path
    _stream: BinaryIO

    @classmethod
    def open(
        cls, target: Path, envelope: Envelope, progress: Progress, pace: Pace | None
    ) -> _Part:
        """Open and lock the file, and read what an earlier download left in it."""
        path = target.with_name(f".{target.name}.{envelope.sha256.hex()[:16]}.part")
        with contextlib.ExitStack() as stack:
            stream = stack.enter_context(open(path, "r+b", opener=_create))
            if not _lock(stream, path):
                detail = "is being downloaded by another process"
                raise TransferError(detail, uri=str(target))
            if os.fstat(stream.fileno()).st_size > envelope.size:
                stream.truncate(0)
            hashed = hashlib.file_digest(stream, "sha256")
            stack.pop_all()
        size = stream.tell()
        return cls(envelope, progress, pace, size, hash=hashed, path=path, stream=stream)

    def write(self, chunk: bytes) -> None:
        """Write bytes so that they are kept if this process is killed."""
        self._stream.write(chunk)
        self._stream.flush()
        super().write(chunk)

    def restart(self) -> None:
        self._stream.seek(0)
        self._stream.truncate()
        super().restart()

    def finish(self, target: Path) -> None:
        """Move the file to the target, durably."""
        os.fsync(self._stream.fileno())
        self._path.replace(target)
        sync_directory(target.parent)

    def close(self) -> None:
        """Unlock the file, and remove it if it is empty."""
        if self.size == 0:
            self._path.unlink(missing_ok=True)
        self._stream.close()


def _create(path: str, flags: int) -> int:
    # The name can be guessed, so somebody else's link must not be followed.
    return open_nofollow(path, flags | os.O_CREAT)


def _lock(stream: BinaryIO, path: Path) -> bool:
    """Lock a file; False if another process has locked, moved or removed it."""
    try:
        fcntl.flock(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
        return os.fstat(stream.fileno()).st_ino == path.stat().st_ino
    except (BlockingIOError, FileNotFoundError):
        return False


def _is_complete(target: Path, envelope: Envelope) -> bool:
    if target.exists() and not target.is_file():
        raise ConfigError(f"{target}: exists and is not a regular file", hint="Name another file.")
    if not target.exists() or target.stat().st_size != envelope.size:
        return False
    with target.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").digest() == envelope.sha256
