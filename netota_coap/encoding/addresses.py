"""Reads addresses that operators write: where to listen, and the URIs of upstreams.

Source: `spec/mirror.md`, rules M-1 and M-10.
"""

from __future__ import annotations

import ipaddress
import re

from netota_coap.encoding.codecs import refuse
from netota_coap.errors import ConfigError
from netota_coap.model.values import text

_FORM = re.compile(
    r"(?P<scheme>coap|https?)://(?P<host>\[[^\s\[\]/?#@]+\]|[^\s\[\]/?#@:]+)"
    r"(?::(?P<port>[0-9]{1,5}))?(?P<prefix>/[^\s?#]*)?"
)
_NAME = re.compile(rb"[a-z0-9._-]+")
_PORTS = {"coap": 5683, "http": 80, "https": 443}


def parse_bind(text: str) -> tuple[str, int]:
    """Read `HOST:PORT`, `HOST`, `[HOST]:PORT` or `:PORT`.

    Raises:
        ConfigError: The text has none of these forms.
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
    return host or "::", int(port or _PORTS["coap"])


def author_of(origin: str) -> str:
    """Return the author of the streams that are adopted from an upstream."""
    return f"mirror of {origin}"


def canonical(uri: str) -> str:
    """Return an upstream's URI in a spelling that is the same for the same upstream.

    Raises:
        InvalidDataError: The URI cannot be that of an upstream.
    """
    reason = text("title")(author_of(uri))
    if reason is not None:
        raise refuse(reason)
    found = _FORM.fullmatch(uri.rstrip("/"))
    if found is None or (found["scheme"] == "coap" and found["prefix"]):
        raise refuse("must be the URI of an upstream, such as coap://host or https://host/prefix")
    host, port = _host(found["host"]), int(found["port"] or _PORTS[found["scheme"]])
    if not 1 <= port <= 65_535:
        raise refuse("the port must be from 1 to 65535")
    return f"{found['scheme']}://{host}:{port}{found['prefix'] or ''}"


def _host(host: str) -> str:
    try:
        if host.startswith("["):
            return f"[{ipaddress.IPv6Address(host[1:-1])}]"
        name = host.lower().encode("idna")
    except ValueError:
        name = b""
    if not _NAME.fullmatch(name):
        raise refuse(f"{host!r} is not a valid host")
    return name.removesuffix(b".").decode()
