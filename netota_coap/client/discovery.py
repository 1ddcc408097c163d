"""Finds the servers of a network through the multicast groups of all CoAP nodes.

Source: RFC 7252, section 8; RFC 6690.
"""

from __future__ import annotations

import asyncio
import socket
import struct
from collections.abc import AsyncIterator, Sequence
from typing import Any

import attrs

from netota_coap.coap import options as coap
from netota_coap.coap.protocol import DEFAULT_PORT, GROUPS, LEISURE_S, interface_index

WAIT_S = LEISURE_S + 1
"""Servers spread their responses over the leisure (RFC 7252, section 8.2)."""

_NON_GET = 0x50, 1
_CONTENT = 0x45
_QUESTION = coap.encode(
    [
        (coap.URI_PATH, b".well-known"),
        (coap.URI_PATH, b"core"),
        (coap.URI_QUERY, b"rt=netota.packages"),
    ]
)
_AGAIN_S = 1.0  # until the question is sent once more: multicast is not retransmitted


@attrs.frozen
class _Answers(asyncio.DatagramProtocol):
    """Collects the URIs of the servers that answer."""

    _found: asyncio.Queue[str]

    def datagram_received(self, data: bytes, addr: tuple[Any, ...]) -> None:
        if len(data) > 4 and data[1] == _CONTENT and b'rt="netota.packages"' in data:
            self._found.put_nowait(_uri(addr))

    def error_received(self, exc: Exception) -> None:
        """Ignore an unreachable network: others may be reachable."""


async def discover(
    interfaces: Sequence[str] = (), port: int = DEFAULT_PORT, wait_s: float = WAIT_S
) -> AsyncIterator[str]:
    """Yield the URI of each server of the network once, as soon as it answers.

    Without `interfaces`, it asks on all network interfaces.

    Raises:
        ConfigError: There is no such interface.
    """
    found: asyncio.Queue[str] = asyncio.Queue()
    indexes = [interface_index(name) for name in interfaces]
    indexes = indexes or [index for index, _ in socket.if_nameindex()]
    loop = asyncio.get_running_loop()
    asking: list[tuple[asyncio.DatagramTransport, tuple[Any, ...]]] = []
    seen: set[str] = set()
    try:
        for index in indexes:
            for group in GROUPS:
                opened, target = _socket(group, port, index)
                transport, _ = await loop.create_datagram_endpoint(
                    lambda: _Answers(found), sock=opened
                )
                asking.append((transport, target))
        for pause_s in (min(_AGAIN_S, wait_s / 2), wait_s):
            for number, (transport, target) in enumerate(asking):
                transport.sendto(bytes((*_NON_GET, 0, number & 0xFF)) + _QUESTION, target)
            end_s = loop.time() + pause_s
            while (rest_s := end_s - loop.time()) > 0:
                try:
                    uri = await asyncio.wait_for(found.get(), rest_s)
                except TimeoutError:
                    break
                if uri not in seen:
                    seen.add(uri)
                    yield uri
    finally:
        for transport, _ in asking:
            transport.close()


def _socket(group: str, port: int, index: int) -> tuple[socket.socket, tuple[Any, ...]]:
    """Open a socket that sends to a multicast group on an interface."""
    if ":" in group:
        opened = socket.socket(socket.AF_INET6, socket.SOCK_DGRAM)
        opened.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_MULTICAST_IF, index)
        target: tuple[Any, ...] = (group, port, 0, index)
    else:
        opened = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
        request = bytes(8) + struct.pack("@i", index)
        opened.setsockopt(socket.IPPROTO_IP, socket.IP_MULTICAST_IF, request)
        target = (group, port)
    opened.setblocking(False)
    return opened, target


def _uri(address: tuple[Any, ...]) -> str:
    host, port, *rest = address
    scope = f"%{socket.if_indextoname(rest[1])}" if rest and rest[1] else ""
    name = f"[{host.partition('%')[0]}{scope}]" if ":" in host else host
    return f"coap://{name}" + (f":{port}" if port != DEFAULT_PORT else "")
