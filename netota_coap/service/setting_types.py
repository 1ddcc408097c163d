"""Kinds of settings: how the values of a configuration look, and what is refused.

Source: `spec/operation.md`.
"""

from __future__ import annotations

import ipaddress
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import attrs

from netota_coap.coap.sockets import parse_bind
from netota_coap.encoding.codecs import refuse
from netota_coap.errors import ConfigError, InvalidDataError
from netota_coap.gateway.upstream_uri import canonical
from netota_coap.model.values import LIMITS, Rule, instance, text

_PREFIX = re.compile(r"(/[A-Za-z0-9._~-]+)+")


@attrs.frozen
class Kind:
    """How the values of a setting look.

    Attributes:
        name: For people.
        decode: From what TOML has, and the directory that paths are relative to, to the value.
        parse: From text of the environment to what TOML would have; what is not of the kind is
            left for `decode` to refuse.
        encode: From the value to what TOML has.
    """

    name: str
    decode: Callable[[Any, Path], Any]
    parse: Callable[[str], Any] = str
    encode: Callable[[Any], Any] = lambda value: value


def _held(rule: Rule, plain: Any) -> Any:
    reason = rule(plain)
    if reason is not None:
        raise refuse(reason)
    return plain


def _directory(plain: Any, base: Path) -> Path:
    return base / str(_held(text("summary"), str(plain) if isinstance(plain, Path) else plain))


def _bind(plain: Any) -> str:
    try:
        parse_bind(_held(text("url"), plain))
    except ConfigError as error:
        raise refuse(error.detail) from error
    return str(plain)


def _http_bind(plain: Any, _base: Path) -> str:
    if not _held(instance(str, "text"), plain):
        return ""
    if not _bind(plain).rpartition(":")[2].isdecimal():
        raise refuse(f"{plain!r}: must be HOST:PORT")
    return str(plain)


def _prefix(plain: Any, _base: Path) -> str:
    path = str(_held(instance(str, "text"), plain))
    if path and not _PREFIX.fullmatch(path):
        raise refuse("must be a path as in a URL, begin with '/' and not end with it")
    return path


def _interface(plain: Any) -> str:
    return str(_held(text("name"), plain))


def _network(plain: Any) -> str:
    try:
        return str(ipaddress.ip_network(_held(text("text"), plain)))
    except InvalidDataError:
        raise
    except ValueError as error:
        raise refuse(f"must be a network, as in 192.0.2.0/24: {error}") from error


def _upstream(plain: Any) -> str:
    return str(_held(text("url"), plain)).rstrip("/")


def _pattern(plain: Any) -> str:
    return str(_held(text("name"), plain))


def _parameter(plain: Any) -> str:
    if "=" not in _held(text("url"), plain):
        raise refuse("must say what a device is, as in machine=nrf52840dk")
    return str(plain)


def _array(
    of: str,
    item: Callable[[Any], str],
    fewest: int = 0,
    same: Callable[[str], object] | None = None,
) -> Kind:
    """Return the kind of several.

    Args:
        of: What they are.
        item: Reads one of them.
        fewest: There must be.
        same: Returns what no two may have in common, and refuses what cannot be used.
    """

    def decode(plain: Any, _base: Path) -> tuple[str, ...]:
        if type(plain) not in (list, tuple):
            raise refuse("must be an array")
        if len(plain) < fewest:
            raise refuse("must not be empty")
        values, issues = [], []
        first: dict[object, int] = {}
        for index, each in enumerate(plain):
            try:
                value = item(each)
                if same and (other := first.setdefault(same(value), index)) != index:
                    raise refuse(f"is the same as [{other}]")
                values.append(value)
            except InvalidDataError as error:
                issues += [issue.inside(f"[{index}]") for issue in error.issues]
        if issues:
            raise InvalidDataError(issues)
        return tuple(values)

    return Kind(f"array of {of}", decode, str.split, list)


def _number(unit: str, low: int, high: int) -> Kind:
    def decode(plain: Any, _base: Path) -> int:
        number = int(_held(instance(int, "an integer"), plain))
        if not low <= number <= high:
            raise refuse(f"must be from {low} to {high}")
        return number

    def parse(given: str) -> int | str:
        return int(given) if given.isascii() and given.isdecimal() and len(given) < 20 else given

    return Kind(f"{unit}, {low} to {high}", decode, parse)


def choice(*names: str) -> Kind:
    """Return the kind of what is one of a few names."""
    one_of = ", ".join(names)

    def decode(plain: Any, _base: Path) -> str:
        if plain not in names:
            raise refuse(f"must be one of {one_of}")
        return str(plain)

    return Kind(one_of, decode)


PATH = Kind("directory", _directory, encode=str)
HTTP_BIND = Kind("HOST:PORT", _http_bind)
PREFIX = Kind("path", _prefix)
LISTENERS = _array("HOST:PORT", _bind, fewest=1)
INTERFACES = _array("interfaces", _interface)
NETWORKS = _array("networks", _network)
UPSTREAMS = _array("URIs", _upstream, same=canonical)
PATTERNS = _array("patterns", _pattern, fewest=1)
PARAMETERS = _array("KEY=VALUE", _parameter)
BYTES = _number("bytes", 0, 2**63 - 1)
SECONDS = _number("seconds", 0, LIMITS["poll"].value)
PERIOD = _number("seconds", 1, LIMITS["poll"].value)
WINDOW = _number("number", 1, 64)
COUNT = _number("number", 1, 10_000_000)
METRIC = _number("number", 0, LIMITS["metric"].value)
BOOLEAN = Kind(
    "true or false",
    lambda plain, _: _held(instance(bool, "a boolean"), plain),
    lambda given: {"true": True, "false": False}.get(given, given),
)
