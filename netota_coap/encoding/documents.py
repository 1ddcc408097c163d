"""Converts values of the model to TOML for the disk, CBOR for the wire and JSON for people.

One table of fields per class drives all formats in both directions. Rules for editors of this
file: a field is a row of `TABLES`; how a value looks in each format is a `Form`, whose docstring
appears in the spec. Sources: `spec/repository.md`, `spec/wire.md`, `spec/wire.cddl`.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from datetime import UTC, datetime
from typing import Any, TypeVar

import attrs

from netota_coap.encoding.codecs import Format, dump, load, refuse
from netota_coap.encoding.schema import Field, Form, Many, One, Table
from netota_coap.errors import InvalidDataError, Issue
from netota_coap.model.selection import Selection, SelectionValue
from netota_coap.model.values import (
    CONTENT_ATTRIBUTES,
    Archive,
    Content,
    Envelope,
    Offer,
    Package,
    PackageEntry,
    Repository,
    Stream,
    StreamEntry,
    Value,
    clashes,
    name_rule,
)

V = TypeVar("V", bound=Value)


MEDIA_TYPES: Mapping[str, int] = {
    "application/xml": 41,
    "application/octet-stream": 42,
    "application/json": 50,
    "application/cbor": 60,
}
"""CBOR writes these media types as CoAP Content-Format numbers (RFC 7252, section 12.3)."""

_MEDIA_TYPES_BY_NUMBER = {number: name for name, number in MEDIA_TYPES.items()}

# datetime.fromisoformat also accepts week dates, dates without a time, and more.
_RFC_3339 = re.compile(r"[\d-]{10}T[\d:]{8}(\.\d+)?(Z|[+-]\d\d:\d\d)?", re.ASCII)


class _Time(Form):
    """TOML: offset date-time; CBOR: epoch seconds; JSON: RFC 3339."""

    def encode(self, value: datetime, fmt: Format) -> Any:
        utc = value.astimezone(UTC)
        if fmt is Format.CBOR:
            return int(utc.timestamp())
        return utc if fmt is Format.TOML else utc.isoformat().replace("+00:00", "Z")

    def decode(self, plain: Any, fmt: Format) -> Any:
        try:
            if fmt is Format.CBOR and type(plain) is int:
                return datetime.fromtimestamp(plain, UTC)
            if fmt is Format.JSON and type(plain) is str and _RFC_3339.fullmatch(plain):
                return datetime.fromisoformat(plain)
        except (ValueError, OverflowError, OSError):
            pass
        if fmt is Format.TOML:
            return plain
        wanted = "epoch seconds" if fmt is Format.CBOR else "an RFC 3339 time"
        raise refuse(f"must be {wanted}")


class _Digest(Form):
    """CBOR: bytes; else hexadecimal digits."""

    def encode(self, value: bytes, fmt: Format) -> Any:
        return value if fmt is Format.CBOR else value.hex()

    def decode(self, plain: Any, fmt: Format) -> Any:
        if fmt is Format.CBOR:
            return plain
        # bytes.fromhex would skip white space.
        if type(plain) is str and len(plain) == 64 and plain.isalnum():
            try:
                return bytes.fromhex(plain)
            except ValueError:
                pass
        raise refuse("must be 64 hexadecimal digits")


class _MediaType(Form):
    """CBOR: a Content-Format number where `MEDIA_TYPES` has one; else text."""

    def encode(self, value: str, fmt: Format) -> Any:
        return MEDIA_TYPES.get(value, value) if fmt is Format.CBOR else value

    def decode(self, plain: Any, fmt: Format) -> Any:
        if fmt is not Format.CBOR or type(plain) is not int:
            return plain
        if plain not in _MEDIA_TYPES_BY_NUMBER:
            raise refuse(f"{plain} is not a Content-Format number of the table in wire.md")
        return _MEDIA_TYPES_BY_NUMBER[plain]


class _Target(Form):
    """CBOR: [package, stream]; else `package/stream`."""

    def encode(self, value: tuple[str, str], fmt: Format) -> Any:
        return list(value) if fmt is Format.CBOR else "/".join(value)

    def decode(self, plain: Any, fmt: Format) -> Any:
        if fmt is Format.CBOR:
            return tuple(plain) if type(plain) is list else plain
        if type(plain) is not str or plain.count("/") != 1:
            raise refuse('must be text as in "package/stream"')
        return tuple(plain.split("/"))


class _Texts(Form):
    """An array of text."""

    def encode(self, value: tuple[str, ...], _format: Format) -> Any:
        return list(value)

    def decode(self, plain: Any, _format: Format) -> Any:
        return tuple(plain) if type(plain) is list else plain


_ALL = frozenset(Format)
_DISK = frozenset({Format.TOML})
_BINARY = frozenset({Format.CBOR})


OFFER = Table(
    Offer,
    "an offer",
    (
        Field("url", 1, required=_ALL),
        Field("metric", 0, required=_ALL),
    ),
    array=True,
)
_ENVELOPE = Table(
    Envelope,
    "an envelope",
    (
        Field("type", 1, _MediaType(), required=_ALL),
        Field("size", 2, required=_ALL),
        Field("sha256", 3, _Digest(), required=_ALL),
    ),
)
CONTENT = Table(
    Content,
    "content",
    tuple(Field(name, key) for key, name in enumerate(CONTENT_ATTRIBUTES, start=1)),
    free="attributes",
)
_ARCHIVE = Table(
    Archive,
    "an archive",
    (
        Field("name", 1, required=_ALL),
        Field("envelope", 2, One(_ENVELOPE), required=_ALL),
        Field("content", 3, One(CONTENT)),
        Field("offers", 4, Many(OFFER, "offers")),
    ),
)
_ARCHIVES_KEY = 3
_STREAM = Table(
    Stream,
    "a stream",
    (
        Field("version", 1, required=_ALL),
        Field("sequence", 2, required=_ALL),
        Field("published", 6, _Time(), required=_ALL),
        Field("changed", None, _Time(), formats=_DISK),
        Field("closed", 4),
        Field("replacement", 5, _Target()),
        Field("removed", None, formats=_DISK),
        Field("poll_s", 7),
        Field("title", None, formats=_DISK),
        Field("author", None, formats=_DISK),
        Field("message", None, formats=_DISK),
        Field("archives", _ARCHIVES_KEY, Many(_ARCHIVE, "archives"), required=_DISK),
        Field("more", 8, formats=_BINARY),
    ),
)
_PACKAGE = Table(
    Package,
    "a package",
    (
        Field("title", None, formats=_DISK),
        Field("summary", None, formats=_DISK),
        Field("homepage", None, formats=_DISK),
        Field("poll_s", None, formats=_DISK),
        Field("offers", None, Many(OFFER, "offers"), formats=_DISK),
    ),
)
_REPOSITORY = Table(
    Repository,
    "a repository",
    (
        Field("format", None, formats=_DISK, required=_DISK),
        Field("title", None, formats=_DISK),
        Field("requires", None, _Texts(), formats=_DISK),
    ),
)
_PACKAGE_ENTRY = Table(PackageEntry, "a package", (Field("title", 0, required=_ALL),), array=True)
_STREAM_ENTRY = Table(
    StreamEntry,
    "a stream",
    (
        Field("version", 0, required=_ALL),
        Field("sequence", 1, required=_ALL),
        Field("closed", 2, required=_ALL),
    ),
    array=True,
)

TABLES: Mapping[type[Value], Table[Any]] = {
    table.cls: table
    for table in (
        OFFER,
        _ENVELOPE,
        CONTENT,
        _ARCHIVE,
        _STREAM,
        _PACKAGE,
        _REPOSITORY,
        _PACKAGE_ENTRY,
        _STREAM_ENTRY,
    )
}


def encode(value: Value, fmt: Format) -> bytes:
    """Encode a value of a class in `TABLES`; CBOR is as in `wire.cddl` and deterministic."""
    return dump(TABLES[type(value)].to_plain(value, fmt), fmt)


@attrs.frozen(eq=False)
class StreamEncoder:
    """Encodes one stream in CBOR many times, each time with other archives."""

    stream: Stream
    _plain: dict[int, Any] = attrs.field(init=False)
    _archives: dict[int, Any] = attrs.field(init=False)  # by `id`; `stream` keeps them alive

    @_plain.default
    def _all_but_archives(self) -> dict[int, Any]:
        plain: dict[int, Any] = _STREAM.to_plain(self.stream, Format.CBOR)
        plain.pop(_ARCHIVES_KEY, None)
        return plain

    @_archives.default
    def _each_archive(self) -> dict[int, Any]:
        return {id(a): _ARCHIVE.to_plain(a, Format.CBOR) for a in self.stream.archives or ()}

    def encode(self, archives: Iterable[Archive]) -> bytes:
        """Encode the stream with these archives; its own ones were converted in advance."""
        known = self._archives
        plain = [known.get(id(a)) or _ARCHIVE.to_plain(a, Format.CBOR) for a in archives]
        return dump({**self._plain, _ARCHIVES_KEY: plain}, Format.CBOR)


def decode(cls: type[V], data: bytes, fmt: Format, **given: Any) -> V:
    """Decode a value of a class in `TABLES`, strictly; `given` are fields not in the document.

    Raises:
        InvalidDataError: The document breaks rules. All are listed.
    """
    value: V = TABLES[cls].from_plain(load(data, fmt), fmt, **given)
    return value


def encode_list(entries: Mapping[str, Value], fmt: Format) -> bytes:
    """Encode a map of names to entries: `packages` or `streams` of `wire.cddl`."""
    plain = {name: TABLES[type(entry)].to_plain(entry, fmt) for name, entry in entries.items()}
    return dump(plain, fmt)


def decode_list(cls: type[V], data: bytes, fmt: Format) -> dict[str, V]:
    """Decode a map of names to entries.

    Raises:
        InvalidDataError: The document breaks rules. All are listed.
    """
    plain = load(data, fmt)
    if type(plain) is not dict or any(type(name) is not str for name in plain):
        raise refuse("must be a table of names")
    entries, issues = {}, clashes(plain)
    for name, item in plain.items():
        if (reason := name_rule(name)) is not None:
            issues.append(Issue(name, reason))
        try:
            entries[name] = TABLES[cls].from_plain(item, fmt)
        except InvalidDataError as error:
            issues += [issue.inside(name) for issue in error.issues]
    if issues:
        raise InvalidDataError(issues)
    return entries


_SELECTION_KEYS = dict(enumerate((*CONTENT_ATTRIBUTES, "scheme"), start=1))
_SELECTION_NAMES = {name: key for key, name in _SELECTION_KEYS.items()}


def selection_to_cbor(selection: Selection) -> bytes:
    """Encode the payload of a FETCH: `selection` of `wire.cddl`."""
    wanted = (*selection.attributes, ("scheme", selection.schemes))
    plain = {
        _SELECTION_NAMES.get(name, name): texts[0] if len(texts) == 1 else list(texts)
        for name, texts in wanted
        if texts
    }
    return dump(plain, Format.CBOR)


def selection_from_cbor(data: bytes) -> Selection:
    """Decode the payload of a FETCH.

    Raises:
        InvalidDataError: It is longer than `LIMITS["selection"]` or not as in `wire.cddl`.
    """
    plain = load(data, Format.CBOR, "selection")
    if type(plain) is not dict:
        raise refuse("a selection must be a map")
    wanted: dict[str, SelectionValue] = {}
    issues = []
    for key, value in plain.items():
        name = key if type(key) is str else _SELECTION_KEYS.get(key if type(key) is int else 0)
        if name is None:
            continue
        values = value if type(value) is list else [value]
        if all(type(item) in (str, int, bool) for item in values):
            wanted[name] = values
        else:
            issues.append(Issue(name, "must be text, an integer, a boolean or an array of these"))
    if issues:
        raise InvalidDataError(issues)
    return Selection.of(wanted)


def selection_to_query(selection: Selection) -> list[str]:
    """Return a selection as parameters of a query, `key=value` each."""
    wanted = (*selection.attributes, ("scheme", selection.schemes))
    return [f"{name}={text}" for name, texts in wanted for text in texts]


def selection_from_query(parameters: Iterable[str]) -> Selection:
    """Read a selection from the parameters of a query; those without `=` are ignored."""
    wanted: dict[str, list[str]] = {}
    for parameter in parameters:
        name, equals, value = parameter.partition("=")
        if equals:
            wanted.setdefault(name, []).append(value)
    return Selection.of(wanted)


def encode_problem(title: str, detail: str) -> bytes:
    """Encode concise problem details (RFC 9290, section 2)."""
    return dump({-1: title} | ({-2: detail} if detail else {}), Format.CBOR)


def decode_problem(data: bytes) -> str:
    """Return the detail or the title of concise problem details, or "" if there is none."""
    try:
        plain = load(data, Format.CBOR)
    except InvalidDataError:
        return ""
    if type(plain) is not dict:
        return ""
    return next((text for key in (-2, -1) if type(text := plain.get(key)) is str), "")
