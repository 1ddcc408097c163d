"""The domain's values, their limits and their rules.

Every value checks itself when it is made, so that all that exist are valid. Nothing here knows a
file, a format or a protocol. Rules for editors of this file: a limit is a row of `LIMITS`; a rule
of one field is the `rule` of that field; a rule over several fields is in `_cross_rules`.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from datetime import UTC, datetime
from types import MappingProxyType
from typing import Any

import attrs

from netota_coap.errors import InvalidDataError, Issue

# ----------------------------------------------------------------------------------------------
# Limits


@attrs.frozen
class Limit:
    """The highest value allowed for something."""

    value: int
    unit: str
    what: str


LIMITS: Mapping[str, Limit] = MappingProxyType(
    {
        "name": Limit(32, "bytes", "name of a package, stream or archive"),
        "text": Limit(64, "bytes", "version, attribute name, text value, media type"),
        "url": Limit(255, "bytes", "URL of an offer or homepage"),
        "title": Limit(100, "bytes", "title, author"),
        "summary": Limit(500, "bytes", "summary, message"),
        "archives": Limit(1_000, "archives", "per stream"),
        "offers": Limit(16, "offers", "per archive"),
        "attributes": Limit(16, "attributes", "free attributes per archive"),
        "size": Limit(2**63 - 1, "bytes", "size of an envelope"),
        "integer": Limit(2**63 - 1, "", "integer value of a free attribute, either way"),
        "sequence": Limit(2**32 - 1, "", "sequence of a stream (lowest: 1)"),
        "metric": Limit(65_535, "", "metric of an offer (lowest: 0)"),
        "poll": Limit(2**32 - 1, "seconds", "poll_s (lowest: 1)"),
        "document": Limit(8 * 2**20, "bytes", "any file or payload that is read"),
        "selection": Limit(256, "bytes", "selection in a FETCH"),
        "datagram": Limit(256, "bytes", "CBOR payload of a stream over CoAP"),
    }
)

CONTENT_ATTRIBUTES = ("type", "arch", "machine", "debug", "filesystem", "compression")
"""The attributes of `Content` that are fields, in the order of narrowing."""

RESERVED_ATTRIBUTES = frozenset(
    ("head", "full", "sequence", "scheme", "name", *CONTENT_ATTRIBUTES)
)
"""Names that a free attribute cannot have."""

FORMAT = 1
"""The version of the on-disk format that this package reads and writes."""

FEATURES: frozenset[str] = frozenset()
"""The features that this program can serve if a repository requires them."""

# Defaults of settings, which also hold for servers without a configuration:
DEFAULT_MAX_AGE_S = 60
DEFAULT_POLL_S = 86_400
OBSERVERS_IN_TOTAL = 200_000
OBSERVERS_PER_STREAM = 100_000
OBSERVERS_PER_ADDRESS = 10_000
STATUS_READERS = ("127.0.0.0/8", "::1/128")
UPSTREAM_POLL_S = 300

# The lowest metric wins: a server's own copy is nearer than the URL that a publisher gives.
BLOB_METRIC = 10
URL_METRIC = 100

BLOBS_PATH = "/b/"
"""A server offers its own blobs at this path, each by its digest."""

# ----------------------------------------------------------------------------------------------
# Rules: from a value of any type to the reason why it is refused, or None

Rule = Callable[[Any], "str | None"]

_RULE = "netota_coap.rule"
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._+-]*")
# `//host/path` would name another server.
_URL = re.compile(r"(?:[A-Za-z][A-Za-z0-9+.-]*:|/(?!/))[!-~]+")
# C0, DEL, C1, line and paragraph separators would let a title rewrite a terminal or a log.
_CONTROL = re.compile("[\x00-\x1f\x7f-\x9f\u2028\u2029]")


def _type_reason(value: object, wanted: str) -> str:
    return f"must be {wanted}, not {_TYPE_NAMES.get(type(value), type(value).__name__)}"


_TYPE_NAMES: Mapping[type, str] = {
    str: "text",
    bytes: "bytes",
    int: "an integer",
    bool: "a boolean",
    float: "a floating-point number",
    list: "an array",
    dict: "a table",
    datetime: "a time",
    type(None): "null",
}


def text(limit: str) -> Rule:
    """Require text that is not empty and keeps within a row of `LIMITS`, in bytes of UTF-8."""
    bound = LIMITS[limit].value

    def rule(value: object) -> str | None:
        if type(value) is not str:
            return _type_reason(value, "text")
        if not value:
            return "must not be empty"
        if _CONTROL.search(value):
            return "must not contain control characters"
        if value.isascii():
            length = len(value)
        else:
            try:
                length = len(value.encode())
            except UnicodeEncodeError:
                return "must be valid Unicode"
        return None if length <= bound else f"must be at most {bound} bytes long, not {length}"

    return rule


def _spelled(limit: str, pattern: re.Pattern[str], reason: str) -> Rule:
    as_text = text(limit)

    def rule(value: object) -> str | None:
        return as_text(value) or (None if pattern.fullmatch(value) else reason)  # type: ignore[call-overload]

    return rule


def _integer(low: int, limit: str) -> Rule:
    high = LIMITS[limit].value

    def rule(value: object) -> str | None:
        if type(value) is not int:
            return _type_reason(value, "an integer")
        if low <= value <= high:
            return None
        # Python refuses to print more than 4,300 digits, which TOML can write as 0xffff….
        shown = value if value.bit_length() <= 128 else f"one of {value.bit_length()} bits"
        return f"must be from {low} to {high}, not {shown}"

    return rule


def instance(cls: type, wanted: str) -> Rule:
    """Require exactly this class, which the reason calls `wanted`."""

    def rule(value: object) -> str | None:
        return None if type(value) is cls else _type_reason(value, wanted)

    return rule


def optional(rule: Rule) -> Rule:
    """Let None pass, too."""
    return lambda value: None if value is None else rule(value)


def several(cls: type, limit: str) -> Rule:
    """Require a tuple of a class, no longer than a row of `LIMITS` allows."""
    bound, unit = LIMITS[limit].value, LIMITS[limit].unit

    def rule(value: object) -> str | None:
        if type(value) is not tuple or any(type(item) is not cls for item in value):
            return f"must be a tuple of {cls.__name__}"
        return None if len(value) <= bound else f"must be at most {bound} {unit}, not {len(value)}"

    return rule


_NAME_RULE = "must consist of letters, digits, '.', '_', '+', '-' and start with a letter or digit"
name_rule = _spelled("name", _NAME, _NAME_RULE)
"""The rule of the names of packages, streams and archives."""

_attribute_rule = _spelled("text", _NAME, _NAME_RULE)
_url_rule = _spelled("url", _URL, "must be a URL with a scheme, or a path that begins with '/'")
_integer_value = _integer(-LIMITS["integer"].value, "integer")
_text_value = text("text")


def _attribute_value(value: object) -> str | None:
    if type(value) is bool:
        return None
    if type(value) is int:
        return _integer_value(value)
    if type(value) is str:
        return _text_value(value)
    return _type_reason(value, "text, an integer or a boolean")


def _digest(value: object) -> str | None:
    if type(value) is not bytes:
        return _type_reason(value, "bytes")
    return None if len(value) == 32 else f"must be 32 bytes long, not {len(value)}"


def _time(value: object) -> str | None:
    if type(value) is not datetime:
        return _type_reason(value, "a time")
    if value.tzinfo is None:
        return "must have an offset from UTC, as in 2026-11-20T09:30:00Z"
    try:
        utc = value.astimezone(UTC)
    except OverflowError:
        return "must be from 1970 to 9999 in UTC"
    if utc.microsecond:
        return "must be in whole seconds"
    return None if utc.year >= 1970 else "must not be before 1970"


def _format(value: object) -> str | None:
    if type(value) is not int:
        return _type_reason(value, "an integer")
    return None if value == FORMAT else f"must be {FORMAT}; this program reads no other"


def _requires(value: object) -> str | None:
    if type(value) is not tuple or any(type(item) is not str for item in value):
        return "must be an array of text"
    unknown = sorted(set(value) - FEATURES)
    return f"asks for features that this program lacks: {', '.join(unknown)}" if unknown else None


def _target(value: object) -> str | None:
    if type(value) is not tuple or len(value) != 2:
        return "must be a package and a stream"
    return name_rule(value[0]) or name_rule(value[1])


def _attributes(value: object) -> str | None:
    if not isinstance(value, Mapping):
        return _type_reason(value, "a table")
    bound = LIMITS["attributes"].value
    return None if len(value) <= bound else f"must be at most {bound} free attributes"


def ruled(rule: Rule, **options: Any) -> Any:
    """Declare a field of a value with its rule."""
    return attrs.field(metadata={_RULE: rule}, **options)


@attrs.frozen
class Value:
    """A value that breaks a rule raises `InvalidDataError` when it is made."""

    @classmethod
    def rules(cls) -> Mapping[str, Rule]:
        """Return the rule of each field."""
        if cls not in _RULES:
            _RULES[cls] = {field.name: field.metadata[_RULE] for field in attrs.fields(cls)}
        return _RULES[cls]

    def __attrs_post_init__(self) -> None:
        issues = issues_of(type(self), {name: getattr(self, name) for name in self.rules()})
        if issues:
            raise InvalidDataError(issues)

    @classmethod
    def _cross_rules(cls, _sound: Mapping[str, Any]) -> Iterable[Issue]:
        """Check the rules over several fields; `_sound` are those that keep their own rule."""
        return ()


_RULES: dict[type[Value], Mapping[str, Rule]] = {}


def issues_of(cls: type[Value], fields: Mapping[str, Any]) -> list[Issue]:
    """Return one issue per rule of a class that the given fields break, in the class's order."""
    issues = [
        Issue(name, reason)
        for name, rule in cls.rules().items()
        if name in fields and (reason := rule(fields[name])) is not None
    ]
    broken = {issue.place for issue in issues}
    sound = {name: fields[name] for name in fields if name not in broken} if broken else fields
    return issues + list(cls._cross_rules(sound))


