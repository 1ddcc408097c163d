"""A UDP socket of the server: reads datagrams, answers what it can, hands on the rest."""

from __future__ import annotations

import ipaddress
import logging
import socket
import time
from collections.abc import Sequence
from typing import Any, Protocol

import attrs
from aiocoap.message import Message
from aiocoap.numbers.codes import Code
from aiocoap.transports.udp6 import MessageInterfaceUDP6

from netota_coap.coap import options as coap
from netota_coap.coap.blob_blocks import Pieces
from netota_coap.coap.multicast import Leisure, is_group, unspecified
from netota_coap.coap.observe.entries import OUR_IDS, Endpoint, address_of, pack, unpack
from netota_coap.coap.observe.table import Observers
from netota_coap.coap.response_cache import HEADS, Answering, Ready, ReadyAnswers
from netota_coap.coap.vetting import METHOD_REFUSED, NO_RESPONSE, Doorkeeper, Verdict, vet
from netota_coap.monitoring import Exchange, Metrics, Tally, resource_class

_log = logging.getLogger("netota_coap.coap")

_CON, _NON, _ACK, _RST = range(4)
_SEND_ATTEMPTS = 3


class Site(Protocol):
    """The root resource, as `server.Site` is."""

    @property
    def responder(self) -> Answering:
        """What answers now: another object after each swap."""

    @property
    def observers(self) -> Observers:
        """Who is to be told."""

    @property
    def metrics(self) -> Metrics:
        """What was counted."""


# ----------------------------------------------------------------------------------------------
# Datagrams

Address = tuple[Any, ...]
Ancillary = list[tuple[int, int, bytes]]

_DATAGRAMS = 64  # that are read at a time, before timers and notifications have their turn
_LONGEST = 4_096  # bytes of a datagram
_METHODS = {Code.GET: False, Code.FETCH: True}  # and whether their payload counts
_REGISTER, _DEREGISTER = 0, 1  # values of Observe
_IPV6_RECVERR = 25  # of Linux; the socket module has no names for these two
_IP_RECVERR = 11
_ANCILLARY = socket.CMSG_SPACE(20)  # IPV6_PKTINFO
_PIECE_HEADS = HEADS[Code.CONTENT]
# The first two bytes of a plain GET, and where its options begin.
_GETS = {
    bytes((0x40 | kind << 4 | length, Code.GET)): 4 + length
    for kind in (_CON, _NON)
    for length in range(9)
}


@attrs.frozen
class _Plain:
    """A request that the door answers.

    Attributes:
        options: In the order of their numbers.
        payload: The bytes.
        resource: Class of what is asked for.
    """

    options: tuple[coap.Option, ...]
    payload: bytes
    resource: str

    @property
    def unobserved(self) -> tuple[coap.Option, ...]:
        """The options of the same request, as one who does not try to observe has them."""
        return tuple(option for option in self.options if option[0] != coap.OBSERVE)


