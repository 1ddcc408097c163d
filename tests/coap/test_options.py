"""coap/options.py: bytes of options, what is known of them, blocks."""

from __future__ import annotations

import pytest
from aiocoap.message import Message
from aiocoap.options import Options
from hypothesis import given
from hypothesis import strategies as st

from netota_coap.coap import options as coap
from netota_coap.coap.options import Block

VECTORS = [
    ((), b"", ""),
    (((11, b"p"),), b"", "b170"),
    (((4, b"12345678"), (12, b"\x3c"), (14, b"\x3c")), b"x", "483132333435363738813c213cff78"),
    (((6, b""), (11, b"p"), (11, b"q")), b"", "6051700171"),
    (((60, b"\x01"), (258, b"")), b"", "d12f01d0b9"),
    (((65_535, b""),), b"", "e0fef2"),
    (((15, b"a" * 13),), b"", "dd0200" + "61" * 13),
    (((15, b"a" * 269),), b"", "de020000" + "61" * 269),
]


@pytest.mark.parametrize(("options", "payload", "data"), VECTORS)
def test_vectors(options: tuple[coap.Option, ...], payload: bytes, data: str) -> None:
    """Options have the same bytes both ways."""
    assert bytes.fromhex(data) == coap.encode(options, payload)
    assert (options, payload) == coap.decode(bytes.fromhex(data))


@given(
    st.lists(st.tuples(st.integers(0, 65_535), st.binary(max_size=300)), max_size=8),
    st.binary(max_size=20),
)
def test_round_trip(options: list[coap.Option], payload: bytes) -> None:
    """Any options come back, in the order of their numbers."""
    expected = tuple(sorted(options, key=lambda option: option[0])), payload

    assert expected == coap.decode(coap.encode(options, payload))


@given(st.lists(st.sampled_from([b"p", b"sensor-node", b"x" * 20, b"y" * 255]), max_size=5))
def test_same_bytes_as_aiocoap(path: list[bytes]) -> None:
    """Another implementation writes the same bytes."""
    theirs = Message(uri_path=[part.decode() for part in path]).opt.encode()

    assert theirs == coap.encode((coap.URI_PATH, part) for part in path)


def test_read_by_aiocoap() -> None:
    """Another implementation reads our bytes."""
    theirs = Options()
    payload = theirs.decode(coap.encode([(12, b"\x3c"), (23, b"\x14"), (28, b"\x64")], b"data"))

    assert (payload, theirs.content_format, theirs.size2) == (b"data", 60, 100)


@pytest.mark.parametrize(
    "data", ["ff", "f0", "0f", "d1", "e100", "b5616161", "13ff", "e0fff2", "b170ff"]
)
def test_malformed(data: str) -> None:
    """What is cut off, reserved or beyond the last number is refused."""
    with pytest.raises(ValueError, match=r"option|payload"):
        coap.decode(bytes.fromhex(data))


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ([(11, b"p"), (11, b"q"), (15, b"a"), (15, b"b")], None),
        ([(2, b"anything"), (252, b""), (258, b"\x01" * 20)], None),
        ([(4, b"123456789")], None),
        ([(1, b"")], "option 1 is critical and unknown"),
        ([(5, b"")], "option 5 is critical and unknown"),
        ([(65, b"")], "option 65 is critical and unknown"),
        ([(17, b"\x3c"), (17, b"\x3c")], "Accept is repeated"),
        ([(3, b"")], "Uri-Host has 0 bytes"),
        ([(17, b"123")], "Accept has 3 bytes"),
        ([(23, b"1234")], "Block2 has 4 bytes"),
        ([(11, b"\xff")], "Uri-Path is not UTF-8"),
    ],
)
def test_refusal(options: list[coap.Option], reason: str | None) -> None:
    """Critical options must be known, sane and single; elective ones never matter."""
    assert reason == coap.refusal(options)


@pytest.mark.parametrize(
    ("value", "block"),
    [
        ("", Block(0, False, 0)),
        ("04", Block(0, False, 4)),
        ("1e", Block(1, True, 6)),
        ("fffff6", Block(0xFFFFF, False, 6)),
    ],
)
def test_block(value: str, block: Block) -> None:
    """Block options have the same bytes both ways."""
    assert block == Block.decode(bytes.fromhex(value))
    assert bytes.fromhex(value) == block.encode()


def test_reserved_block_size() -> None:
    """Block size exponent 7 is for TCP."""
    with pytest.raises(ValueError, match="exponent 7"):
        Block.decode(b"\x07")
