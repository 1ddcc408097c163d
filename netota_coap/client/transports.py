"""The protocols that files are had by: a URL is opened at an offset, or asked for its size.

Source: RFC 7959; RFC 9110, sections 13 to 15.
"""

from __future__ import annotations

import contextlib
import os
import re
import socket
import ssl
import time
from collections.abc import AsyncGenerator, AsyncIterator, Iterable, Iterator, Mapping
from email.utils import parsedate_to_datetime
from types import MappingProxyType
from typing import Protocol

import attrs
import httpx2

from netota_coap import __version__
from netota_coap.client.coap_client import Block, Client
from netota_coap.errors import ConfigError, IntegrityError, PeerError, TransferError

_REDIRECTS = 10  # followed
_COAP_BLOCK = 1024
_PACED_BUFFER = 128 * 1024  # bytes
_LONGEST_URL = 255  # shown of one that a server sent
_LONGEST_CAUSE = 120  # characters of what a library says, which may hold what a server sent


class ChangedError(Exception):
    """What is there and what would come are not of one file."""


@attrs.frozen
class Body:
    """What a source sends.

    Attributes:
        start: Where it begins: as asked, or at 0.
        size: Of the whole, bytes; None: not told.
        tag: ETag; None: there is none that can be relied on.
        chunks: The bytes, not all of them at a time.
    """

    start: int
    size: int | None
    tag: bytes | None
    chunks: AsyncGenerator[bytes, None]


class Source(Protocol):
    """A protocol that files are had by."""

    async def size(self, url: str, wanted: int) -> int | None:
        """Return the size of a file; None: the server does not tell.

        Args:
            url: Of the file.
            wanted: The size that it should have, where only that can be asked for.
        """
        ...

    def open(
        self, url: str, start: int, tag: bytes | None, wanted: int
    ) -> contextlib.AbstractAsyncContextManager[Body]:
        """Open a file at an offset, or at 0 if the server cannot, or has another one now.

        Args:
            url: Of the file.
            start: Offset, bytes.
            tag: ETag of what was there before the offset; None: not known.
            wanted: The size that the file should have, bytes.
        """
        ...


@contextlib.asynccontextmanager
async def sources_of(
    urls: Iterable[str], timeout_s: float, *, paced: bool = False, in_flight: int = 1
) -> AsyncIterator[Mapping[str, Source]]:
    """Make the sources that URLs need; by scheme.

    Args:
        urls: That are to be opened.
        timeout_s: Of one answer over CoAP, seconds.
        paced: Whether they are read slowly on purpose, so that little of them is to wait here.
        in_flight: Blocks that are asked for at a time over CoAP, 1 to 64.
    """
    schemes = {_scheme(url) for url in urls}
    made: dict[str, Source] = {}
    async with contextlib.AsyncExitStack() as stack:
        if "coap" in schemes:
            coap = await stack.enter_async_context(Client(timeout_s=timeout_s))
            made["coap"] = _Coap(coap, in_flight)
        if schemes & {"http", "https"}:
            client = await stack.enter_async_context(http_client())
            made["http"] = made["https"] = _Http(client, paced)
        yield made


def http_client() -> httpx2.AsyncClient:
    """Return a client of HTTP that waits for as long as it is let.

    Raises:
        ConfigError: What the environment says of proxies cannot be used.
    """
    headers = {"User-Agent": f"netota-coap/{__version__}", "Accept-Encoding": "identity"}
    try:
        return httpx2.AsyncClient(
            headers=headers,
            timeout=None,  # whoever uses it has one for all protocols
            verify=ssl.create_default_context(),  # the system's authorities, not httpx2's
        )
    except (ImportError, ValueError, httpx2.InvalidURL) as error:
        # The first is for SOCKS, which httpx2 speaks only with another package.
        raise ConfigError(
            f"the proxy of the environment cannot be used: {error}",
            hint="See HTTP_PROXY, HTTPS_PROXY and ALL_PROXY.",
        ) from error


def _scheme(url: str) -> str:
    return url.partition(":")[0].lower()


def spoken(sources: Mapping[str, Source], url: str) -> Source:
    """Return the source of a URL.

    Raises:
        ConfigError: There is none for its scheme.
    """
    source = sources.get(_scheme(url))
    if source is None:
        raise ConfigError(f"{url}: scheme {_scheme(url)} is not spoken here")
    return source


