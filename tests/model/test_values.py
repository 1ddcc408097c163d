"""The rules and limits of the model, and its pure questions."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta, timezone, tzinfo
from typing import Any

import attrs
import pytest
from hypothesis import given

from netota_coap.errors import InvalidDataError, Issue
from netota_coap.model.values import (
    LIMITS,
    RESERVED_ATTRIBUTES,
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
    issues_of,
    name_rule,
)
from tests.support.strategies import archives, names, repositories, streams

NOW = datetime(2026, 11, 20, 9, 30, tzinfo=UTC)
ENVELOPE = Envelope(type="application/x", size=1, sha256=bytes(32))
ARCHIVE = Archive(name="a", envelope=ENVELOPE)
OFFER = Offer(url="coap://h/a", metric=0)

VALID: dict[type[Value], dict[str, Any]] = {
    Offer: {"url": "coap://h/a", "metric": 0},
    Envelope: {"type": "application/x", "size": 1, "sha256": bytes(32)},
    Content: {},
    Archive: {"name": "a", "envelope": ENVELOPE},
    Stream: {"version": "1", "sequence": 1, "published": NOW},
    Package: {},
    Repository: {"format": 1},
    PackageEntry: {"title": ""},
    StreamEntry: {"version": "1", "sequence": 1, "closed": False},
}

SPELLING = "must consist of letters, digits, '.', '_', '+', '-' and start with a letter or digit"
CONTROL = "must not contain control characters"
URL = "must be a URL with a scheme, or a path that begins with '/'"
INTEGER = f"must be from -{2**63 - 1} to {2**63 - 1}, not "


def too_long(bound: int, length: int) -> str:
    return f"must be at most {bound} bytes long, not {length}"


def out_of(low: int, high: int, value: int) -> str:
    return f"must be from {low} to {high}, not {value}"


def issues(cls: type[Value], **fields: Any) -> list[str]:
    """Return what is wrong with a value that is valid but for the fields given."""
    try:
        cls(**VALID[cls] | fields)
    except InvalidDataError as error:
        return [str(issue) for issue in error.issues]
    return []


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("a", None),
        ("0", None),
        ("A.b_c+d-9", None),
        ("a..b", None),
        ("a" * 32, None),
        ("a" * 33, too_long(32, 33)),
        ("a" * 300, too_long(32, 300)),
        ("", "must not be empty"),
        (".", SPELLING),
        ("..", SPELLING),
        (".a", SPELLING),
        ("-a", SPELLING),
        ("_a", SPELLING),
        ("+a", SPELLING),
        ("a/b", SPELLING),
        ("/", SPELLING),
        ("a\\b", SPELLING),
        ("a b", SPELLING),
        ("a:b", SPELLING),
        ("a%2Fb", SPELLING),
        ("a?b", SPELLING),
        ("é", SPELLING),
        ("имя", SPELLING),
        ("名前", SPELLING),
        ("٣", SPELLING),
        ("é" * 17, too_long(32, 34)),
        ("a\n", CONTROL),
        ("\x00", CONTROL),
        ("a\x1b[31m", CONTROL),
        ("\ud800", "must be valid Unicode"),
        (None, "must be text, not null"),
        (1, "must be text, not an integer"),
        (True, "must be text, not a boolean"),
        (b"a", "must be text, not bytes"),
        (["a"], "must be text, not an array"),
        ({}, "must be text, not a table"),
    ],
)
def test_names(name: object, expected: str | None) -> None:
    """A name that is refused is refused for the rule that it breaks."""
    assert expected == name_rule(name)


@given(names())
def test_names_drawn(name: str) -> None:
    """What is spelled by the rule is a name."""
    assert name_rule(name) is None


TEXT_FIELDS = [
    (Envelope, "type", 64),
    *((Content, field, 64) for field in ("type", "arch", "machine", "filesystem", "compression")),
    (Stream, "version", 64),
    (Stream, "title", 100),
    (Stream, "author", 100),
    (Stream, "message", 500),
    (Package, "title", 100),
    (Package, "summary", 500),
    (Repository, "title", 100),
    (PackageEntry, "title", 100),
    (StreamEntry, "version", 64),
]


@pytest.mark.parametrize(("cls", "field", "bound"), TEXT_FIELDS)
def test_text_limits(cls: type[Value], field: str, bound: int) -> None:
    """Text is as long as its limit in bytes of UTF-8, and no longer."""
    assert issues(cls, **{field: "x" * (bound - 1)}) == []
    assert issues(cls, **{field: "x" * bound}) == []
    assert issues(cls, **{field: "é" * (bound // 2)}) == []
    assert [f"{field}: {too_long(bound, bound + 1)}"] == issues(cls, **{field: "x" * (bound + 1)})
    expected = [f"{field}: {too_long(bound, bound + 2)}"]
    assert expected == issues(cls, **{field: "é" * (bound // 2 + 1)})


@pytest.mark.parametrize(("cls", "field", "_bound"), TEXT_FIELDS)
@pytest.mark.parametrize(
    ("value", "expected"),
    [
        *((f"a{c}b", CONTROL) for c in "\x00\t\n\r\x1b\x1f\x7f\x80\x85\x9f\u2028\u2029"),
        ("\udc80", "must be valid Unicode"),
        (1, "must be text, not an integer"),
        (1.5, "must be text, not a floating-point number"),
        (NOW, "must be text, not a time"),
        ((), "must be text, not tuple"),
    ],
)
def test_text_refused(
    cls: type[Value], field: str, _bound: int, value: object, expected: str
) -> None:
    """Text that could rewrite a terminal, and what is not text, is refused."""
    assert [f"{field}: {expected}"] == issues(cls, **{field: value})


def test_empty_text() -> None:
    """Only the title of a package's entry can be empty."""
    for cls, field, _ in TEXT_FIELDS:
        expected = [] if cls is PackageEntry else [f"{field}: must not be empty"]
        assert expected == issues(cls, **{field: ""})


