"""Files that the server holds: their offers, and their bytes over CoAP and HTTP."""

from __future__ import annotations

import hashlib
import os
from collections.abc import AsyncIterator, Callable
from pathlib import Path

import attrs
import httpx2
import pytest
from aiocoap.numbers.codes import Code
from hypothesis import given
from hypothesis import strategies as st

from netota_coap.catalog.catalog import Catalog
from netota_coap.catalog.local_blobs import LocalBlobs, OpenBlobs, prefix_own_offers
from netota_coap.catalog.render_cache import RenderCache
from netota_coap.coap import options as coap
from netota_coap.coap.blob_blocks import BlobBlocks
from netota_coap.coap.options import Block
from netota_coap.coap.responder import Responder
from netota_coap.encoding.codecs import Format
from netota_coap.encoding.content_formats import ContentFormat
from netota_coap.encoding.documents import decode
from netota_coap.errors import NotFoundError
from netota_coap.model.values import Offer, Stream
from netota_coap.publishing import publish
from netota_coap.publishing.archives import ArchiveSource
from netota_coap.repository.blobs import Blobs, blob_name, path_of
from netota_coap.repository.loading import Loader
from netota_coap.repository.store import DirectoryStore
from tests.support.device import GET, NON, device
from tests.support.publishing import EDIT
from tests.support.serving import serving

NAME = ("sensor-node", "stable")
PATH = ("p", *NAME[:1], "s", *NAME[1:])
DATA = bytes(range(256)) * 40 + b"the end"
SHA256 = hashlib.sha256(DATA).digest()
URL = f"/b/{blob_name(SHA256)}"


@pytest.fixture
def root(sample: Path) -> Path:
    """A repository whose stream has one archive, which is held."""
    image = sample.with_name("image.bin")
    image.write_bytes(DATA)
    store(sample, image)
    return sample


def store(root: Path, image: Path, *offers: str) -> None:
    source = ArchiveSource(image, "image", offers=tuple(Offer(url=u, metric=100) for u in offers))
    edit = attrs.evolve(EDIT, allow_missing=True)
    publish.publish(
        DirectoryStore(root), NAME, "9.0", [source], edit=edit, store_files=True, force=True
    )


def held(root: Path, metric: int = 10) -> LocalBlobs:
    repository = Loader(root).load()
    return LocalBlobs(Blobs(root).present(repository), OpenBlobs(Blobs(root)), metric)


def catalog(root: Path, before: Catalog | None = None, blobs: LocalBlobs | None = None) -> Catalog:
    return Catalog.of(Loader(root).load(), before, blobs or held(root))


def seen(catalog: Catalog, *query: str) -> Stream:
    fmt = ContentFormat.CBOR
    payload = catalog.find(PATH).represent(query, fmt, "coap").payload
    return decode(Stream, payload, Format.CBOR)


def urls(stream: Stream) -> list[list[str]]:
    return [[offer.url for offer in archive.offers] for archive in stream.archives or ()]


def test_own_offers(root: Path) -> None:
    """What is held is offered first, at the server's metric; the files stay as they are."""
    stream = seen(catalog(root))
    assert [offer.metric for offer in (stream.archives or ())[0].offers] == [10]
    assert urls(stream) == [[URL]]
    assert urls(publish.existing(DirectoryStore(root), NAME)) == [[]]
    assert urls(seen(catalog(root), "scheme=coap")) == [[URL]]
    assert urls(seen(catalog(root), "scheme=https")) == []


def test_one_offer_makes_room(root: Path) -> None:
    """There are 16 at most: that of the highest metric goes; its own URL is there once."""
    offers = [Offer(url=f"coap://h/{number}", metric=number) for number in range(16)]
    archive = (publish.existing(DirectoryStore(root), NAME).archives or ())[0]
    full = held(root).add_offer(attrs.evolve(archive, offers=tuple(offers)))
    assert len(full.offers) == 16
    assert "coap://h/15" not in [offer.url for offer in full.offers]
    again = held(root, 20).add_offer(full)
    assert [offer.metric for offer in again.offers if offer.url == URL] == [20]