class Interface(MessageInterfaceUDP6):
    """aiocoap's UDP transport, with the door before it."""

    failed = False

    def listen(
        self,
        opened: socket.socket,
        index: int,
        site: Site,
        ready: ReadyAnswers,
        doorkeeper: Doorkeeper,
        leisure: Leisure,
    ) -> None:
        """Read a socket instead of aiocoap.

        Args:
            opened: That aiocoap sends by.
            index: Of the socket, in endpoints.
            site: Answers the requests.
            ready: Shared by all sockets of a site.
            doorkeeper: Likewise.
            leisure: Likewise.
        """
        self._opened, self._index, self._site = opened, index, site
        self._ready, self._doorkeeper, self._leisure = ready, doorkeeper, leisure
        self._pieces = Pieces()
        self._tallies: dict[int, Tally] = {}  # of pieces, by their bytes
        self._own: dict[bytes, None] = {}  # addresses, with interfaces, that were asked at
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
                if key in table:
                    heads, tail, tally = table[key]
                    table.move_to_end(key)
                else:
                    heads, tail, tally = self._piece(key)
                head = heads[data[0]]
            except KeyError:
                if self._come_in(data, self._pktinfo, address):
                    return
                continue
            tally.count += 1
            try:
                send(head + data[2:end] + tail, address)
            except OSError:
                continue  # it will ask again

    def _read_any(self, opened: socket.socket) -> None:
        """Read a socket that has all addresses; an answer leaves from the one that was asked."""
        receive, send = opened.recvmsg, opened.sendmsg
        table, own = self._ready.of(self._site.responder), self._own
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
                    heads, tail, tally = self._piece(key)
                head = heads[data[0]]
                own[ancillary[0][2]]
            except (KeyError, IndexError):
                if self._come_in(data, ancillary, address):
                    return
                continue
            tally.count += 1
            try:
                send((head + data[2:end] + tail,), ancillary, 0, address)
            except OSError:
                continue

    def _come_in(self, data: bytes, ancillary: Ancillary, address: Address) -> bool:
        """Take in what cannot be answered from its bytes.

        Returns:
            Whether it was handed on: aiocoap must begin with it before it gets another one, which
            might end it (and Python complains of what never began).
        """
        self._came_ns = time.perf_counter_ns()
        verdict = vet(data[:_LONGEST], truncated=len(data) > _LONGEST)
        if ancillary and is_group(ancillary[0][2]):
            if isinstance(verdict, bytes):
                self._be_found(verdict, ancillary, address)
            return False
        if ancillary:
            self._own[ancillary[0][2]] = None
        if isinstance(verdict, bytes) and self._hear(verdict, ancillary, address):
            return False
        if isinstance(verdict, Verdict):
            _log.debug("refused a datagram from %s: %s", address[:2], verdict.reason)
            if verdict.code is Code.EMPTY:
                reset = bytes((0x40 | _RST << 4, 0)) + data[2:4]
                self.transport.sendmsg(reset, ancillary, 0, address)
            elif verdict.code is not None:
                tail = coap.problem(verdict.code.name_printable, verdict.reason)
                self._reply(data, verdict.code, tail, ancillary, address)
            return False
        plain = self._plain(verdict)
        if plain and verdict[1] not in _METHODS:
            self._reply(data, *METHOD_REFUSED, ancillary, address, plain)
            return False
        if plain and self._register(verdict, plain, ancillary, address):
            return False
        answer = self._answer(plain, verdict, data) if plain else None
        if plain and answer:
            self._reply(data, *answer, ancillary, address, plain)
        elif refusal := self._turns_away(verdict, ancillary, address):
            code, after_s = refusal
            busy = coap.encode([(coap.MAX_AGE, coap.encode_uint(after_s))])
            self._reply(data, code, busy, ancillary, address)
        else:
            self.datagram_msg_received(verdict, ancillary, 0, address)
            return True
        return False

    def _piece(self, key: bytes) -> Ready:
        """Return the answer to a request of a block of a file.

        Raises:
            KeyError: Something else is asked for.
        """
        metrics = self._site.metrics
        if metrics.listener:
            raise KeyError(key)
        tail = self._pieces.find(self._site.responder.files, key)
        if tail is None:
            raise KeyError(key)
        tally = self._tallies.get(len(tail))
        if tally is None:
            tally = self._tallies[len(tail)] = metrics.tally("blob", "2.05", len(tail))
        return _PIECE_HEADS, tail, tally

    def _be_found(self, vetted: bytes, ancillary: Ancillary, address: Address) -> None:
        """Answer a request to a group, if it is a discovery that finds something here."""
        plain = self._plain(vetted)
        is_get = vetted[0] >> 4 & 3 == _NON and vetted[1] == Code.GET
        if plain is None or not is_get or plain.resource != "core":
            return
        code, tail = self._site.responder.answer(plain.unobserved, None)
        if code is not Code.CONTENT or not coap.decode(tail)[1]:
            return
        from_interface = [(*ancillary[0][:2], unspecified(ancillary[0][2]))]
        self._leisure.later(
            lambda: self._reply(vetted, code, tail, from_interface, address, plain)
        )

    @staticmethod
    def _plain(vetted: bytes) -> _Plain | None:
        """Read a request that the door answers; None: it is for aiocoap."""
        if vetted[1] == Code.EMPTY:
            return None
        options, payload = coap.decode(vetted[4 + (vetted[0] & 15) :])
        plain = _Plain(options, payload, resource_class(_texts(options, coap.URI_PATH)))
        # What is the operator's depends on who asks.
        to_reader = vetted[1] in _METHODS and plain.resource == "status"
        aside = to_reader or any(number == NO_RESPONSE for number, _ in options)
        return None if aside else plain

    def _turns_away(
        self, vetted: bytes, ancillary: Ancillary, address: Address
    ) -> tuple[Code, int] | None:
        if vetted[1] == Code.EMPTY:
            return None
        source = address_of(self._endpoint(ancillary, address))
        remembered = len(self._manager._recent_messages)
        return self._doorkeeper.turns_away(self.loop.time(), source, remembered)

    def _hear(self, vetted: bytes, ancillary: Ancillary, address: Address) -> bool:
        """Take in an ACK or a RST if it is of a notification."""
        message_id = int.from_bytes(vetted[2:4], "big")
        if vetted[1] or vetted[0] >> 4 & 3 < _ACK or message_id < OUR_IDS:
            return False
        endpoint = self._endpoint(ancillary, address)
        if vetted[0] >> 4 & 3 == _ACK:
            self._site.observers.acknowledged(self.loop.time(), endpoint, message_id)
        else:
            self._site.observers.reset(endpoint, message_id)
        return True

    def _register(
        self,
        vetted: bytes,
        plain: _Plain,
        ancillary: Ancillary,
        address: Address,
    ) -> bool:
        """Let a request register or deregister an observer; whether it is answered then."""
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
                confirmable=vetted[0] >> 4 & 3 == _CON,
            )
        elif coap.decode_uint(observe) == _DEREGISTER:
            self._site.observers.deregister(endpoint, vetted[4:end])
        # Whom no answer can be sent to (who would say to be port 0?) can be told nothing later.
        if answer is not None and not self.notify(*unpack(endpoint)[1:], answer):
            self._site.observers.deregister(endpoint, vetted[4:end])
        if answer is not None:
            self._count(vetted, Code(answer[1]), len(answer) - end, plain, address)
        return answer is not None

    def _endpoint(self, ancillary: Ancillary, address: Address) -> Endpoint:
        """Pack where a datagram came from and, where that may differ, where it came to."""
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

    def _answer(self, plain: _Plain, vetted: bytes, data: bytes) -> tuple[Code, bytes] | None:
        """Answer a plain request; None: it is for aiocoap.

        Args:
            plain: The request, read.
            vetted: The request, without what is to be ignored.
            data: As it came, which is how it will come again.
        """
        options = plain.unobserved
        counts = _METHODS[Code(vetted[1])]
        payload = plain.payload if counts else None
        code, tail = self._site.responder.answer(options, payload)
        # Files are large, and each device asks for each block once.
        as_plain = options == plain.options and not plain.payload and plain.resource != "blob"
        if code in HEADS and not counts and as_plain and not self._site.metrics.listener:
            tally = self._site.metrics.tally(plain.resource, code.dotted, len(tail))
            self._ready.put(data[4 + (data[0] & 15) :], code, tail, tally)
        return code, tail

    def _reply(
        self,
        request: bytes,
        code: Code,
        tail: bytes,
        ancillary: Ancillary,
        address: Address,
        plain: _Plain | None = None,
    ) -> None:
        """Answer a request: by acknowledgement, or by a message that is not to be confirmed."""
        self._count(request, code, len(tail), plain, address)
        kind, number = _ACK, request[2:4]
        if request[0] >> 4 & 3 == _NON:
            kind, number = _NON, self._manager._next_message_id().to_bytes(2, "big")
        token = request[4 : 4 + (request[0] & 15)]
        head = bytes((0x40 | kind << 4 | len(token), code))
        self.transport.sendmsg(head + number + token + tail, ancillary, 0, address)

    def _count(
        self, request: bytes, code: Code, size: int, plain: _Plain | None, address: Address
    ) -> None:
        metrics = self._site.metrics
        metrics.answered("coap", plain.resource if plain else "other", code.dotted, size)
        if metrics.listener is None or plain is None:
            return
        metrics.listener(
            Exchange(
                "coap",
                Code(request[1]).name,
                _texts(plain.options, coap.URI_PATH),
                _texts(plain.options, coap.URI_QUERY),
                code.dotted,
                size,
                _who(address),
                (time.perf_counter_ns() - self._came_ns) / 1_000,
            )
        )

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


def _texts(options: Sequence[coap.Option], wanted: int) -> list[str]:
    return [value.decode() for number, value in options if number == wanted]


def _who(address: Address) -> str:
    host = str(address[0]).removeprefix("::ffff:")
    return f"[{host}]:{address[1]}" if ":" in host else f"{host}:{address[1]}"
