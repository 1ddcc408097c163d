"""The parts of `spec/operation.md` that `make_spec.py` makes: settings and metrics."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping

from netota_coap.monitoring import METRICS
from netota_coap.service.config import SETTINGS, Config, Setting


def settings() -> str:
    """Describe each setting."""
    rows = "".join(
        f"| `{row.key}` | {_option(row)} | {row.kind.name} | {_default(row)} "
        f"| {'reload' if row.at_reload else 'restart'} | {row.help} |\n"
        for row in SETTINGS
    )
    return (
        "| key | option of `serve` | values | default | takes effect at | meaning |\n"
        f"| --- | --- | --- | --- | --- | --- |\n{rows}"
    )


def _option(row: Setting) -> str:
    return f"`{row.option}`" if row.option else ""


def _default(row: Setting) -> str:
    return "" if row.example else f"`{json.dumps(row.plain(Config()))}`"


def metrics() -> str:
    """Describe each metric."""
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
"""What can stand in the document, by the name in its marker."""
