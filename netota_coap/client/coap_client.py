"""A CoAP client that gets and observes streams, and verifies them before it returns them.

Source: `spec/resources.md`, `spec/wire.md`.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
from collections import deque
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable, Iterable, Iterator
from typing import Any, TypeVar, cast

import aiocoap.error
import attrs
from aiocoap.message import Message
from aiocoap.numbers.codes import Code
from aiocoap.numbers.constants import Unreliable
from aiocoap.optiontypes import BlockOption
from aiocoap.protocol import ClientObservation, Context, Request

from netota_coap.client.back_off import BackOff, jittered
from netota_coap.client.round_trip_time import ServerTiming
from netota_coap.encoding.codecs import Format, load
from netota_coap.encoding.content_formats import CODECS, ContentFormat
from netota_coap.encoding.documents import decode, decode_list, decode_problem, selection_to_query
from netota_coap.errors import (
    ConfigError,
    IntegrityError,
    InvalidDataError,
    PeerError,
    RollbackError,
    TransferError,
)
from netota_coap.model.selection import Selection
from netota_coap.model.values import DEFAULT_POLL_S, LIMITS, PackageEntry, Stream, StreamEntry

T = TypeVar("T")

ANY_DEVICE = Selection()
LARGEST_BLOCK = 6
"""Size exponent of CoAP's largest block, 1,024 bytes."""
MOST_IN_FLIGHT = 64
"""Blocks requested at a time: more overflow a socket's receive buffer."""

_DEFAULT_MAX_AGE_S = 60  # RFC 7252, section 5.10.5
_ATTEMPTS = 5  # to get a resource that changes meanwhile
_LONGEST_RETRY_S = 60.0
_LAST_BLOCK = 2**20 - 1  # RFC 7959, section 2.2
_LARGEST_SIZE = 2**32 - 1  # RFC 7959, section 4


@attrs.frozen
class Fetched:
    """A resource that arrived whole; None stands for an option that the server did not send."""

    format: int | None
    payload: bytes
    max_age_s: int
    etag: bytes | None = None


@attrs.frozen
class ReceivedBlock:
    """One block of a resource; None stands for an option that the server did not send."""

    offset: int
    payload: bytes
    more: bool
    exponent: int  # the server wants blocks of 2^(exponent+4) bytes
    etag: bytes | None
    size: int | None  # of the whole resource


class ChangedError(Exception):
    """The resource is no longer the one whose first bytes were received."""


@contextlib.asynccontextmanager
async def within(
    seconds: float, uri: str, problem: str = "no answer in"
) -> AsyncIterator[asyncio.Timeout]:
    """Raise `TransferError` if the block takes longer; `reschedule` moves its deadline."""
    try:
        async with asyncio.timeout(seconds) as waiting:
            yield waiting
    except TimeoutError:
        raise TransferError(f"{problem} {seconds:g} s", uri=uri) from None


