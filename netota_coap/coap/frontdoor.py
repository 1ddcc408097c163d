"""The sockets, and what comes in through them. The only user of private names of aiocoap.

It opens the UDP sockets itself (aiocoap would share ports and open TCP beside), and reads them
itself. A plain GET that was asked before is answered from its bytes: no message object is built,
and nothing is kept of it. Any other datagram is vetted, so that nothing malformed reaches aiocoap.
A plain request is answered by the same pure function that aiocoap's resource calls. The rest is
handed on, as long as aiocoap has not too much to remember.
aiocoap is pinned in `pyproject.toml`; `tests/test_frontdoor.py` fails when a release moves the
names that are used here.
"""

from __future__ import annotations

import asyncio
import ipaddress
import logging
import socket
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from typing import Any, Protocol

import attrs
from aiocoap.message import Message
from aiocoap.messagemanager import MessageManager
from aiocoap.numbers.codes import Code
from aiocoap.protocol import Context
from aiocoap.transports.udp6 import MessageInterfaceUDP6

from netota_coap.coap import options as coap
from netota_coap.coap.sockets import open_sockets, tell_buffers, uri_of

_log = logging.getLogger("netota_coap.coap")

_CON, _NON, _ACK, _RST = range(4)
_RESERVED_CLASSES = (1, 6, 7)
_NO_RESPONSE = 258  # RFC 7967; aiocoap keeps to it
_MOST_OPTIONS = 64
# aiocoap decodes these before anybody can object: Uri-Host, Location-Path, Uri-Path, Uri-Query,
# Location-Query, Proxy-Uri, Proxy-Scheme.
_TEXT_OF_AIOCOAP = (3, 8, 11, 15, 20, 35, 39)
_SEND_ATTEMPTS = 3


# ----------------------------------------------------------------------------------------------
# Vetting


@attrs.frozen
class Verdict:
    """What becomes of a datagram that aiocoap must not see.

    Attributes:
        code: To answer with; EMPTY stands for a reset, None for silence.
        reason: For the log, and for the answer.
    """

    code: Code | None
    reason: str


def vet(data: bytes, *, truncated: bool = False) -> Verdict | bytes:
    """Judge a datagram.

    Returns:
        What may be handed on if it is well-formed: itself, without elective options that are to be
        ignored.

    Source: RFC 7252, sections 3, 4.2, 4.3 and 5.4; rules C-50 to C-52.
    """
    if len(data) < 4 or data[0] >> 6 != 1:
        return Verdict(None, "not CoAP version 1")
    kind, token_length, code = data[0] >> 4 & 3, data[0] & 15, data[1]
    reset = Verdict(Code.EMPTY if kind == _CON else None, "")
    if truncated or token_length > 8 or len(data) < 4 + token_length:
        return attrs.evolve(reset, reason="malformed token, or too long")
    if code >> 5 in _RESERVED_CLASSES:
        return attrs.evolve(reset, reason="reserved code class")
    if code == 0:
        # A Zephyr 1.14 device acknowledges with a token in the empty message: let it.
        empty = len(data) == (4 if kind in (_CON, _NON) else 4 + token_length)
        return data if empty else attrs.evolve(reset, reason="empty message that is not")
    if kind == _RST or (kind == _ACK and code < 32):
        return Verdict(None, "code that does not go with the type")
    try:
        found, payload = coap.decode(data[4 + token_length :])
    except ValueError as error:
        return attrs.evolve(reset, reason=str(error))
    reason = _stumbling_block(found)
    if reason is not None:
        return Verdict(Code.BAD_OPTION if code < 32 else None, reason)
    kept = [option for option in found if _is_kept(option)]
    if len(kept) == len(found):
        return data
    return data[: 4 + token_length] + coap.encode(kept, payload)


def _is_kept(option: coap.Option) -> bool:
    """Tell whether an option is handed on: elective ones that mean nothing here are ignored.

    aiocoap keeps the requests of observers, with all their options, and would not ignore those of
    a length that they cannot have.
    """
    return coap.is_critical(option[0]) or coap.fits(option) or option[0] == _NO_RESPONSE


