"""Values in the formats: round trips, located errors, what is skipped, and selections."""

from __future__ import annotations

from datetime import UTC, datetime
from typing import Any

import attrs
import cbor2
import pytest
from hypothesis import given
from hypothesis import strategies as st

from netota_coap.encoding.codecs import Format
from netota_coap.encoding.documents import (
    MEDIA_TYPES,
    TABLES,
    StreamEncoder,
    decode,
    decode_list,
    decode_problem,
    encode,
    encode_list,
    encode_problem,
    selection_from_cbor,
    selection_from_query,
    selection_to_cbor,
    selection_to_query,
)
from netota_coap.errors import InvalidDataError
from netota_coap.model.selection import Selection
from netota_coap.model.values import (
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
)
from tests.support import cddl, strategies

ENVELOPE = {1: 42, 2: 1, 3: bytes(32)}
STREAM = {1: "1", 2: 1, 6: 0}
SEQUENCE = "sequence: must be from 1 to 4294967295, not "
SPELLING = "must consist of letters, digits, '.', '_', '+', '-' and start with a letter or digit"


def issues(cls: type[Value], document: bytes | str, fmt: Format) -> list[str]:
    with pytest.raises(InvalidDataError) as caught:
        decode(cls, document.encode() if isinstance(document, str) else document, fmt)
    return [str(issue) for issue in caught.value.issues]


# ----------------------------------------------------------------------------------------------
# Round trips

VALUES = {
    "offer": strategies.offers,
    "envelope": strategies.envelopes,
    "content": strategies.contents,
    "archive": strategies.archives,
    "stream": strategies.streams(),
}


@pytest.mark.parametrize("rule", VALUES)
@given(data=st.data())
def test_cbor_round_trip(rule: str, data: st.DataObject) -> None:
    """CBOR is deterministic, as wire.cddl says, and read as what was written."""
    value = data.draw(VALUES[rule])
    payload = encode(value, Format.CBOR)
    assert value == decode(type(value), payload, Format.CBOR)
    assert payload == cbor2.dumps(cbor2.loads(payload), canonical=True)
    cddl.validate(payload, rule)


@pytest.mark.parametrize("rule", VALUES)
@given(data=st.data())
def test_json_round_trip(rule: str, data: st.DataObject) -> None:
    """JSON is read as what was written."""
    value = data.draw(VALUES[rule])
    assert value == decode(type(value), encode(value, Format.JSON), Format.JSON)


@given(strategies.streams(), strategies.archive_lists, st.data())
def test_encoder_of_a_stream(
    stream: Stream, others: tuple[Archive, ...], data: st.DataObject
) -> None:
    """A prepared stream has the bytes that it has with any archives, its own or others."""
    chosen = data.draw(st.lists(st.sampled_from((*(stream.archives or ()), *others, None))))
    unique = {a.name.casefold(): a for a in chosen if a}
    archives = tuple(unique.values())
    expected = encode(attrs.evolve(stream, archives=archives), Format.CBOR)
    assert expected == StreamEncoder(stream).encode(archives)


@given(strategies.streams(on_disk=True))
def test_toml_round_trip(stream: Stream) -> None:
    """A stream's file is read as what was written."""
    assert stream == decode(Stream, encode(stream, Format.TOML), Format.TOML)


@given(st.one_of(strategies.packages, strategies.repositories))
def test_toml_round_trip_without_members(value: Any) -> None:
    """A package's and a repository's file have all but what is in files of its own."""
    members = "streams" if type(value) is Package else "packages"
    given_fields = {members: getattr(value, members)}
    assert value == decode(type(value), encode(value, Format.TOML), Format.TOML, **given_fields)


