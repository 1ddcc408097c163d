"""What is served: one datagram, queries, ETags, collections, discovery, taking over, advice."""

from __future__ import annotations

import hashlib
from datetime import UTC, datetime
from typing import Any

import attrs
import cbor2
import pytest
from hypothesis import given
from hypothesis import strategies as st

from netota_coap.catalog.catalog import Catalog
from netota_coap.catalog.render_cache import RenderCache
from netota_coap.catalog.resources import DiscoveryResource, Resource, StreamResource
from netota_coap.catalog.stream_query import StreamQuery
from netota_coap.encoding.codecs import Format
from netota_coap.encoding.content_formats import ContentFormat
from netota_coap.encoding.datagram_fit import in_one_datagram
from netota_coap.encoding.documents import decode, encode, selection_to_cbor, selection_to_query
from netota_coap.errors import InvalidDataError, NotFoundError
from netota_coap.model.selection import Selection
from netota_coap.model.values import Archive, Content, Envelope, Offer, Package, Repository, Stream
from netota_coap.repository.check import advice
from tests.support import cddl, strategies

NOW = datetime(2026, 11, 20, 9, 30, tzinfo=UTC)
CBOR, JSON, LINK = ContentFormat.CBOR, ContentFormat.JSON, ContentFormat.LINK
PATH = ("p", "sensor-node", "s", "stable")


def archive(name: str = "a", *offers: tuple[int, str], **attributes: Any) -> Archive:
    return Archive(
        name=name,
        envelope=Envelope(type="application/octet-stream", size=1, sha256=bytes(32)),
        content=Content(**attributes),
        offers=tuple(Offer(url=url, metric=metric) for metric, url in offers),
    )


def stream(*archives: Archive, **fields: Any) -> Stream:
    return Stream(
        **{"version": "2.4.1", "sequence": 17, "published": NOW, "archives": archives} | fields
    )


def repository(*archives: Archive, **fields: Any) -> Repository:
    package = Package(title="Sensor", streams={"stable": stream(*archives, **fields)})
    return Repository(format=1, packages={"sensor-node": package})


def served(*archives: Archive, **fields: Any) -> StreamResource:
    resource = Catalog.of(repository(*archives, **fields)).find(PATH)
    assert type(resource) is StreamResource
    return resource


def payload(resource: Resource, *query: str, fmt: ContentFormat = CBOR) -> bytes:
    return resource.represent(query, fmt, "coap").payload


def names(data: bytes) -> list[str] | None:
    found = decode(Stream, data, Format.CBOR).archives
    return None if found is None else [item.name for item in found]


# ----------------------------------------------------------------------------------------------
# One datagram


def test_typical_size() -> None:
    """One archive with one URL of 48 bytes takes at most 204 bytes."""
    typical = Archive(
        name="nrf52840dk",
        envelope=Envelope(type="application/vnd.mcuboot.image", size=214_016, sha256=bytes(32)),
        content=Content(type="zephyr-image", arch="arm", machine="nrf52840dk", debug=False),
        offers=(Offer(url=f"https://cdn.example.com/{'x' * 24}", metric=100),),
    )
    assert len(typical.offers[0].url) == 48
    assert len(payload(served(typical, poll_s=86_400))) <= 204


@pytest.mark.parametrize(
    ("fields", "expected"),
    [
        ({}, 16),
        ({"poll_s": 86_400}, 22),
        ({"version": "1", "sequence": 1}, 12),
        ({"closed": True, "replacement": ("sensor", "lts"), "poll_s": 86_400,
          "sequence": 2**16 - 1}, 39),
    ],
)  # fmt: skip
def test_head_sizes(fields: dict[str, Any], expected: int) -> None:
    """A head with short names is small."""
    assert expected == len(payload(served(archive(), **fields), "head"))


URL = "coap://h/" + "x" * 40