def _stumbling_block(found: Sequence[coap.Option]) -> str | None:
    """Say what aiocoap would stumble over or hide; what else is wrong `Responder` refuses."""
    if len(found) > _MOST_OPTIONS:
        return f"{len(found)} options are more than {_MOST_OPTIONS}"
    for number, value in found:
        if number in _TEXT_OF_AIOCOAP and not coap.is_text(value):
            return f"option {number} is not UTF-8"
        # aiocoap reads these as numbers, and forgets how long they were.
        if coap.is_critical(number) and number in coap.KNOWN and not coap.fits((number, value)):
            return f"{coap.KNOWN[number].name} has {len(value)} bytes"
    return None


# ----------------------------------------------------------------------------------------------
# Ready answers

_READY_ENTRIES = 16_384
_READY_BYTES = 16 * 2**20
_ENTRY_BYTES = 300  # that an entry takes besides its key and its tail

Ready = tuple[Mapping[int, bytes], bytes]
"""Of an answer: the first two bytes, by the first one of the request; all after the token."""

_HEADS: Mapping[Code, Mapping[int, bytes]] = {
    code: {
        0x40 | _CON << 4 | length: bytes((0x40 | _ACK << 4 | length, code)) for length in range(9)
    }
    for code in (Code.CONTENT, Code.VALID)
}


class Answering(Protocol):
    """What answers requests, as `server.Responder` does."""

    def answer(
        self, options: tuple[coap.Option, ...], payload: bytes | None, scheme: str
    ) -> tuple[Code, bytes]:
        """Return response code, and the bytes of options and payload."""


class Site(Protocol):
    """The root resource, as `server.Site` is."""

    @property
    def responder(self) -> Answering:
        """What answers now: another object after each swap."""


@attrs.define(eq=False)
class ReadyAnswers:
    """Answers to plain GETs, by the bytes of their options; the least recently used leave.

    Bounded in entries and in bytes, and filled with successful answers only: asking for what does
    not exist pushes nothing out.
    """

    _table: OrderedDict[bytes, Ready] = attrs.field(init=False, factory=OrderedDict)
    _bytes: int = attrs.field(init=False, default=0)
    _answering: Answering | None = attrs.field(init=False, default=None)

    def of(self, answering: Answering) -> OrderedDict[bytes, Ready]:
        """Return the answers of what answers now: none of before a swap.

        What is used is to be moved to the end of the table.
        """
        if answering is not self._answering:
            self._answering = answering
            self._table.clear()
            self._bytes = 0
        return self._table

    def put(self, key: bytes, code: Code, tail: bytes) -> None:
        """Keep an answer."""
        if key in self._table:
            return
        self._table[key] = (_HEADS[code], tail)
        self._bytes += len(key) + len(tail) + _ENTRY_BYTES
        while len(self._table) > _READY_ENTRIES or self._bytes > _READY_BYTES:
            dropped, (_, its_tail) = self._table.popitem(last=False)
            self._bytes -= len(dropped) + len(its_tail) + _ENTRY_BYTES


# ----------------------------------------------------------------------------------------------
# Datagrams

Address = tuple[Any, ...]
Ancillary = list[tuple[int, int, bytes]]

_DATAGRAMS = 64  # that are read at a time, before timers and notifications have their turn
_LONGEST = 4_096  # bytes of a datagram
_MOST_REMEMBERED = 16_384  # requests, which aiocoap keeps for 247 s each
_BUSY_S = 10  # until who is turned away should ask again
_METHODS = {Code.GET: False, Code.FETCH: True}  # and whether their payload counts
_IPV6_RECVERR = 25  # of Linux; the socket module has no names for these two
_IP_RECVERR = 11
_ANCILLARY = socket.CMSG_SPACE(20)  # IPV6_PKTINFO
# The first two bytes of a plain GET, and where its options begin.
_GETS = {
    bytes((0x40 | kind << 4 | length, Code.GET)): 4 + length
    for kind in (_CON, _NON)
    for length in range(9)
}


