"""Being found: requests to the groups of all CoAP nodes, answered at leisure.

Source: RFC 7252, section 8.
"""

from __future__ import annotations

import asyncio
import random
import socket
import struct
from collections.abc import Callable, Sequence

import attrs

from netota_coap.errors import AddressError, ConfigError

GROUPS = ("ff02::fd", "ff05::fd", "224.0.1.187")
"""Of all CoAP nodes: on the link, on the site, and of IPv4 (RFC 7252, section 12.8)."""

LEISURE_S = 5.0
"""RFC 7252, section 8.2."""

_MOST_WAITING = 64
_IP_MULTICAST_ALL = 49  # of Linux; the socket module has no names for these two
_IPV6_MULTICAST_ALL = 29


def join(sockets: Sequence[socket.socket], interfaces: Sequence[str]) -> None:
    """Let sockets hear what is sent to the groups, on some interfaces and no others.

    Args:
        sockets: Those that are bound to all addresses hear it.
        interfaces: Names.

    Raises:
        ConfigError: There is no such interface, or no such socket.
        AddressError: None of the groups can be joined there.
    """
    hearing = [opened for opened in sockets if opened.getsockname()[0] == "::"]
    for opened in sockets:
        opened.setsockopt(socket.IPPROTO_IP, _IP_MULTICAST_ALL, 0)
        opened.setsockopt(socket.IPPROTO_IPV6, _IPV6_MULTICAST_ALL, 0)
    if interfaces and not hearing:
        raise ConfigError(
            "multicast needs a socket on all addresses", hint="Bind to [::]:5683, the default."
        )
    for name in interfaces:
        index = interface_index(name)
        for opened in hearing:
            failures = [failure for group in GROUPS if (failure := _join(opened, group, index))]
            if len(failures) == len(GROUPS):
                raise AddressError(f"{name}: no group can be joined: {failures[0].strerror}")


def interface_index(name: str) -> int:
    """Return the index of an interface.

    Raises:
        ConfigError: There is none of this name.
    """
    try:
        return socket.if_nametoindex(name)
    except OSError as error:
        known = ", ".join(name for _, name in socket.if_nameindex())
        raise ConfigError(f"{name}: no such interface; there is {known}") from error


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
    """Tell whether a packed address (IPv4 mapped) is one of a group."""
    return local[0] == 0xFF or (local[:12] == bytes(10) + b"\xff\xff" and 224 <= local[12] < 240)


def unspecified(pktinfo: bytes) -> bytes:
    """Return the ancillary data to answer by: from the interface, by whichever address it has."""
    any_address = bytes(16) if pktinfo[0] == 0xFF else bytes(10) + b"\xff\xff" + bytes(4)
    return any_address + pktinfo[16:]


@attrs.define(eq=False)
class Leisure:
    """Answers that wait for their turn, so that not all nodes of a network answer at once.

    Attributes:
        longest_s: That one waits.
    """

    longest_s: float = LEISURE_S
    _waiting: set[asyncio.TimerHandle] = attrs.field(init=False, factory=set)

    def later(self, send: Callable[[], object]) -> None:
        """Call a function after a random time; not at all if too many wait."""
        if len(self._waiting) >= _MOST_WAITING:
            return

        def act() -> None:
            self._waiting.discard(timer)
            send()

        after_s = random.uniform(0, self.longest_s)  # noqa: S311 - no secret
        timer = asyncio.get_running_loop().call_later(after_s, act)
        self._waiting.add(timer)

    def close(self) -> None:
        """Send none of them."""
        for timer in self._waiting:
            timer.cancel()