@pytest.mark.parametrize(
    ("cls", "field", "low", "high"),
    [
        (Offer, "metric", 0, 65_535),
        (Envelope, "size", 0, 2**63 - 1),
        (Stream, "sequence", 1, 2**32 - 1),
        (Stream, "poll_s", 1, 2**32 - 1),
        (Package, "poll_s", 1, 2**32 - 1),
        (StreamEntry, "sequence", 1, 2**32 - 1),
    ],
)
def test_integer_limits(cls: type[Value], field: str, low: int, high: int) -> None:
    """An integer is within its bounds, both included, and no boolean."""
    for value in (low, low + 1, high - 1, high):
        assert issues(cls, **{field: value}) == []
    for value in (low - 1, high + 1, -high, 2**100):
        assert [f"{field}: {out_of(low, high, value)}"] == issues(cls, **{field: value})
    expected = [f"{field}: must be an integer, not a boolean"]
    assert expected == issues(cls, **{field: True})
    expected = [f"{field}: must be an integer, not a floating-point number"]
    assert expected == issues(cls, **{field: 1.0})
    expected = [f"{field}: must be an integer, not text"]
    assert expected == issues(cls, **{field: "1"})


def test_integer_too_long_to_print() -> None:
    """An integer that Python refuses to print is refused like any other."""
    expected = ["metric: must be from 0 to 65535, not one of 20001 bits"]
    assert expected == issues(Offer, metric=2**20_000)


@pytest.mark.parametrize(
    ("url", "expected"),
    [
        ("coap://h", None),
        ("a:b", None),
        ("coap+tcp://[2001:db8::1]:5683/b/x?y#z", None),
        ("/b/x", None),
        ("/x", None),
        ("https://h/" + "x" * 245, None),
        ("https://h/" + "x" * 246, too_long(255, 256)),
        ("/", URL),
        ("//other.example/x", URL),
        ("b/x", URL),
        ("coap:", URL),
        ("://h", URL),
        ("1a://h", URL),
        ("https://h/a b", URL),
        ("https://höst/", URL),
        ("https://h/\n", CONTROL),
        ("", "must not be empty"),
        (None, "must be text, not null"),
    ],
)
def test_urls(url: object, expected: str | None) -> None:
    """A URL has a scheme or is a path of this server, without spaces or other scripts."""
    assert [f"url: {expected}"] * (expected is not None) == issues(Offer, url=url)


@pytest.mark.parametrize(
    ("url", "expected"),
    [
        ("/b/x", "asked"),
        ("coap://h", "coap"),
        ("HTTPS://h", "https"),
        ("coap+tcp://h", "coap+tcp"),
    ],
)
def test_scheme(url: str, expected: str) -> None:
    """The scheme of an offer is its URL's in lower case, or that of the request."""
    assert expected == Offer(url=url, metric=0).scheme("asked")