class _Interface(MessageInterfaceUDP6):
    """aiocoap's UDP transport, with the door before it."""

    failed = False

    def listen(self, opened: socket.socket, site: Site, ready: ReadyAnswers) -> None:
        """Read a socket instead of aiocoap.

        Args:
            opened: That aiocoap sends by.
            site: Answers the requests.
            ready: Shared by all sockets of a site.
        """
        self._site, self._ready = site, ready
        # ICMP tells of a peer that is gone with the next send, to whomever that goes, and can be
        # forged. Nobody is told by it here: silence ends what has to end.
        opened.setsockopt(socket.IPPROTO_IPV6, _IPV6_RECVERR, 0)
        opened.setsockopt(socket.IPPROTO_IP, _IP_RECVERR, 0)
        address = ipaddress.IPv6Address(opened.getsockname()[0].partition("%")[0])
        mapped = address.ipv4_mapped
        self._pktinfo: Ancillary = [
            (socket.IPPROTO_IPV6, socket.IPV6_PKTINFO, address.packed + bytes(4))
        ]
        read = self._read_any if (mapped or address).is_unspecified else self._read_one
        self._descriptor = opened.fileno()
        self.loop.remove_reader(self._descriptor)
        self.loop.add_reader(self._descriptor, read, opened)

    def deafen(self) -> None:
        """Read no more."""
        self.loop.remove_reader(self._descriptor)

    def _read_one(self, opened: socket.socket) -> None:
        """Read a socket that has one address, which all answers leave from."""
        receive, send = opened.recvfrom, opened.sendto
        table = self._ready.of(self._site.responder)
        for _ in range(_DATAGRAMS):
            try:
                data, address = receive(_LONGEST + 1)
            except (BlockingIOError, InterruptedError):
                return
            try:
                # What is no plain GET, or was not asked before, fails in one of these.
                end = _GETS[data[:2]]
                key = data[end:]
                heads, tail = table[key]
                head = heads[data[0]]
            except KeyError:
                if self._come_in(data, self._pktinfo, address):
                    return
                continue
            table.move_to_end(key)
            try:
                send(head + data[2:end] + tail, address)
            except BlockingIOError:
                continue  # it will ask again

    def _read_any(self, opened: socket.socket) -> None:
        """Read a socket that has all addresses; an answer leaves from the one that was asked."""
        receive, send = opened.recvmsg, opened.sendmsg
        table = self._ready.of(self._site.responder)
        for _ in range(_DATAGRAMS):
            try:
                data, ancillary, _, address = receive(_LONGEST + 1, _ANCILLARY)
            except (BlockingIOError, InterruptedError):
                return
            try:
                end = _GETS[data[:2]]
                key = data[end:]
                heads, tail = table[key]
                head = heads[data[0]]
                asked = ancillary[0][2]
            except (KeyError, IndexError):
                if self._come_in(data, ancillary, address):
                    return
                continue
            if asked[0] == 0xFF or (asked[0] == 0 and 224 <= asked[12] < 240):
                self.datagram_msg_received(data, ancillary, 0, address)  # multicast
                return
            table.move_to_end(key)
            try:
                send((head + data[2:end] + tail,), ancillary, 0, address)
            except BlockingIOError:
                continue

    def _come_in(self, data: bytes, ancillary: Ancillary, address: Address) -> bool:
        """Take in what cannot be answered from its bytes.

        Returns:
            Whether it was handed on: aiocoap must begin with it before it gets another one, which
            might end it (and Python complains of what never began).
        """
        verdict = vet(data[:_LONGEST], truncated=len(data) > _LONGEST)
        if isinstance(verdict, Verdict):
            _log.debug("refused a datagram from %s: %s", address[:2], verdict.reason)
            if verdict.code is Code.EMPTY:
                reset = bytes((0x40 | _RST << 4, 0)) + data[2:4]
                self.transport.sendmsg(reset, ancillary, 0, address)
            elif verdict.code is not None:
                tail = coap.problem(verdict.code.name_printable, verdict.reason)
                self._reply(data, verdict.code, tail, ancillary, address)
            return False
        answer = self._answer(verdict, data)
        if answer is not None:
            self._reply(data, *answer, ancillary, address)
        elif _is_request(verdict) and len(self._manager._recent_messages) >= _MOST_REMEMBERED:
            busy = coap.encode([(coap.MAX_AGE, coap.encode_uint(_BUSY_S))])
            self._reply(data, Code.SERVICE_UNAVAILABLE, busy, ancillary, address)
        else:
            self.datagram_msg_received(verdict, ancillary, 0, address)
            return True
        return False

    def _answer(self, vetted: bytes, data: bytes) -> tuple[Code, bytes] | None:
        """Answer a plain request; None if it is for aiocoap.

        Args:
            vetted: The request, without what is to be ignored.
            data: As it came, which is how it will come again.
        """
        if vetted[1] not in _METHODS:
            return None
        start = 4 + (vetted[0] & 15)
        options, payload = coap.decode(vetted[start:])
        if any(number in (coap.OBSERVE, _NO_RESPONSE) for number, _ in options):
            return None
        counts = _METHODS[Code(vetted[1])]
        code, tail = self._site.responder.answer(options, payload if counts else None, "coap")
        key = data[start:]
        if code in _HEADS and not counts and not payload:
            self._ready.put(key, code, tail)
        return code, tail

    def _reply(
        self, request: bytes, code: Code, tail: bytes, ancillary: Ancillary, address: Address
    ) -> None:
        """Answer a request: by acknowledgement, or by a message that is not to be confirmed."""
        kind, number = _ACK, request[2:4]
        if request[0] >> 4 & 3 == _NON:
            kind, number = _NON, self._manager._next_message_id().to_bytes(2, "big")
        token = request[4 : 4 + (request[0] & 15)]
        head = bytes((0x40 | kind << 4 | len(token), code))
        self.transport.sendmsg(head + number + token + tail, ancillary, 0, address)

    @property
    def _manager(self) -> Any:
        """Aiocoap's message manager."""
        return self._ctx

    def send(self, message: Message) -> None:
        """Send a message of aiocoap; try again what the system refuses."""
        for _ in range(_SEND_ATTEMPTS):
            self.failed = False
            super().send(message)
            if not self.failed:
                return

    def error_received(self, exc: OSError) -> None:
        """Blame nobody for what the system refuses (aiocoap would drop all observations)."""
        self.failed = True
        _log.debug("sending failed: %s", exc)


