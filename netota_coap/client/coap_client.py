"""The device's side: fetch and observe streams over CoAP. Verifies before it returns.

Source: `spec/resources.md`, `spec/wire.md`.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import random
from collections import deque
from collections.abc import AsyncGenerator, Awaitable, Callable, Iterable, Iterator
from types import TracebackType
from typing import Any, TypeVar, cast

import aiocoap.error
import attrs
from aiocoap.message import Message
from aiocoap.numbers.codes import Code
from aiocoap.numbers.constants import Unreliable
from aiocoap.optiontypes import BlockOption
from aiocoap.protocol import ClientObservation, Context, Request

from netota_coap.client.round_trip_time import Peer
from netota_coap.encoding.codecs import Format, load
from netota_coap.encoding.content_formats import ContentFormat
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

EVERYTHING = Selection()
LARGEST_BLOCK = 6
"""Exponent of the size of CoAP's largest block, 1,024 bytes."""
MOST_IN_FLIGHT = 64
"""Blocks that can be asked for at a time: what a socket's buffer holds."""

_DEFAULT_MAX_AGE_S = 60  # RFC 7252, section 5.10.5
_ATTEMPTS = 5  # at a state that changes while it is fetched
_LONGEST_RETRY_S = 60.0
_LAST_BLOCK = 2**20 - 1  # RFC 7959, section 2.2
_LARGEST_SIZE = 2**32 - 1  # RFC 7959, section 4


@attrs.frozen
class Fetched:
    """A payload that arrived whole.

    Attributes:
        format: Content-Format number; None if the server gave none.
        payload: The bytes.
        max_age_s: For how long it may be taken as fresh, seconds.
        etag: Of the resource; None if the server gave none.
    """

    format: int | None
    payload: bytes
    max_age_s: int
    etag: bytes | None = None


@attrs.frozen
class Block:
    """A piece of a resource.

    Attributes:
        offset: Where it begins, bytes.
        payload: The bytes.
        more: Whether others follow.
        exponent: Of its size, as the server wants it: 2^(exponent+4) bytes.
        etag: Of the resource; None if the server gave none.
        size: Of the whole resource, bytes; None if the server did not tell.
    """

    offset: int
    payload: bytes
    more: bool
    exponent: int
    etag: bytes | None
    size: int | None


class _ChangedError(Exception):
    """The resource changed between two blocks."""