@attrs.frozen
class _Coap:
    """Block-wise, one block at a time or several."""

    _client: Client
    _in_flight: int
    _sequential: set[str] = attrs.field(init=False, factory=set)
    """URLs whose servers lose their place when they are asked for several."""

    async def size(self, url: str, wanted: int) -> int | None:
        """Return the size that the first block tells, or the block that should be the last."""
        block = await self._client.block(url, 0)
        length = 16 << block.exponent
        offset = max(wanted - 1, 0) // length * length
        if _told(block) is None and offset:
            block = await self._last(url, offset, block.exponent, wanted)
        if _told(block) is None:
            raise IntegrityError(f"has more than {wanted} bytes", uri=url)
        return _told(block)

    async def _last(self, url: str, offset: int, exponent: int, wanted: int) -> Block:
        """Return the block that should be the last."""
        shorter = IntegrityError(f"has fewer than {wanted} bytes", uri=url)
        try:
            block = await self._client.block(url, offset, exponent)
        except PeerError as error:
            raise shorter if error.code in _PAST_THE_END else error from error
        if not block.payload:
            raise shorter
        return block

    @contextlib.asynccontextmanager
    async def open(
        self, url: str, start: int, tag: bytes | None, wanted: int
    ) -> AsyncIterator[Body]:
        """Open at the block that holds the offset."""
        begin = start // _COAP_BLOCK * _COAP_BLOCK
        in_flight = 1 if url in self._sequential else self._in_flight
        blocks = self._client.blocks(url, begin, size=wanted, in_flight=in_flight)
        async with contextlib.aclosing(blocks):
            try:
                first = await anext(blocks)
            except PeerError as error:
                if begin and error.code in _NOT_FROM_THERE:
                    raise ChangedError from error
                raise
            if tag is not None and first.etag != tag:
                raise ChangedError
            chunks = self._chunks(url, first, blocks, start - begin)
            yield Body(start, _told(first), first.etag, chunks)

    async def _chunks(
        self, url: str, first: Block, others: AsyncGenerator[Block, None], skip: int
    ) -> AsyncGenerator[bytes, None]:
        yield first.payload[skip:]
        skip = max(skip - len(first.payload), 0)
        try:
            async for block in others:
                if block.etag != first.etag:
                    raise ChangedError
                yield block.payload[skip:]
                skip = max(skip - len(block.payload), 0)
        except PeerError as error:
            is_ahead = self._in_flight > 1 and url not in self._sequential
            if is_ahead and error.code in _NOT_FROM_THERE:
                self._sequential.add(url)
                raise ChangedError from error
            raise


_PAST_THE_END = ("4.00", "4.02")
"""What servers answer to a block past the end: RFC 7959, section 2.4, leaves it open."""

_NOT_FROM_THERE = (*_PAST_THE_END, "4.08")
"""The same, and what those answer that send blocks only one after the other, from the first."""


def _told(block: Block) -> int | None:
    """Return the size of the whole, as far as a block tells it."""
    return block.size or None if block.more else block.offset + len(block.payload)


@attrs.frozen
class _Http:
    """HTTP and HTTPS, with ranges."""

    _client: httpx2.AsyncClient
    _paced: bool

    async def size(self, url: str, _wanted: int) -> int | None:
        """Return the size that HEAD tells, or the first byte."""
        async with self._answer("HEAD", url) as response:
            if response.status_code == 200 and (told := _whole(response)) is not None:
                _refuse(url, response)
                return told
        # Some refuse HEAD, or tell less in answer to it.
        async with self._answer("GET", url, {"Range": "bytes=0-0"}) as response:
            if response.status_code == 416 and (told := _whole(response)) is not None:
                return told
            _refuse(url, response)
            return _whole(response)

    @contextlib.asynccontextmanager
    async def open(
        self, url: str, start: int, tag: bytes | None, _wanted: int
    ) -> AsyncIterator[Body]:
        """Open by Range, if it is still the same file."""
        asked = {"Range": f"bytes={start}-"} if start else {}
        if start and tag is not None:
            asked["If-Range"] = tag.decode("ascii")
        async with self._answer("GET", url, asked) as response:
            if start and response.status_code == 416:
                raise ChangedError
            _refuse(url, response)
            if self._paced:
                _hold_little(response)
            found = _tag(response)
            if response.status_code == 200:
                start = 0
            elif tag is not None and found != tag:
                raise ChangedError
            elif _begin(response) != start:
                raise IntegrityError("answers with another range than was asked for", uri=url)
            yield Body(start, _whole(response), found, _chunks(url, response))

    @contextlib.asynccontextmanager
    async def _answer(
        self, method: str, url: str, headers: Mapping[str, str] = MappingProxyType({})
    ) -> AsyncIterator[httpx2.Response]:
        """Follow redirects to an answer, of which nothing has been read."""
        with http_failures(url):
            request = self._client.build_request(method, url, headers=headers)
        for _ in range(1 + _REDIRECTS):
            with http_failures(url):
                response = await self._client.send(request, stream=True)
            try:
                following = response.next_request
                if following is None:
                    if response.has_redirect_location:
                        raise TransferError("redirects to an invalid URL", uri=url)
                    yield response
                    return
            finally:
                await response.aclose()
            if request.url.scheme == "https" != following.url.scheme:
                detail = f"redirects to {_shown(following)}, which is not safe"
                raise TransferError(detail, uri=url)
            request = following
        raise TransferError(f"redirects more than {_REDIRECTS} times", uri=url)


