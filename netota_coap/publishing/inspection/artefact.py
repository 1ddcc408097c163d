"""The result of an inspection."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import attrs

from netota_coap.model.values import Content, Envelope, Rule


@attrs.frozen(kw_only=True)
class Artefact:
    """What a file is, by its own bytes and the Zephyr build directory around it.

    Attributes:
        version: The version that the file states; else that of the Zephyr build.
        stated: Which of `version`, `arch`, `filesystem`, `compression` the file itself states;
            publishing it with other values is an error.
        facts: Values for people and scripts by name, in the types of JSON; `format` is the first.
    """

    envelope: Envelope
    content: Content = Content()
    version: str | None = None
    stated: frozenset[str] = frozenset()
    facts: Mapping[str, Any] = attrs.field(hash=False)


def if_valid(rule: Rule, value: Any) -> str | None:
    """Return the value if the model's rule accepts it, else None."""
    return value if rule(value) is None else None