@pytest.mark.parametrize(
    ("rule", "cls", "lists"),
    [
        ("packages", PackageEntry, strategies.package_lists),
        ("streams", StreamEntry, strategies.stream_lists),
    ],
)
@given(data=st.data())
def test_list_round_trip(rule: str, cls: type[Value], lists: Any, data: st.DataObject) -> None:
    """Lists are deterministic, as wire.cddl says, and read as what was written."""
    entries = data.draw(lists)
    payload = encode_list(entries, Format.CBOR)
    assert entries == decode_list(cls, payload, Format.CBOR)
    assert payload == cbor2.dumps(cbor2.loads(payload), canonical=True)
    cddl.validate(payload, rule)
    assert entries == decode_list(cls, encode_list(entries, Format.JSON), Format.JSON)


@given(strategies.selections)
def test_selection_round_trip(selection: Selection) -> None:
    """A selection is the same as a map and as a query."""
    assert selection == selection_from_query(selection_to_query(selection))
    payload = selection_to_cbor(selection)
    cddl.validate(payload, "selection")
    assert payload == cbor2.dumps(cbor2.loads(payload), canonical=True)
    if len(payload) <= 256:
        assert selection == selection_from_cbor(payload)


def test_keys() -> None:
    """The keys are those of DESIGN."""
    expected = {
        Stream: "version sequence archives closed replacement published poll_s more",
        Archive: "name envelope content offers",
        Envelope: "type size sha256",
        Content: "type arch machine debug filesystem compression",
    }
    for cls, names in expected.items():
        keys = {field.key: field.name for field in TABLES[cls].fields if field.key is not None}
        assert dict(enumerate(names.split(), start=1)) == keys


@pytest.mark.parametrize(("name", "number"), MEDIA_TYPES.items())
def test_media_types(name: str, number: int) -> None:
    """A media type of the table is a number in CBOR, text in JSON."""
    envelope = Envelope(type=name, size=1, sha256=bytes(32))
    assert number == cbor2.loads(encode(envelope, Format.CBOR))[1]
    assert envelope == decode(Envelope, cbor2.dumps(ENVELOPE | {1: name}), Format.CBOR)
    assert f'"{name}"'.encode() in encode(envelope, Format.JSON)


# ----------------------------------------------------------------------------------------------
# Located errors


def test_everything_at_once_in_toml() -> None:
    """Everything that is wrong with a file is listed, with its place."""
    document = """
        version = ""
        sequence = 0
        published = 2026-11-20T09:30:00
        colour = "red"
        x-colour = "red"
        [[archives]]
        name = ".."
        [archives.envelope]
        type = "application/x"
        size = -1
        sha256 = "00"
        [archives.content]
        arch = 1
        head = "x"
        [[archives.offers]]
        url = "b"
        metric = 65536
        [[archives.offers]]
        url = "/b"
        [[archives]]
        """
    expected = [
        (
            "colour: unknown key; a stream has version, sequence, published, changed, "
            "closed, replacement, removed, poll_s, title, author, message, archives"
        ),
        "archives[0].envelope.sha256: must be 64 hexadecimal digits",
        "archives[0].envelope.size: must be from 0 to 9223372036854775807, not -1",
        "archives[0].content.arch: must be text, not an integer",
        "archives[0].content.head: is reserved",
        "archives[0].offers[0].url: must be a URL with a scheme, or a path that begins with '/'",
        "archives[0].offers[0].metric: must be from 0 to 65535, not 65536",
        "archives[0].offers[1].metric: missing",
        f"archives[0].name: {SPELLING}",
        "archives[1].name: missing",
        "archives[1].envelope: missing",
        "version: must not be empty",
        f"{SEQUENCE}0",
        "published: must have an offset from UTC, as in 2026-11-20T09:30:00Z",
    ]
    assert sorted(expected) == sorted(issues(Stream, document, Format.TOML))


