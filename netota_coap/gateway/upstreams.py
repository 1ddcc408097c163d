"""Requests of a mirror to its upstream, over CoAP and HTTP.

Payloads are decoded in other threads, because the event loop's thread serves devices.
Source: `spec/mirror.md`, rules M-1 to M-6; `spec/resources.md`; `spec/http.md`.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Mapping
from functools import partial
from typing import ClassVar, TypeVar

import attrs
import httpx2

from netota_coap.client.coap_client import Client, within
from netota_coap.client.transports import (
    http_client,
    http_failures,
    http_response,
    refuse_status,
)
from netota_coap.encoding.codecs import Format
from netota_coap.encoding.content_formats import ContentFormat
from netota_coap.encoding.documents import decode, decode_list
from netota_coap.errors import IntegrityError, InvalidDataError, printable
from netota_coap.model.values import LIMITS, PackageEntry, Stream, StreamEntry, StreamName

T = TypeVar("T")

_CBOR = "application/cbor"
_EVENTS = "text/event-stream"
SILENCE_S = 45.0  # three signs of life of an event stream (H-34)
TRANSFER_S = 300.0  # the same as over CoAP
LONGEST_LIST = 256 * 1024  # bytes
_LONGEST_EVENT = 4 * LONGEST_LIST  # it contains a list as JSON
_LONGEST_STATE = LIMITS["document"].value
_LONGEST_REASON = 300  # characters


def reason_of(detail: str) -> str:
    """Make an error text printable and at most 300 characters long: a server may have sent it."""
    shown = printable(detail[: _LONGEST_REASON + 1])
    return shown if len(shown) <= _LONGEST_REASON else f"{shown[: _LONGEST_REASON - 1]}…"


@attrs.frozen
class Upstream:
    """A server that is mirrored.

    Its methods raise `TransferError` if it is unreachable, refuses, or sends malformed data.
    """

    uri: str
    _state_query: ClassVar[str] = ""

    async def packages(self) -> Mapping[str, PackageEntry]:
        """Return its packages."""
        return await self._read("p", LONGEST_LIST, partial(decode_list, PackageEntry))

    async def streams(self, package: str) -> Mapping[str, StreamEntry]:
        """Return the streams of a package."""
        return await self._read(f"p/{package}", LONGEST_LIST, partial(decode_list, StreamEntry))

    async def stream(self, name: StreamName) -> Stream:
        """Return the whole state of a stream."""
        path = f"p/{name[0]}/s/{name[1]}{self._state_query}"
        return await self._read(path, _LONGEST_STATE, partial(decode, Stream))

    def changes(self, poll_s: float) -> AsyncGenerator[bytes | None, None]:
        """Yield the ETag over everything upstream, at once and with each sign of life.

        It is unchanged for a keep-alive, and None if the server sent none. The generator ends
        after `poll_s` seconds of silence at the latest; the caller then calls it again.
        """
        raise NotImplementedError

    async def _read(self, path: str, longest: int, decoding: Callable[[bytes, Format], T]) -> T:
        url = f"{self.uri}/{path}"
        payload = await self._payload(url, longest)

        def read() -> T:
            try:
                return decoding(payload, Format.CBOR)
            except InvalidDataError as error:
                detail = f"is malformed: {reason_of(error.detail)}"
                raise IntegrityError(detail, uri=url) from error

        return await asyncio.to_thread(read)

    async def _payload(self, url: str, longest: int) -> bytes:
        """Get a URL in CBOR; raise if it has more than `longest` bytes."""
        raise NotImplementedError


@attrs.frozen
class _CoapUpstream(Upstream):
    client: Client
    _state_query = "?full"

    def changes(self, poll_s: float) -> AsyncGenerator[bytes | None, None]:
        return self.client.changes(self.uri, poll_s=poll_s)

    async def _payload(self, url: str, longest: int) -> bytes:
        fetched = await self.client.get(url, accept=ContentFormat.CBOR)
        if fetched.format != ContentFormat.CBOR:
            raise IntegrityError(f"is in format {fetched.format}, not CBOR", uri=url)
        _require_short(url, fetched.payload, longest)
        return fetched.payload


@attrs.frozen
class _HttpUpstream(Upstream):
    client: httpx2.AsyncClient
    timeout_s: float

    async def changes(self, poll_s: float) -> AsyncGenerator[bytes | None, None]:
        url, tag, tail, heard = f"{self.uri}/p", None, b"", False
        now = asyncio.get_running_loop().time
        end = now() + poll_s
        async with (
            self._answer(url, _EVENTS) as response,
            contextlib.aclosing(response.aiter_raw()) as chunks,
        ):
            while now() < end:
                try:
                    async with (
                        asyncio.timeout_at(end),
                        within(SILENCE_S, url, "no sign of life in"),
                    ):
                        chunk = await anext(chunks, b"")
                except TimeoutError:
                    return
                except httpx2.HTTPError:
                    if heard:
                        return  # proxies close connections that are quiet or old
                    raise
                if not chunk:
                    return  # the server stops
                *events, tail = (tail + chunk).split(b"\n\n")
                _require_short(url, tail, _LONGEST_EVENT)
                changed = [event for event in events if b"data:" in event]
                if changed:
                    end, tag = now() + poll_s, _id_of(changed[-1])
                if events:
                    heard = True
                    yield tag

    async def _payload(self, url: str, longest: int) -> bytes:
        data, now = bytearray(), asyncio.get_running_loop().time
        async with (
            within(TRANSFER_S, url, "is incomplete after"),
            self._answer(url, _CBOR) as response,
            within(self.timeout_s, url, "no progress in") as waiting,
        ):
            async for chunk in response.aiter_raw():
                data += chunk
                _require_short(url, data, longest)
                waiting.reschedule(now() + self.timeout_s)
        return bytes(data)

    @contextlib.asynccontextmanager
    async def _answer(self, url: str, media_type: str) -> AsyncIterator[httpx2.Response]:
        """Yield a response; `http_failures` applies to what is done with it, too."""
        answer = http_response(self.client, "GET", url, {"Accept": media_type}, redirects=0)
        async with contextlib.AsyncExitStack() as stack:
            async with within(self.timeout_s, url):
                response = await stack.enter_async_context(answer)
            refuse_status(url, response, (200,))
            found = response.headers.get("Content-Type", "").partition(";")[0]
            if found != media_type:
                raise IntegrityError(f"is {found[:40]!r}, not {media_type}", uri=url)
            with http_failures(url):
                yield response


@contextlib.asynccontextmanager
async def upstream_of(uri: str, timeout_s: float) -> AsyncIterator[Upstream]:
    """Make the upstream that a URI names, which has no slash at its end.

    It raises `ConfigError` if the proxy settings of the environment are invalid.
    """
    if uri.startswith("coap:"):
        async with Client(timeout_s=timeout_s) as client:
            yield _CoapUpstream(uri, client)
    else:
        async with http_client() as client:
            yield _HttpUpstream(uri, client, timeout_s)


def _id_of(event: bytes) -> bytes | None:
    ids = (line[3:].strip() for line in event.split(b"\n") if line.startswith(b"id:"))
    return next(ids, None)


def _require_short(url: str, data: bytes | bytearray, longest: int) -> None:
    if len(data) > longest:
        raise IntegrityError(f"is longer than {longest} bytes", uri=url)