def test_offers_come_and_go(root: Path) -> None:
    """With the file, at a swap; that is a change like others, and one of the metric is, too."""
    first = catalog(root)
    same = catalog(root, first)
    assert first.find(PATH).source is not same.find(PATH).source  # loaded anew
    repository = Loader(root).load()
    one = Catalog.of(repository, None, held(root))
    assert Catalog.of(repository, one, held(root)).differing(one) == {
        (".well-known", "core"),
        ("p",),
        *(path for path in one.resources if len(path) == 2 and path[0] == "p"),
    }
    cheaper = Catalog.of(repository, one, held(root, 5))
    assert PATH in cheaper.differing(one)
    (root / path_of(SHA256)).unlink()
    without = Catalog.of(repository, one, held(root))
    assert PATH in without.differing(one)
    assert urls(seen(without)) == [[]]


def test_full_views_go_on_with_what_they_began_with(root: Path) -> None:
    """Under one sequence, until the change after the next, or until it is forgotten."""
    repository = Loader(root).load()
    one = Catalog.of(repository, None, held(root))
    sequence = seen(one).sequence
    full = ("full", f"sequence={sequence}")
    two = Catalog.of(repository, one, held(root, 5))
    assert seen(two, *full) == seen(one, *full)
    assert seen(two, "full") != seen(one, "full")
    three = Catalog.of(repository, two, held(root, 7))
    assert seen(three, *full) == seen(two, "full")
    stable = three.find(PATH)
    assert stable.previous and not stable.previous.previous  # no chain
    assert three.forget_previous(stable.replaced_s - 1) == (False, stable.replaced_s)
    assert three.forget_previous(stable.replaced_s) == (True, None)
    assert seen(three, *full) == seen(three, "full")
    assert three.forget_previous(stable.replaced_s) == (False, None)
    store(root, root.with_name("image.bin"))
    assert catalog(root, three).forget_previous(0.0) == (False, None)  # another sequence


def test_prefix(root: Path) -> None:
    """Of what the server offers itself, and of nothing else."""
    (stored,) = publish.existing(DirectoryStore(root), NAME).archives or ()
    offers = tuple(Offer(url=url, metric=1) for url in (URL, "/x", "coap://h/b/"))
    archive = attrs.evolve(stored, offers=offers)
    assert prefix_own_offers("", archive) is archive
    assert [o.url for o in prefix_own_offers("/ota", archive).offers] == [
        f"/ota{URL}",
        "/x",
        "coap://h/b/",
    ]


@pytest.fixture
async def uris(root: Path) -> AsyncIterator[list[str]]:
    """A service over CoAP and HTTP."""
    async with serving(root, http_bind="127.0.0.1:0") as uris:
        yield uris


