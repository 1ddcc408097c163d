"""Options of commands, made from the table of settings."""

from __future__ import annotations

import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import click

from netota_coap.cli.common import FILE
from netota_coap.service.config import SETTINGS, Command, Setting


def setting_options(command: Command) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Add the options of a command's settings; it gets those that were given as `options`.

    `options` maps attributes of `Config` to values, which `config` validates.
    """

    def decorate(function: Callable[..., Any]) -> Callable[..., Any]:
        def run(**given: Any) -> Any:
            values = {row.name: given.pop(row.name) for row in rows}
            options = {name: value for name, value in values.items() if value not in (None, ())}
            return function(options=options, **given)

        wrapped: Callable[..., Any] = functools.wraps(function)(run)
        rows = [row for row in SETTINGS if row.option(command)]
        for row in reversed(rows):
            wrapped = _parameter(row, row.option(command))(wrapped)
        return wrapped

    return decorate


def _parameter(row: Setting, option: str) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    kind = row.kind
    if not option.startswith("-"):
        return click.argument(row.name, metavar=f"[{option}]", type=FILE, required=False)
    help_text = f"{row.help} Repeatable." if kind.many else row.help
    if kind.of is bool:
        return click.option(option, row.name, is_flag=True, default=None, help=help_text)
    if row.default is not None:
        default = ", ".join(row.default) if kind.many else row.default
        help_text += f" [default: {default}]"
    types = {int: int, Path: FILE, str: click.Choice(kind.choices) if kind.choices else str}
    return click.option(
        option,
        row.name,
        metavar=None if kind.choices else kind.metavar,
        type=types[kind.of],
        multiple=kind.many,
        help=help_text,
    )