def clashes(names: Iterable[str], place: str = "{name}") -> list[Issue]:
    """Return an issue per name that equals an earlier one or differs from it only in case."""
    seen: dict[str, str] = {}
    issues = []
    for index, name in enumerate(names):
        folded = name.casefold()
        if (first := seen.get(folded)) is None:
            seen[folded] = name
        else:
            why = "appears twice" if first == name else f"differs from {first!r} only in case"
            issues.append(Issue(place.format(index=index, name=name), f"{name!r} {why}"))
    return issues


StreamName = tuple[str, str]
"""Package and stream."""


def stream_name(text: str) -> StreamName:
    """Read `PACKAGE/STREAM`.

    Raises:
        InvalidDataError: The text has another form, or a name breaks the rule of names.
    """
    package, slash, stream = text.partition("/")
    if not slash:
        raise InvalidDataError([Issue(text, "must be PACKAGE/STREAM")])
    require_names(package, stream)
    return package, stream


def require_names(*names: str) -> None:
    """Raise `InvalidDataError` if names break their rule."""
    issues = [Issue(repr(name), reason) for name in names if (reason := name_rule(name))]
    if issues:
        raise InvalidDataError(issues)


# ----------------------------------------------------------------------------------------------
# Values

AttributeValue = str | int | bool


