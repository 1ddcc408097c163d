"""Commands for operators: the configuration of a service, and its systemd unit."""

from __future__ import annotations

import json
import os
from pathlib import Path

import click

from netota_coap.cli import json_output
from netota_coap.cli.common import FILE, command, json_option, print_json, print_table, say
from netota_coap.service.config import assemble, default_file, documented
from netota_coap.service.systemd import UNIT, unit, unit_directory
from netota_coap.service.systemd import install as install_unit

_file_argument = click.argument("file", metavar="[FILE]", type=FILE, required=False)


@click.group(epilog="Example: netota-coap config check /etc/netota-coap/config.toml")
def config() -> None:
    """If no FILE is given, it is the one that `serve` reads: /etc/netota-coap/config.toml."""


@command("config check /etc/netota-coap/config.toml", group=config)
@_file_argument
def check(file: Path | None) -> None:
    """Check a configuration file by itself, without environment variables."""
    named = file or default_file(os.environ)
    assemble(named, {})
    click.echo(f"{named}: valid")


@command("config show", group=config)
@_file_argument
@json_option
def show(file: Path | None, as_json: bool) -> None:
    """Show the value of each setting, and where it comes from.

    The file need not exist unless it is named; environment variables override it.
    """
    effective = assemble(file, os.environ)
    for name in effective.strays:
        say(f"{name}: unknown setting, ignored")
    shown = json_output.configuration(effective)
    if as_json:
        print_json(shown)
        return
    values = ((key, json.dumps(row["value"]), row["from"]) for key, row in shown.items())
    print_table(("KEY", "VALUE", "FROM"), values)


@command("config default > config.toml", group=config)
def default() -> None:
    """Print a configuration file with every key, its default and its meaning, commented out."""
    click.echo(documented(), nl=False)


@click.group(epilog="Example: netota-coap systemd install")
def systemd() -> None:
    """The unit is called netota-coapd.service, and serves this installation."""


_user_option = click.option(
    "--user", is_flag=True, help="Use your own service manager, not the system's."
)


@command("systemd print", "print", systemd)
@_user_option
def print_unit(user: bool) -> None:
    """Print the unit netota-coapd.service for this installation."""
    click.echo(unit(user=user), nl=False)


@command("systemd install", group=systemd)
@_user_option
def install(user: bool) -> None:
    """Write the unit netota-coapd.service, and enable it, so that it starts at the next boot."""
    file = install_unit(unit_directory(os.environ, user=user), user=user)
    start = f"systemctl{' --user' if user else ''} start {UNIT}"
    click.echo(f"{file}: enabled; start it now: {start}")
