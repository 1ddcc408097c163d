"""Multicast discovery: requests to the groups of all CoAP nodes, answered after a random delay.

Source: RFC 7252, section 8.
"""

from __future__ import annotations

import asyncio
import random
import socket
import struct
from collections.abc import Callable, Sequence

import attrs

from netota_coap.coap.protocol import GROUPS, LEISURE_S, interface_index
from netota_coap.errors import AddressError, ConfigError

_MOST_DELAYED = 64
_IP_MULTICAST_ALL = 49  # of Linux; the socket module has no names for these two
_IPV6_MULTICAST_ALL = 29


def join(sockets: Sequence[socket.socket], interfaces: Sequence[str]) -> None:
    """Receive what is sent to the groups on the named interfaces, and on no others.

    Raises:
        ConfigError: An interface does not exist, or no socket is bound to all addresses.
        AddressError: None of the groups can be joined on an interface.
    """
    joining = [opened for opened in sockets if opened.getsockname()[0] == "::"]
    for opened in sockets:
        opened.setsockopt(socket.IPPROTO_IP, _IP_MULTICAST_ALL, 0)
        opened.setsockopt(socket.IPPROTO_IPV6, _IPV6_MULTICAST_ALL, 0)
    if interfaces and not joining:
        raise ConfigError(
            "multicast needs a socket on all addresses", hint="Bind to [::]:5683, the default."
        )
    for name in interfaces:
        index = interface_index(name)
        for opened in joining:
            failures = [failure for group in GROUPS if (failure := _join(opened, group, index))]
            if len(failures) == len(GROUPS):
                raise AddressError(f"{name}: no group can be joined: {failures[0].strerror}")


def _join(opened: socket.socket, group: str, index: int) -> OSError | None:
    try:
        if ":" in group:
            request = socket.inet_pton(socket.AF_INET6, group) + struct.pack("@I", index)
            opened.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_JOIN_GROUP, request)
        else:
            request = socket.inet_aton(group) + bytes(4) + struct.pack("@i", index)
            opened.setsockopt(socket.IPPROTO_IP, socket.IP_ADD_MEMBERSHIP, request)
    except OSError as error:
        return error
    return None


def is_group(local: bytes) -> bool:
    """Tell whether a packed address (IPv4 mapped) is a multicast address."""
    return local[0] == 0xFF or (local[:12] == bytes(10) + b"\xff\xff" and 224 <= local[12] < 240)


def unspecified(pktinfo: bytes) -> bytes:
    """Return IPV6_PKTINFO by which the kernel chooses an address of the same interface."""
    any_address = bytes(16) if pktinfo[0] == 0xFF else bytes(10) + b"\xff\xff" + bytes(4)
    return any_address + pktinfo[16:]


@attrs.define(eq=False)
class Leisure:
    """Delays responses, so that not all nodes of a network answer at once (RFC 7252, 8.2)."""

    longest_s: float = LEISURE_S
    _delayed: set[asyncio.TimerHandle] = attrs.field(init=False, factory=set)

    def later(self, send: Callable[[], object]) -> None:
        """Call a function after a random delay; drop it if too many are delayed already."""
        if len(self._delayed) >= _MOST_DELAYED:
            return

        def act() -> None:
            self._delayed.discard(timer)
            send()

        after_s = random.uniform(0, self.longest_s)  # noqa: S311 - no secret
        timer = asyncio.get_running_loop().call_later(after_s, act)
        self._delayed.add(timer)

    def close(self) -> None:
        """Drop the delayed calls."""
        for timer in self._delayed:
            timer.cancel()