def _is_request(data: bytes) -> bool:
    return 0 < data[1] < 32


# ----------------------------------------------------------------------------------------------
# The door


def _remember_only_acknowledgements(manager: Any) -> None:
    """Keep a notification from being taken for the answer to a request of the same message ID.

    aiocoap would send it, as a confirmable message that nobody waits for, when the request is
    repeated; an acknowledgement is the only message that shares its ID with the peer's.
    """
    store = manager._store_response_for_duplicates

    def store_acknowledgement(message: Message) -> None:
        if message.mtype == _ACK:
            store(message)

    manager._store_response_for_duplicates = store_acknowledgement


@attrs.define
class FrontDoor:
    """The open sockets of a server.

    Attributes:
        uris: Where it listens.
    """

    uris: tuple[str, ...]
    _context: Context

    @classmethod
    async def open(cls, site: Site, binds: Sequence[str]) -> FrontDoor:
        """Listen.

        Args:
            site: Answers the requests, of aiocoap by its `render_to_pipe`.
            binds: `HOST:PORT` each.

        Raises:
            AddressError: One of them cannot be listened on; none is then.
            ConfigError: One of them cannot be read.
        """
        sockets: list[socket.socket] = []
        try:
            for bind in binds:
                sockets += open_sockets(bind)
        except BaseException:
            for opened in sockets:
                opened.close()
            raise
        tell_buffers(sockets[0])
        loop = asyncio.get_running_loop()
        context = Context(loop=loop, serversite=site, loggername="netota_coap.aiocoap")
        ready = ReadyAnswers()
        for opened in sockets:

            async def attach(manager: MessageManager, opened: socket.socket = opened) -> Any:
                _remember_only_acknowledgements(manager)
                interface = await _Interface._create_transport_endpoint(
                    opened, manager, context.log, loop, []
                )
                interface.listen(opened, site, ready)
                return interface

            await context._append_tokenmanaged_messagemanaged_transport(attach)
        return cls(tuple(dict.fromkeys(map(uri_of, sockets))), context)

    async def close(self) -> None:
        """Stop listening; observers are told nothing, so that they stay."""
        for manager in self._context.request_interfaces:
            manager.token_interface.message_interface.deafen()
        # What was read last has to begin before it can be ended.
        await asyncio.sleep(0)
        await self._context.shutdown()