@attrs.define
class Client:
    """A CoAP client of any number of servers; use it as an async context manager.

    It remembers the highest sequence of each stream, and takes none below it.

    Attributes:
        timeout_s: How long to wait for one answer, seconds.
        transfer_s: How long to wait for all blocks of one answer, seconds.
        retry_s: How long to wait before the first retry of an observation, seconds; doubles up to
            a minute.
        on_trouble: Called with each error that an observation waits out.
    """

    timeout_s: float = 30.0
    transfer_s: float = 300.0
    retry_s: float = 1.0
    on_trouble: Callable[[TransferError], object] = lambda _: None
    _context: Context | None = attrs.field(init=False, default=None)
    _sequences: dict[str, int] = attrs.field(init=False, factory=dict)

    async def __aenter__(self) -> Client:
        self._context = await Context.create_client_context(
            transports=["udp6"], loggername="netota_coap.aiocoap"
        )
        return self

    async def __aexit__(
        self,
        _type: type[BaseException] | None,
        _value: BaseException | None,
        _traceback: TracebackType | None,
    ) -> None:
        if self._context:
            await self._context.shutdown()

    async def get(
        self, uri: str, query: Iterable[str] = (), accept: ContentFormat | None = None
    ) -> Fetched:
        """Get a resource, block by block where it takes several.

        Args:
            uri: `coap://…`.
            query: Parameters that are added to those of the URI.
            accept: Wanted format; None: the server's default.

        Raises:
            PeerError: The server answered with an error.
            IntegrityError: The resource changed again and again while it was fetched.
            TransferError: The server cannot be reached.
            ConfigError: The URI is none.
        """
        for _ in range(_ATTEMPTS):
            first = await self._answer(uri, self._first(self._send(_message(uri, query, accept))))
            with contextlib.suppress(_ChangedError):
                return await self._rest(uri, query, accept, first)
        raise IntegrityError("changed again and again while it was fetched", uri=uri)

    async def block(self, uri: str, offset: int, exponent: int = LARGEST_BLOCK) -> Block:
        """Get one block of a resource, and the size of the whole if the server tells it.

        Args:
            uri: `coap://…`.
            offset: A multiple of the block's size, bytes.
            exponent: Of the block's size, 0 to 6: 2^(exponent+4) bytes. The server may choose a
                smaller one.

        Returns:
            The block, at most as long as was asked for.

        Raises:
            IntegrityError: The answer is another block.
            TransferError: As `get` does; or CoAP cannot reach that far into a resource.
        """
        return await self._piece(uri, offset, exponent)

    async def blocks(
        self, uri: str, offset: int = 0, *, size: int = 0, in_flight: int = 1
    ) -> AsyncGenerator[Block, None]:
        """Get the blocks of a resource in their order, several of them on their way at a time.

        The first is asked for alone, and so is what follows after `size`: nothing past the end is
        asked for. A block that is refused among others is asked for once more, and from there on
        one after the other: not every server can do better. Whether the blocks are of one state,
        their ETags tell.

        Args:
            uri: `coap://…`.
            offset: Where to begin: a multiple of 1,024 bytes.
            size: Of the whole, bytes, in case the server does not tell it; 0: not known.
            in_flight: Blocks that are asked for ahead of those that were yielded, 1 to 64.

        Yields:
            Each block, up to the end.

        Raises:
            ConfigError: As `get` does; or `in_flight` is out of range.
            TransferError: As `block` does.
        """
        if not 1 <= in_flight <= MOST_IN_FLIGHT:
            raise ConfigError(f"{in_flight} blocks in flight: must be 1 to {MOST_IN_FLIGHT}")
        peer = Peer() if in_flight > 1 else None
        block = await self._piece(uri, offset, LARGEST_BLOCK, peer)
        size, exponent, ahead = block.size or size, -1, 0
        asked: deque[asyncio.Task[Block]] = deque()
        try:
            yield block
            while block.more:
                if block.exponent != exponent:
                    # What was asked for in blocks of another size does not follow on this one.
                    await _drop(asked)
                    exponent, ahead = block.exponent, block.offset + len(block.payload)
                while not asked or (len(asked) < in_flight and ahead < size):
                    piece = self._piece(uri, ahead, exponent, peer)
                    asked.append(asyncio.create_task(piece))
                    ahead += 16 << exponent
                try:
                    block = await asked.popleft()
                except PeerError:
                    if peer is None:
                        raise
                    in_flight, peer, exponent = 1, None, -1
                else:
                    yield block
        finally:
            await _drop(asked)

    async def _piece(
        self, uri: str, offset: int, exponent: int, peer: Peer | None = None
    ) -> Block:
        """Get one block; with `peer`, whatever else is on its way to that server."""
        number = offset >> exponent + 4
        if number > _LAST_BLOCK:
            raise TransferError(f"CoAP counts no block of it at {offset} bytes", uri=uri)
        message = _message(uri, (), None)
        message.opt.block2 = (number, False, exponent)
        message.opt.size2 = 0  # RFC 7959, section 4: tell it
        pending = self._repeated(message, peer) if peer else self._first(self._send(message))
        block = _block(uri, await self._answer(uri, pending), offset)
        if block.exponent > exponent:
            raise _another_block(uri)
        return block

    async def get_plain(self, uri: str, query: Iterable[str], accept: ContentFormat) -> Any:
        """Get a resource, and return the text of link-format or the plain data of the others.

        Raises:
            IntegrityError: The answer is in another format, or malformed.
            TransferError: As `get` does.
        """
        fetched = await self.get(uri, query, accept)
        if fetched.format != accept:
            raise IntegrityError(f"is in format {fetched.format}, not {accept}", uri=uri)
        if accept is ContentFormat.LINK:
            return fetched.payload.decode(errors="replace")
        fmt = Format.CBOR if accept is ContentFormat.CBOR else Format.JSON
        return _decoded(uri, lambda: load(fetched.payload, fmt))

    async def packages(self, uri: str) -> dict[str, PackageEntry]:
        """Return the packages of a server (`coap://HOST`); raises as `get` does."""
        fetched = await self.get(f"{uri.rstrip('/')}/p", accept=ContentFormat.CBOR)
        return _decoded(uri, lambda: decode_list(PackageEntry, fetched.payload, Format.CBOR))

    async def streams(self, uri: str, package: str) -> dict[str, StreamEntry]:
        """Return the streams of a package of a server (`coap://HOST`); raises as `get` does."""
        fetched = await self.get(f"{uri.rstrip('/')}/p/{package}", accept=ContentFormat.CBOR)
        return _decoded(uri, lambda: decode_list(StreamEntry, fetched.payload, Format.CBOR))

    async def stream(self, uri: str, selection: Selection = EVERYTHING) -> Stream:
        """Return the state of a stream, whole.

        Args:
            uri: `coap://HOST/p/PACKAGE/s/STREAM`.
            selection: What the device says about itself.

        Returns:
            What suits the device, the preferred archive first.

        Raises:
            IntegrityError: The answer is malformed.
            RollbackError: Its sequence is below one that was there before.
            TransferError: As `get` does.
        """
        query = selection_to_query(selection)
        return await self._complete(uri, query, await self.get(uri, query, ContentFormat.CBOR))

    async def observe(
        self, uri: str, selection: Selection = EVERYTHING, *, poll_s: float | None = None
    ) -> AsyncGenerator[Stream, None]:
        """Follow a stream: its state now, and each other one as it comes.

        It registers again when the server was silent for as long as it promised to be at most
        (key 7, Max-Age), so that a server that lost the observation costs a delay, not a device;
        and when the network or the server is away, until they are back.

        Args:
            uri: As in `stream`.
            selection: As in `stream`.
            poll_s: Ask again at least this often, seconds; None: when the server says.

        Yields:
            Each state that differs from the one before.

        Raises:
            PeerError: The server refuses: the stream vanished, or never was.
            IntegrityError: As `stream` does.
            RollbackError: As `stream` does.
        """
        query = selection_to_query(selection)
        last: Stream | None = None
        retry_s = self.retry_s
        while True:
            try:
                async with contextlib.aclosing(self._registered(uri, query, poll_s)) as states:
                    async for fetched in states:
                        try:
                            state = await self._complete(uri, query, fetched)
                        except RollbackError:
                            # A notification may be overtaken by a later answer: ask once more.
                            state = await self.stream(uri, selection)
                        retry_s = self.retry_s
                        if state != last:
                            last = state
                            yield state
            except (IntegrityError, RollbackError):
                raise
            except TransferError as error:
                if isinstance(error, PeerError) and not error.code.startswith("5."):
                    raise
                self.on_trouble(error)
                await asyncio.sleep(retry_s * random.uniform(1.0, 1.5))  # noqa: S311
                retry_s = min(retry_s * 2, _LONGEST_RETRY_S)

    async def changes(
        self, uri: str, *, poll_s: float | None = None
    ) -> AsyncGenerator[bytes | None, None]:
        """Learn by one observation that anything of a server changed; the first time at once.

        It ends when it is time to begin anew: the server was silent for as long as it may be.

        Args:
            uri: Of the server, `coap://HOST`.
            poll_s: As in `observe`.

        Yields:
            ETag over everything that the server has; None if it gave none.

        Raises:
            TransferError: As `get` does; the server may be back later.
        """
        registered = self._registered(f"{uri.rstrip('/')}/p", [], poll_s)
        async with contextlib.aclosing(registered) as states:
            async for fetched in states:
                yield fetched.etag

    async def _registered(
        self, uri: str, query: list[str], poll_s: float | None
    ) -> AsyncGenerator[Fetched, None]:
        """Yield the answers of one registration, until the server was silent for too long."""
        message = _message(uri, query, ContentFormat.CBOR)
        message.opt.observe = 0
        request = self._send(message)
        response = await self._answer(uri, self._first(request))
        registered = response.opt.observe is not None
        notifications = aiter(request.observation)
        poll_s = DEFAULT_POLL_S if poll_s is None else poll_s
        try:
            while True:
                # If it changes between two blocks, the notification of that is on its way.
                with contextlib.suppress(_ChangedError):
                    yield await self._rest(uri, query, ContentFormat.CBOR, response)
                # A server that promises nothing must not be asked without end. And all devices
                # that heard of one publish would else ask again at one moment.
                silence_s = max(min(_max_age_s(response), poll_s), self.retry_s)
                silence_s *= random.uniform(1.0, 1.1)  # noqa: S311
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
        """Tell the server that an observation is over; aiocoap itself never does."""
        message = registration.copy(observe=1, mid=None)
        message.token, message.remote = registration.token, response.remote
        # Its answer does not matter, and must not hold up the next request to this server.
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
                # Another state was published meanwhile: begin again with that one.
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
        """Fetch the blocks after the first."""
        try:
            async with asyncio.timeout(self.transfer_s):
                return await self._blocks(uri, query, accept, first)
        except TimeoutError:
            raise TransferError(f"not all of it came in {self.transfer_s:g} s", uri=uri) from None

    async def _blocks(
        self, uri: str, query: Iterable[str], accept: ContentFormat | None, first: Message
    ) -> Fetched:
        payload, response = bytearray(), first
        while True:
            block = _block(uri, response, len(payload))
            payload += block.payload
            if len(payload) > LIMITS["document"].value:
                raise IntegrityError("is longer than any document may be", uri=uri)
            if not block.more:
                break
            message = _message(uri, query, accept)
            number = len(payload) >> block.exponent + 4
            message.opt.block2 = (number, False, block.exponent)
            response = await self._answer(uri, self._first(self._send(message)))
            if response.opt.etag != first.opt.etag:
                raise _ChangedError
        found = first.opt.content_format, bytes(payload), _max_age_s(first)
        return Fetched(*found, first.opt.etag)

    def _send(self, message: Message) -> Request:
        assert self._context is not None, "use the client as an async context manager"
        request: Request = self._context.request(message, handle_blockwise=False)
        return request

    async def _first(self, request: Request) -> Message:
        """Wait for the response to a request, which notifications may follow."""
        response = _response(request)
        try:
            await asyncio.wait((response,))
        except asyncio.CancelledError:
            self._let_go(response, request.observation)
            raise
        return response.result()

    def _let_go(
        self, response: asyncio.Future[Message], observation: ClientObservation | None = None
    ) -> None:
        """Wait for a response no more, with whatever it comes to."""
        # aiocoap fails at an answer that comes in the moment of a cancellation.
        asyncio.get_running_loop().call_later(self.timeout_s, response.cancel)

        def over(_: object) -> None:
            came = not response.cancelled() and response.exception() is None
            if came and observation and not observation.cancelled:
                observation.cancel()

        response.add_done_callback(over)

    async def _repeated(self, message: Message, peer: Peer) -> Message:
        """Send a request, again and again, until it is answered.

        aiocoap repeats what is confirmable, but lets only one of it go to a server at a time.
        """
        loop = asyncio.get_running_loop()
        message.transport_tuning = Unreliable()
        if peer.remote:
            message.remote = peer.remote
        wait_s = peer.repeat_s()
        sent: dict[asyncio.Future[Message], float] = {}
        try:
            while True:
                # Each has a token of its own, so that it is known which one was answered.
                sent[_response(self._send(message.copy()))] = loop.time()
                done, _ = await asyncio.wait(sent, timeout=wait_s, return_when="FIRST_COMPLETED")
                if done:
                    answered = done.pop()
                    peer.answered(answered.result(), loop.time() - sent.pop(answered))
                    return answered.result()
                wait_s *= 2
        finally:
            for response in sent:
                self._let_go(response)

    async def _answer(self, uri: str, pending: Awaitable[Message]) -> Message:
        with _failures(uri):
            try:
                async with asyncio.timeout(self.timeout_s):
                    response: Message = await pending
            except TimeoutError:
                raise TransferError(f"no answer in {self.timeout_s:g} s", uri=uri) from None
        _refuse_error(uri, response)
        return response