def _hold_little(response: httpx2.Response) -> None:
    """Keep the kernel from taking in much that is not read yet, and lost with this process."""
    opened: socket.socket = response.extensions["network_stream"].get_extra_info("socket")
    opened.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, _PACED_BUFFER)


async def _chunks(url: str, response: httpx2.Response) -> AsyncGenerator[bytes, None]:
    with http_failures(url):
        async for chunk in response.aiter_raw():
            yield chunk


def _refuse(url: str, response: httpx2.Response) -> None:
    """Refuse an answer that is not the file."""
    status = response.status_code
    if status not in (200, 206):
        detail = httpx2.codes.get_reason_phrase(status) or "Unknown"
        after_s = _retry_after_s(response) if status == 503 else None
        detail += _elsewhere(url, response)
        raise PeerError(detail, uri=url, code=str(status), retry_after_s=after_s)
    encoding = response.headers.get("Content-Encoding", "identity")
    if encoding != "identity":
        raise IntegrityError(f"is sent as {encoding[:20]}, and not as it is", uri=url)


def _retry_after_s(response: httpx2.Response) -> float | None:
    """Return when to ask again, seconds; None: not told (RFC 9110, section 10.2.3)."""
    told = response.headers.get("Retry-After", "")
    if told.isascii() and told.isdecimal():
        return float(told)
    try:
        return max(parsedate_to_datetime(told).timestamp() - time.time(), 0.0)
    except (ValueError, OverflowError):
        return None


def _elsewhere(url: str, response: httpx2.Response) -> str:
    return f" at {_shown(response)}" if response.url != url else ""


def _shown(it: httpx2.Request | httpx2.Response) -> str:
    return str(it.url)[:_LONGEST_URL]


_CONTENT_RANGE = re.compile(r"bytes (?:(\d{1,19})-\d{1,19}|\*)/(?:(\d{1,19})|\*)", re.ASCII)


def _begin(response: httpx2.Response) -> int | None:
    found = _CONTENT_RANGE.fullmatch(response.headers.get("Content-Range", ""))
    return int(found[1]) if found and found[1] else None


def _whole(response: httpx2.Response) -> int | None:
    """Return the size of the whole file, as far as an answer tells it."""
    if response.status_code == 200:
        length = response.headers.get("Content-Length", "")
        return int(length) if length.isdecimal() else None
    found = _CONTENT_RANGE.fullmatch(response.headers.get("Content-Range", ""))
    return int(found[2]) if found and found[2] else None


def _tag(response: httpx2.Response) -> bytes | None:
    """Return a strong ETag: only by such a one can files be told apart byte by byte."""
    tag = response.headers.get("ETag", "")
    return tag.encode() if tag.isascii() and tag.startswith('"') else None


@contextlib.contextmanager
def http_failures(url: str) -> Iterator[None]:
    """Turn what httpx2 raises into our own errors."""
    try:
        yield
    except (httpx2.InvalidURL, ValueError, ExceptionGroup) as error:
        # The last two come from below, for host names and ports that cannot be any.
        raise TransferError("is, or redirects to, what is no URL of HTTP", uri=url) from error
    except httpx2.HTTPError as error:
        raise TransferError(_cause(error), uri=url) from error


def _cause(error: httpx2.HTTPError) -> str:
    """Find out what the system said: httpx2 has it below what it says itself."""
    cause: BaseException | None = error
    while cause is not None:
        if isinstance(cause, ssl.SSLCertVerificationError):
            return f"its certificate is refused: {cause.verify_message}"
        if isinstance(cause, OSError) and cause.errno and not isinstance(cause, ssl.SSLError):
            return os.strerror(cause.errno) if cause.errno > 0 else str(cause.strerror)
        cause = cause.__cause__ or cause.__context__
    return str(error)[:_LONGEST_CAUSE] or type(error).__name__
