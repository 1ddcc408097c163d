"""Strict reading of the three formats, to plain data."""

from __future__ import annotations

import time
from typing import Any

import cbor2
import pytest
from hypothesis import given
from hypothesis import strategies as st

from netota_coap.encoding.codecs import Format, dump, load
from netota_coap.errors import InvalidDataError

TOO_LONG = "must be at most {bound} bytes long, not {length}"


def reason(data: bytes, fmt: Format, limit: str = "document") -> str:
    with pytest.raises(InvalidDataError) as caught:
        load(data, fmt, limit)
    assert [issue.place for issue in caught.value.issues] == [""]
    return caught.value.issues[0].reason


@pytest.mark.parametrize(
    ("hexadecimal", "expected"),
    [
        ("", "is not valid CBOR: "),
        ("a1", "is not valid CBOR: "),
        ("a101", "is not valid CBOR: "),
        ("a000", "1 bytes follow the end of the CBOR item"),
        ("a0f6f6", "2 bytes follow the end of the CBOR item"),
        ("bf0101ff", "is not valid CBOR: "),  # map of indefinite length
        ("9f01ff", "is not valid CBOR: "),  # array
        ("7f6161ff", "is not valid CBOR: "),  # text
        ("5f4161ff", "is not valid CBOR: "),  # bytes
        ("a1019fff", "is not valid CBOR: "),  # array inside
        ("ff", "is not valid CBOR: "),
        ("1c", "is not valid CBOR: "),
        ("fc", "is not valid CBOR: "),
        ("f818", "is not valid CBOR: "),  # simple value below 32 in two bytes
        ("a201010102", "is not valid CBOR: error decoding map: Duplicate map key: 1"),
        ("a2616101616102", "is not valid CBOR: error decoding map: Duplicate map key: 'a'"),
        ("a20101180102", "is not valid CBOR: error decoding map: Dup"),
        ("a1f6a201010102", "is not valid CBOR: "),  # inside
        ("a20101f502", "is not valid CBOR: error decoding map: Duplicate map key: True"),
        ("61ff", "is not valid CBOR: "),  # no UTF-8
        ("63eda080", "is not valid CBOR: "),  # surrogate
        ("81" * 17 + "00", "is not valid CBOR: maximum container nesting depth"),
        ("a101" * 17 + "00", "is not valid CBOR: maximum container nesting depth"),
        ("c1" * 2000 + "00", "is not valid CBOR: "),
        ("9bffffffffffffffff", "is not valid CBOR: "),
        ("bbffffffffffffffff", "is not valid CBOR: "),
        ("5bffffffffffffffff", "is not valid CBOR: "),
        ("7b7fffffffffffffff", "is not valid CBOR: "),
    ],
)
def test_bad_cbor(hexadecimal: str, expected: str) -> None:
    """CBOR is one well-formed item of definite lengths, with each key once."""
    assert reason(bytes.fromhex(hexadecimal), Format.CBOR).startswith(expected)


@pytest.mark.parametrize(
    "tagged",
    [
        "c06161",  # time, and no valid one
        "c1fb7e37e43c8800759c",  # time out of bounds
        "c249010000000000000000",  # bignum
        "c349010000000000000000",
        "c48201c249010000000000000000",  # fraction
        "c5820103",
        "d81c81d81d00",  # shared, cyclic
        "d8238128",  # regular expression of an array
        "d823612a",  # one that does not compile
        "d8254100",  # UUID of one byte
        "d90102820101",  # set
        "d901046161",  # address
        "d9010081d81900",  # string reference without a string
        "d9d9f7a0",
        "d9ffff00",
    ],
)
def test_tags(tagged: str) -> None:
    """A tag is neither understood nor an error, but never what a known key wants."""
    plain = load(bytes.fromhex("a118ff" + tagged), Format.CBOR)
    assert list(plain) == [0xFF]
    assert type(plain[0xFF]) not in (str, bytes, int, bool, float, list, dict)


def test_depth() -> None:
    """16 levels are read."""
    assert type(load(bytes.fromhex("81" * 16 + "00"), Format.CBOR)) is list


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("", "is not valid JSON: "),
        ("{", "is not valid JSON: "),
        ("{}{}", "is not valid JSON: Extra data"),
        ("{} x", "is not valid JSON: Extra data"),
        ('{"a":1,"a":1}', "is not valid JSON: key 'a' appears twice"),
        ('{"a":1,"\\u0061":1}', "is not valid JSON: key 'a' appears twice"),
        ('{"x":{"b":1,"a":1,"a":2,"b":3}}', "is not valid JSON: key 'a' appears twice"),
        ("NaN", "is not valid JSON: NaN is not JSON"),
        ('{"a":-Infinity}', "is not valid JSON: -Infinity is not JSON"),
        ("{'a':1}", "is not valid JSON: "),
        ('{"a":01}', "is not valid JSON: "),
        ('{"a":1,}', "is not valid JSON: "),
        ('"\n"', "is not valid JSON: "),
        ("\ufeff{}", "is not valid JSON: "),
        ("9" * 5_000, "is not valid JSON: "),
        ("[" * 100_000, "is not valid JSON: "),
        ('{"a":' * 100_000, "is not valid JSON: "),
    ],
)
def test_bad_json(text: str, expected: str) -> None:
    """JSON is RFC 8259's, with each key once."""
    assert reason(text.encode(), Format.JSON).startswith(expected)