async def test_blocks(uris: list[str]) -> None:
    """Of any size and at any place; the first tells the size; there is one ETag for all."""
    async with device(uris[0]) as it:
        for szx in range(7):
            size = 16 << szx
            for number in (0, 1, len(DATA) // size):
                block = Block(number, more=False, szx=szx).encode()
                answer = await it.ask(GET, URL, options=[(coap.BLOCK2, block)])
                assert (answer.code, answer.values(coap.ETAG)) == ("2.05", [SHA256[:8]])
                assert DATA[number * size :][:size] == answer.payload
                assert answer.uint(coap.CONTENT_FORMAT) == 42
                assert answer.uint(coap.SIZE2) == (None if number else len(DATA))
                assert answer.uint(coap.MAX_AGE) == 31_536_000
        plain = await it.ask(GET, URL)
        assert DATA[:256] == plain.payload
        valid = await it.ask(GET, URL, options=[(coap.ETAG, SHA256[:8])])
        assert (valid.code, valid.payload) == ("2.03", b"")
        past = [(coap.BLOCK2, Block(len(DATA), more=False, szx=6).encode())]
        assert (await it.ask(GET, URL, options=past)).code == "4.00"
        assert (await it.ask(GET, URL, options=[(coap.ACCEPT, b"\x3c")])).code == "4.06"
        assert (await it.observe(URL)).values(coap.OBSERVE) == []


@given(st.integers(0, len(DATA) // 16 + 2), st.integers(0, 7), st.booleans())
def test_pieces_are_what_the_responder_answers(number: int, szx: int, more: bool) -> None:
    """Byte for byte, for each block but the first; what is no block is left to it."""
    files = _Memory()
    responder = Responder(Catalog({}, RenderCache(), files))
    block = coap.encode_uint(number << 4 | more << 3 | szx)
    options = (*FILE, (coap.BLOCK2, block))
    found = BlobBlocks().find(files, coap.encode(options))
    code, tail = responder.answer(options, None)
    expected = tail if number and szx < 7 and not more and code == Code.CONTENT else None
    assert expected == found


class _Memory(OpenBlobs):
    """A file that is in no repository."""

    def __init__(self) -> None:
        super().__init__(Blobs(Path()))

    def size(self, sha256: bytes) -> int:
        return len(DATA)

    def block(self, sha256: bytes, offset: int, size: int) -> tuple[bytes, bool]:
        return DATA[offset : offset + size], offset + size < len(DATA)


FILE = [(coap.URI_PATH, part.encode()) for part in URL.split("/")[1:]]
BLOCK_1 = (coap.BLOCK2, b"\x16")


@pytest.mark.parametrize(
    "options",
    [
        [],
        [(coap.URI_PATH, b"b")],
        FILE,
        [*FILE, (coap.ACCEPT, b"\x2a"), BLOCK_1],
        [*FILE, BLOCK_1, (coap.SIZE2, b"")],
        [(coap.URI_PATH, b"c"), FILE[1], BLOCK_1],
        [FILE[0], (coap.URI_PATH, b"?" * 43), BLOCK_1],
        [FILE[0], (coap.URI_PATH, b"\xff" * 43), BLOCK_1],
        [*FILE, (coap.BLOCK2, b"\1\0\0\x16")],
        [*FILE, (coap.BLOCK2, b"\0\x16")],
        [(coap.URI_PATH, b"p"), (coap.URI_PATH, b"x" * 43), BLOCK_1],
    ],
)
def test_other_requests_are_no_pieces(options: list[coap.Option]) -> None:
    """The responder is asked; so it is where nothing is held."""
    key = coap.encode(options)
    assert BlobBlocks().find(_Memory(), key) is None
    assert BlobBlocks().find(None, key) is None


@pytest.mark.parametrize(
    ("bind", "hosts", "ready"),
    [
        ("127.0.0.1:0", ("127.0.0.1",), 3),
        # At an address of its own that it is asked at for the first time, the front door is slow.
        ("0.0.0.0:0", ("127.0.0.1", "127.0.0.2"), 4),
    ],
)
async def test_pieces_over_the_wire(
    root: Path, bind: str, hosts: tuple[str, ...], ready: int
) -> None:
    """They are sent from the address that was asked, and counted."""
    block = [(coap.BLOCK2, Block(3, more=False, szx=2).encode())]
    async with serving(root, bind, http_bind="127.0.0.1:0") as uris:
        for host in hosts:
            async with device(f"coap://{host}:{uris[0].rpartition(':')[2]}") as it:
                answers = [await it.ask(GET, URL, options=block) for _ in range(3)]
                assert [DATA[192:256]] * 3 == [answer.payload for answer in answers]
                slow = await it.ask(GET, URL, options=block, kind=NON)
                assert slow.payload == answers[0].payload
        async with httpx2.AsyncClient(base_url=uris[1]) as client:
            counted = (await client.get("/metrics")).text
    requests = 'netota_requests_total{code="2.05",resource="blob",transport="coap"}'
    assert f"{requests} {4 * len(hosts)}.0" in counted
    assert f"netota_ready_answers_total {ready}.0" in counted


@pytest.mark.parametrize(
    "name", ["", "x", "A" * 42, "A" * 43, "A" * 44, blob_name(SHA256) + "=", "%2e%2e", "é" * 43]
)
async def test_names_that_nothing_has(uris: list[str], name: str) -> None:
    """Are not found, whatever they look like."""
    async with device(uris[0]) as it:
        assert (await it.ask(GET, f"b/{name}")).code == "4.04"
    async with httpx2.AsyncClient() as client:
        assert (await client.get(f"{uris[1]}/b/{name}")).status_code == 404


@pytest.mark.parametrize("szx", [6, 2])
async def test_a_file_that_changes_is_gone(uris: list[str], root: Path, szx: int) -> None:
    """Truncated, written to, or removed, in mid-transfer: 4.04, and never a wrong byte."""
    file = root / path_of(SHA256)
    block = [(coap.BLOCK2, Block(1, more=False, szx=szx).encode())]
    async with device(uris[0]) as it:
        assert (await it.ask(GET, URL, options=block)).code == "2.05"
        file.chmod(0o644)
        os.truncate(file, 20)
        for _ in range(2):
            assert (await it.ask(GET, URL, options=block)).code == "4.04"
            assert (await it.ask(GET, URL)).code == "4.04"


def _write(file: Path, offset: int, data: bytes) -> None:
    file.chmod(0o644)
    with file.open("r+b") as stream:
        stream.seek(offset)
        stream.write(data)


def _truncate(file: Path, size: int) -> None:
    file.chmod(0o644)
    os.truncate(file, size)


@pytest.mark.parametrize(
    ("change", "right"),
    [
        (lambda file: _write(file, 1_500, b"?"), False),
        (lambda file: _write(file, len(DATA), b"?"), False),
        (lambda file: _truncate(file, 1_500), False),
        (lambda file: _truncate(file, 0), False),
        (Path.unlink, True),
        (lambda file: file.with_name("new").rename(file), True),
    ],
    ids=["written", "appended", "truncated", "emptied", "removed", "replaced"],
)
def test_a_piece_of_a_file_that_changes(
    root: Path, change: Callable[[Path], object], right: bool
) -> None:
    """It is what was put in, or nothing: again and again until all are opened anew."""
    file, files = root / path_of(SHA256), OpenBlobs(Blobs(root))
    file.with_name("new").write_bytes(bytes(len(DATA)))
    assert files.block(SHA256, 1_024, 1_024) == (DATA[1_024:2_048], True)
    change(file)
    for _ in range(2):
        if right:
            assert files.block(SHA256, 1_024, 1_024) == (DATA[1_024:2_048], True)
        else:
            with pytest.raises(NotFoundError, match="damaged"):
                files.block(SHA256, 1_024, 1_024)


async def test_ranges(uris: list[str]) -> None:
    """One range, from either end; others and several get the whole; none of it is 416."""
    size = len(DATA)
    etag = f'"{SHA256[:8].hex()}"'
    async with httpx2.AsyncClient(base_url=uris[1]) as client:
        for asked, first, end in (
            ("bytes=0-0", 0, 1),
            ("bytes=5-", 5, size),
            (f"bytes=5-{size + 100}", 5, size),
            ("bytes=-7", size - 7, size),
            (f"bytes=-{size + 1}", 0, size),
            (f"bytes=0-{'9' * 30}", 0, size),
            ("BYTES=0-1", 0, 2),
        ):
            answer = await client.get(URL, headers={"Range": asked})
            assert (answer.status_code, answer.content) == (206, DATA[first:end])
            assert answer.headers["Content-Range"] == f"bytes {first}-{end - 1}/{size}"
        for asked in ("bytes=1-2,4-5", "lines=1-2", "bytes=-", "bytes=9-1", "bytes=x-"):
            answer = await client.get(URL, headers={"Range": asked})
            assert (answer.status_code, answer.content) == (200, DATA)
        for asked in (f"bytes={size}-", "bytes=-0", f"bytes={'9' * 30}-"):
            answer = await client.get(URL, headers={"Range": asked})
            assert answer.status_code == 416
            assert answer.headers["Content-Range"] == f"bytes */{size}"
        for if_range, status in ((etag, 206), ('"other"', 200)):
            headers = {"Range": "bytes=1-1", "If-Range": if_range}
            assert (await client.get(URL, headers=headers)).status_code == status
        assert (await client.get(URL, headers={"If-None-Match": etag})).status_code == 304
        head = await client.head(URL)
        assert (head.headers["Content-Length"], head.content) == (str(size), b"")
        assert "immutable" in head.headers["Cache-Control"]


async def test_a_new_file_is_offered(uris: list[str], root: Path) -> None:
    """When it is added, as its observers learn; it can be had at once."""
    async with device(uris[0]) as it:
        await it.observe("/".join(PATH))
        other = root.with_name("other.bin")
        other.write_bytes(b"another")
        store(root, other)
        stream = decode(Stream, (await it.notification()).payload, Format.CBOR)
        ((url,),) = urls(stream)
        assert (await it.ask(GET, url)).payload == b"another"
        assert (await it.ask(GET, URL)).code == "2.05"  # who is late can end what it began


def test_descriptors_are_bounded(root: Path) -> None:
    """However many files are read."""
    blobs, files = Blobs(root), OpenBlobs(Blobs(root))
    before = len(list(Path("/proc/self/fd").iterdir()))
    for number in range(80):
        file = root.with_name(f"{number}.bin")
        file.write_bytes(b"%d" % number)
        sha256 = blobs.add(file).sha256
        assert files.read(sha256, 0, 100) == b"%d" % number
    assert len(list(Path("/proc/self/fd").iterdir())) <= before + 64
    files.refresh(())
    assert len(list(Path("/proc/self/fd").iterdir())) == before
    with pytest.raises(NotFoundError):
        files.size(bytes(32))