def _response(request: Request) -> asyncio.Future[Message]:
    # aiocoap documents the attribute by a string, which mypy takes for its type.
    return cast("asyncio.Future[Message]", request.response)


async def _drop(asked: deque[asyncio.Task[Block]]) -> None:
    """Let go what is not wanted any more, with whatever it came to."""
    for task in asked:
        task.cancel()
    await asyncio.gather(*asked, return_exceptions=True)
    asked.clear()


def _message(uri: str, query: Iterable[str], accept: ContentFormat | None) -> Message:
    try:
        message = Message(code=Code.GET, uri=uri)
    except (ValueError, aiocoap.error.Error) as error:
        raise ConfigError(f"{uri}: not a URI of CoAP", hint="As in coap://[::1]/p") from error
    if not uri.startswith("coap://"):
        raise ConfigError(f"{uri}: only coap:// is spoken here")
    message.opt.uri_query = (*message.opt.uri_query, *query)
    if accept is not None:
        message.opt.accept = accept
    return message


def _block(uri: str, response: Message, offset: int) -> Block:
    """Read an answer as the block that begins at an offset."""
    # A resource that fits into one answer needs no option.
    option = response.opt.block2 or BlockOption.BlockwiseTuple(0, False, LARGEST_BLOCK)
    payload, etag, size = response.payload, response.opt.etag, response.opt.size2
    if size is not None and size > _LARGEST_SIZE:
        size = None
    if option.start != offset or (option.more and len(payload) != option.size):
        raise _another_block(uri)
    return Block(offset, payload, bool(option.more), option.size_exponent, etag, size)


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