@pytest.mark.parametrize(
    "text",
    [
        "a",
        "a =",
        "a = 1\na = 1",
        "[a]\n[a]",
        "a.b = 1\n[a]\nb = 2",
        "a = 1 b = 2",
        "a = 01",
        "a = 2026-13-01",
        'a = "\x00"',
        "a = '''",
        "[[a]]\n[a]",
        "a = " + "9" * 5_000,
        "a = " + "[" * 100_000,
        "a = " + "{a=" * 100_000,
        ".".join("a" * 100_000) + " = 1",
        "\ufeff=1",
    ],
)
def test_bad_toml(text: str) -> None:
    """TOML is TOML 1.0's."""
    assert reason(text.encode(), Format.TOML).startswith("is not valid TOML: ")


@pytest.mark.parametrize("fmt", [Format.TOML, Format.JSON])
@pytest.mark.parametrize("data", [b"\xff", b'a = "\xc3"', b"\xed\xa0\x80", b"\xc0\x80"])
def test_no_utf8(data: bytes, fmt: Format) -> None:
    """Text is UTF-8."""
    assert reason(data, fmt).startswith(f"is not valid {fmt.value}: 'utf-8' codec can't decode")


@pytest.mark.parametrize("fmt", Format)
def test_length(fmt: Format) -> None:
    """A document is as long as its limit, and no longer; longer ones are not even looked at."""
    bound = 256
    filled = {
        Format.TOML: b"#" * bound,
        Format.JSON: b"{}" + b" " * (bound - 2),
        Format.CBOR: b"\x58\xfe" + bytes(bound - 2),
    }[fmt]
    load(filled, fmt, "selection")
    expected = TOO_LONG.format(bound=bound, length=bound + 1)
    assert expected == reason(filled + b"#", fmt, "selection")
    expected = TOO_LONG.format(bound=2**23, length=2**23 + 1)
    assert expected == reason(bytes(2**23 + 1), fmt)


def test_a_key_twice_is_found_quickly() -> None:
    """A long document with a key twice at its end does not keep anybody busy."""
    pairs = ",".join(f'"{index}":0' for index in range(50_000))
    start = time.process_time()
    reason(f'{{{pairs},"49999":0}}'.encode(), Format.JSON)
    assert time.process_time() - start < 2


def test_dump() -> None:
    """CBOR is deterministic, JSON compact, and both UTF-8."""
    plain: Any = {"é": [1, True], 256: b"x", 1: 2**40}
    expected = "a301 1b0000010000000000 190100 4178 62c3a9 8201f5"
    assert bytes.fromhex(expected) == dump(plain, Format.CBOR)
    assert '{"b":"é","a":[1,true]}'.encode() == dump({"b": "é", "a": [1, True]}, Format.JSON)
    assert 'a = "é"\n'.encode() == dump({"a": "é"}, Format.TOML)


_VALID = {
    Format.TOML: b'a = 1\nb = "x"\n[[c]]\nd = 2026-11-20T09:30:00Z\ne = {f = [1.5, true]}\n',
    Format.JSON: b'{"a":1,"b":"x","c":[{"d":null,"e":{"f":[1.5,true]}}]}',
    Format.CBOR: cbor2.dumps({1: "x", "a": [b"y", 2**32, -1, 1.5, None, True], 3: {4: [5]}}),
}


@st.composite
def mutated(draw: st.DrawFn, data: bytes) -> bytes:
    """The bytes with a few of them changed, left out, or repeated."""
    result = bytearray(data)
    for _ in range(draw(st.integers(1, 4))):
        at = draw(st.integers(0, len(result)))
        until = draw(st.integers(at, min(at + 4, len(result))))
        result[at:until] = draw(
            st.one_of(st.binary(max_size=3), st.just(bytes(result[at:until] * 2)))
        )
    return bytes(result)


@given(st.data(), st.sampled_from(Format))
def test_any_bytes(data: st.DataObject, fmt: Format) -> None:
    """Whatever is read gives plain data or an error of ours."""
    document = data.draw(st.one_of(st.binary(max_size=64), mutated(_VALID[fmt])))
    try:
        load(document, fmt)
    except InvalidDataError as error:
        assert error.issues


_JSON = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**63), 2**63 - 1) | st.text(max_size=4),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=2), inner),
    max_leaves=6,
)


@given(_JSON)
def test_round_trip(plain: Any) -> None:
    """What is written is read again, CBOR the same by another encoder."""
    assert plain == load(dump(plain, Format.CBOR), Format.CBOR)
    assert cbor2.dumps(plain, canonical=True) == dump(plain, Format.CBOR)
    assert plain == load(dump(plain, Format.JSON), Format.JSON)
