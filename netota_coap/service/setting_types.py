"""Kinds of settings: how values are written in a configuration, and which are refused.

Source: `spec/operation.md`.
"""

from __future__ import annotations

import ipaddress
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import attrs

from netota_coap.encoding.addresses import canonical, parse_bind
from netota_coap.encoding.codecs import refuse
from netota_coap.errors import ConfigError, InvalidDataError
from netota_coap.model.values import LIMITS, Rule, instance, text

_PREFIX = re.compile(r"(/[A-Za-z0-9._~-]+)+")


@attrs.frozen
class Kind:
    """How the values of a setting are written.

    Attributes:
        metavar: Stands for one value in documents and usage lines.
        decode: Turns a TOML value into the setting's value; relative paths are resolved against
            the directory given. Raises `InvalidDataError`.
        parse: Turns the text of an environment variable into a TOML value; text that it cannot
            read is passed on, so that `decode` refuses it.
        encode: Turns a value into a TOML value.
        of: The TOML type of one value; `Path` where it is text that names a directory.
        many: Whether the setting is an array.
        bounds: Smallest and largest number allowed.
        choices: The only texts allowed; empty if not restricted.
    """

    metavar: str
    decode: Callable[[Any, Path], Any]
    parse: Callable[[str], Any] = str
    encode: Callable[[Any], Any] = lambda value: value
    of: type = str
    many: bool = False
    bounds: tuple[int, int] | None = None
    choices: tuple[str, ...] = ()

    def setting(self, default: object, help: str, **more: Any) -> Any:  # noqa: A002
        """Return the field of a setting; keywords are attributes of `config.Setting`."""
        return attrs.field(default=default, metadata={"kind": self, "help": help, **more})

    @property
    def name(self) -> str:
        """Describe the values for people."""
        if self.bounds:
            return f"{self.metavar.lower()}, {self.bounds[0]} to {self.bounds[1]}"
        return f"array of {self.metavar}" if self.many else self.metavar


def _valid(rule: Rule, plain: Any) -> Any:
    reason = rule(plain)
    if reason is not None:
        raise refuse(reason)
    return plain


def _directory(plain: Any, base: Path) -> Path:
    return base / str(_valid(text("summary"), str(plain) if isinstance(plain, Path) else plain))


def _bind(plain: Any) -> str:
    try:
        parse_bind(_valid(text("url"), plain))
    except ConfigError as error:
        raise refuse(error.detail) from error
    return str(plain)


def _http_bind(plain: Any, _base: Path) -> str:
    if not _valid(instance(str, "text"), plain):
        return ""
    if not _bind(plain).rpartition(":")[2].isdecimal():
        raise refuse(f"{plain!r}: must be HOST:PORT")
    return str(plain)


def _prefix(plain: Any, _base: Path) -> str:
    path = str(_valid(instance(str, "text"), plain))
    if path and not _PREFIX.fullmatch(path):
        raise refuse("must be a path as in a URL, begin with '/' and not end with it")
    return path


def _name(plain: Any) -> str:
    return str(_valid(text("name"), plain))


def _network(plain: Any) -> str:
    try:
        return str(ipaddress.ip_network(_valid(text("text"), plain)))
    except InvalidDataError:
        raise
    except ValueError as error:
        raise refuse(f"must be a network, as in 192.0.2.0/24: {error}") from error


def _upstream(plain: Any) -> str:
    return str(_valid(text("url"), plain)).rstrip("/")


def _parameter(plain: Any) -> str:
    if "=" not in _valid(text("url"), plain):
        raise refuse("must be KEY=VALUE, as in machine=nrf52840dk")
    return str(plain)


def _array(
    metavar: str,
    item: Callable[[Any], str],
    fewest: int = 0,
    same: Callable[[str], object] | None = None,
) -> Kind:
    """Return the kind of an array whose items are valid for `item`.

    No two items may have the same key, which `same` returns; it may refuse an item, too.
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

    return Kind(metavar, decode, str.split, list, many=True)


def _number(metavar: str, low: int, high: int) -> Kind:
    def decode(plain: Any, _base: Path) -> int:
        number = int(_valid(instance(int, "an integer"), plain))
        if not low <= number <= high:
            raise refuse(f"must be from {low} to {high}")
        return number

    def parse(given: str) -> int | str:
        return int(given) if given.isascii() and given.isdecimal() and len(given) < 20 else given

    return Kind(metavar, decode, parse, of=int, bounds=(low, high))


def choice(*names: str) -> Kind:
    """Return the kind of a setting that is one of a few names."""
    one_of = ", ".join(names)

    def decode(plain: Any, _base: Path) -> str:
        if plain not in names:
            raise refuse(f"must be one of {one_of}")
        return str(plain)

    return Kind(one_of, decode, choices=names)


PATH = Kind("DIR", _directory, encode=str, of=Path)
HTTP_BIND = Kind("HOST:PORT", _http_bind)
PREFIX = Kind("PATH", _prefix)
LISTENERS = _array("HOST:PORT", _bind, fewest=1)
INTERFACES = _array("INTERFACE", _name)
NETWORKS = _array("NETWORK", _network)
UPSTREAMS = _array("URI", _upstream, same=canonical)
PATTERNS = _array("PATTERN", _name, fewest=1)
PARAMETERS = _array("KEY=VALUE", _parameter)
BYTES = _number("BYTES", 0, 2**63 - 1)
SECONDS = _number("SECONDS", 0, LIMITS["poll"].value)
PERIOD = _number("SECONDS", 1, LIMITS["poll"].value)
WINDOW = _number("NUMBER", 1, 64)
COUNT = _number("NUMBER", 1, 10_000_000)
METRIC = _number("NUMBER", 0, LIMITS["metric"].value)
BOOLEAN = Kind(
    "true or false",
    lambda plain, _: _valid(instance(bool, "a boolean"), plain),
    lambda given: {"true": True, "false": False}.get(given, given),
    of=bool,
)
