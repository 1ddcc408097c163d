"""The sockets, and what comes in through them. The only user of private names of aiocoap.

It opens the UDP sockets itself (aiocoap would share ports and open TCP beside), and vets each
datagram, so that nothing malformed reaches aiocoap. aiocoap is pinned in `pyproject.toml`;
`tests/test_frontdoor.py` fails when a release moves the names that are used here.
"""

from __future__ import annotations

import asyncio
import errno
import ipaddress
import logging
import socket
from collections.abc import Sequence
from typing import Any

import attrs
from aiocoap.message import Message
from aiocoap.messagemanager import MessageManager
from aiocoap.numbers.codes import Code
from aiocoap.protocol import Context
from aiocoap.transports.udp6 import MessageInterfaceUDP6

from netota_coap.coap import options as coap
from netota_coap.errors import AddressError, ConfigError

DEFAULT_PORT = 5683
DEFAULT_BIND = "[::]:5683"

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
# Sockets


def parse_bind(text: str) -> tuple[str, int]:
    """Read `HOST:PORT`, `HOST`, `[HOST]:PORT` or `:PORT`.

    Raises:
        ConfigError: It is none of these.
    """
    host, port = text, ""
    if text.startswith("["):
        host, bracket, port = text[1:].partition("]")
        if not bracket or (port and not port.startswith(":")):
            raise ConfigError(f"{text!r}: must be HOST:PORT", hint="As in --bind [::1]:5683")
        port = port[1:]
    elif text.count(":") == 1:
        host, _, port = text.partition(":")
    if port and not (port.isascii() and port.isdecimal() and int(port) <= 65_535):
        raise ConfigError(f"{text!r}: the port must be from 0 to 65535")
    return host or "::", int(port or DEFAULT_PORT)


def open_sockets(bind: str) -> list[socket.socket]:
    """Open a socket on each address of a name.

    Args:
        bind: `HOST:PORT`; port 0 is any free one.

    Returns:
        At least one, each AF_INET6; IPv4 is served through mapped addresses.

    Raises:
        AddressError: It is in use, not of this machine, or not to be had.
        ConfigError: It cannot be read.
    """
    host, port = parse_bind(bind)
    try:
        found = socket.getaddrinfo(
            host, port, socket.AF_UNSPEC, socket.SOCK_DGRAM, 0, socket.AI_PASSIVE
        )
    except (OSError, UnicodeError) as error:
        reason = getattr(error, "strerror", None) or "not a host name"
        raise AddressError(f"{bind}: {reason}") from error
    sockets: list[socket.socket] = []
    failure: OSError | None = None
    for family, _, _, _, address in found:
        mapped = f"::ffff:{address[0]}" if family == socket.AF_INET else address[0]
        scope = address[3] if len(address) == 4 else 0
        # One name, one port, also where any free one will do.
        chosen = port or (sockets[0].getsockname()[1] if sockets else 0)
        try:
            sockets.append(_open(mapped, chosen, scope))
        except OSError as error:
            failure = error
            if error.errno != errno.EADDRNOTAVAIL:
                break
    if failure and (not sockets or failure.errno != errno.EADDRNOTAVAIL):
        for opened in sockets:
            opened.close()
        raise _address_error(bind, failure) from failure
    return sockets


def _open(host: object, port: int, scope: object) -> socket.socket:
    opened = socket.socket(socket.AF_INET6, socket.SOCK_DGRAM)
    try:
        opened.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 0)
        opened.bind((host, port, 0, scope))
    except OSError:
        opened.close()
        raise
    return opened


def _address_error(bind: str, error: OSError) -> AddressError:
    hints = {
        errno.EADDRINUSE: "Another server listens there: stop it, or choose another --bind.",
        errno.EADDRNOTAVAIL: "It is no address of this machine: choose another --bind.",
        errno.EACCES: "Ports below 1024 need a privilege: choose another --bind.",
        errno.EAFNOSUPPORT: (
            "AF_INET6 sockets are needed, for IPv4 too: allow them (RestrictAddressFamilies= in "
            "systemd, ipv6.disable=0 for the kernel). Switching IPv6 off by sysctl is fine."
        ),
    }
    reason = error.strerror or str(error)
    return AddressError(f"cannot listen on {bind}: {reason}", hint=hints.get(error.errno or 0, ""))


def uri_of(opened: socket.socket) -> str:
    """Return the URI of the server that listens on a socket."""
    host, port, *_ = opened.getsockname()
    address = ipaddress.IPv6Address(host.partition("%")[0])
    name = str(address.ipv4_mapped) if address.ipv4_mapped else f"[{host}]"
    return f"coap://{name}" + (f":{port}" if port != DEFAULT_PORT else "")


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


class _Interface(MessageInterfaceUDP6):
    """aiocoap's UDP transport behind the vetting."""

    failed = False

    def datagram_msg_received(
        self, data: bytes, ancdata: list[Any], flags: int, address: tuple[Any, ...]
    ) -> None:
        verdict = vet(data, truncated=bool(flags & socket.MSG_TRUNC))
        if isinstance(verdict, bytes):
            super().datagram_msg_received(verdict, ancdata, flags, address)
            return
        _log.debug("refused a datagram from %s: %s", address[:2], verdict.reason)
        if verdict.code is None:
            return
        if verdict.code is Code.EMPTY:
            reply = bytes((0x40 | _RST << 4, 0)) + data[2:4]
        else:
            token = data[4 : 4 + (data[0] & 15)]
            confirmable = data[0] >> 4 & 3 == _CON
            kind = _ACK if confirmable else _NON
            manager: Any = self._ctx
            number = data[2:4] if confirmable else manager._next_message_id().to_bytes(2, "big")
            reply = bytes((0x40 | kind << 4 | len(token), verdict.code)) + number + token
            reply += coap.problem(verdict.code.name_printable, verdict.reason)
        self.transport.sendmsg(reply, ancdata, 0, address)

    def send(self, message: Message) -> None:
        # A pending ICMP error of one peer is reported by the next send, to whomever it goes: that
        # one has to be sent again, and nobody to be blamed. What the error queue says of its
        # addressee is true (`datagram_errqueue_received`).
        for _ in range(_SEND_ATTEMPTS):
            self.failed = False
            super().send(message)
            if not self.failed:
                return

    def error_received(self, exc: OSError) -> None:
        self.failed = True
        _log.debug("sending failed: %s", exc)


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
    async def open(cls, site: object, binds: Sequence[str]) -> FrontDoor:
        """Listen.

        Args:
            site: Answers the requests, by aiocoap's `render_to_pipe`.
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
        loop = asyncio.get_running_loop()
        context = Context(loop=loop, serversite=site, loggername="netota_coap.aiocoap")
        for opened in sockets:

            def attach(manager: MessageManager, opened: socket.socket = opened) -> Any:
                _remember_only_acknowledgements(manager)
                return _Interface._create_transport_endpoint(
                    opened, manager, context.log, loop, []
                )

            await context._append_tokenmanaged_messagemanaged_transport(attach)
        return cls(tuple(dict.fromkeys(map(uri_of, sockets))), context)

    async def close(self) -> None:
        """Stop listening; observers are told nothing, so that they stay."""
        await self._context.shutdown()