@attrs.define
class Client:
    """A CoAP client for any number of `coap://` servers; use it as an async context manager.

    It remembers the highest sequence of each stream and refuses a lower one. It calls `on_trouble`
    with each error after which an observation is retried.
    """

    timeout_s: float = 30.0  # for one response
    transfer_s: float = 300.0  # for all blocks of one resource
    retry_s: float = 1.0  # first wait before an observation is retried, which doubles up to 60
    on_trouble: Callable[[TransferError], object] = lambda _: None
    _context: Context | None = attrs.field(init=False, default=None)
    _sequences: dict[str, int] = attrs.field(init=False, factory=dict)

    async def __aenter__(self) -> Client:
        self._context = await Context.create_client_context(
            transports=["udp6"], loggername="netota_coap.aiocoap"
        )
        return self

    async def __aexit__(self, *_: object) -> None:
        if self._context:
            await self._context.shutdown()

    async def get(
        self, uri: str, query: Iterable[str] = (), accept: ContentFormat | None = None
    ) -> Fetched:
        """Get a resource, block by block if need be.

        Raises:
            PeerError: The server answered with an error.
            IntegrityError: The resource changed during each of five attempts.
            TransferError: The server is unreachable.
            ConfigError: `uri` is not a `coap://` URI.
        """
        for _ in range(_ATTEMPTS):
            first = await self._checked(uri, self._sent(_get(uri, query, accept)))
            with contextlib.suppress(ChangedError):
                return await self._rest(uri, query, accept, first)
        raise IntegrityError("changed again and again while it was fetched", uri=uri)

    async def block(
        self,
        uri: str,
        offset: int,
        exponent: int = LARGEST_BLOCK,
        timing: ServerTiming | None = None,
    ) -> ReceivedBlock:
        """Get one block of a resource, 2^(exponent+4) bytes; the server may choose fewer.

        The offset is a multiple of that size. Without `timing`, aiocoap retransmits; it has only
        one request in flight to each server.

        Raises:
            IntegrityError: The server sent another block.
            TransferError: As for `get`, or CoAP cannot address a block at this offset.
        """
        number = offset >> exponent + 4
        if number > _LAST_BLOCK:
            raise TransferError(f"CoAP cannot address a block at {offset} bytes", uri=uri)
        message = _get(uri)
        message.opt.block2 = (number, False, exponent)
        message.opt.size2 = 0  # asks for the size: RFC 7959, section 4
        pending = self._retransmitted(message, timing) if timing else self._sent(message)
        block = _block(uri, await self._checked(uri, pending), offset)
        if block.exponent > exponent:
            raise _another_block(uri)
        return block

    async def blocks(
        self, uri: str, offset: int = 0, *, size: int = 0, in_flight: int = 1
    ) -> AsyncGenerator[ReceivedBlock, None]:
        """Get the blocks of a resource in order, with several requests in flight.

        Nothing past the end is requested: the first block is requested alone, and so is each
        after `size`. After an error all further blocks are requested one at a time, because some
        servers can do no more. The caller compares ETags to notice a change of the resource.

        Args:
            uri: Any `coap://` URI.
            offset: Where to begin: a multiple of 1,024 bytes.
            size: Expected size of the resource, bytes, if the server sends none; 0: unknown.
            in_flight: Blocks requested ahead of the one yielded last, 1 to 64.

        Raises:
            ConfigError: As for `get`, or `in_flight` is out of range.
            TransferError: As for `block`.
        """
        if not 1 <= in_flight <= MOST_IN_FLIGHT:
            raise ConfigError(f"{in_flight} blocks in flight: must be 1 to {MOST_IN_FLIGHT}")
        timing = ServerTiming() if in_flight > 1 else None
        block = await self.block(uri, offset, LARGEST_BLOCK, timing)
        size, exponent, ahead = block.size or size, -1, 0
        requested: deque[asyncio.Task[ReceivedBlock]] = deque()
        try:
            yield block
            while block.more:
                if block.exponent != exponent:
                    # Blocks of another size do not continue this one.
                    await _cancel(requested)
                    exponent, ahead = block.exponent, block.offset + len(block.payload)
                while not requested or (len(requested) < in_flight and ahead < size):
                    request = self.block(uri, ahead, exponent, timing)
                    requested.append(asyncio.create_task(request))
                    ahead += 16 << exponent
                try:
                    block = await requested.popleft()
                except PeerError:
                    if timing is None:
                        raise
                    in_flight, timing, exponent = 1, None, -1
                else:
                    yield block
        finally:
            await _cancel(requested)

    async def get_plain(self, uri: str, query: Iterable[str], accept: ContentFormat) -> Any:
        """Get a resource as text (link-format) or plain data (the other formats).

        It raises as `get` does, and `IntegrityError` if the response is in another format.
        """
        fetched = await self.get(uri, query, accept)
        if fetched.format != accept:
            raise IntegrityError(f"is in format {fetched.format}, not {accept}", uri=uri)
        if accept is ContentFormat.LINK:
            return fetched.payload.decode(errors="replace")
        return _decoded(uri, lambda: load(fetched.payload, CODECS[accept]))

    async def packages(self, uri: str) -> dict[str, PackageEntry]:
        """Return the packages of a server (`coap://HOST`); raises as `get` does."""
        fetched = await self.get(f"{uri.rstrip('/')}/p", accept=ContentFormat.CBOR)
        return _decoded(uri, lambda: decode_list(PackageEntry, fetched.payload, Format.CBOR))

    async def streams(self, uri: str, package: str) -> dict[str, StreamEntry]:
        """Return the streams of a package of a server (`coap://HOST`); raises as `get` does."""
        fetched = await self.get(f"{uri.rstrip('/')}/p/{package}", accept=ContentFormat.CBOR)
        return _decoded(uri, lambda: decode_list(StreamEntry, fetched.payload, Format.CBOR))

    async def stream(self, uri: str, selection: Selection = ANY_DEVICE) -> Stream:
        """Return the whole state of a stream (`coap://HOST/p/PACKAGE/s/STREAM`).

        It has the archives that suit a device, the preferred one first.

        Raises:
            IntegrityError: The response is malformed.
            RollbackError: The sequence is lower than one received before.
            TransferError: As for `get`.
        """
        query = selection_to_query(selection)
        return await self._complete(uri, query, await self.get(uri, query, ContentFormat.CBOR))

    async def observe(
        self, uri: str, selection: Selection = ANY_DEVICE, *, poll_s: float | None = None
    ) -> AsyncGenerator[Stream, None]:
        """Yield the state of a stream, as `stream` returns it, now and after each change.

        A server that lost the observation is silent. So the client registers again when the
        server was silent for `poll_s` seconds, or for longer than it promised (key 7, Max-Age),
        and, with back-off, while the server is unreachable.

        Raises:
            PeerError: The server refuses; the stream was removed, say.
            TransferError: As for `stream`, except that an unreachable server is waited for.
        """
        query = selection_to_query(selection)
        last: Stream | None = None
        back_off = BackOff(self.retry_s, _LONGEST_RETRY_S)
        while True:
            try:
                async with contextlib.aclosing(self._registered(uri, query, poll_s)) as states:
                    async for fetched in states:
                        try:
                            state = await self._complete(uri, query, fetched)
                        except RollbackError:
                            # A later response may overtake a notification: ask once more.
                            state = await self.stream(uri, selection)
                        back_off.reset()
                        if state != last:
                            last = state
                            yield state
            except TransferError as error:
                refused = isinstance(error, PeerError) and not error.code.startswith("5.")
                if refused or isinstance(error, IntegrityError | RollbackError):
                    raise
                self.on_trouble(error)
                await asyncio.sleep(back_off.next_s())

    async def changes(
        self, uri: str, *, poll_s: float | None = None
    ) -> AsyncGenerator[bytes | None, None]:
        """Yield the ETag over everything on a server (`coap://HOST`), now and after each change.

        One observation serves all streams. The generator ends when `observe` would register
        again; the caller then calls it again. The ETag is None if the server sent none. Errors
        are those of `get`.
        """
        registered = self._registered(f"{uri.rstrip('/')}/p", [], poll_s)
        async with contextlib.aclosing(registered) as states:
            async for fetched in states:
                yield fetched.etag

    async def _registered(
        self, uri: str, query: list[str], poll_s: float | None
    ) -> AsyncGenerator[Fetched, None]:
        """Yield the notifications of one registration until the server was silent for too long."""
        message = _get(uri, query, ContentFormat.CBOR)
        message.opt.observe = 0
        request = self._send(message)
        response = await self._checked(uri, self._response(request))
        registered = response.opt.observe is not None
        notifications = aiter(request.observation)
        poll_s = DEFAULT_POLL_S if poll_s is None else poll_s
        try:
            while True:
                # A change between two blocks is followed by a notification of its own.
                with contextlib.suppress(ChangedError):
                    yield await self._rest(uri, query, ContentFormat.CBOR, response)
                # `retry_s` bounds the rate if the server promises nothing, and jitter keeps all
                # devices that heard of one publish from asking at one time.
                promised_s = max(min(_max_age_s(response), poll_s), self.retry_s)
                silence_s = jittered(promised_s, share=0.1)
                try:
                    async with asyncio.timeout(silence_s):
                        with _failures(uri):
                            response = await anext(notifications)
                            _refuse_error(uri, response)
                except TimeoutError:
                    return
                except StopAsyncIteration:
                    if not registered:
                        await asyncio.sleep(silence_s)
                    return
        finally:
            if not request.observation.cancelled:
                request.observation.cancel()
                self._deregister(message, response)

    def _deregister(self, registration: Message, response: Message) -> None:
        """Deregister from the server, which aiocoap itself never does."""
        message = registration.copy(observe=1, mid=None)
        message.token, message.remote = registration.token, response.remote
        # Nobody waits for the response, and it must not delay the next request to this server.
        message.transport_tuning = Unreliable()
        for manager in self._context.request_interfaces if self._context else ():
            manager.token_interface.send_message(message, lambda: None)

    async def _complete(self, uri: str, query: list[str], fetched: Fetched) -> Stream:
        """Verify a state, and fetch what the server left out of it."""
        for _ in range(_ATTEMPTS):
            state = self._verified(uri, fetched)
            if not state.more:
                return state
            rest = [f"sequence={state.sequence}", "full", *query]
            try:
                fetched = await self.get(uri, rest, ContentFormat.CBOR)
            except PeerError as error:
                if error.code != "4.04":
                    raise
                # Another state was published meanwhile.
                fetched = await self.get(uri, query, ContentFormat.CBOR)
        raise IntegrityError("changed again and again while it was fetched", uri=uri)

    def _verified(self, uri: str, fetched: Fetched) -> Stream:
        if fetched.format != ContentFormat.CBOR:
            raise IntegrityError(f"is in format {fetched.format}, not CBOR", uri=uri)
        state = _decoded(uri, lambda: decode(Stream, fetched.payload, Format.CBOR))
        key = uri.partition("?")[0]
        highest = self._sequences.get(key, 0)
        if state.sequence < highest:
            detail = f"went back from sequence {highest} to {state.sequence}"
            raise RollbackError(detail, uri=uri)
        self._sequences[key] = state.sequence
        return state

    async def _rest(
        self, uri: str, query: Iterable[str], accept: ContentFormat | None, first: Message
    ) -> Fetched:
        """Fetch the blocks after the first; raise `ChangedError` if their ETags differ."""
        payload, response = bytearray(), first
        async with within(self.transfer_s, uri, "is incomplete after"):
            while True:
                block = _block(uri, response, len(payload))
                payload += block.payload
                if len(payload) > LIMITS["document"].value:
                    raise IntegrityError("is longer than a document may be", uri=uri)
                if not block.more:
                    found = first.opt.content_format, bytes(payload), _max_age_s(first)
                    return Fetched(*found, first.opt.etag)
                message = _get(uri, query, accept)
                number = len(payload) >> block.exponent + 4
                message.opt.block2 = (number, False, block.exponent)
                response = await self._checked(uri, self._sent(message))
                if response.opt.etag != first.opt.etag:
                    raise ChangedError

    def _send(self, message: Message) -> Request:
        assert self._context is not None, "use the client as an async context manager"
        request: Request = self._context.request(message, handle_blockwise=False)
        return request

    async def _sent(self, message: Message) -> Message:
        return await self._response(self._send(message))

    async def _response(self, request: Request) -> Message:
        """Wait for the response to a request; notifications may follow it."""
        response = _future(request)
        try:
            await asyncio.wait((response,))
        except asyncio.CancelledError:
            self._abandon(response, request.observation)
            raise
        return response.result()

    def _abandon(
        self, response: asyncio.Future[Message], observation: ClientObservation | None = None
    ) -> None:
        """Ignore a response, and an observation that it would begin."""
        # aiocoap fails if a response arrives at the moment of a cancellation.
        asyncio.get_running_loop().call_later(self.timeout_s, response.cancel)

        def end(_: object) -> None:
            # Asking for the exception keeps asyncio from logging it.
            arrived = not response.cancelled() and response.exception() is None
            if arrived and observation and not observation.cancelled:
                observation.cancel()

        response.add_done_callback(end)

    async def _retransmitted(self, message: Message, timing: ServerTiming) -> Message:
        """Send a request again and again until one transmission is answered.

        aiocoap retransmits confirmable messages, but has only one in flight to each server.
        """
        loop = asyncio.get_running_loop()
        message.transport_tuning = Unreliable()
        if timing.remote:
            message.remote = timing.remote
        wait_s = timing.repeat_s()
        sent: dict[asyncio.Future[Message], float] = {}
        try:
            while True:
                # Each copy has its own token, which tells which of them was answered.
                sent[_future(self._send(message.copy()))] = loop.time()
                done, _ = await asyncio.wait(sent, timeout=wait_s, return_when="FIRST_COMPLETED")
                if done:
                    answered = done.pop()
                    timing.answered(answered.result(), loop.time() - sent.pop(answered))
                    return answered.result()
                wait_s *= 2
        finally:
            for response in sent:
                self._abandon(response)

    async def _checked(self, uri: str, pending: Awaitable[Message]) -> Message:
        """Wait for a response for at most `timeout_s`, and raise if it is an error."""
        async with within(self.timeout_s, uri):
            with _failures(uri):
                response: Message = await pending
        _refuse_error(uri, response)
        return response


