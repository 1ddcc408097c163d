"""A UDP socket of the server: answers most datagrams itself, and hands the rest to aiocoap.

What always holds:
* A plain request, which is any but one for the status or with No-Response, is answered here and
  not remembered: a duplicate is answered again. A cached response takes constant time.
* aiocoap gets the other requests, as many as `RequestLimiter` allows, since it remembers each for
  247 s; and empty messages that do not answer a notification. It never gets what is malformed,
  responses, or what is sent to a group.
* Message IDs from `FIRST_NOTIFICATION_ID` on are those of the table of observers, lower ones are
  aiocoap's: the ID alone tells to whom an ACK or RST goes.
* The response cache is bounded, has only successful responses to GETs of one responder, and is
  emptied when the site replaces that: with each new catalog, and each change of `max_age_s`.
* A response leaves from the address that was asked. Failed sends and ICMP errors end nothing.

The way of a datagram:
1. `_read_one` or `_read_any` looks for the bytes after its token in the response cache, and in
   `BlobBlocks`. What is found is sent after the message ID and the token; nothing is decoded.
2. `_process` lets `vet` refuse or clean it, answers discovery by multicast, and hands ACKs, RSTs
   and registrations to the observers.
3. The responder answers it, if it is plain, and the response is cached; or aiocoap gets it.

This module and `frontdoor` are the only ones that use private names of aiocoap.
"""

from __future__ import annotations

import ipaddress
import logging
import socket
import time
from collections.abc import Sequence
from typing import Any

import attrs
from aiocoap.message import Message
from aiocoap.numbers.codes import Code
from aiocoap.transports.udp6 import MessageInterfaceUDP6

from netota_coap.coap import options as coap
from netota_coap.coap.blob_blocks import BlobBlocks
from netota_coap.coap.multicast import Leisure, is_group, unspecified
from netota_coap.coap.observe.entries import (
    FIRST_NOTIFICATION_ID,
    Endpoint,
    address_of,
    pack,
    unpack,
)
from netota_coap.coap.protocol import ACK, CON, NON, RST
from netota_coap.coap.responder import METHODS, SCHEME
from netota_coap.coap.response_cache import HEADS, CachedResponse, ResponseCache
from netota_coap.coap.site import CoapSite
from netota_coap.coap.vetting import METHOD_REFUSED, NO_RESPONSE, RequestLimiter, Verdict, vet
from netota_coap.monitoring import Tally, resource_class

_log = logging.getLogger("netota_coap.coap")

Address = tuple[Any, ...]
Ancillary = list[tuple[int, int, bytes]]

_DATAGRAMS = 64  # read at a time, before timers and notifications have their turn
_LONGEST = 4_096  # bytes of a datagram
_SEND_ATTEMPTS = 3
_REGISTER, _DEREGISTER = 0, 1  # values of Observe
_IPV6_RECVERR = 25  # of Linux; the socket module has no names for these two
_IP_RECVERR = 11
_ANCILLARY = socket.CMSG_SPACE(20)  # IPV6_PKTINFO
_BLOCK_HEADS = HEADS[Code.CONTENT]
# The first two bytes of a confirmable GET, and where its options begin.
_GETS = {bytes((0x40 | CON << 4 | length, Code.GET)): 4 + length for length in range(9)}


@attrs.frozen
class _PlainRequest:
    """A request that is answered without aiocoap."""

    options: tuple[coap.Option, ...]
    payload: bytes
    resource: str

    @property
    def unobserved(self) -> tuple[coap.Option, ...]:
        """The options without Observe."""
        return tuple(option for option in self.options if option[0] != coap.OBSERVE)


