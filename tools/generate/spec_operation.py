"""Writes the parts of `spec/operation.md` for `make_spec.py`: settings and metrics."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from typing import get_args

from netota_coap.monitoring import METRICS
from netota_coap.service.config import SETTINGS, Command, Setting


def settings() -> str:
    """List the settings."""
    rows = "".join(
        f"| `{row.key}` | {_option(row)} | {row.kind.name} | {_default(row)} "
        f"| {'reload' if row.at_reload else 'restart'} | {row.help} |\n"
        for row in SETTINGS
    )
    return (
        "| key | option | values | default | takes effect at | meaning |\n"
        f"| --- | --- | --- | --- | --- | --- |\n{rows}"
    )


def _option(row: Setting) -> str:
    options = [f"{name} {row.option(name)}" for name in get_args(Command) if row.option(name)]
    return ", ".join(f"`{option}`" for option in options)


def _default(row: Setting) -> str:
    return "" if row.default is None else f"`{json.dumps(row.default)}`"


def metrics() -> str:
    """List the metrics."""
    rows = "".join(
        f"| `{each.name}` | {each.kind} | {', '.join(f'`{label}`' for label in each.labels)} "
        f"| {each.help} |\n"
        for each in METRICS
    )
    return f"| metric | kind | labels | meaning |\n| --- | --- | --- | --- |\n{rows}"


PARTS: Mapping[str, Callable[[], str]] = {
    "table:settings": settings,
    "table:metrics": metrics,
}
"""Functions that write a part of the document, by the name in its marker."""