def _future(request: Request) -> asyncio.Future[Message]:
    # aiocoap documents the attribute by a string, which mypy takes for its type.
    return cast("asyncio.Future[Message]", request.response)


async def _cancel(tasks: deque[asyncio.Task[ReceivedBlock]]) -> None:
    """Cancel and forget all tasks, whatever their results."""
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)
    tasks.clear()


def _get(uri: str, query: Iterable[str] = (), accept: ContentFormat | None = None) -> Message:
    try:
        message = Message(code=Code.GET, uri=uri)
    except (ValueError, aiocoap.error.Error) as error:
        raise ConfigError(f"{uri}: not a CoAP URI", hint="Example: coap://[::1]/p") from error
    if not uri.startswith("coap://"):
        raise ConfigError(f"{uri}: only coap:// is supported")
    message.opt.uri_query = (*message.opt.uri_query, *query)
    if accept is not None:
        message.opt.accept = accept
    return message


def _block(uri: str, response: Message, offset: int) -> ReceivedBlock:
    """Read a response as the block that begins at an offset."""
    # A resource that fits into one response needs no option.
    option = response.opt.block2 or BlockOption.BlockwiseTuple(0, False, LARGEST_BLOCK)
    payload, etag, size = response.payload, response.opt.etag, response.opt.size2
    if size is not None and size > _LARGEST_SIZE:
        size = None
    if option.start != offset or (option.more and len(payload) != option.size):
        raise _another_block(uri)
    return ReceivedBlock(offset, payload, bool(option.more), option.size_exponent, etag, size)


