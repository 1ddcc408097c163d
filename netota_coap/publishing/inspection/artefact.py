"""An open file: looked at here and there, then read once from end to end."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import attrs

from netota_coap.model.values import Content, Envelope, Rule


@attrs.frozen(kw_only=True)
class Artefact:
    """What a file is, as far as it tells itself, and a Zephyr build directory beside it.

    Attributes:
        envelope: The file as it is downloaded.
        content: What is known of what is inside.
        version: That the file states or, failing that, the Zephyr build.
        stated: Which of `version`, `arch`, `filesystem`, `compression` the file itself states as a
            fact: whoever publishes it as something else contradicts it.
        facts: For people and scripts: by name, in the types of JSON; `format` is the first.
    """

    envelope: Envelope
    content: Content = Content()
    version: str | None = None
    stated: frozenset[str] = frozenset()
    facts: Mapping[str, Any] = attrs.field(hash=False)


def fitting(rule: Rule, value: Any) -> str | None:
    """Return a value that the model takes; one that it refuses is left to the facts."""
    return value if rule(value) is None else None