def test_everything_at_once_in_cbor() -> None:
    """Errors of CBOR name the fields, not the keys."""
    archive = {1: "a/b", 2: {1: 43, 2: "1", 3: b""}, 3: {4: 1, "a": None}, 4: [[0], {}, 1]}
    document = cbor2.dumps({1: 5, 2: 0, 3: [archive, 7], 4: 1, 5: ["a", "b", "c"], 6: "x", 7: 0})
    expected = [
        "archives[0].envelope.type: 43 is not a Content-Format number of the table in wire.md",
        "archives[0].envelope.size: must be an integer, not text",
        "archives[0].envelope.sha256: must be 32 bytes long, not 0",
        "archives[0].content.debug: must be a boolean, not an integer",
        "archives[0].content.a: must be text, an integer or a boolean, not null",
        "archives[0].offers[0].url: missing",
        "archives[0].offers[1]: an offer must be an array",
        "archives[0].offers[2]: an offer must be an array",
        f"archives[0].name: {SPELLING}",
        "archives[1]: an archive must be a table",
        "closed: must be a boolean, not an integer",
        "poll_s: must be from 1 to 4294967295, not 0",
        "published: must be epoch seconds",
        "replacement: must be a package and a stream",
        f"{SEQUENCE}0",
        "version: must be text, not an integer",
    ]
    assert sorted(expected) == sorted(issues(Stream, document, Format.CBOR))


@pytest.mark.parametrize(
    ("cls", "document", "expected"),
    [
        (Stream, "", ["version: missing", "sequence: missing", "published: missing",
                      "archives: missing"]),
        (Stream, "archives = 1", ["archives: must be an array", "version: missing",
                                  "sequence: missing", "published: missing"]),
        (Repository, "", ["format: missing"]),
        (Repository, "format = 2", ["format: must be 1; this program reads no other"]),
        (Repository, "format = 1.0", ["format: must be an integer, not a floating-point number"]),
        (Repository, 'format = 1\nrequires = ["x"]',
         ["requires: asks for features that this program lacks: x"]),
        (Repository, "format = 1\npackages = 1",
         ["packages: unknown key; a repository has format, title, requires"]),
        (Package, "offers = [1]", ["offers[0]: an offer must be a table"]),
        (Content, "a = 1.5\nb = [1]\nname = 'x'",
         ["a: must be text, an integer or a boolean, not a floating-point number",
          "b: must be text, an integer or a boolean, not an array",
          "name: is reserved"]),
        (Content, f"a = 0x{'f' * 5_000}",
         ["a: must be from -9223372036854775807 to 9223372036854775807, not one of 20000 bits"]),
        (Content, '"" = 1\n"a/b" = 1', [": must not be empty"[2:], f"a/b: {SPELLING}"]),
    ],
)  # fmt: skip
def test_bad_toml(cls: type[Value], document: str, expected: list[str]) -> None:
    """What a file breaks is told."""
    assert expected == issues(cls, document, Format.TOML)


@pytest.mark.parametrize(
    ("field", "expected"),
    [
        ('"published":"2026-11-20"', "must be an RFC 3339 time"),
        ('"published":"2026-W47-5T09:30:00Z"', "must be an RFC 3339 time"),
        ('"published":"20261120T093000Z"', "must be an RFC 3339 time"),
        ('"published":"2026-11-20 09:30:00Z"', "must be an RFC 3339 time"),
        ('"published":"2026-11-20T09:30:00+00:00:00.5"', "must be an RFC 3339 time"),
        ('"published":"2026-11-31T09:30:00Z"', "must be an RFC 3339 time"),
        ('"published":"٢٠٢٦-11-20T09:30:00Z"', "must be an RFC 3339 time"),
        ('"published":1', "must be an RFC 3339 time"),
        ('"published":"2026-11-20T09:30:00.5Z"', "must be in whole seconds"),
        (
            '"published":"2026-11-20T09:30:00"',
            "must have an offset from UTC, as in 2026-11-20T09:30:00Z",
        ),
    ],
)
def test_json_times(field: str, expected: str) -> None:
    """Times of JSON are those of RFC 3339."""
    document = f'{{"version":"1","sequence":1,{field}}}'
    assert [f"published: {expected}"] == issues(Stream, document, Format.JSON)