class Interface(MessageInterfaceUDP6):
    """aiocoap's UDP transport, whose datagrams are read here."""

    failed = False

    def listen(
        self,
        opened: socket.socket,
        index: int,
        site: CoapSite,
        cache: ResponseCache,
        limiter: RequestLimiter,
        leisure: Leisure,
    ) -> None:
        """Read the socket instead of aiocoap; `index` names it in endpoints.

        All sockets of a site share `cache`, `limiter` and `leisure`.
        """
        self._opened, self._index, self._site = opened, index, site
        self._cache, self._limiter, self._leisure = cache, limiter, leisure
        self._blob_blocks = BlobBlocks()
        self._tallies: dict[int, Tally] = {}  # of blocks, by their size
        self._local: dict[bytes, None] = {}  # addresses, with interfaces, that were asked
        # An ICMP error reports an unreachable peer at the next send to any other, and can be
        # forged. Nobody is ended by it here, only by silence.
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

    def stop_reading(self) -> None:
        """Leave further datagrams unread."""
        self.loop.remove_reader(self._descriptor)

    def _read_one(self, opened: socket.socket) -> None:
        """Read a socket that has one address, which all responses leave from."""
        receive, send = opened.recvfrom, opened.sendto
        table = self._cache.of(self._site.responder)
        for _ in range(_DATAGRAMS):
            try:
                data, address = receive(_LONGEST + 1)
            except (BlockingIOError, InterruptedError):
                return
            try:
                # All but confirmable GETs of cached responses and blob blocks fail here.
                end = _GETS[data[:2]]
                key = data[end:]
                if key in table:
                    heads, tail, tally = table[key]
                    table.move_to_end(key)
                else:
                    heads, tail, tally = self._blob_block(key)
                head = heads[data[0]]
            except KeyError:
                if self._process(data, self._pktinfo, address):
                    return
                continue
            tally.count += 1
            try:
                send(head + data[2:end] + tail, address)
            except OSError:
                continue  # the device will ask again

    def _read_any(self, opened: socket.socket) -> None:
        """Read a socket that has all addresses; a response leaves from the one that was asked."""
        receive, send = opened.recvmsg, opened.sendmsg
        table, local = self._cache.of(self._site.responder), self._local
        for _ in range(_DATAGRAMS):
            try:
                data, ancillary, _, address = receive(_LONGEST + 1, _ANCILLARY)
            except (BlockingIOError, InterruptedError):
                return
            try:
                end = _GETS[data[:2]]
                key = data[end:]
                if key in table:
                    heads, tail, tally = table[key]
                    table.move_to_end(key)
                else:
                    heads, tail, tally = self._blob_block(key)
                head = heads[data[0]]
                local[ancillary[0][2]]  # no group is among them
            except (KeyError, IndexError):
                if self._process(data, ancillary, address):
                    return
                continue
            tally.count += 1
            try:
                send((head + data[2:end] + tail,), ancillary, 0, address)
            except OSError:
                continue

    def _process(self, data: bytes, ancillary: Ancillary, address: Address) -> bool:
        """Answer a datagram that needs decoding, or hand it to aiocoap.

        Returns:
            Whether aiocoap got it. It must begin with one before it gets the next, which might
            cancel it (and Python warns of a coroutine that never began).
        """
        self._arrived_ns = time.perf_counter_ns()
        verdict = vet(data[:_LONGEST], truncated=len(data) > _LONGEST)
        if ancillary and is_group(ancillary[0][2]):
            if isinstance(verdict, bytes):
                self._answer_discovery(verdict, ancillary, address)
            return False
        if ancillary:
            self._local[ancillary[0][2]] = None
        if isinstance(verdict, Verdict):
            _log.debug("refused a datagram from %s: %s", address[:2], verdict.reason)
            if verdict.code is Code.EMPTY:
                reset = bytes((0x40 | RST << 4, 0)) + data[2:4]
                self.transport.sendmsg(reset, ancillary, 0, address)
            elif verdict.code is not None:
                tail = coap.problem(verdict.code.name_printable, verdict.reason)
                self._reply(data, verdict.code, tail, ancillary, address)
            return False
        if self._end_exchange(verdict, ancillary, address):
            return False
        plain = self._decode(verdict)
        if plain is None:
            return self._hand_on(verdict, ancillary, address)
        if verdict[1] not in METHODS:
            self._reply(data, *METHOD_REFUSED, ancillary, address, plain)
        elif not self._register(verdict, plain, ancillary, address):
            self._reply(data, *self._answer(plain, verdict, data), ancillary, address, plain)
        return False

    def _blob_block(self, key: bytes) -> CachedResponse:
        """Return the response to a request for a block of a blob.

        Raises:
            KeyError: The request is for something else.
        """
        metrics = self._site.metrics
        if metrics.listener:
            raise KeyError(key)
        tail = self._blob_blocks.find(self._site.responder.catalog.files, key)
        if tail is None:
            raise KeyError(key)
        tally = self._tallies.get(len(tail))
        if tally is None:
            tally = self._tallies[len(tail)] = metrics.tally("blob", "2.05", len(tail))
        return _BLOCK_HEADS, tail, tally

    def _answer_discovery(self, vetted: bytes, ancillary: Ancillary, address: Address) -> None:
        """Answer a request to a group, if it is a discovery that finds something here."""
        plain = self._decode(vetted)
        is_get = vetted[0] >> 4 & 3 == NON and vetted[1] == Code.GET
        if plain is None or not is_get or plain.resource != "core":
            return
        code, tail = self._site.responder.answer(plain.unobserved, None)
        if code is not Code.CONTENT or not coap.decode(tail)[1]:
            return
        pktinfo = [(*ancillary[0][:2], unspecified(ancillary[0][2]))]
        self._leisure.later(lambda: self._reply(vetted, code, tail, pktinfo, address, plain))

    @staticmethod
    def _decode(vetted: bytes) -> _PlainRequest | None:
        """Decode a plain request; None: the message is for aiocoap."""
        if vetted[1] == Code.EMPTY:
            return None
        options, payload = coap.decode(vetted[4 + (vetted[0] & 15) :])
        plain = _PlainRequest(options, payload, resource_class(_texts(options, coap.URI_PATH)))
        # The status depends on who asks.
        of_status = vetted[1] in METHODS and plain.resource == "status"
        aside = of_status or any(number == NO_RESPONSE for number, _ in options)
        return None if aside else plain

    def _hand_on(self, vetted: bytes, ancillary: Ancillary, address: Address) -> bool:
        """Give a message to aiocoap; False: it would have too much to remember."""
        if vetted[1] != Code.EMPTY:
            source = address_of(self._endpoint(ancillary, address))
            remembered = len(self._manager._recent_messages)
            refusal = self._limiter.refusal(self.loop.time(), source, remembered)
            if refusal:
                code, after_s = refusal
                tail = coap.encode([(coap.MAX_AGE, coap.encode_uint(after_s))])
                self._reply(vetted, code, tail, ancillary, address)
                return False
        self.datagram_msg_received(vetted, ancillary, 0, address)
        return True

    def _end_exchange(self, vetted: bytes, ancillary: Ancillary, address: Address) -> bool:
        """Hand an ACK or RST of a notification to the observers; False: it is something else."""
        message_id = int.from_bytes(vetted[2:4], "big")
        if vetted[1] or vetted[0] >> 4 & 3 < ACK or message_id < FIRST_NOTIFICATION_ID:
            return False
        endpoint = self._endpoint(ancillary, address)
        if vetted[0] >> 4 & 3 == ACK:
            self._site.observers.acknowledged(self.loop.time(), endpoint, message_id)
        else:
            self._site.observers.reset(endpoint, message_id)
        return True

    def _register(
        self, vetted: bytes, plain: _PlainRequest, ancillary: Ancillary, address: Address
    ) -> bool:
        """Register or deregister an observer; False: the request still has to be answered."""
        observe = next((value for number, value in plain.options if number == coap.OBSERVE), None)
        if observe is None:
            return False
        endpoint = self._endpoint(ancillary, address)
        end = 4 + (vetted[0] & 15)
        answer = None
        if coap.decode_uint(observe) == _REGISTER:
            answer = self._site.observers.register(
                self.loop.time(),
                endpoint,
                vetted[4:end],
                int.from_bytes(vetted[2:4], "big"),
                vetted[1:2] + vetted[end:],
                confirmable=vetted[0] >> 4 & 3 == CON,
            )
        elif coap.decode_uint(observe) == _DEREGISTER:
            self._site.observers.deregister(endpoint, vetted[4:end])
        if answer is None:
            return False
        # An observer that no response can be sent to, from port 0 say, cannot be notified either.
        if not self.notify(*unpack(endpoint)[1:], answer):
            self._site.observers.deregister(endpoint, vetted[4:end])
        self._count(vetted, Code(answer[1]), len(answer) - end, plain, address)
        return True

    def _endpoint(self, ancillary: Ancillary, address: Address) -> Endpoint:
        """Pack the sender's address and, if the socket has several, the one that it asked."""
        local = b"" if ancillary is self._pktinfo or not ancillary else ancillary[0][2]
        return pack(self._index, address, local)

    def notify(self, address: Address, local: bytes, datagram: bytes) -> bool:
        """Send a notification; False: the system refused it."""
        try:
            if local:
                pktinfo = [(socket.IPPROTO_IPV6, socket.IPV6_PKTINFO, local)]
                self._opened.sendmsg([datagram], pktinfo, 0, address)
            else:
                self._opened.sendto(datagram, address)
        except OSError as error:
            _log.debug("sending to %s failed: %s", address[:2], error)
            return False
        return True

    def _answer(self, plain: _PlainRequest, vetted: bytes, data: bytes) -> tuple[Code, bytes]:
        """Answer a plain request, and cache the response under the request's bytes in `data`."""
        options, is_fetch = plain.unobserved, vetted[1] == Code.FETCH
        code, tail = self._site.responder.answer(options, plain.payload if is_fetch else None)
        # Blobs are large, and each device asks for each block once.
        as_plain = options == plain.options and not plain.payload and plain.resource != "blob"
        if code in HEADS and not is_fetch and as_plain and not self._site.metrics.listener:
            tally = self._site.metrics.tally(plain.resource, code.dotted, len(tail))
            self._cache.put(data[4 + (data[0] & 15) :], code, tail, tally)
        return code, tail

    def _reply(
        self,
        request: bytes,
        code: Code,
        tail: bytes,
        ancillary: Ancillary,
        address: Address,
        plain: _PlainRequest | None = None,
    ) -> None:
        """Send the response: in the ACK of a confirmable request, else in a NON."""
        self._count(request, code, len(tail), plain, address)
        kind, number = ACK, request[2:4]
        if request[0] >> 4 & 3 == NON:
            kind, number = NON, self._manager._next_message_id().to_bytes(2, "big")
        token = request[4 : 4 + (request[0] & 15)]
        head = bytes((0x40 | kind << 4 | len(token), code))
        self.transport.sendmsg(head + number + token + tail, ancillary, 0, address)

    def _count(
        self, request: bytes, code: Code, size: int, plain: _PlainRequest | None, address: Address
    ) -> None:
        metrics = self._site.metrics
        metrics.answered(SCHEME, plain.resource if plain else "other", code.dotted, size)
        if metrics.listener and plain:
            metrics.exchanged(
                SCHEME,
                Code(request[1]).name,
                _texts(plain.options, coap.URI_PATH),
                _texts(plain.options, coap.URI_QUERY),
                code.dotted,
                size,
                _who(address),
                self._arrived_ns,
            )

    @property
    def _manager(self) -> Any:
        """Aiocoap's message manager."""
        return self._ctx

    def send(self, message: Message) -> None:
        """Send a message of aiocoap; try again if the system refuses."""
        for _ in range(_SEND_ATTEMPTS):
            self.failed = False
            super().send(message)
            if not self.failed:
                return

    def error_received(self, exc: OSError) -> None:
        """Note that the system refused to send; aiocoap would end all exchanges of the peer."""
        self.failed = True
        _log.debug("sending failed: %s", exc)


def _texts(options: Sequence[coap.Option], wanted: int) -> list[str]:
    return [value.decode() for number, value in options if number == wanted]


def _who(address: Address) -> str:
    host = str(address[0]).removeprefix("::ffff:")
    return f"[{host}]:{address[1]}" if ":" in host else f"{host}:{address[1]}"
