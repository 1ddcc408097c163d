"""The sockets of a server: where to listen, and what goes wrong with it."""

from __future__ import annotations

import errno
import ipaddress
import logging
import socket

from netota_coap.errors import AddressError, ConfigError

DEFAULT_PORT = 5683
DEFAULT_BIND = "[::]:5683"

_log = logging.getLogger("netota_coap.coap")

_BUFFER = 4 * 2**20  # bytes: 4,000 datagrams, as the kernel counts them
_BUFFERS = {
    "receive": (socket.SO_RCVBUF, "net.core.rmem_max"),
    "send": (socket.SO_SNDBUF, "net.core.wmem_max"),
}


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


def open_sockets(bind: str, kind: int = socket.SOCK_DGRAM) -> list[socket.socket]:
    """Open a socket on each address of a name.

    Args:
        bind: `HOST:PORT`; port 0 is any free one.
        kind: `SOCK_DGRAM`, or `SOCK_STREAM` for one that is to listen.

    Returns:
        At least one, each AF_INET6; IPv4 is served through mapped addresses.

    Raises:
        AddressError: It is in use, not of this machine, or not to be had.
        ConfigError: It cannot be read.
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
        # One name, one port, also where any free one will do.
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
                opened.setsockopt(socket.SOL_SOCKET, option, _BUFFER)
        opened.bind((host, port, 0, scope))
    except OSError:
        opened.close()
        raise
    return opened


def tell_buffers(opened: socket.socket) -> None:
    """Say what the kernel did not grant: a burst of more than it holds is lost."""
    for what, (option, sysctl) in _BUFFERS.items():
        # The kernel counts twice what is asked for.
        granted = opened.getsockopt(socket.SOL_SOCKET, option) // 2
        if granted < _BUFFER:
            _log.info(
                "%s buffer: %d bytes of %d: sysctl -w %s=%d",
                what,
                granted,
                _BUFFER,
                sysctl,
                _BUFFER,
            )


def _address_error(bind: str, error: OSError) -> AddressError:
    hints = {
        errno.EADDRINUSE: "Another server listens there: stop it, or choose another address.",
        errno.EADDRNOTAVAIL: "It is no address of this machine: choose another.",
        errno.EACCES: "Ports below 1024 need a privilege: choose another.",
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