def _frozen_mapping(value: Mapping[str, Any]) -> Mapping[str, Any]:
    return MappingProxyType(dict(value)) if value else _NOTHING


_NOTHING: Mapping[str, Any] = MappingProxyType({})


def _typed(value: Mapping[str, Any]) -> Mapping[str, tuple[type, Any]]:
    """Tell True from 1, which are equal in Python but not to a device."""
    return {name: (type(item), item) for name, item in value.items()}


@attrs.frozen(kw_only=True)
class Offer(Value):
    """One place to download an archive from; the lowest metric is preferred.

    Attributes:
        url: A URL with a scheme, or a path on this server that the device gets by the scheme of
            its request.
        metric: 0 to 65,535.
    """

    url: str = ruled(_url_rule)
    metric: int = ruled(_integer(0, "metric"))

    def scheme(self, request_scheme: str) -> str:
        """Return the URL's scheme in lower case; a path has the scheme of the request."""
        return request_scheme if self.url[0] == "/" else self.url.partition(":")[0].lower()


@attrs.frozen(kw_only=True)
class Envelope(Value):
    """The file as it is downloaded: its media type, its size in bytes and its digest."""

    type: str = ruled(text("text"))
    size: int = ruled(_integer(0, "size"))
    sha256: bytes = ruled(_digest)


@attrs.frozen(kw_only=True)
class Content(Value):
    """What is inside the file. An attribute that is None or absent suits every device."""

    type: str | None = ruled(optional(text("text")), default=None)
    arch: str | None = ruled(optional(text("text")), default=None)
    machine: str | None = ruled(optional(text("text")), default=None)
    debug: bool | None = ruled(optional(instance(bool, "a boolean")), default=None)
    filesystem: str | None = ruled(optional(text("text")), default=None)
    compression: str | None = ruled(optional(text("text")), default=None)
    attributes: Mapping[str, AttributeValue] = ruled(
        _attributes, default=_NOTHING, converter=_frozen_mapping, eq=_typed, hash=False
    )

    def get(self, attribute: str) -> AttributeValue | None:
        """Return the value of an attribute, be it a field or a free one."""
        if attribute in CONTENT_ATTRIBUTES:
            value: AttributeValue | None = getattr(self, attribute)
            return value
        return self.attributes.get(attribute)

    def all(self) -> dict[str, AttributeValue]:
        """Return all attributes that have a value, by name."""
        fixed = {name: getattr(self, name) for name in CONTENT_ATTRIBUTES}
        return {name: value for name, value in fixed.items() if value is not None} | dict(
            self.attributes
        )

    @classmethod
    def _cross_rules(cls, sound: Mapping[str, Any]) -> Iterator[Issue]:
        for name, value in sound.get("attributes", _NOTHING).items():
            reason = _attribute_rule(name)
            if reason is None and (name in RESERVED_ATTRIBUTES or name.startswith("x-")):
                reason = "is reserved"
            if reason is None:
                reason = _attribute_value(value)
            if reason is not None:
                yield Issue(str(name), reason)