@pytest.mark.parametrize(
    ("archives", "expected", "more"),
    [
        # It fits.
        ([[(1, URL), (2, URL)]], [[1, 2]], False),
        # The highest metric goes first.
        ([[(1, URL), (3, URL), (2, URL), (4, URL)]], [[1, 2, 3]], True),
        # Whichever archive has it.
        ([[(1, URL), (3, "/b/x")], [(1, "/b/x"), (2, URL)]], [[1, 3], [1, 2]], False),
        ([[(1, URL), (3, "/b/x")], [(1, URL), (2, "/b/x")]], [[1, 3], [1, 2]], False),
        ([[(1, URL), (3, URL)], [(1, "/b/x"), (2, URL)]], [[1], [1, 2]], True),
        ([[(1, URL), (2, URL)], [(1, "/b/x"), (3, URL)]], [[1, 2], [1]], True),
        # Each keeps its best, whatever its metric.
        ([[(9, URL), (10, URL)], [(1, URL), (2, "/b/x"), (3, URL)]], [[9], [1, 2]], True),
        # Where that does not do, all archives go.
        ([[(1, URL)], [(1, URL)], [(1, URL)]], None, True),
        ([[(1, URL), (2, URL)]] * 9, None, True),
        ([[(1, "coap://h/" + "x" * 240)]], None, True),
        # Nothing suits.
        ([], [], False),
    ],
)
def test_one_datagram(
    archives: list[list[tuple[int, str]]], expected: list[list[int]] | None, more: bool
) -> None:
    """Offers of the highest metrics are left out first, then all archives."""
    given_in = [archive(f"a{index}", *offers) for index, offers in enumerate(archives)]
    data = payload(served(*given_in))
    got = decode(Stream, data, Format.CBOR)
    assert len(data) <= 256
    assert more == got.more
    if expected is None:
        assert got.archives is None
    else:
        assert got.archives is not None
        assert expected == [[offer.metric for offer in item.offers] for item in got.archives]


def test_to_the_byte() -> None:
    """256 bytes are sent whole, 257 are not."""
    for size, more in ((256, False), (257, True)):
        spare = size - len(encode(stream(archive("a", (1, "/" + "x" * 99))), Format.CBOR))
        data = in_one_datagram(stream(archive("a", (1, "/" + "x" * (99 + spare)))))
        assert more == decode(Stream, data, Format.CBOR).more


@pytest.mark.slow
@given(strategies.streams(on_disk=True), strategies.selections)
def test_always_one_datagram(source: Stream, selection: Selection) -> None:
    """CBOR is within 256 bytes always, as wire.cddl says, and leaves out no more than it must."""
    resource = StreamResource.of(PATH, source, source.poll_s, RenderCache())
    data = payload(resource, *selection_to_query(selection))
    assert len(data) <= 256
    cddl.validate(data, "stream")
    full = payload(resource, "full", *selection_to_query(selection))
    cddl.validate(full, "full")
    got = decode(Stream, data, Format.CBOR)
    assert got.more == (len(full) > 256)
    if not got.more:
        assert full == data
    elif got.archives is not None:
        whole = decode(Stream, full, Format.CBOR).archives or ()
        left_out = []
        assert [item.name for item in whole] == [item.name for item in got.archives]
        for before, after in zip(whole, got.archives, strict=True):
            count = len(after.offers)
            assert before.offers[:count] == after.offers
            assert count >= min(1, len(before.offers))
            left_out += [offer.metric for offer in before.offers[count:]]
        kept = [offer.metric for item in got.archives for offer in item.offers[1:]]
        assert left_out
        assert max(kept, default=0) <= min(left_out)


# ----------------------------------------------------------------------------------------------
# Views

MANY = tuple(
    archive(f"a{index}", (1, URL), arch="arm" if index % 2 else "x86") for index in range(9)
)


def test_head() -> None:
    """A head has neither archives nor `more`, and wins over `full`."""
    resource = served(*MANY, closed=True, replacement=("sensor-node", "lts"))
    for query in (
        ["head"],
        ["full", "head"],
        ["head", "arch=arm"],
        ["head", "full", "sequence=3"],
    ):
        data = payload(resource, *query)
        cddl.validate(data, "head")
        assert {1, 2, 4, 5, 6} == set(cbor2.loads(data))
    assert b'"archives"' not in payload(resource, "head", fmt=JSON)