def _another_block(uri: str) -> IntegrityError:
    return IntegrityError("answers with another block than was asked for", uri=uri)


def _max_age_s(message: Message) -> int:
    age = message.opt.max_age
    return _DEFAULT_MAX_AGE_S if age is None else int(age)


def _refuse_error(uri: str, response: Message) -> None:
    code = Code(int(response.code or 0))
    if not code.is_successful():
        detail = decode_problem(response.payload) or code.name_printable
        # RFC 7252, section 5.9.3.4
        after_s = response.opt.max_age if code is Code.SERVICE_UNAVAILABLE else None
        raise PeerError(detail, uri=uri, code=code.dotted, retry_after_s=after_s)


@contextlib.contextmanager
def _failures(uri: str) -> Iterator[None]:
    """Turn what aiocoap raises into our own errors."""
    try:
        yield
    except UnicodeError as error:
        raise ConfigError(f"{uri}: not a host name") from error
    except (aiocoap.error.Error, OSError) as error:
        if isinstance(error, TimeoutError):
            raise
        cause = error.__cause__
        number = cause.errno if isinstance(cause, OSError) else None
        detail = os.strerror(number) if number and number > 0 else str(error)
        hint = error.extra_help() if isinstance(error, aiocoap.error.HelpfulError) else ""
        raise TransferError(detail or type(error).__name__, uri=uri, hint=hint or "") from error


def _decoded(uri: str, decoding: Callable[[], T]) -> T:
    try:
        return decoding()
    except InvalidDataError as error:
        raise IntegrityError(f"is malformed: {error.detail}", uri=uri) from error