@pytest.mark.parametrize(
    ("digest", "expected"),
    [
        (bytes(32), []),
        (bytes(31), ["sha256: must be 32 bytes long, not 31"]),
        (bytes(33), ["sha256: must be 32 bytes long, not 33"]),
        (b"", ["sha256: must be 32 bytes long, not 0"]),
        ("0" * 64, ["sha256: must be bytes, not text"]),
        (bytearray(32), ["sha256: must be bytes, not bytearray"]),
    ],
)
def test_digests(digest: object, expected: list[str]) -> None:
    """A digest is 32 bytes."""
    assert expected == issues(Envelope, sha256=digest)


def zone(hours: float) -> tzinfo:
    return timezone(timedelta(hours=hours))


@pytest.mark.parametrize(
    ("published", "expected"),
    [
        (datetime(1970, 1, 1, tzinfo=UTC), None),
        (datetime(1970, 1, 1, 1, tzinfo=zone(1)), None),
        (datetime(9999, 12, 31, 23, 59, 59, tzinfo=UTC), None),
        (datetime(1969, 12, 31, 23, 59, 59, tzinfo=UTC), "must not be before 1970"),
        (datetime(1970, 1, 1, tzinfo=zone(1)), "must not be before 1970"),
        (
            datetime(9999, 12, 31, 23, 59, 59, tzinfo=zone(-1)),
            "must be from 1970 to 9999 in UTC",
        ),
        (datetime(1, 1, 1, tzinfo=zone(1)), "must be from 1970 to 9999 in UTC"),
        (
            datetime(2026, 11, 20),  # noqa: DTZ001
            "must have an offset from UTC, as in 2026-11-20T09:30:00Z",
        ),
        (datetime(2026, 11, 20, microsecond=1, tzinfo=UTC), "must be in whole seconds"),
        (
            datetime(2026, 11, 20, tzinfo=timezone(timedelta(microseconds=1))),
            "must be in whole seconds",
        ),
        (NOW.date(), "must be a time, not date"),
        ("2026-11-20T09:30:00Z", "must be a time, not text"),
        (0, "must be a time, not an integer"),
    ],
)
def test_times(published: object, expected: str | None) -> None:
    """A time is of the years 1970 to 9999 in UTC, in whole seconds, with an offset."""
    expected_issues = [] if expected is None else [f"published: {expected}"]
    assert expected_issues == issues(Stream, published=published)


@pytest.mark.parametrize(
    ("cls", "field", "item", "limit"),
    [
        (Archive, "offers", OFFER, "offers"),
        (Package, "offers", OFFER, "offers"),
    ],
)
def test_several(cls: type[Value], field: str, item: Value, limit: str) -> None:
    """There are as many values in a tuple as the limit says, and no more."""
    bound = LIMITS[limit].value
    assert issues(cls, **{field: (item,) * (bound - 1)}) == []
    assert issues(cls, **{field: (item,) * bound}) == []
    expected = [f"{field}: must be at most {bound} {limit}, not {bound + 1}"]
    assert expected == issues(cls, **{field: (item,) * (bound + 1)})
    expected = [f"{field}: must be a tuple of {type(item).__name__}"]
    assert expected == issues(cls, **{field: [item]})
    assert expected == issues(cls, **{field: (item, 1)})


def test_archives_limit() -> None:
    """A stream has at most 1,000 archives."""
    many = tuple(attrs.evolve(ARCHIVE, name=f"a{index}") for index in range(1_001))
    assert issues(Stream, archives=many[:999]) == []
    assert issues(Stream, archives=many[:1_000]) == []
    assert issues(Stream, archives=many) == ["archives: must be at most 1000 archives, not 1001"]
    assert issues(Stream, archives=(OFFER,)) == ["archives: must be a tuple of Archive"]