def test_full() -> None:
    """A full view has everything that suits."""
    resource = served(*MANY)
    assert [item.name for item in MANY] == names(payload(resource, "full"))
    assert names(payload(resource, "arch=arm", "full")) == ["a1", "a3", "a5", "a7"]
    assert names(payload(resource)) is None
    assert decode(Stream, payload(resource), Format.CBOR).more


def test_sequence() -> None:
    """A view that continues a state is answered while the stream holds it."""
    resource = served(*MANY)
    assert payload(resource, "full") == payload(resource, "full", "sequence=17")
    for gone in ("0", "16", "18", "4294967295"):
        with pytest.raises(NotFoundError):
            payload(resource, "full", f"sequence={gone}")
    for odd in ("", "x", "-17", "17.0", "+17", "\u0661\u0667", "9" * 5_000):
        with pytest.raises(InvalidDataError):
            payload(resource, "full", f"sequence={odd}")
    # Without `full` there is nothing to continue.
    assert payload(resource) == payload(resource, "sequence=3")


def test_json_is_full() -> None:
    """JSON has everything, however long."""
    resource = served(*MANY)
    got = decode(Stream, payload(resource, fmt=JSON), Format.JSON)
    assert len(MANY) == len(got.archives or ())
    assert payload(resource, fmt=JSON) == payload(resource, "full", fmt=JSON)
    assert b"more" not in payload(resource, fmt=JSON)


def test_nothing_suits() -> None:
    """What suits nobody is an empty list."""
    assert names(payload(served(*MANY), "arch=riscv")) == []
    assert names(payload(served(*MANY), "scheme=ftp")) == []
    assert names(payload(served())) == []


def test_odd_queries() -> None:
    """Keys without `=` other than `head` and `full` are ignored."""
    resource = served(*MANY)
    assert payload(resource) == payload(resource, "heads", "", "arch", "=", "colour=red", "full=1")


def test_relative_offers() -> None:
    """A relative offer counts as the scheme of the request."""
    resource = served(archive("a", (1, "/b/x")))
    for scheme in ("coap", "http"):
        data = resource.represent([f"scheme={scheme}"], CBOR, scheme).payload
        assert names(data) == ["a"]
        other = resource.represent([f"scheme={scheme}"], CBOR, "coaps").payload
        assert names(other) == []


@given(strategies.selections)
def test_fetch_as_get(selection: Selection) -> None:
    """FETCH and GET of one selection see the same."""
    data = selection_to_cbor(selection)
    if len(data) <= 256:
        query = selection_to_query(selection)
        view = StreamQuery.from_query(query)
        assert view == StreamQuery.from_fetch(data)
        resource = served(*MANY[:2])
        assert resource.represent(query, CBOR, "coap") == resource.answer(view, CBOR, "coap")


def test_poll() -> None:
    """A stream says its package's poll_s unless it has its own."""
    for own, default, expected in ((None, None, None), (None, 60, 60), (30, 60, 30)):
        package = Package(poll_s=default, streams={"stable": stream(poll_s=own)})
        resource = Catalog.of(Repository(format=1, packages={"sensor-node": package})).find(PATH)
        assert expected == decode(Stream, payload(resource), Format.CBOR).poll_s
        assert (expected or 86_400) == resource.poll_s


# ----------------------------------------------------------------------------------------------
# ETags


def test_etags() -> None:
    """An ETag is the first 8 bytes of SHA-256 over the payload."""
    resource = served(*MANY)
    views = [([], CBOR), (["head"], CBOR), (["full"], CBOR), ([], JSON), (["arch=arm"], CBOR)]
    for query, fmt in views:
        got = resource.represent(query, fmt, "coap")
        assert hashlib.sha256(got.payload).digest()[:8] == got.etag
        assert fmt is got.format


def top_etag(of: Repository) -> bytes:
    return Catalog.of(of).find(("p",)).represent([], CBOR, "coap").etag


BASE = stream(archive("a", (1, URL), arch="arm"))


