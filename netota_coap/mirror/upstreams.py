"""Upstreams: what a mirror asks another server, over CoAP and HTTP.

Source: `spec/mirror.md`, rules M-1 to M-5; `spec/resources.md`; `spec/http.md`.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Mapping
from typing import Protocol, TypeVar

import attrs
import httpx

from netota_coap.client import Client
from netota_coap.download.transports import http_client, http_failures
from netota_coap.errors import (
    ConfigError,
    IntegrityError,
    InvalidDataError,
    PeerError,
    TransferError,
)
from netota_coap.formats import Format
from netota_coap.model import LIMITS, PackageEntry, Stream, StreamEntry, StreamName
from netota_coap.wire import decode, decode_list

T = TypeVar("T")

_CBOR = "application/cbor"
_EVENTS = "text/event-stream"
_SILENCE_S = 45.0  # three signs of life of an event stream (H-34)


class Upstream(Protocol):
    """Another server."""

    async def packages(self) -> Mapping[str, PackageEntry]:
        """Return its packages.

        Raises:
            TransferError: It is away, refuses, or what it sends is malformed; so do the others.
        """
        ...

    async def streams(self, package: str) -> Mapping[str, StreamEntry]:
        """Return the streams of a package."""
        ...

    async def stream(self, name: StreamName) -> Stream:
        """Return the state of a stream, whole."""
        ...

    def changes(self, poll_s: float) -> AsyncGenerator[bytes | None, None]:
        """Learn that anything changed, the first time at once, and that the server is there.

        It ends when it is time to begin anew, after `poll_s` seconds of silence at the latest.

        Yields:
            What all that there is is known by: the same as before with a sign of life only; None:
            it may be anything.
        """
        ...


@contextlib.asynccontextmanager
async def upstream_of(uri: str, timeout_s: float) -> AsyncIterator[Upstream]:
    """Make the upstream that a URI names.

    Args:
        uri: `coap://HOST`, or of HTTP, with the prefix if it has one.
        timeout_s: How long to wait for an answer, seconds.

    Raises:
        ConfigError: The URI is of another scheme.
    """
    scheme = uri.partition("://")[0]
    if scheme == "coap":
        async with Client(timeout_s=timeout_s) as client:
            yield _Coap(uri, client)
    elif scheme in ("http", "https"):
        async with http_client() as client:
            yield _Http(uri, client, timeout_s)
    else:
        raise ConfigError(
            f"{uri}: not the URI of an upstream", hint="As in coap://host or https://host/prefix"
        )


@attrs.frozen
class _Coap:
    uri: str
    client: Client

    async def packages(self) -> Mapping[str, PackageEntry]:
        return await self.client.packages(self.uri)

    async def streams(self, package: str) -> Mapping[str, StreamEntry]:
        return await self.client.streams(self.uri, package)

    async def stream(self, name: StreamName) -> Stream:
        return await self.client.stream(f"{self.uri}/p/{name[0]}/s/{name[1]}")

    def changes(self, poll_s: float) -> AsyncGenerator[bytes | None, None]:
        return self.client.changes(self.uri, poll_s=poll_s)


@attrs.frozen
class _Http:
    uri: str
    client: httpx.AsyncClient
    timeout_s: float

    async def packages(self) -> Mapping[str, PackageEntry]:
        return await self._get("p", lambda data: decode_list(PackageEntry, data, Format.CBOR))

    async def streams(self, package: str) -> Mapping[str, StreamEntry]:
        return await self._get(
            f"p/{package}", lambda data: decode_list(StreamEntry, data, Format.CBOR)
        )

    async def stream(self, name: StreamName) -> Stream:
        return await self._get(
            f"p/{name[0]}/s/{name[1]}", lambda data: decode(Stream, data, Format.CBOR)
        )

    async def changes(self, poll_s: float) -> AsyncGenerator[bytes | None, None]:
        url, tag = f"{self.uri}/p", None
        now = asyncio.get_running_loop().time
        end = now() + poll_s
        async with self._answer(url, _EVENTS, self.timeout_s) as response:
            chunks, tail = response.aiter_raw(), b""
            async with contextlib.aclosing(chunks):  # type: ignore[type-var]
                while now() < end:
                    with http_failures(url):
                        try:
                            async with asyncio.timeout(min(_SILENCE_S, end - now())):
                                chunk = await anext(chunks, b"")
                        except TimeoutError:
                            if now() >= end:
                                return
                            detail = f"no sign of life in {_SILENCE_S:g} s"
                            raise TransferError(detail, uri=url) from None
                    if not chunk:
                        return  # it stops
                    *events, tail = (tail + chunk).split(b"\n\n")
                    _require_short(url, tail)
                    told = [event for event in events if b"data:" in event]
                    if told:
                        end, tag = now() + poll_s, _id_of(told[-1])
                    if events:
                        yield tag

    async def _get(self, path: str, read: Callable[[bytes], T]) -> T:
        url = f"{self.uri}/{path}"
        data = bytearray()
        try:
            async with (
                asyncio.timeout(self.timeout_s),
                self._answer(url, _CBOR, self.timeout_s) as response,
            ):
                with http_failures(url):
                    async for chunk in response.aiter_raw():
                        data += chunk
                        _require_short(url, data)
        except TimeoutError:
            raise TransferError(f"no answer in {self.timeout_s:g} s", uri=url) from None
        try:
            return read(bytes(data))
        except InvalidDataError as error:
            raise IntegrityError(f"is malformed: {error.detail}", uri=url) from error

    @contextlib.asynccontextmanager
    async def _answer(
        self, url: str, media_type: str, timeout_s: float
    ) -> AsyncIterator[httpx.Response]:
        with http_failures(url):
            request = self.client.build_request("GET", url, headers={"Accept": media_type})
            try:
                async with asyncio.timeout(timeout_s):
                    response = await self.client.send(request, stream=True)
            except TimeoutError:
                raise TransferError(f"no answer in {timeout_s:g} s", uri=url) from None
        try:
            if response.status_code != httpx.codes.OK:
                status = str(response.status_code)
                detail = httpx.codes.get_reason_phrase(response.status_code) or "Unknown"
                raise PeerError(detail, uri=url, code=status)
            found = response.headers.get("Content-Type", "").partition(";")[0]
            if found != media_type:
                raise IntegrityError(f"is {found[:40]!r}, not {media_type}", uri=url)
            yield response
        finally:
            await response.aclose()


def _id_of(event: bytes) -> bytes | None:
    ids = (line[3:].strip() for line in event.split(b"\n") if line.startswith(b"id:"))
    return next(ids, None)


def _require_short(url: str, data: bytes | bytearray) -> None:
    if len(data) > LIMITS["document"].value:
        raise IntegrityError("is longer than any document may be", uri=url)
