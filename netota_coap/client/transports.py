"""The protocols of downloads: each opens a URL at an offset, and finds out its size.

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
from netota_coap.client.coap_client import ChangedError, Client, ReceivedBlock
from netota_coap.errors import ConfigError, IntegrityError, PeerError, TransferError

Blocks = AsyncGenerator[ReceivedBlock, None]

_REDIRECTS = 10
_COAP_BLOCK = 1024
_PACED_BUFFER = 128 * 1024  # bytes
_LONGEST_URL = 255  # characters shown of a URL that a server sent
_LONGEST_CAUSE = 120  # characters shown of a library's error, which may quote a server


@attrs.frozen
class Body:
    """The bytes of a file from an offset on."""

    start: int  # the requested offset, or 0
    size: int | None  # of the whole file; None if the server did not send it
    tag: bytes | None  # a strong ETag; None if the server sent none
    chunks: AsyncGenerator[bytes, None]


class Source(Protocol):
    """A protocol to download files by."""

    async def size(self, url: str, wanted: int) -> int | None:
        """Return the size of a file, or None; CoAP may only be able to test the wanted size."""
        ...

    def open(
        self, url: str, start: int, tag: bytes | None, wanted: int
    ) -> contextlib.AbstractAsyncContextManager[Body]:
        """Open a file at an offset, or at 0 if the server cannot resume it.

        Raises:
            ChangedError: The file is no longer the one with the ETag `tag`.
        """
        ...


@contextlib.asynccontextmanager
async def sources_of(
    urls: Iterable[str], timeout_s: float, *, paced: bool = False, in_flight: int = 1
) -> AsyncIterator[Mapping[str, Source]]:
    """Make the sources that URLs need, by scheme.

    `timeout_s` applies to one response over CoAP; the caller bounds the time of HTTP. `paced` says
    that a rate limit applies, which receive buffers must not undermine.
    """
    schemes = {_scheme(url) for url in urls}
    made: dict[str, Source] = {}
    async with contextlib.AsyncExitStack() as stack:
        if "coap" in schemes:
            coap = await stack.enter_async_context(Client(timeout_s=timeout_s))
            made["coap"] = _CoapSource(coap, in_flight)
        if schemes & {"http", "https"}:
            client = await stack.enter_async_context(http_client())
            made["http"] = made["https"] = _HttpSource(client, paced)
        yield made


def http_client() -> httpx2.AsyncClient:
    """Return an HTTP client; invalid proxy settings of the environment raise `ConfigError`."""
    headers = {"User-Agent": f"netota-coap/{__version__}", "Accept-Encoding": "identity"}
    try:
        return httpx2.AsyncClient(
            headers=headers,
            timeout=None,  # the callers have time-outs that apply to all protocols
            verify=ssl.create_default_context(),  # the system's authorities, not httpx2's
        )
    except (ImportError, ValueError, httpx2.InvalidURL) as error:
        # ImportError: httpx2 supports SOCKS only with another package.
        raise ConfigError(
            f"the proxy settings of the environment are invalid: {error}",
            hint="Check HTTP_PROXY, HTTPS_PROXY and ALL_PROXY.",
        ) from error


def _scheme(url: str) -> str:
    return url.partition(":")[0].lower()


def source_for(sources: Mapping[str, Source], url: str) -> Source:
    """Return the source for a URL; raise `ConfigError` if its scheme is not supported."""
    source = sources.get(_scheme(url))
    if source is None:
        raise ConfigError(f"{url}: scheme {_scheme(url)} is not supported")
    return source


@attrs.frozen
class _CoapSource:
    """Block-wise transfer with one block in flight or several."""

    _client: Client
    _in_flight: int
    _sequential: set[str] = attrs.field(init=False, factory=set)
    """URLs whose servers fail with several blocks in flight."""

    async def size(self, url: str, wanted: int) -> int | None:
        """Return the size from the first block, or else from the one that should be the last."""
        block = await self._client.block(url, 0)
        length = 16 << block.exponent
        offset = max(wanted - 1, 0) // length * length
        if _size_from(block) is None and offset:
            block = await self._last(url, offset, block.exponent, wanted)
        if _size_from(block) is None:
            raise IntegrityError(f"has more than {wanted} bytes", uri=url)
        return _size_from(block)

    async def _last(self, url: str, offset: int, exponent: int, wanted: int) -> ReceivedBlock:
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
        """Open at the block that contains the offset."""
        begin = start // _COAP_BLOCK * _COAP_BLOCK
        in_flight = 1 if url in self._sequential else self._in_flight
        blocks = self._client.blocks(url, begin, size=wanted, in_flight=in_flight)
        async with contextlib.aclosing(blocks):
            try:
                first = await anext(blocks)
            except PeerError as error:
                if begin and error.code in _CANNOT_RESUME:
                    raise ChangedError from error
                raise
            if tag is not None and first.etag != tag:
                raise ChangedError
            chunks = self._chunks(url, first, blocks, start - begin)
            yield Body(start, _size_from(first), first.etag, chunks)

    async def _chunks(
        self, url: str, first: ReceivedBlock, others: Blocks, skip: int
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
            if is_ahead and error.code in _CANNOT_RESUME:
                self._sequential.add(url)
                raise ChangedError from error
            raise


_PAST_THE_END = ("4.00", "4.02")
"""Responses to a block past the end: RFC 7959, section 2.4, leaves the code open."""

_CANNOT_RESUME = (*_PAST_THE_END, "4.08")
"""Servers that send blocks only in order from the first answer 4.08."""


def _size_from(block: ReceivedBlock) -> int | None:
    """Return the size of the whole file if a block contains it, or is the last."""
    return block.size or None if block.more else block.offset + len(block.payload)


@attrs.frozen
class _HttpSource:
    """HTTP and HTTPS with range requests."""

    _client: httpx2.AsyncClient
    _paced: bool

    async def size(self, url: str, _wanted: int) -> int | None:
        """Return the size from a HEAD request, or else from a request for the first byte."""
        async with http_response(self._client, "HEAD", url) as response:
            if response.status_code == 200 and (size := _whole_size(response)) is not None:
                _refuse(url, response)
                return size
        # Some servers refuse HEAD, or answer it without a size.
        first_byte = {"Range": "bytes=0-0"}
        async with http_response(self._client, "GET", url, first_byte) as response:
            if response.status_code == 416 and (size := _whole_size(response)) is not None:
                return size
            _refuse(url, response)
            return _whole_size(response)

    @contextlib.asynccontextmanager
    async def open(
        self, url: str, start: int, tag: bytes | None, _wanted: int
    ) -> AsyncIterator[Body]:
        """Open with Range, and with If-Range so that a changed file is sent from its start."""
        headers = {"Range": f"bytes={start}-"} if start else {}
        if start and tag is not None:
            headers["If-Range"] = tag.decode("ascii")
        async with http_response(self._client, "GET", url, headers) as response:
            if start and response.status_code == 416:
                raise ChangedError
            _refuse(url, response)
            if self._paced:
                _shrink_buffer(response)
            found = _strong_tag(response)
            if response.status_code == 200:
                start = 0
            elif tag is not None and found != tag:
                raise ChangedError
            elif _range(response)[0] != start:
                raise IntegrityError("answers with another range than was asked for", uri=url)
            yield Body(start, _whole_size(response), found, _chunks(url, response))


@contextlib.asynccontextmanager
async def http_response(
    client: httpx2.AsyncClient,
    method: str,
    url: str,
    headers: Mapping[str, str] = MappingProxyType({}),
    redirects: int = _REDIRECTS,
) -> AsyncIterator[httpx2.Response]:
    """Yield a response whose body is unread; a redirect, too, if `redirects` is 0."""
    with http_failures(url):
        request = client.build_request(method, url, headers=headers)
    for _ in range(1 + redirects):
        with http_failures(url):
            response = await client.send(request, stream=True)
        try:
            following = response.next_request
            if following is None or not redirects:
                if redirects and response.has_redirect_location:
                    raise TransferError("redirects to an invalid URL", uri=url)
                yield response
                return
        finally:
            await response.aclose()
        if request.url.scheme == "https" != following.url.scheme:
            detail = f"redirects to {_shown(following)}, which is not encrypted"
            raise TransferError(detail, uri=url)
        request = following
    raise TransferError(f"redirects more than {redirects} times", uri=url)


def _shrink_buffer(response: httpx2.Response) -> None:
    """Bound what the kernel receives ahead, which is lost if this process is killed."""
    opened: socket.socket = response.extensions["network_stream"].get_extra_info("socket")
    opened.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, _PACED_BUFFER)


async def _chunks(url: str, response: httpx2.Response) -> AsyncGenerator[bytes, None]:
    with http_failures(url):
        async for chunk in response.aiter_raw():
            yield chunk


def refuse_status(url: str, response: httpx2.Response, expected: tuple[int, ...]) -> None:
    """Raise `PeerError` if a response has another status."""
    status = response.status_code
    if status not in expected:
        detail = httpx2.codes.get_reason_phrase(status) or "Unknown"
        after_s = _retry_after_s(response) if status == 503 else None
        detail += f" at {_shown(response)}" if response.url != url else ""
        raise PeerError(detail, uri=url, code=str(status), retry_after_s=after_s)


def _refuse(url: str, response: httpx2.Response) -> None:
    """Raise if a response is not the file as it is stored."""
    refuse_status(url, response, (200, 206))
    encoding = response.headers.get("Content-Encoding", "identity")
    if encoding != "identity":
        raise IntegrityError(f"is sent with Content-Encoding {encoding[:20]}", uri=url)


def _retry_after_s(response: httpx2.Response) -> float | None:
    """Return the seconds of Retry-After (RFC 9110, section 10.2.3)."""
    value = response.headers.get("Retry-After", "")
    if value.isascii() and value.isdecimal():
        return float(value)
    try:
        return max(parsedate_to_datetime(value).timestamp() - time.time(), 0.0)
    except (ValueError, OverflowError):
        return None


def _shown(message: httpx2.Request | httpx2.Response) -> str:
    return str(message.url)[:_LONGEST_URL]


_CONTENT_RANGE = re.compile(r"bytes (?:(\d{1,19})-\d{1,19}|\*)/(?:(\d{1,19})|\*)", re.ASCII)


def _range(response: httpx2.Response) -> tuple[int | None, int | None]:
    """Return the offset of a response in the file, and the size of the file."""
    found = _CONTENT_RANGE.fullmatch(response.headers.get("Content-Range", ""))
    start, size = found.groups() if found else (None, None)
    return int(start) if start else None, int(size) if size else None


def _whole_size(response: httpx2.Response) -> int | None:
    if response.status_code == 200:
        length = response.headers.get("Content-Length", "")
        return int(length) if length.isdecimal() else None
    return _range(response)[1]


def _strong_tag(response: httpx2.Response) -> bytes | None:
    """Return the ETag unless it is weak: files with equal weak ETags may differ."""
    tag = response.headers.get("ETag", "")
    return tag.encode() if tag.isascii() and tag.startswith('"') else None


@contextlib.contextmanager
def http_failures(url: str) -> Iterator[None]:
    """Turn what httpx2 raises into our own errors."""
    try:
        yield
    except (httpx2.InvalidURL, ValueError, ExceptionGroup) as error:
        # ValueError and ExceptionGroup: impossible host names and ports.
        detail = "is not a valid HTTP URL, or redirects to one that is not"
        raise TransferError(detail, uri=url) from error
    except httpx2.HTTPError as error:
        raise TransferError(_cause(error), uri=url) from error


def _cause(error: httpx2.HTTPError) -> str:
    """Return the operating system's reason, which httpx2 hides in the chain of causes."""
    cause: BaseException | None = error
    while cause is not None:
        if isinstance(cause, ssl.SSLCertVerificationError):
            return f"certificate refused: {cause.verify_message}"
        if isinstance(cause, OSError) and cause.errno and not isinstance(cause, ssl.SSLError):
            return os.strerror(cause.errno) if cause.errno > 0 else str(cause.strerror)
        cause = cause.__cause__ or cause.__context__
    return str(error)[:_LONGEST_CAUSE] or type(error).__name__
