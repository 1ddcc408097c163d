"""Converts bytes to plain data and back, strictly. Only this module imports cbor2 and tomli."""

from __future__ import annotations

import enum
import io
import json
from collections.abc import Callable, Mapping
from typing import Any

import cbor2
import tomli
import tomli_w

from netota_coap.errors import InvalidDataError, Issue
from netota_coap.model.values import LIMITS


class Format(enum.Enum):
    """A format; its value is its name in errors."""

    TOML = "TOML"
    CBOR = "CBOR"
    JSON = "JSON"

    # Enum's own hash is written in Python: too slow for a look-up by format for each field.
    __hash__ = object.__hash__


def refuse(reason: str) -> InvalidDataError:
    """Return an error about the datum as a whole."""
    return InvalidDataError([Issue("", reason)])


class TaggedItem:
    """Stands in for a tagged CBOR item, which every field refuses."""

    def __repr__(self) -> str:
        return "(an item with a tag)"


# cbor2 would build times, regular expressions and fractions from tags. Undecoded, a tag under an
# unknown key is skipped and one under a known key has the wrong type.
_UNTOUCHED: Mapping[int, Callable[[Any, bool], Any]] = dict.fromkeys(
    (*range(6), *range(25, 31), *range(35, 38), 100, *range(256, 262), 1004, 43000, 55799),
    lambda _value, _immutable: TaggedItem(),
)


def _loads_cbor(data: bytes) -> Any:
    stream = io.BytesIO(data)
    decoder = cbor2.CBORDecoder(
        stream,
        max_depth=16,
        allow_indefinite=False,
        allow_duplicate_keys=False,
        semantic_decoders=_UNTOUCHED,
        read_size=1,
    )
    try:
        plain = decoder.decode()
    except (cbor2.CBORError, ValueError, TypeError, OverflowError) as error:
        raise refuse(f"is not valid CBOR: {error}") from error
    if stream.tell() != len(data):
        raise refuse(f"{len(data) - stream.tell()} bytes follow the end of the CBOR item")
    return plain


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    result: dict[str, Any] = {}
    for key, value in pairs:
        if key in result:
            raise ValueError(f"key {key!r} appears twice")
        result[key] = value
    return result


def _not_a_number(constant: str) -> Any:
    raise ValueError(f"{constant} is not JSON")


def _loads_json(data: bytes) -> Any:
    try:
        return json.loads(data.decode(), object_pairs_hook=_unique, parse_constant=_not_a_number)
    except (ValueError, RecursionError) as error:
        raise refuse(f"is not valid JSON: {error}") from error


def _loads_toml(data: bytes) -> Any:
    try:
        return tomli.loads(data.decode())
    except (ValueError, RecursionError) as error:
        raise refuse(f"is not valid TOML: {error}") from error


_LOADS: Mapping[Format, Callable[[bytes], Any]] = {
    Format.TOML: _loads_toml,
    Format.CBOR: _loads_cbor,
    Format.JSON: _loads_json,
}


_DUMPS: Mapping[Format, Callable[[Any], bytes]] = {
    Format.TOML: lambda plain: tomli_w.dumps(plain).encode(),
    Format.CBOR: lambda plain: cbor2.dumps(plain, canonical=True),
    Format.JSON: lambda plain: json.dumps(
        plain, ensure_ascii=False, separators=(",", ":")
    ).encode(),
}


def load(data: bytes, fmt: Format, limit: str = "document") -> Any:
    """Decode a document to plain data.

    Raises:
        InvalidDataError: The document is longer than `LIMITS[limit]`, malformed, or has duplicate
            keys, trailing bytes or indefinite lengths.
    """
    bound = LIMITS[limit].value
    if len(data) > bound:
        raise refuse(f"must be at most {bound} bytes long, not {len(data)}")
    return _LOADS[fmt](data)


def dump(plain: Any, fmt: Format) -> bytes:
    """Encode plain data; CBOR is deterministic (RFC 8949, section 4.2)."""
    return _DUMPS[fmt](plain)


def diagnostic(item: object, indent: str = "") -> str:
    """Write plain data in CBOR's diagnostic notation (RFC 8949, section 8).

    All lines but the first begin with `indent`.
    """
    if isinstance(item, bytes):
        return f"h'{item.hex()}'"
    if not isinstance(item, Mapping | list):
        return json.dumps(item, ensure_ascii=False)
    deeper = indent + "  "
    if isinstance(item, Mapping):
        parts = [f"{diagnostic(k)}: {diagnostic(v, deeper)}" for k, v in item.items()]
        opening, closing = "{", "}"
    else:
        parts = [diagnostic(value, deeper) for value in item]
        opening, closing = "[", "]"
    line = f"{opening}{', '.join(parts)}{closing}"
    if len(indent) + len(line) <= 88 and "\n" not in line:
        return line
    return f"{opening}\n{deeper}" + f",\n{deeper}".join(parts) + f"\n{indent}{closing}"
