"""coap/responder.py: what is answered, without a socket."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from datetime import UTC, datetime

import cbor2
import pytest
from aiocoap.numbers.codes import Code

from netota_coap.catalog.catalog import Catalog
from netota_coap.coap import options as coap
from netota_coap.coap.options import Block
from netota_coap.coap.responder import CODES, Responder, problem
from netota_coap.encoding.codecs import Format
from netota_coap.encoding.documents import decode, encode, selection_to_cbor
from netota_coap.errors import ConfigError, InvalidDataError, Issue, NotFoundError, RepositoryError
from netota_coap.model.selection import Selection
from netota_coap.model.values import (
    DEFAULT_MAX_AGE_S,
    Archive,
    Content,
    Envelope,
    Offer,
    Package,
    Repository,
    Stream,
)


def archive(name: str, url: str = "https://example.com/f", **content: str | bool) -> Archive:
    return Archive(
        name=name,
        envelope=Envelope(
            type="application/octet-stream", size=9, sha256=hashlib.sha256(name.encode()).digest()
        ),
        content=Content(**content),  # type: ignore[arg-type]
        offers=(Offer(url=url, metric=1),),
    )


STABLE = Stream(
    version="1",
    sequence=7,
    published=datetime(2026, 11, 20, tzinfo=UTC),
    archives=tuple(archive(f"board{n}", machine=f"m{n}") for n in range(9)),
)
SMALL = Stream(
    version="2",
    sequence=8,
    published=datetime(2026, 11, 20, tzinfo=UTC),
    archives=(archive("only", "/b/x"),),
    poll_s=3600,
)
RESPONDER = Responder(
    Catalog.of(
        Repository(
            format=1,
            packages={"pkg": Package(title="A package", streams={"big": STABLE, "small": SMALL})},
        )
    )
)
BIG = "p/pkg/s/big"

Options = list[coap.Option]


def ask(
    path: str,
    options: Sequence[coap.Option] = (),
    payload: bytes | None = None,
) -> tuple[str, dict[int, bytes], bytes]:
    """Ask the responder: code, options, payload."""
    where, _, query = path.partition("?")
    sent = [(coap.URI_PATH, part.encode()) for part in where.split("/")]
    sent += [(coap.URI_QUERY, part.encode()) for part in query.split("&") if part]
    ordered = tuple(sorted([*sent, *options], key=lambda option: option[0]))
    code, tail = RESPONDER.answer(ordered, payload)
    found, body = coap.decode(tail)
    return code.dotted, dict(found), body


def fetch(
    path: str, payload: bytes, options: Sequence[coap.Option] = ()
) -> tuple[str, dict[int, bytes], bytes]:
    return ask(path, [(coap.CONTENT_FORMAT, b"\x3c"), *options], payload)


def test_plain_answer() -> None:
    """A GET is answered with payload, format, the payload's own ETag and the caches' Max-Age."""
    code, options, payload = ask("p/pkg/s/small")

    assert code == "2.05"
    assert {
        coap.ETAG: hashlib.sha256(payload).digest()[:8],
        coap.CONTENT_FORMAT: b"\x3c",
        coap.MAX_AGE: bytes((DEFAULT_MAX_AGE_S,)),
    } == options
    assert decode(Stream, payload, Format.CBOR) == SMALL


@pytest.mark.parametrize(
    ("path", "accept", "code"),
    [
        ("p/pkg/s/small", 60, "2.05"),
        ("p/pkg/s/small", 50, "2.05"),
        ("p/pkg/s/small", 40, "4.06"),
        ("p/pkg/s/small", 0, "4.06"),
        ("p", 40, "2.05"),
        ("p", 50, "2.05"),
        ("p/pkg", 60, "2.05"),
        ("p/pkg", 65_000, "4.06"),
        (".well-known/core", 40, "2.05"),
        (".well-known/core", 60, "4.06"),
    ],
)
def test_accept(path: str, accept: int, code: str) -> None:
    """Each resource has its formats, and 4.06 for the others."""
    answered, options, _ = ask(path, [(coap.ACCEPT, coap.encode_uint(accept))])

    assert code == answered
    if code == "2.05":
        assert coap.encode_uint(accept) == options[coap.CONTENT_FORMAT]


def test_default_formats() -> None:
    """Collections come as links by default."""
    assert ask("p")[1][coap.CONTENT_FORMAT] == b"\x28"
    assert ask("p/pkg")[1][coap.CONTENT_FORMAT] == b"\x28"
    assert ask(".well-known/core")[1][coap.CONTENT_FORMAT] == b"\x28"


def test_valid() -> None:
    """A client that has the bytes is told so in a few."""
    etag = ask("p/pkg/s/small")[1][coap.ETAG]

    code, options, payload = ask("p/pkg/s/small", [(coap.ETAG, b"other"), (coap.ETAG, etag)])

    assert ("2.03", {coap.ETAG: etag, coap.MAX_AGE: b"\x3c"}, b"") == (code, options, payload)


@pytest.mark.parametrize(
    ("path", "max_age"),
    [(BIG, 86_400), ("p/pkg/s/small", 3600), ("p", 86_400), ("p/pkg", 60), ("nix", None)],
)
def test_max_age_of_an_observation(path: str, max_age: int | None) -> None:
    """An answer to a registration may be trusted for as long as the poll interval."""
    options = ask(path, [(coap.OBSERVE, b"")])[1]

    assert max_age == (coap.decode_uint(options[coap.MAX_AGE]) if max_age else None)


@pytest.mark.parametrize(
    ("options", "max_age"),
    [
        ([(coap.OBSERVE, b"\x01")], 60),
        ([(coap.OBSERVE, b""), (coap.BLOCK2, b"\x10")], 60),
        ([(coap.OBSERVE, b""), (coap.BLOCK2, b"\x00")], 86_400),
        ([(coap.OBSERVE, b"1234")], 60),
    ],
)
def test_what_registers(options: Options, max_age: int) -> None:
    """Deregistration, later blocks and a malformed Observe register nothing."""
    found = ask(BIG + "?full", options)[1]
    path = tuple(BIG.split("/"))
    sent = tuple((coap.URI_PATH, part.encode()) for part in path)

    assert max_age == coap.decode_uint(found[coap.MAX_AGE])
    expected = path if max_age == 86_400 else None
    assert expected == RESPONDER.observed((*options[:1], *sent, *options[1:]))


@pytest.mark.parametrize("szx", range(7))
def test_blocks(szx: int) -> None:
    """Any block of any size can be had at any time, and they make up the whole."""
    whole = encode(STABLE, Format.CBOR)
    size = 16 << szx
    got = b""
    for number in range(-(-len(whole) // size)):
        more = (number + 1) * size < len(whole)
        asked = Block(number, more=False, szx=szx).encode()
        code, options, part = ask(BIG + "?full", [(coap.BLOCK2, asked)])
        assert code == "2.05"
        assert Block(number, more, szx) == Block.decode(options[coap.BLOCK2])
        assert (coap.SIZE2 in options) == (number == 0 and more)
        got += part

    assert whole == got


def test_first_block_unasked() -> None:
    """Without a wish, blocks have 256 bytes, and what fits one has no Block2."""
    options, payload = ask(BIG + "?full")[1:]

    assert (256, Block(0, True, 4)) == (len(payload), Block.decode(options[coap.BLOCK2]))
    assert len(encode(STABLE, Format.CBOR)) == coap.decode_uint(options[coap.SIZE2])
    assert coap.BLOCK2 not in ask(BIG)[1]
    assert Block(0, False, 6) == Block.decode(ask(BIG, [(coap.BLOCK2, b"\x06")])[1][coap.BLOCK2])


@pytest.mark.parametrize(
    ("path", "options", "code"),
    [
        ("", [], "4.04"),
        ("nix", [], "4.04"),
        ("p/pkg/s", [], "4.04"),
        ("p/pkg/s/big/", [], "4.04"),
        ("p/PKG/s/big", [], "4.04"),
        (BIG + "?full&sequence=6", [], "4.04"),
        (BIG + "?full&sequence=7", [], "2.05"),
        (BIG + "?full&sequence=x", [], "4.00"),
        (BIG + "?full", [(coap.BLOCK2, b"\x07")], "4.00"),
        (BIG + "?full", [(coap.BLOCK2, Block(99, more=False, szx=6).encode())], "4.00"),
        (BIG, [(coap.BLOCK2, Block(1, more=False, szx=6).encode())], "4.00"),
        (BIG, [(1, b"")], "4.02"),
        (BIG, [(5, b"")], "4.02"),
        (BIG, [(9, b"oscore")], "4.02"),
        (BIG, [(65, b"")], "4.02"),
        (BIG, [(coap.ACCEPT, b"\x3c"), (coap.ACCEPT, b"\x3c")], "4.02"),
        (BIG, [(coap.PROXY_URI, b"coap://example.com/")], "5.05"),
        (BIG, [(coap.PROXY_SCHEME, b"coap")], "5.05"),
        (BIG, [(64, b""), (258, b"\x08"), (252, b"")], "2.05"),
        (BIG, [(coap.URI_HOST, b"example.com"), (coap.URI_PORT, b"\x16\x33")], "2.05"),
        (BIG + "?head&x=y&odd", [], "2.05"),
    ],
)
def test_codes(path: str, options: Options, code: str) -> None:
    """Each wrong request gets the code of RFC 7252, and problem details that say why."""
    answered, found, payload = ask(path, options)

    assert code == answered
    if code[0] != "2":
        assert coap.encode_uint(257) == found[coap.CONTENT_FORMAT]
        assert {-1, -2} == cbor2.loads(payload).keys()


def test_fetch() -> None:
    """A selection in the payload answers like the same one in the query."""
    selection = Selection.of({"machine": ["m3"]})

    assert ask(BIG + "?machine=m3") == fetch(BIG, selection_to_cbor(selection))


@pytest.mark.parametrize(
    ("path", "payload", "options", "code"),
    [
        (BIG, b"\xa0", [(coap.ACCEPT, b"\x3c")], "2.05"),
        (BIG, b"\xa0", [(coap.ACCEPT, b"\x32")], "4.06"),
        (BIG, b"\xa0", [(coap.BLOCK1, b"\x04")], "2.05"),
        (BIG, b"\xa0", [(coap.BLOCK1, b"\x0c")], "4.13"),
        (BIG, b"\xa0", [(coap.BLOCK1, b"\x14")], "4.13"),
        (BIG, cbor2.dumps({"a": "b" * 300}), [], "4.13"),
        (BIG, b"", [], "4.00"),
        (BIG, b"\x80", [], "4.00"),
        (BIG, b"\xa1\x02\xa0", [], "4.00"),
        ("p", b"\xa0", [], "4.05"),
        ("p/pkg", b"\xa0", [], "4.05"),
        ("nix", b"\xa0", [], "4.04"),
    ],
)
def test_fetch_codes(path: str, payload: bytes, options: Options, code: str) -> None:
    """FETCH is for streams, with a small selection in CBOR, and answers in CBOR."""
    assert code == fetch(path, payload, options)[0]


@pytest.mark.parametrize("options", [[], [(coap.CONTENT_FORMAT, b"\x32")]])
def test_fetch_content_format(options: Options) -> None:
    """A selection that is not said to be CBOR is refused."""
    assert ask(BIG, options, b"\xa0")[0] == "4.15"


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (NotFoundError("x"), Code.NOT_FOUND),
        (InvalidDataError([Issue("", "x")]), Code.BAD_REQUEST),
        (RepositoryError("x"), Code.INTERNAL_SERVER_ERROR),
        (ConfigError("x"), Code.INTERNAL_SERVER_ERROR),
    ],
)
def test_code_of_errors(error: Exception, code: Code) -> None:
    """Each error has a code, by its own class or the nearest above."""
    assert code == problem(error)[0]  # type: ignore[arg-type]
    assert set(CODES.values()) >= {code}
