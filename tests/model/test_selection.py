"""Narrowing, as DESIGN section 4 has it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import attrs
import pytest
from hypothesis import given
from hypothesis import strategies as st

from netota_coap.model.selection import Index, Selection, preferred, suits, text_form
from netota_coap.model.values import Archive, Content, Envelope, Offer
from tests.support.strategies import archives, selections

ENVELOPE = Envelope(type="application/x", size=1, sha256=bytes(32))
ORDER = ("type", "arch", "machine", "debug", "filesystem", "compression")


def archive(name: str, *urls: str, **attributes: Any) -> Archive:
    """Return an archive with offers of the metrics 0, 1, … in the order of the URLs."""
    fields = {key: attributes.pop(key) for key in ORDER if key in attributes}
    return Archive(
        name=name,
        envelope=ENVELOPE,
        content=Content(**fields, attributes=attributes),
        offers=tuple(Offer(url=url, metric=metric) for metric, url in enumerate(urls)),
    )


PLAIN = archive("plain")
ARM = archive("arm", arch="arm")
ARM_A = archive("arm-a", arch="arm", machine="a")
ARM_B = archive("arm-b", arch="arm", machine="b")
X86 = archive("x86", arch="x86")
ALL = (X86, PLAIN, ARM_B, ARM_A, ARM)


@pytest.mark.parametrize(
    ("wanted", "expected"),
    [
        # Nothing said: everything, by name.
        ({}, ["arm", "arm-a", "arm-b", "plain", "x86"]),
        # What does not say the attribute suits everybody, and comes last.
        ({"arch": "arm"}, ["arm", "arm-a", "arm-b", "plain"]),
        ({"arch": "x86"}, ["x86", "plain"]),
        ({"arch": "riscv"}, ["plain"]),
        # Given twice: either, the first preferred.
        ({"arch": ["x86", "arm"]}, ["x86", "arm", "arm-a", "arm-b", "plain"]),
        ({"arch": ["arm", "x86"]}, ["arm", "arm-a", "arm-b", "x86", "plain"]),
        # A value given again keeps its first rank.
        ({"arch": ["arm", "x86", "arm"]}, ["arm", "arm-a", "arm-b", "x86", "plain"]),
        # In the fixed order: arch before machine, in whatever order they are given.
        ({"machine": "b", "arch": "arm"}, ["arm-b", "arm", "plain"]),
        ({"machine": ["b", "a"], "arch": "arm"}, ["arm-b", "arm-a", "arm", "plain"]),
        ({"machine": ["b", "a"]}, ["arm-b", "arm-a", "arm", "plain", "x86"]),
        # Values compare case-sensitively and as a whole.
        ({"arch": "ARM"}, ["plain"]),
        ({"arch": "ar"}, ["plain"]),
        ({"arch": ""}, ["plain"]),
        # An attribute that no archive has narrows nothing.
        ({"colour": "red"}, ["arm", "arm-a", "arm-b", "plain", "x86"]),
        # No attributes.
        ({"head": "1", "full": "1", "sequence": "9", "name": "arm"},
         ["arm", "arm-a", "arm-b", "plain", "x86"]),
        # No values: not said.
        ({"arch": []}, ["arm", "arm-a", "arm-b", "plain", "x86"]),
    ],
)  # fmt: skip
def test_narrow(wanted: Mapping[str, Any], expected: list[str]) -> None:
    """A selection keeps what suits, the preferred first."""
    for given_in in (ALL, ALL[::-1]):
        narrowed = Selection.of(wanted).narrow(given_in, "coap")
        assert expected == [item.name for item in narrowed]


@pytest.mark.parametrize(
    ("value", "wanted", "expected"),
    [
        (True, "true", True),
        (True, True, True),
        (True, "True", False),
        (True, 1, False),
        (True, "1", False),
        (False, "false", True),
        (False, 0, False),
        (512, "512", True),
        (512, 512, True),
        (512, "0512", False),
        (-1, "-1", True),
        (1, True, False),
        ("512", 512, True),
        ("true", True, True),
        ("é", "é", True),
        ("é", "e\u0301", False),
    ],
)
def test_text_forms(value: Any, wanted: Any, expected: bool) -> None:
    """Values are compared by their text."""
    assert expected == suits(archive("a", flash=value), Selection.of({"flash": wanted}))


@pytest.mark.parametrize(
    ("value", "expected"), [(True, "true"), (False, "false"), (1, "1"), (-512, "-512"), ("X", "X")]
)
def test_text_form(value: Any, expected: str) -> None:
    """Booleans are lower case, numbers decimal, text itself."""
    assert expected == text_form(value)


def test_debug() -> None:
    """`debug` is compared as `true` and `false`."""
    builds = (archive("d", debug=True), archive("r", debug=False), archive("x"))
    narrowed = Selection.of({"debug": "false"}).narrow(builds, "coap")
    assert [item.name for item in narrowed] == ["r", "x"]
    narrowed = Selection.of({"debug": ["false", "true"]}).narrow(builds, "coap")
    assert [item.name for item in narrowed] == ["r", "d", "x"]


def test_order_of_attributes() -> None:
    """Six of content first, then free ones by name; each decides before the next."""
    wanted = {"b": "1", "a": "1", **dict.fromkeys(reversed(ORDER), "x"), "Z": "1"}
    expected = (*ORDER, "Z", "a", "b")
    assert expected == tuple(name for name, _ in Selection.of(wanted).attributes)
    first = archive("z", a="1", b="2")
    second = archive("y", a="2", b="1")
    selection = Selection.of({"b": ["1", "2"], "a": ["1", "2"]})
    assert (first, second) == selection.narrow((second, first), "coap")


@pytest.mark.parametrize(
    ("schemes", "request_scheme", "expected"),
    [
        ([], "coap", {"a": "chs", "b": "/", "c": ""}),
        (["coap"], "coap", {"a": "c", "b": "/"}),
        (["COAP"], "coap", {"a": "c", "b": "/"}),
        (["https"], "coap", {"a": "s"}),
        # Schemes choose offers, their order does not matter: the metric does.
        (["https", "http"], "coap", {"a": "hs"}),
        (["http"], "http", {"a": "h", "b": "/"}),
        (["ftp"], "coap", {}),
        (["coa"], "coap", {}),
        ([""], "coap", {}),
    ],
)
def test_schemes(schemes: list[str], request_scheme: str, expected: dict[str, str]) -> None:
    """Offers of other schemes go, and archives that have none left."""
    short = {"coap://h": "c", "HTTP://h": "h", "https://h": "s", "/b/x": "/"}
    given_in = (
        archive("a", "coap://h", "HTTP://h", "https://h"),
        archive("b", "/b/x"),
        archive("c"),
    )
    narrowed = Selection.of({"scheme": schemes}).narrow(given_in, request_scheme)
    actual = {item.name: "".join(short[offer.url] for offer in item.offers) for item in narrowed}
    assert expected == actual


def test_offers_by_metric() -> None:
    """Offers are in the order of their metrics, those of one metric as they were."""
    offers = tuple(Offer(url=f"coap://{m}", metric=ord(m[0])) for m in ("c", "b2", "a", "b1"))
    narrowed = Selection().narrow((attrs.evolve(PLAIN, offers=offers),), "coap")
    assert [offer.url[7:] for offer in narrowed[0].offers] == ["a", "b2", "b1", "c"]


@pytest.mark.parametrize(
    "attributes",
    [
        [("machine", "x")],
        {"machine": "x"},
        (("machine", "x"),),
        (("machine", ["x"]),),
        (("debug", (True,)),),
        ("machine", "x"),
    ],
)
def test_wrong_use_is_refused(attributes: Any) -> None:
    """A selection of other shapes would silently select nothing."""
    with pytest.raises(TypeError, match=r"use Selection\.of"):
        Selection(attributes)
    with pytest.raises(TypeError, match=r"use Selection\.of"):
        Selection(schemes="coap")  # type: ignore[arg-type]


def test_preferred() -> None:
    """The preferred archive is the first, if there is any."""
    assert preferred(ALL, Selection.of({"machine": "b"})) == ARM_B
    assert preferred((X86,), Selection.of({"arch": "arm"})) is None
    assert preferred((), Selection()) is None


def test_what_stays_is_taken_over() -> None:
    """An archive whose offers all stay in their order is the same object."""
    given_in = archive("a", "coap://h", "coap://i")
    assert given_in is Selection.of({"scheme": "coap"}).narrow((given_in,), "coap")[0]


# An oracle that shares nothing with the code but the text of DESIGN.


def _text(value: Any) -> str:
    return {True: "true", False: "false"}[value] if isinstance(value, bool) else f"{value}"


def _said(item: Archive, attribute: str) -> str | None:
    if attribute in ORDER:
        value = getattr(item.content, attribute)
    else:
        value = item.content.attributes.get(attribute)
    return None if value is None else _text(value)


def _before(a: Archive, b: Archive, attributes: list[tuple[str, list[str]]]) -> bool:
    """Whether a comes before b, attribute by attribute."""
    for name, wanted in attributes:
        ranks = [
            len(wanted) if (said := _said(item, name)) is None else wanted.index(said)
            for item in (a, b)
        ]
        if ranks[0] != ranks[1]:
            return ranks[0] < ranks[1]
    return a.name < b.name


@given(
    st.lists(archives, max_size=5, unique_by=lambda item: item.name),
    st.dictionaries(
        st.sampled_from((*ORDER, "a", "b", "scheme")),
        st.lists(st.sampled_from(("a", "b", "ab", "true", "false", "coap", "https")), max_size=3),
        max_size=3,
    ),
)
def test_narrow_as_the_oracle(given_in: list[Archive], wanted: dict[str, list[str]]) -> None:
    """Narrowing is what DESIGN says, step by step."""
    schemes = wanted.get("scheme") or []
    attributes = [(name, wanted[name]) for name in (*ORDER, "a", "b") if wanted.get(name)]
    expected: list[Archive] = []
    for item in given_in:
        if any(_said(item, name) not in (None, *texts) for name, texts in attributes):
            continue
        offers = []
        for offer in item.offers:
            scheme = "coap" if offer.url.startswith("/") else offer.url.split(":")[0].lower()
            if not schemes or scheme in schemes:
                place = sum(other.metric <= offer.metric for other in offers)
                offers.insert(place, offer)
        if schemes and not offers:
            continue
        place = sum(_before(other, item, attributes) for other in expected)
        expected.insert(place, attrs.evolve(item, offers=tuple(offers)))
    assert tuple(expected) == Selection.of(wanted).narrow(given_in, "coap")


@given(st.lists(archives, max_size=4), selections, st.sampled_from(("coap", "https")))
def test_narrow_twice(given_in: list[Archive], selection: Selection, scheme: str) -> None:
    """To narrow what is narrowed changes nothing, and each archive is judged by itself."""
    narrowed = selection.narrow(given_in, scheme)
    assert narrowed == selection.narrow(narrowed, scheme)
    assert len(narrowed) == sum(suits(item, selection, scheme) for item in given_in)


@given(st.lists(archives, max_size=4), selections, st.sampled_from(("coap", "https")))
def test_within_narrows_alike(given_in: list[Archive], selection: Selection, scheme: str) -> None:
    """What is left out because no archive says it makes no difference."""
    vocabulary = Index.of(tuple(given_in), scheme).vocabulary
    within = selection.within(vocabulary)

    assert selection.narrow(given_in, scheme) == within.narrow(given_in, scheme)
    assert within == within.within(vocabulary)


@given(st.lists(archives, max_size=6), selections, st.sampled_from(("coap", "https")))
def test_an_index_narrows_alike(
    given_in: list[Archive], selection: Selection, scheme: str
) -> None:
    """What an index does not look at would not have suited."""
    index = Index.of(tuple(given_in), scheme)

    assert selection.narrow(given_in, scheme) == index.narrow(selection)