@pytest.mark.parametrize(
    ("digest", "valid"),
    [
        ("0" * 64, True),
        ("aB" * 32, True),
        ("0" * 63, False),
        ("0" * 65, False),
        ("0" * 63 + "g", False),
        (" " + "0" * 63, False),
        ("0 " * 32, False),
        ("٣" * 64, False),
    ],
)
def test_hexadecimal_digests(digest: str, valid: bool) -> None:
    """A digest of JSON is 64 hexadecimal digits and nothing else."""
    document = f'{{"type":"x","size":1,"sha256":"{digest}"}}'
    if valid:
        expected = bytes.fromhex(digest)
        assert expected == decode(Envelope, document.encode(), Format.JSON).sha256
    else:
        expected_issues = ["sha256: must be 64 hexadecimal digits"]
        assert expected_issues == issues(Envelope, document, Format.JSON)


@pytest.mark.parametrize("target", ['"a"', '"a/b/c"', '["a","b"]', "1"])
def test_replacements(target: str) -> None:
    """A replacement of JSON is text with one slash."""
    document = (
        '{"version":"1","sequence":1,"published":"2026-11-20T09:30:00Z","closed":true,'
        f'"replacement":{target}}}'
    )
    expected = ['replacement: must be text as in "package/stream"']
    assert expected == issues(Stream, document, Format.JSON)


# ----------------------------------------------------------------------------------------------
# What is skipped, and what is not


@pytest.mark.parametrize("extra", [{9: 1}, {-1: "x"}, {"x": 1}, {b"x": 1}, {None: 1}, {1.5: 1},
                                   {(1,): 1}, {99: cbor2.CBORTag(2, b"x")}, {"x-a": [{}]},
                                   {99: float("nan")}])  # fmt: skip
def test_unknown_keys_of_cbor(extra: dict[Any, Any]) -> None:
    """Keys of CBOR that are not known are skipped, whatever is under them."""
    stream = decode(Stream, cbor2.dumps(STREAM), Format.CBOR)
    assert stream == decode(Stream, cbor2.dumps(STREAM | extra), Format.CBOR)


def test_unknown_elements_of_cbor() -> None:
    """Elements of an array beyond the known ones are skipped."""
    expected = Offer(url="/b", metric=1)
    assert expected == decode(Offer, cbor2.dumps([1, "/b", {}, 7]), Format.CBOR)
    entries = {"a": PackageEntry(title="x")}
    assert entries == decode_list(PackageEntry, cbor2.dumps({"a": ["x", 1]}), Format.CBOR)


def test_true_is_no_key() -> None:
    """True is not 1, nor is 1.0."""
    document = cbor2.dumps({True: "1", 2.0: 1, 6: 0})
    assert issues(Stream, document, Format.CBOR) == ["version: missing", "sequence: missing"]


@pytest.mark.parametrize("key", STREAM)
@pytest.mark.parametrize("tag", [0, 1, 2, 55799, 99])
def test_tags_under_known_keys(key: int, tag: int) -> None:
    """What is tagged is not what is asked for."""
    value = b"x" if tag == 2 else STREAM[key]
    found = issues(Stream, cbor2.dumps(STREAM | {key: cbor2.CBORTag(tag, value)}), Format.CBOR)
    assert len(found) == 1
    assert found[0].startswith({1: "version", 2: "sequence", 6: "published"}[key])


@pytest.mark.parametrize(
    ("key", "value", "expected"),
    [
        (2, 2**32, f"{SEQUENCE}4294967296"),
        (2, 1.0, "sequence: must be an integer, not a floating-point number"),
        (2, float("nan"), "sequence: must be an integer, not a floating-point number"),
        (2, True, "sequence: must be an integer, not a boolean"),
        (6, -1, "published: must not be before 1970"),
        (6, 2**60, "published: must be epoch seconds"),
        (6, True, "published: must be epoch seconds"),
        (6, 0.0, "published: must be epoch seconds"),
        (3, {}, "archives: must be an array"),
        (3, None, "archives: must not be null; leave the key out"),
        (5, "a/b", "replacement: must be a package and a stream"),
        (8, 1, "more: must be a boolean, not an integer"),
    ],
)
def test_wrong_types_of_cbor(key: int, value: Any, expected: str) -> None:
    """A known key with a value of another type is an error."""
    assert [expected] == issues(Stream, cbor2.dumps(STREAM | {key: value}), Format.CBOR)