@pytest.mark.parametrize(
    "changed",
    [
        {"version": "2"},
        {"sequence": 18},
        {"closed": True},
        {"poll_s": 7},
        {"title": "Stable"},  # of the link
        {"published": NOW.replace(second=1)},
        {"archives": ()},
        {"archives": (archive("a", (2, URL), arch="arm"),)},
        {"archives": (archive("a", (1, URL), arch="arm", attributes={"x": 1}),)},
    ],
)
def test_etag_of_everything(changed: dict[str, Any]) -> None:
    """The ETag of /p changes with whatever of a stream can be seen."""
    base, other = (
        Repository(format=1, packages={"p": Package(streams={"s": source})})
        for source in (BASE, attrs.evolve(BASE, **changed))
    )
    assert top_etag(base) == top_etag(attrs.evolve(base))
    assert top_etag(base) != top_etag(other)


@pytest.mark.parametrize(
    "other",
    [
        Repository(format=1),
        Repository(format=1, title="x", packages={"p": Package(streams={"s": BASE})}),
        Repository(format=1, packages={"q": Package(streams={"s": BASE})}),
        Repository(format=1, packages={"p": Package(streams={"t": BASE})}),
        Repository(format=1, packages={"p": Package(title="x", streams={"s": BASE})}),
        Repository(format=1, packages={"p": Package(poll_s=7, streams={"s": BASE})}),
        Repository(format=1, packages={"p": Package()}),
        Repository(format=1, packages={"p": Package(streams={"s": BASE}), "q": Package()}),
    ],
)
def test_etag_of_the_rest(other: Repository) -> None:
    """The ETag of /p changes with packages, names and titles."""
    base = Repository(format=1, packages={"p": Package(streams={"s": BASE})})
    assert top_etag(base) != top_etag(other)


def test_etag_of_messages() -> None:
    """What is not on the wire tells nobody."""
    base, other = repository(archive()), repository(archive(), message="m", author="a")
    assert top_etag(base) == top_etag(other)


# ----------------------------------------------------------------------------------------------
# Collections and discovery

TITLED = Catalog.of(
    Repository(
        format=1,
        title='A "b" \\',
        packages={
            "b": Package(title="Bé", streams={"y": stream(closed=True), "x": stream(sequence=3)}),
            "a": Package(),
        },
    )
)


def test_collections() -> None:
    """Packages and streams are listed by name, in all formats."""
    top, package = TITLED.find(("p",)), TITLED.find(("p", "b"))
    assert LINK == top.formats[0] == package.formats[0]
    assert cbor2.loads(payload(top)) == {"a": [""], "b": ["Bé"]}
    cddl.validate(payload(top), "packages")
    expected = {"x": ["2.4.1", 3, False], "y": ["2.4.1", 17, True]}
    assert expected == cbor2.loads(payload(package))
    cddl.validate(payload(package), "streams")
    assert payload(top, fmt=JSON) == '{"a":{"title":""},"b":{"title":"Bé"}}'.encode()
    links = '</p/a>;rt="netota.package";ct="40 50 60",</p/b>;rt="netota.package";ct="40 50 60"'
    assert f'{links};title="Bé"' == payload(top, fmt=LINK).decode()
    assert payload(TITLED.find(("p", "a")), fmt=LINK) == b""
    assert top.observable
    assert not package.observable


TOP = '</p>;rt="netota.packages";ct="40 50 60";obs;title="A \\"b\\" \\\\"'
A = '</p/a>;rt="netota.package";ct="40 50 60"'
B = '</p/b>;rt="netota.package";ct="40 50 60";title="Bé"'
X = '</p/b/s/x>;rt="netota.stream";ct="50 60";obs;sz=18'
Y = '</p/b/s/y>;rt="netota.stream";ct="50 60";obs;sz=20'


