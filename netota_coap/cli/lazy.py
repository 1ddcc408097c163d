"""A group of commands that imports the module of a command only when the command is used."""

from __future__ import annotations

import importlib
import inspect
from collections.abc import Mapping
from typing import Any

import click
from click.shell_completion import CompletionItem

Table = Mapping[str, Mapping[str, tuple[str, str]]]
"""Heading → command → `module:attribute` and the first sentence of its help."""


class LazyGroup(click.Group):
    """A group whose list of commands, `--help` and completion import no command.

    The help of a command is its sentence in the table, then the docstring of its function.
    """

    def __init__(self, *arguments: Any, package: str, table: Table, **options: Any) -> None:
        super().__init__(*arguments, **options)
        self._package = package
        self._table = table
        self._rows = {name: row for rows in table.values() for name, row in rows.items()}

    def list_commands(self, _context: click.Context) -> list[str]:
        """Return the names in the order of the table."""
        return list(self._rows)

    def get_command(self, context: click.Context, name: str) -> click.Command | None:
        """Import and return a command."""
        if name in self._rows and name not in self.commands:
            place, sentence = self._rows[name]
            module, _, attribute = place.partition(":")
            found = importlib.import_module(f"{self._package}.{module}")
            command: click.Command = getattr(found, attribute)
            command.help = f"{sentence}\n\n{inspect.cleandoc(command.help or '')}"
            command.short_help = sentence
            self.add_command(command, name)
        return super().get_command(context, name)

    def format_commands(self, _context: click.Context, formatter: click.HelpFormatter) -> None:
        """Write the commands under their headings."""
        width = max(map(len, self._rows))
        for heading, rows in self._table.items():
            with formatter.section(heading):
                formatter.write_dl([(f"{name:{width}}", row[1]) for name, row in rows.items()])

    def shell_complete(self, context: click.Context, incomplete: str) -> list[CompletionItem]:
        """Complete the name of a command, or an option of the group."""
        return [
            CompletionItem(name, help=sentence)
            for name, (_, sentence) in self._rows.items()
            if name.startswith(incomplete)
        ] + click.Command.shell_complete(self, context, incomplete)
