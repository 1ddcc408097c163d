"""Opens the sockets of both servers, CoAP's and HTTP's; no other module binds sockets."""

from __future__ import annotations

import errno
import ipaddress
import logging
import socket

from netota_coap.coap.protocol import DEFAULT_PORT
from netota_coap.encoding.addresses import parse_bind
from netota_coap.errors import AddressError

_log = logging.getLogger("netota_coap.coap")

BUFFER = 4 * 2**20  # bytes: 4,000 datagrams, as the kernel counts them
_BUFFERS = {
    "receive": (socket.SO_RCVBUF, "net.core.rmem_max"),
    "send": (socket.SO_SNDBUF, "net.core.wmem_max"),
}


def open_sockets(bind: str, kind: int = socket.SOCK_DGRAM) -> list[socket.socket]:
    """Open a socket on each address of a host.

    Args:
        bind: `HOST:PORT`; port 0 stands for any free one, the same for all addresses.
        kind: `SOCK_DGRAM` or `SOCK_STREAM`.

    Returns:
        At least one bound socket of AF_INET6; IPv4 is served through mapped addresses.

    Raises:
        AddressError: The address is in use, not of this machine, or not permitted.
        ConfigError: `bind` is malformed.
    """
    host, port = parse_bind(bind)
    try:
        found = socket.getaddrinfo(host, port, socket.AF_UNSPEC, kind, 0, socket.AI_PASSIVE)
    except (OSError, UnicodeError) as error:
        reason = getattr(error, "strerror", None) or "not a host name"
        raise AddressError(f"{bind}: {reason}") from error
    sockets: list[socket.socket] = []
    failure: OSError | None = None
    for family, _, _, _, address in found:
        mapped = f"::ffff:{address[0]}" if family == socket.AF_INET else address[0]
        scope = address[3] if len(address) == 4 else 0
        chosen = port or (sockets[0].getsockname()[1] if sockets else 0)
        try:
            sockets.append(_open(kind, mapped, chosen, scope))
        except OSError as error:
            failure = error
            if error.errno != errno.EADDRNOTAVAIL:
                break
    if failure and (not sockets or failure.errno != errno.EADDRNOTAVAIL):
        for opened in sockets:
            opened.close()
        raise _address_error(bind, failure) from failure
    return sockets


def _open(kind: int, host: object, port: int, scope: object) -> socket.socket:
    opened = socket.socket(socket.AF_INET6, kind)
    try:
        opened.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 0)
        if kind == socket.SOCK_STREAM:
            opened.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        else:
            for option, _ in _BUFFERS.values():
                opened.setsockopt(socket.SOL_SOCKET, option, BUFFER)
        opened.bind((host, port, 0, scope))
    except OSError:
        opened.close()
        raise
    return opened


def log_small_buffers(opened: socket.socket) -> None:
    """Log which buffers the kernel made smaller than asked for: larger bursts are lost."""
    for what, (option, sysctl) in _BUFFERS.items():
        # Linux doubles what is asked for.
        granted = opened.getsockopt(socket.SOL_SOCKET, option) // 2
        if granted < BUFFER:
            wanted = "%s buffer: %d bytes instead of %d: sysctl -w %s=%d"
            _log.info(wanted, what, granted, BUFFER, sysctl, BUFFER)


def _address_error(bind: str, error: OSError) -> AddressError:
    hints = {
        errno.EADDRINUSE: "Another server listens there: stop it, or choose another address.",
        errno.EADDRNOTAVAIL: "This machine does not have that address: choose another.",
        errno.EACCES: "Ports below 1024 need a privilege: choose another.",
        errno.EAFNOSUPPORT: (
            "AF_INET6 sockets are needed, also for IPv4: allow them (RestrictAddressFamilies= in "
            "systemd, ipv6.disable=0 for the kernel). Switching IPv6 off by sysctl is fine."
        ),
    }
    reason = error.strerror or str(error)
    return AddressError(f"cannot listen on {bind}: {reason}", hint=hints.get(error.errno or 0, ""))


def uri_of(opened: socket.socket, scheme: str = "coap") -> str:
    """Return the URI of a bound socket."""
    host, port, *_ = opened.getsockname()
    address = ipaddress.IPv6Address(host.partition("%")[0])
    name = address.ipv4_mapped or f"[{host}]"
    return f"{scheme}://{name}" + (f":{port}" if (scheme, port) != ("coap", DEFAULT_PORT) else "")
