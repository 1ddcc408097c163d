"""Hypothesis strategies for the values of the model and for selections.

They draw valid values only, of all that the rules allow, unless a comment says otherwise.
"""

from __future__ import annotations

import string
from datetime import UTC, datetime, timedelta, timezone
from typing import Any

from hypothesis import settings
from hypothesis import strategies as st

from netota_coap.model.selection import Selection
from netota_coap.model.values import (
    CONTENT_ATTRIBUTES,
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
)


def fewer(times: int, **others: Any) -> settings:
    """Return settings with so many times fewer examples than the profile has."""
    return settings(max_examples=settings().max_examples // times, **others)


_ALPHANUMERIC = string.ascii_letters + string.digits


def integers(low: int, limit: str) -> st.SearchStrategy[int]:
    return st.integers(low, LIMITS[limit].value)


def texts(limit: str = "text") -> st.SearchStrategy[str]:
    """Text of any script; control characters, which the rules refuse, are left out."""
    bound = LIMITS[limit].value
    characters = st.characters(codec="utf-8", exclude_categories=("Cc", "Zl", "Zp"))
    return st.text(characters, min_size=1, max_size=bound).filter(
        lambda text: len(text.encode()) <= bound
    )


def names(limit: str = "name") -> st.SearchStrategy[str]:
    rest = st.text(_ALPHANUMERIC + "._+-", max_size=LIMITS[limit].value - 1)
    return st.builds(str.__add__, st.sampled_from(_ALPHANUMERIC), rest)


# Names of two letters at most clash now and then, and make selections that suit.
_SHORT = st.text("ab", min_size=1, max_size=2)

attribute_names = st.one_of(_SHORT, names("text")).filter(
    lambda name: name not in RESERVED_ATTRIBUTES and not name.startswith("x-")
)
attribute_values = st.one_of(
    _SHORT, texts(), st.booleans(), integers(-LIMITS["integer"].value, "integer")
)

urls = st.builds(
    str.__add__,
    st.sampled_from(("coap://", "coaps://[::1]/", "HTTP://", "https://cdn.example.com/", "/b/")),
    st.text(st.characters(min_codepoint=0x21, max_codepoint=0x7E), min_size=1, max_size=200),
).filter(lambda url: not url.startswith("//"))

# Offsets of whole minutes: TOML has no others.
times = st.builds(
    lambda seconds, minutes: datetime.fromtimestamp(seconds, UTC).astimezone(
        timezone(timedelta(minutes=minutes))
    ),
    # A day less than the rules allow at both ends, as the offset must not lead out of 1 to 9999.
    st.integers(86_400, 253_402_214_400),
    st.integers(-23 * 60, 23 * 60),
)

offers = st.builds(Offer, url=urls, metric=integers(0, "metric"))

envelopes = st.builds(
    Envelope,
    type=st.one_of(texts(), st.sampled_from(("application/octet-stream", "application/cbor"))),
    size=integers(0, "size"),
    sha256=st.binary(min_size=32, max_size=32),
)


def _maybe(strategy: st.SearchStrategy) -> st.SearchStrategy:
    return st.one_of(st.none(), strategy)


_field = _maybe(st.one_of(_SHORT, texts()))

contents = st.builds(
    Content,
    type=_field,
    arch=_field,
    machine=_field,
    debug=_maybe(st.booleans()),
    filesystem=_field,
    compression=_field,
    attributes=st.dictionaries(attribute_names, attribute_values, max_size=4),
)

# Few offers and archives: the bounds are tested by hand, and large values are slow to draw.
archives = st.builds(
    Archive,
    name=st.one_of(_SHORT, names()),
    envelope=envelopes,
    content=contents,
    offers=st.lists(offers, max_size=3).map(tuple),
)
archive_lists = st.lists(
    archives, max_size=3, unique_by=lambda archive: archive.name.casefold()
).map(tuple)


@st.composite
def streams(draw: st.DrawFn, *, on_disk: bool = False) -> Stream:
    """A stream as the disk has it, or as the wire has it (then without what is for people)."""
    closed = draw(st.booleans())
    fields = {
        "version": draw(texts()),
        "sequence": draw(integers(1, "sequence")),
        "published": draw(times),
        "closed": closed,
        "replacement": draw(_maybe(st.tuples(names(), names()))) if closed else None,
        "poll_s": draw(_maybe(integers(1, "poll"))),
        "archives": draw(archive_lists if on_disk else _maybe(archive_lists)),
    }
    if on_disk:
        fields |= {
            "title": draw(_maybe(texts("title"))),
            "author": draw(_maybe(texts("title"))),
            "message": draw(_maybe(texts("title"))),  # shorter than allowed, to be quick
        }
    return Stream(**fields)


def _tables(values: st.SearchStrategy) -> st.SearchStrategy:
    """Tables by names that go together."""
    pairs = st.tuples(st.one_of(_SHORT, names()), values)
    return st.lists(pairs, max_size=3, unique_by=lambda pair: pair[0].casefold()).map(dict)


packages = st.builds(
    Package,
    title=_maybe(texts("title")),
    summary=_maybe(texts("title")),
    homepage=_maybe(urls),
    poll_s=_maybe(integers(1, "poll")),
    offers=st.lists(offers, max_size=3).map(tuple),
    streams=_tables(streams(on_disk=True)),
)

repositories = st.builds(
    Repository, format=st.just(1), title=_maybe(texts("title")), packages=_tables(packages)
)

package_entries = st.builds(PackageEntry, title=st.one_of(st.just(""), texts("title")))

stream_entries = st.builds(
    StreamEntry, version=texts(), sequence=integers(1, "sequence"), closed=st.booleans()
)

package_lists = _tables(package_entries)
stream_lists = _tables(stream_entries)

# Values that archives of `archives` often have, so that something suits.
_wanted = st.lists(st.one_of(_SHORT, st.booleans(), attribute_values), max_size=3)

selections = st.builds(
    Selection.of,
    st.dictionaries(
        st.one_of(st.sampled_from((*CONTENT_ATTRIBUTES, "scheme")), attribute_names),
        _wanted,
        max_size=4,
    ),
)