@pytest.mark.parametrize("fmt", [Format.CBOR, Format.JSON])
@pytest.mark.parametrize("plain", [[], 1, "x", None, True])
def test_no_map(fmt: Format, plain: Any) -> None:
    """A stream is a map."""
    document = cbor2.dumps(plain) if fmt is Format.CBOR else str(plain).lower()
    if fmt is Format.JSON and plain in ("x", None):
        document = '"x"' if plain else "null"
    assert issues(Stream, document, fmt) == ["a stream must be a table"]


@pytest.mark.parametrize(
    ("plain", "expected"),
    [
        ([], ["must be a table of names"]),
        ({1: ["x"]}, ["must be a table of names"]),
        ({"a": "x", "b": [1], "c": []},
         ["a: a package must be an array", "b.title: must be text, not an integer",
          "c.title: missing"]),
        ({"..": ["x"]}, [f"..: {SPELLING}"]),
        ({"a/b": ["x"], "é": 1},
         [f"a/b: {SPELLING}", f"é: {SPELLING}", "é: a package must be an array"]),
        ({"a": [""], "A": [""]}, ["'A' differs from 'a' only in case"]),
    ],
)  # fmt: skip
def test_bad_lists(plain: Any, expected: list[str]) -> None:
    """A list is a map of names that go together."""
    with pytest.raises(InvalidDataError) as caught:
        decode_list(PackageEntry, cbor2.dumps(plain), Format.CBOR)
    actual = [str(issue) for issue in caught.value.issues]
    assert expected == [text.removeprefix("A: ") for text in actual]


# ----------------------------------------------------------------------------------------------
# Selections and problems


@pytest.mark.parametrize(
    ("plain", "expected"),
    [
        ({}, {}),
        ({1: "t", 2: "a", 3: "m", 4: True, 5: "f", 6: "c", 7: "coap", "x": 1},
         {"type": "t", "arch": "a", "machine": "m", "debug": "true", "filesystem": "f",
          "compression": "c", "scheme": "coap", "x": "1"}),
        ({2: ["b", "a"], 7: ["HTTPS", "coap"]}, {"arch": ["b", "a"], "scheme": ["https", "coap"]}),
        ({2: [], 0: "x", 8: "y", -1: 1, True: "z", "head": "1", b"x": 1}, {}),
        ({"flash": [512, "1024", True]}, {"flash": ["512", "1024", "true"]}),
        ({99: cbor2.CBORTag(2, b"x")}, {}),
    ],
)  # fmt: skip
def test_selections(plain: Any, expected: dict[str, Any]) -> None:
    """A selection has a value or several per attribute; keys that are not known are skipped."""
    assert Selection.of(expected) == selection_from_cbor(cbor2.dumps(plain))


@pytest.mark.parametrize(
    ("payload", "expected"),
    [
        (cbor2.dumps([]), ["a selection must be a map"]),
        (cbor2.dumps({2: None, "a": [["x"]], 7: {}, 3: 1.5, 1: b"x", 4: cbor2.CBORTag(2, b"x")}),
         [f"{name}: must be text, an integer, a boolean or an array of these"
          for name in ("arch", "a", "scheme", "machine", "type", "debug")]),
        (bytes(257), ["must be at most 256 bytes long, not 257"]),
        (b"\xa0\x00", ["1 bytes follow the end of the CBOR item"]),
    ],
)  # fmt: skip
def test_bad_selections(payload: bytes, expected: list[str]) -> None:
    """What is wrong with a selection is told all at once."""
    with pytest.raises(InvalidDataError) as caught:
        selection_from_cbor(payload)
    assert expected == [str(issue) for issue in caught.value.issues]


def test_longest_selection() -> None:
    """256 bytes are read."""
    payload = cbor2.dumps({"a": "x" * 251})
    assert len(payload) == 256
    assert selection_from_cbor(payload).attributes[0][1][0] == "x" * 251