@pytest.mark.parametrize(
    ("query", "expected"),
    [
        ([], [TOP, A, B, X, Y]),
        (["rt=netota.stream"], [X, Y]),
        (["rt=netota.package"], [A, B]),
        (["rt=netota.package*"], [TOP, A, B]),
        (["rt=netota.*"], [TOP, A, B, X, Y]),
        (["rt=*"], [TOP, A, B, X, Y]),
        (["rt=netota"], []),
        (["href=/p/b/s/x"], [X]),
        (["href=/p/b*"], [B, X, Y]),
        (["href=/p/b"], [B]),
        (["href=p/b"], []),
        (["ct=40"], [TOP, A, B]),
        (["ct=60"], [TOP, A, B, X, Y]),
        (["ct=6"], []),
        (["title=Bé"], [B]),
        (["title=*"], [TOP, B]),
        (["title="], []),
        (["obs=*"], [TOP, X, Y]),
        (["if=x"], []),
        (["colour=*"], []),
        (["rt"], [TOP, A, B, X, Y]),
    ],
)
def test_discovery(query: list[str], expected: list[str]) -> None:
    """/.well-known/core has all links that pass the filter; `*` at the end stands for the rest."""
    core = TITLED.find((".well-known", "core"))
    assert type(core) is DiscoveryResource
    assert ",".join(expected) == payload(core, *query, fmt=LINK).decode()


def test_size_in_links() -> None:
    """`sz` is the size of the default representation."""
    resource = served(*MANY)
    assert resource.link().endswith(f";sz={len(payload(resource))}")


@pytest.mark.parametrize(
    "path", [(), ("",), ("P",), ("p", "x"), ("p", "a", "s", "x"), ("p", "b", "s")]
)
def test_not_found(path: tuple[str, ...]) -> None:
    """There is nothing at other paths."""
    with pytest.raises(NotFoundError):
        TITLED.find(path)


# ----------------------------------------------------------------------------------------------
# From one catalog to the next


def test_taking_over() -> None:
    """A stream that did not change is the same object, with the same ready bytes."""
    kept, changed = stream(sequence=1), stream(sequence=2)
    package = Package(streams={"kept": kept, "changed": changed, "gone": kept})
    old = Catalog.of(Repository(format=1, packages={"p": package}))
    ready = old.find(("p", "p", "s", "kept")).represent(["arch=arm"], CBOR, "coap")
    streams = {"kept": kept, "changed": attrs.evolve(changed, sequence=3), "new": kept}
    new = Catalog.of(
        Repository(format=1, packages={"p": attrs.evolve(package, streams=streams)}), old
    )
    assert old.find(("p", "p", "s", "kept")) is new.find(("p", "p", "s", "kept"))
    assert ready is new.find(("p", "p", "s", "kept")).represent(["arch=arm"], CBOR, "coap")
    expected = {("p", "p", "s", name) for name in ("changed", "gone", "new")}
    differing = old.differing(new)
    assert expected == {path for path in differing if len(path) == 4}
    assert differing == new.differing(old)
    assert old.differing(old) == set()


def test_taking_over_with_another_poll() -> None:
    """A stream whose package has another poll_s is rendered again, unless it has its own."""
    streams = {"own": stream(poll_s=5), "default": stream()}
    old = Catalog.of(Repository(format=1, packages={"p": Package(poll_s=7, streams=streams)}))
    new = Catalog.of(Repository(format=1, packages={"p": Package(poll_s=8, streams=streams)}), old)
    differing = {path[-1] for path in old.differing(new) if len(path) == 4}
    assert {"default"} == differing


def test_ready_once() -> None:
    """A view is rendered once, whatever a client says besides that makes no difference."""
    resource = served(*MANY)
    first = resource.represent(["arch=arm"], CBOR, "coap")
    assert first is resource.represent(["arch=arm", "colour=red", "arch=z80"], CBOR, "http")
    for index in range(1_000):
        resource.represent([f"arch={index}", f"x{index}=1", f"scheme=x{index}"], CBOR, "coap")
    assert len(resource.cache._ready) <= 3