@pytest.mark.parametrize(
    ("cls", "field", "value", "expected"),
    [
        (Archive, "envelope", None, "must be an envelope, not null"),
        (Archive, "envelope", {}, "must be an envelope, not a table"),
        (Archive, "content", None, "must be content, not null"),
        (Archive, "name", "..", SPELLING),
        (Content, "debug", 1, "must be a boolean, not an integer"),
        (Content, "debug", "true", "must be a boolean, not text"),
        (Stream, "closed", None, "must be a boolean, not null"),
        (Stream, "more", 1, "must be a boolean, not an integer"),
        (StreamEntry, "closed", 0, "must be a boolean, not an integer"),
        (Stream, "replacement", "a/b", "must be a package and a stream"),
        (Stream, "replacement", ("a",), "must be a package and a stream"),
        (Stream, "replacement", ("a", "b", "c"), "must be a package and a stream"),
        (Stream, "replacement", ("a", ".."), SPELLING),
        (Stream, "replacement", ("a" * 33, "b"), too_long(32, 33)),
        (Stream, "replacement", ("a", 1), "must be text, not an integer"),
        (Stream, "replacement", ("a", "b"), "only a closed stream has one"),
        (Repository, "format", 2, "must be 1; this program reads no other"),
        (Repository, "format", True, "must be an integer, not a boolean"),
        (Repository, "requires", "x", "must be an array of text"),
        (Repository, "requires", (1,), "must be an array of text"),
        (Repository, "requires", ("b", "a"), "asks for features that this program lacks: a, b"),
        (Package, "homepage", "example.com", URL),
    ],
)
def test_other_rules(cls: type[Value], field: str, value: object, expected: str) -> None:
    """Each field is held to its rule."""
    assert [f"{field}: {expected}"] == issues(cls, **{field: value})


@pytest.mark.parametrize(
    ("name", "value", "expected"),
    [
        ("a", "x", None),
        ("a", 0, None),
        ("a", False, None),
        ("a" * 64, "x" * 64, None),
        ("a", 2**63 - 1, None),
        ("a", -(2**63) + 1, None),
        ("a", 2**63, f"{INTEGER}{2**63}"),
        ("a", -(2**63), f"{INTEGER}{-(2**63)}"),
        ("a", "x" * 65, too_long(64, 65)),
        ("a", "", "must not be empty"),
        ("a", "\x1b", CONTROL),
        ("a", 1.5, "must be text, an integer or a boolean, not a floating-point number"),
        ("a", float("nan"), "must be text, an integer or a boolean, not a floating-point number"),
        ("a", None, "must be text, an integer or a boolean, not null"),
        ("a", ["x"], "must be text, an integer or a boolean, not an array"),
        ("a" * 65, "x", too_long(64, 65)),
        ("..", "x", SPELLING),
        ("a=b", "x", SPELLING),
        ("a&b", "x", SPELLING),
        ("ä", "x", SPELLING),
        (1, "x", "must be text, not an integer"),
        ("x-a", "x", "is reserved"),
        *((name, "x", "is reserved") for name in sorted(RESERVED_ATTRIBUTES)),
    ],
)
def test_free_attributes(name: Any, value: Any, expected: str | None) -> None:
    """A free attribute has a name that nothing else has, and a value of text, integer, boolean."""
    expected_issues = [] if expected is None else [f"{name}: {expected}"]
    assert expected_issues == issues(Content, attributes={name: value})


def test_reserved() -> None:
    """The names that are not usable are those of DESIGN."""
    content = {"type", "arch", "machine", "debug", "filesystem", "compression"}
    assert {"head", "full", "sequence", "scheme", "name"} | content == RESERVED_ATTRIBUTES


def test_number_of_free_attributes() -> None:
    """Content has at most 16 free attributes, in a table."""
    attributes = {f"a{index}": index for index in range(17)}
    assert issues(Content, attributes=attributes) == [
        "attributes: must be at most 16 free attributes"
    ]
    del attributes["a0"]
    assert issues(Content, attributes=attributes) == []


def test_all_at_once() -> None:
    """Everything that is wrong with a value is told, in the order of its fields."""
    expected = [
        "version: must not be empty",
        f"sequence: {out_of(1, 2**32 - 1, 0)}",
        "published: must be a time, not null",
        "closed: must be a boolean, not text",
        f"replacement: {SPELLING}",
        f"poll_s: {out_of(1, 2**32 - 1, 0)}",
    ]
    given_fields = {
        "poll_s": 0,
        "replacement": ("..", "b"),
        "closed": "no",
        "published": None,
        "sequence": 0,
        "version": "",
    }
    assert expected == issues(Stream, **given_fields)