@pytest.mark.parametrize(
    ("query", "expected"),
    [
        ([], {}),
        (["head", "full", "x", ""], {}),
        (["arch=arm", "arch=x86", "a=b=c", "e="], {"arch": ["arm", "x86"], "a": "b=c", "e": ""}),
        (["scheme=COAP"], {"scheme": "coap"}),
        (["sequence=7", "name=x", "head=1"], {}),
    ],
)
def test_queries(query: list[str], expected: dict[str, Any]) -> None:
    """A query says `key=value`; what has no `=` is ignored."""
    assert Selection.of(expected) == selection_from_query(query)


@given(st.text(min_size=1), st.text())
def test_problems(title: str, detail: str) -> None:
    """Problem details are as wire.cddl says; the detail is read, or else the title."""
    payload = encode_problem(title, detail)
    cddl.validate(payload, "problem")
    assert (detail or title) == decode_problem(payload)


@pytest.mark.parametrize("payload", [b"", b"\xff", b"\xa0", b"\x80", b"\xa1\x20\x01", b"x" * 99])
def test_no_problems(payload: bytes) -> None:
    """What is no problem details has nothing to say."""
    assert decode_problem(payload) == ""


# ----------------------------------------------------------------------------------------------
# Any bytes

_STREAM = Stream(
    version="1",
    sequence=1,
    published=datetime(2026, 11, 20, tzinfo=UTC),
    closed=True,
    replacement=("p", "s"),
    poll_s=60,
    archives=(
        Archive(
            name="a",
            envelope=Envelope(type="application/cbor", size=1, sha256=bytes(32)),
            content=Content(arch="arm", debug=False, attributes={"a": 1, "b": "x"}),
            offers=(Offer(url="/b/x", metric=1),),
        ),
    ),
)


@st.composite
def mutated(draw: st.DrawFn, data: bytes) -> bytes:
    """The bytes with one to four places changed."""
    result = bytearray(data)
    for _ in range(draw(st.integers(1, 4))):
        at = draw(st.integers(0, len(result)))
        until = draw(st.integers(at, min(at + 4, len(result))))
        result[at:until] = draw(st.binary(max_size=3))
    return bytes(result)


# Package and repository, which are on the disk only, are left out.
_ON_THE_WIRE = [cls for cls in TABLES if cls not in (Package, Repository)]


@given(st.data(), st.sampled_from(Format), st.sampled_from(_ON_THE_WIRE))
def test_any_bytes(data: st.DataObject, fmt: Format, cls: type[Value]) -> None:
    """Whatever is decoded gives a value of the model or an error of ours."""
    document = data.draw(st.one_of(st.binary(max_size=64), mutated(encode(_STREAM, fmt))))
    for subject in (cls, Stream):
        try:
            value = decode(subject, document, fmt)
        except InvalidDataError as error:
            assert error.issues
        else:
            assert type(value) is subject
            encode(value, fmt)
    try:
        decode_list(StreamEntry, document, fmt)
        selection_from_cbor(document)
    except InvalidDataError as error:
        assert error.issues
    decode_problem(document)


@given(
    st.recursive(
        st.sampled_from((None, True, 1, 2, -1, 2**64 - 1, 1.5, "a", "", b"x", bytes(32), "/b")),
        lambda inner: (
            st.lists(inner, max_size=3)
            | st.dictionaries(
                st.one_of(st.integers(0, 9), st.sampled_from(("a", "x-a", ""))), inner
            )
        ),
        max_leaves=12,
    ),
    st.sampled_from(_ON_THE_WIRE),
)
def test_any_item(plain: Any, cls: type[Value]) -> None:
    """Whatever well-formed item is decoded gives a value of the model or an error of ours."""
    try:
        assert type(decode(cls, cbor2.dumps(plain), Format.CBOR)) is cls
    except InvalidDataError as error:
        assert error.issues


def test_unknown_keys_of_json_are_skipped() -> None:
    """What a newer server says besides is skipped, as in CBOR."""
    known = encode(_STREAM, Format.JSON)
    more = known.replace(b"{", b'{"later":{"a":[1]},', 1)

    assert decode(Stream, more, Format.JSON) == _STREAM
