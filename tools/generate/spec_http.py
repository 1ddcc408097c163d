"""Writes the part of `spec/http.md` for `make_spec.py`: status codes of errors."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping

from netota_coap.http.site import STATUSES


def statuses() -> str:
    """List the classes of errors with their status codes."""
    rows = "".join(
        f"| `{cls.__name__}` | {(inspect.getdoc(cls) or '').partition('.')[0]} "
        f"| {status.value} {status.phrase} |\n"
        for cls, status in STATUSES.items()
    )
    return f"| error | what it means | status |\n| --- | --- | --- |\n{rows}"


PARTS: Mapping[str, Callable[[], str]] = {"table:statuses": statuses}
"""Functions that write a part of the document, by the name in its marker."""
