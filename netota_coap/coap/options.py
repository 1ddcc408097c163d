"""CoAP options: the table of known ones, their encoding, and the value of Block2.

Rules for editors of this file: a new option is a row of `KNOWN`.
Source: RFC 7252, sections 3.1 and 5.10; RFC 7959; RFC 7641.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import attrs

from netota_coap.encoding.documents import encode_problem

Option = tuple[int, bytes]
"""Number and value."""

URI_HOST = 3
ETAG = 4
OBSERVE = 6
URI_PORT = 7
URI_PATH = 11
CONTENT_FORMAT = 12
MAX_AGE = 14
URI_QUERY = 15
ACCEPT = 17
BLOCK2 = 23
BLOCK1 = 27
SIZE2 = 28
PROXY_URI = 35
PROXY_SCHEME = 39

PROBLEM_DETAILS = 257  # application/concise-problem-details+cbor
_LONGEST_DETAIL = 120  # characters: an error must not be much larger than what it answers


@attrs.frozen
class Known:
    """A row of the table of options; lengths of the value are in bytes, text is UTF-8."""

    name: str
    shortest: int
    longest: int
    repeatable: bool = False
    text: bool = False


KNOWN: Mapping[int, Known] = {
    URI_HOST: Known("Uri-Host", 1, 255, text=True),
    ETAG: Known("ETag", 1, 8, repeatable=True),
    OBSERVE: Known("Observe", 0, 3),
    URI_PORT: Known("Uri-Port", 0, 2),
    URI_PATH: Known("Uri-Path", 0, 255, repeatable=True, text=True),
    CONTENT_FORMAT: Known("Content-Format", 0, 2),
    MAX_AGE: Known("Max-Age", 0, 4),
    URI_QUERY: Known("Uri-Query", 0, 255, repeatable=True, text=True),
    ACCEPT: Known("Accept", 0, 2),
    BLOCK2: Known("Block2", 0, 3),
    BLOCK1: Known("Block1", 0, 3),
    SIZE2: Known("Size2", 0, 4),
}
"""The options of requests that have an effect. Of the others, elective ones are ignored and
critical ones refused (RFC 7252, section 5.4.1)."""


def is_critical(number: int) -> bool:
    """Tell whether a request must be refused if this option is unknown."""
    return number % 2 == 1


def fits(option: Option) -> bool:
    """Tell whether an option is known and the length of its value allowed."""
    known = KNOWN.get(option[0])
    return known is not None and known.shortest <= len(option[1]) <= known.longest


def refusal(options: Iterable[Option]) -> str | None:
    """Return why a request must be refused with 4.02, or None.

    Elective options with a bad length are ignored like unknown ones.
    """
    last = -1
    for number, value in options:
        known = KNOWN.get(number)
        if is_critical(number):
            if known is None:
                return f"option {number} is critical and unknown"
            if not fits((number, value)):
                return f"{known.name} has {len(value)} bytes"
            if number == last and not known.repeatable:
                return f"{known.name} is repeated"
            if known.text and not is_text(value):
                return f"{known.name} is not UTF-8"
        last = number
    return None


def is_text(value: bytes) -> bool:
    """Tell whether bytes are UTF-8."""
    try:
        value.decode()
    except UnicodeDecodeError:
        return False
    return True


def encode_uint(value: int) -> bytes:
    """Encode an integer in the fewest bytes; 0 in none."""
    return value.to_bytes((value.bit_length() + 7) // 8, "big")


def decode_uint(value: bytes) -> int:
    """Decode an integer of any length."""
    return int.from_bytes(value, "big")


def encode(options: Iterable[Option], payload: bytes = b"") -> bytes:
    """Encode options, sorted by their numbers, and a payload."""
    data = bytearray()
    last = 0
    for number, value in sorted(options, key=lambda option: option[0]):
        delta, delta_more = _nibble(number - last)
        length, length_more = _nibble(len(value))
        data.append(delta << 4 | length)
        data += delta_more + length_more + value
        last = number
    if payload:
        data.append(0xFF)
        data += payload
    return bytes(data)


def problem(title: str, detail: str, after_s: int | None = None) -> bytes:
    """Encode the options and payload of an error: concise problem details (RFC 9290).

    `title` is the response code in words, `after_s` when to ask again, seconds.
    """
    payload = encode_problem(title, detail[:_LONGEST_DETAIL])
    max_age = [(MAX_AGE, encode_uint(after_s))] if after_s is not None else []
    return encode([(CONTENT_FORMAT, encode_uint(PROBLEM_DETAILS)), *max_age], payload)


def _nibble(value: int) -> tuple[int, bytes]:
    if value < 13:
        return value, b""
    if value < 269:
        return 13, bytes((value - 13,))
    return 14, (value - 269).to_bytes(2, "big")


def decode(data: bytes) -> tuple[tuple[Option, ...], bytes]:
    """Decode options and payload.

    Raises:
        ValueError: The bytes are malformed (RFC 7252, section 3.1).
    """
    options: list[Option] = []
    number = at = 0
    while at < len(data):
        if data[at] == 0xFF:
            if at + 1 == len(data):
                raise ValueError("a payload marker without payload")
            return tuple(options), data[at + 1 :]
        delta, length = data[at] >> 4, data[at] & 15
        delta, at = _extended(delta, data, at + 1)
        length, at = _extended(length, data, at)
        number += delta
        if at + length > len(data) or number > 0xFFFF:
            raise ValueError("an option that ends after the datagram")
        options.append((number, data[at : at + length]))
        at += length
    return tuple(options), b""


def _extended(nibble: int, data: bytes, at: int) -> tuple[int, int]:
    if nibble < 13:
        return nibble, at
    size = nibble - 12
    if nibble == 15 or at + size > len(data):
        raise ValueError("an option header that is reserved or cut off")
    return decode_uint(data[at : at + size]) + (13 if size == 1 else 269), at + size


@attrs.frozen
class Block:
    """The value of a Block2 option; with `szx` 0 to 6, the block has 2^(szx+4) bytes."""

    number: int
    more: bool
    szx: int

    @classmethod
    def decode(cls, value: bytes) -> Block:
        """Decode the option; ValueError: `szx` is 7, which is reserved."""
        word = decode_uint(value)
        if word & 7 == 7:
            raise ValueError("block size exponent 7 is not for UDP")
        return cls(word >> 4, bool(word & 8), word & 7)

    def encode(self) -> bytes:
        """Encode the option."""
        return encode_uint(self.number << 4 | self.more << 3 | self.szx)

    @property
    def size(self) -> int:
        """Bytes of the block."""
        return 16 << self.szx

    @property
    def offset(self) -> int:
        """The offset of the block's first byte."""
        return self.number * self.size
