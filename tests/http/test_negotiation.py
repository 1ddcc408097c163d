"""http/negotiation.py: what requests say, whatever they say."""

from __future__ import annotations

import contextlib

import pytest
from hypothesis import given
from hypothesis import strategies as st

from netota_coap.catalog.stream_query import StreamQuery
from netota_coap.errors import NotFoundError
from netota_coap.http.negotiation import chosen, is_current, parameters_of, path_of


@pytest.mark.parametrize(
    ("accept", "expected"),
    [
        ("", "a/x"),
        (" , ", "a/x"),
        ("a/*", "a/x"),
        ("b/*", "b/z"),
        ("A/Y", "a/y"),
        ("a/y;v=1;Q=0.4, a/x ; q = 0.3", "a/y"),
        ("a/y;q=2, a/x;q=0.1", "a/x"),
        ("a/y;q=, */*;q=0.001", "a/x"),
        ("a/x;q=0, a/*;q=0.5", "a/y"),
        ("*/*;q=0", None),
        ("c/*", None),
        ("a", "a/x"),
        ("a, c/d", None),
        ("text/*;q=0.3, b/z;q=1.000", "b/z"),
    ],
)
def test_chosen(accept: str, expected: str | None) -> None:
    """The most specific range decides on each, the highest quality among them."""
    assert expected == chosen(accept, ["a/x", "a/y", "b/z"])


@given(st.text(), st.binary())
def test_whatever_is_sent(text: str, data: bytes) -> None:
    """Headers, paths and queries of any bytes are read or refused."""
    assert chosen(text, ["a/x", "b/y"]) in ("a/x", "b/y", None)
    assert is_current(text, "0" * 16) in (True, False)
    with contextlib.suppress(NotFoundError):
        path_of(b"/" + data)
    with contextlib.suppress(ValueError):
        StreamQuery.from_query(parameters_of(data))