def test_render_cache_is_bounded() -> None:
    """What is kept is bounded in bytes; the least recently used leaves."""
    machines = [f"m{n}" for n in range(130)]
    offers = [(metric, "/" + "x" * 245) for metric in range(1, 9)]
    resource = served(*(archive(m, *offers, machine=m) for m in machines))
    often = resource.represent(["full"], CBOR, "coap")
    for machine in machines:
        # All others suit as well: each view is large.
        query = ["full", *(f"machine={other}" for other in (machine, *machines))]
        resource.represent(query, CBOR, "coap")
        assert often is resource.represent(["full"], CBOR, "http")
    kept = sum(len(ready.payload) for ready in resource.cache._ready.values())
    assert 50 * len(often.payload) <= kept <= 2**24 < len(machines) * len(often.payload)


def test_discovery_is_bounded() -> None:
    """Few filtered lists are kept."""
    core = Catalog.of(repository(*MANY)).find((".well-known", "core"))
    first = core.represent(["rt=core"], LINK, "coap")
    assert first is core.represent(["rt=core"], LINK, "coap")
    for index in range(100):
        core.represent([f"rt={index}"], LINK, "coap")
    assert first is not core.represent(["rt=core"], LINK, "coap")
    assert len(core._ready) <= 16  # type: ignore[attr-defined]


# ----------------------------------------------------------------------------------------------
# Advice


def test_no_advice() -> None:
    """What fits is not spoken of."""
    assert list(advice(repository(archive("a", (1, "coap://h/x"), machine="board")))) == []


ONCE = " once a gateway adds its own offer"


@pytest.mark.parametrize(
    ("offers", "size", "when"),
    [
        ([(1, URL)], 0, ""),
        ([(1, URL), (2, URL)], 0, ""),
        ([(1, URL), (2, URL), (3, "/b/x")], 0, ONCE),
        ([(1, URL), (2, URL), (3, URL)], 284, ONCE),
        ([(1, URL), (2, URL), (3, URL), (4, URL)], 287, ""),
        ([(1, "/b/x")] * 16, 0, ""),
        ([(1, URL)] * 16, 923, ""),
    ],
)
def test_advice_on_size(offers: list[tuple[int, str]], size: int, when: str) -> None:
    """What a device would not get whole, now or behind a gateway, is told once per archive."""
    expected = (
        f"packages/sensor-node/streams/stable.toml: archives[0]: ?machine=board takes {size} "
        f"bytes{when}: more than one datagram of 256, so something is left out"
    )
    found = [str(issue) for issue in advice(repository(archive("a", *offers, machine="board")))]
    assert [expected] * (size > 0) == found


@pytest.mark.parametrize(("length", "warned"), [(20, False), (21, True)])
def test_advice_on_paths(length: int, warned: bool) -> None:
    """A path and query of more than 63 characters is told."""
    # p/sensor-node/s/stable?machine=…&scheme=coap
    base = len("p/sensor-node/s/stable?machine=&scheme=coap")
    assert base == 43
    machine = "m" * length
    found = list(advice(repository(archive("a", machine="short"), archive("b", machine=machine))))
    expected = f"p/sensor-node/s/stable?machine={machine}&scheme=coap has 64 characters"
    assert warned == any(issue.reason.startswith(expected) for issue in found)
    assert warned == bool(found)


@given(st.lists(strategies.archives, max_size=3, unique_by=lambda item: item.name.casefold()))
def test_advice_of_anything(archives: list[Archive]) -> None:
    """Whatever is valid can be advised on."""
    for issue in advice(repository(*archives)):
        assert issue.file == "packages/sensor-node/streams/stable.toml"


def test_renders_of_states_that_are_gone_leave_the_cache() -> None:
    """Those of the present one, and of what it goes on with, stay."""
    old = repository(archive("a", (1, "coap://h/x"), machine="board"))
    new = repository(archive("a", (2, "coap://h/x"), machine="board"))
    one = Catalog.of(old)
    for catalog in (one, Catalog.of(new, one)):
        for query in (["machine=board"], ["full"], ["head"]):
            catalog.find(PATH).represent(query, ContentFormat.CBOR, "coap")
    kept = one.cache._ready
    assert len(kept) == 6
    one.trim_cache()
    assert {key[1] for key in kept} == {one.find(PATH).fingerprint}  # type: ignore[attr-defined]