def test_issues_of_some_fields() -> None:
    """Fields are judged by themselves where others are missing."""
    expected = [Issue("size", out_of(0, 2**63 - 1, -1))]
    assert expected == issues_of(Envelope, {"size": -1, "type": "x"})
    assert issues_of(Envelope, {}) == []


def test_archive_names_go_together() -> None:
    """Archives of one name, or of names that differ only in case, are not of one stream."""
    other, upper = attrs.evolve(ARCHIVE, name="b"), attrs.evolve(ARCHIVE, name="A")
    equal = attrs.evolve(ARCHIVE, name="".join(["a"]))
    assert issues(Stream, archives=(ARCHIVE, other)) == []
    expected = ["archives[1].name: 'a' appears twice"]
    assert expected == issues(Stream, archives=(ARCHIVE, equal))
    assert expected == issues(Stream, archives=(ARCHIVE, ARCHIVE))
    expected = [
        "archives[2].name: 'A' differs from 'a' only in case",
        "archives[3].name: 'b' appears twice",
    ]
    assert expected == issues(Stream, archives=(ARCHIVE, other, upper, other))


def test_clashes() -> None:
    """Names that do not go together are named."""
    assert clashes(["a", "b"]) == []
    assert [Issue("B", "'B' differs from 'b' only in case")] == clashes(["a", "b", "B"])


def test_content_says() -> None:
    """Content tells its attributes, fields and free ones alike."""
    content = Content(arch="arm", debug=False, attributes={"flash": 512})
    assert content.all() == {"arch": "arm", "debug": False, "flash": 512}
    assert tuple(content.get(name) for name in ("arch", "debug", "flash", "machine", "ram")) == (
        "arm",
        False,
        512,
        None,
        None,
    )


def test_true_is_not_one() -> None:
    """Values that a device tells apart are not equal."""
    content = Content(attributes={"a": 1})
    assert Content(attributes={"a": 1}) == content
    assert Content(attributes={"a": True}) != content


def test_values_do_not_change() -> None:
    """A value is frozen, its tables included, and independent of what it was made from."""
    attributes: dict[str, Any] = {"a": 1}
    content = Content(attributes=attributes)
    attributes["a"] = ""
    assert dict(content.attributes) == {"a": 1}
    with pytest.raises(attrs.exceptions.FrozenInstanceError):
        content.arch = "x"  # type: ignore[misc]
    with pytest.raises(TypeError):
        content.attributes["a"] = 2  # type: ignore[index]


@given(streams(on_disk=True))
def test_essence_without_trifles(stream: Stream) -> None:
    """Offers, title, author, message, poll_s and the zone of the time are not of the essence."""
    other = attrs.evolve(
        stream,
        title="t",
        author="a",
        message="m",
        poll_s=7,
        published=stream.published.astimezone(zone(2)),
        archives=tuple(attrs.evolve(archive, offers=(OFFER,)) for archive in stream.archives),
    )
    assert stream.essence() == other.essence()


@pytest.mark.parametrize(
    "change",
    [
        {"version": "2"},
        {"sequence": 2},
        {"published": NOW + timedelta(seconds=1)},
        {"closed": True},
        {"closed": True, "replacement": ("p", "s")},
        {"archives": ()},
        {"archives": (attrs.evolve(ARCHIVE, name="b"),)},
        {"archives": (attrs.evolve(ARCHIVE, content=Content(attributes={"a": True})),)},
        {"archives": (attrs.evolve(ARCHIVE, envelope=attrs.evolve(ENVELOPE, size=2)),)},
    ],
)
def test_essence(change: dict[str, Any]) -> None:
    """Everything else is."""
    archive = attrs.evolve(ARCHIVE, content=Content(attributes={"a": 1}))
    stream = Stream(version="1", sequence=1, published=NOW, archives=(archive,))
    assert stream.essence() != attrs.evolve(stream, **change).essence()


@given(archives)
def test_archives_can_be_kept_in_sets(archive: Archive) -> None:
    """Equal archives have equal hashes."""
    assert hash(archive) == hash(attrs.evolve(archive))


@pytest.mark.slow
@given(repositories)
def test_repositories_drawn(repository: Repository) -> None:
    """What the strategies draw is valid as a whole."""
    assert repository == attrs.evolve(repository)