@attrs.frozen(kw_only=True)
class Archive(Value):
    """The description of one downloadable file; its name is unique in the stream."""

    name: str = ruled(name_rule)
    envelope: Envelope = ruled(instance(Envelope, "an envelope"))
    content: Content = ruled(instance(Content, "content"), default=Content())
    offers: tuple[Offer, ...] = ruled(several(Offer, "offers"), default=())


@attrs.frozen(kw_only=True)
class Stream(Value):
    """A named distribution point: exactly one version at a time.

    Attributes:
        version: The version of all its archives.
        sequence: 1 to 2^32-1, +1 with every publish, close and reopen; never reused.
        published: When its archives were published, with an offset from UTC, in whole seconds.
        changed: When this state was made, if not by publishing; on disk only.
        archives: None where the sender left them out (`?head`, or `more`).
        replacement: The stream that a closed stream recommends.
        removed: Whether the stream was removed; True only for states in the history.
        poll_s: Seconds until the device should ask again.
        more: Whether the sender left out something that `?full` has.
    """

    version: str = ruled(text("text"))
    sequence: int = ruled(_integer(1, "sequence"))
    published: datetime = ruled(_time)
    changed: datetime | None = ruled(optional(_time), default=None)
    closed: bool = ruled(instance(bool, "a boolean"), default=False)
    replacement: tuple[str, str] | None = ruled(optional(_target), default=None)
    removed: bool = ruled(instance(bool, "a boolean"), default=False)
    poll_s: int | None = ruled(optional(_integer(1, "poll")), default=None)
    title: str | None = ruled(optional(text("title")), default=None)
    author: str | None = ruled(optional(text("title")), default=None)
    message: str | None = ruled(optional(text("summary")), default=None)
    archives: tuple[Archive, ...] | None = ruled(
        optional(several(Archive, "archives")), default=None
    )
    more: bool = ruled(instance(bool, "a boolean"), default=False)

    def essence(self) -> Stream:
        """Return the state without what may change under the same sequence. Source: rule R-9."""
        return attrs.evolve(
            self,
            archives=tuple(attrs.evolve(archive, offers=()) for archive in self.archives or ()),
            published=self.published.astimezone(UTC),
            changed=None,
            poll_s=None,
            title=None,
            author=None,
            message=None,
        )

    @classmethod
    def _cross_rules(cls, sound: Mapping[str, Any]) -> Iterator[Issue]:
        if sound.get("replacement") and not sound.get("closed", False):
            yield Issue("replacement", "only a closed stream has one")
        names = (archive.name for archive in sound.get("archives") or ())
        yield from clashes(names, "archives[{index}].name")


@attrs.frozen(kw_only=True)
class Package(Value):
    """Texts and defaults of a package, and its streams by their names.

    Attributes:
        poll_s: Default for its streams, seconds.
        offers: Templates of the offers of archives that are published.
    """

    title: str | None = ruled(optional(text("title")), default=None)
    summary: str | None = ruled(optional(text("summary")), default=None)
    homepage: str | None = ruled(optional(_url_rule), default=None)
    poll_s: int | None = ruled(optional(_integer(1, "poll")), default=None)
    offers: tuple[Offer, ...] = ruled(several(Offer, "offers"), default=())
    streams: Mapping[str, Stream] = ruled(
        instance(MappingProxyType, "a table"), default=_NOTHING, converter=_frozen_mapping
    )


@attrs.frozen(kw_only=True)
class Repository(Value):
    """Everything one server offers: packages by their names.

    Attributes:
        format: Version of the on-disk format.
        requires: Features without which a server must not serve it.
    """

    format: int = ruled(_format)
    title: str | None = ruled(optional(text("title")), default=None)
    requires: tuple[str, ...] = ruled(_requires, default=())
    packages: Mapping[str, Package] = ruled(
        instance(MappingProxyType, "a table"), default=_NOTHING, converter=_frozen_mapping
    )


@attrs.frozen(kw_only=True)
class PackageEntry(Value):
    """A package in the list of packages; its title is "" if the package has none."""

    title: str = ruled(lambda value: None if value == "" else text("title")(value))


@attrs.frozen(kw_only=True)
class StreamEntry(Value):
    """A stream in the list of its package."""

    version: str = ruled(text("text"))
    sequence: int = ruled(_integer(1, "sequence"))
    closed: bool = ruled(instance(bool, "a boolean"))
