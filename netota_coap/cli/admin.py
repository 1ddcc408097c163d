"""Commands for who operates a service: its configuration, and its service manager."""

from __future__ import annotations

from pathlib import Path

import click

from netota_coap.cli.common import (
    FILE,
    command,
    console,
    json_option,
    print_json,
    say,
    table,
    text,
)

_file_argument = click.argument("file", metavar="[FILE]", type=FILE, required=False)


@click.group(epilog="Example: netota-coap config check /etc/netota-coap/config.toml")
def config() -> None:
    """Check, show and write the configuration of a service."""


@command("config check /etc/netota-coap/config.toml", "check")
@_file_argument
def check(file: Path | None) -> None:
    """Check a configuration file, by itself.

    Without FILE: the one that a service reads.
    """
    import os

    from netota_coap.service.config import assemble, default_file

    named = file or default_file(os.environ)
    assemble(named, {})
    click.echo(f"{named}: can be used")


@command("config show", "show")
@_file_argument
@json_option
def show(file: Path | None, as_json: bool) -> None:
    """Show each value that a service would have, and where it comes from.

    Without FILE: the one that a service reads, if it is there.
    """
    import json
    import os

    from netota_coap.cli import json_output
    from netota_coap.service.config import assemble

    effective = assemble(file, os.environ)
    for name in effective.strays:
        say(f"{name}: no setting is called so")
    shown = json_output.configuration(effective)
    if as_json:
        print_json(shown)
        return
    rows = table("KEY", "VALUE", "FROM")
    for key, row in shown.items():
        rows.add_row(key, text(json.dumps(row["value"])), text(row["from"]))
    console().print(rows)


@command("config default > config.toml", "default")
def default() -> None:
    """Print a configuration file with every key and its default, all of them commented out."""
    from netota_coap.service.config import documented

    click.echo(documented(), nl=False)


@click.group(epilog="Example: netota-coap systemd install")
def systemd() -> None:
    """Let systemd run a service."""


_user_option = click.option("--user", is_flag=True, help="For your own manager, not the system's.")


@command("systemd print", "print")
@_user_option
def print_unit(user: bool) -> None:
    """Print the unit netota-coapd.service, for this installation."""
    from netota_coap.service.systemd import unit

    click.echo(unit(user=user), nl=False)


@command("systemd install", "install")
@_user_option
def install(user: bool) -> None:
    """Write the unit netota-coapd.service and enable it; the next boot starts it, or you do."""
    import os

    from netota_coap.service.systemd import UNIT, install, unit_directory

    file = install(unit_directory(os.environ, user=user), user=user)
    start = f"systemctl{' --user' if user else ''} start {UNIT}"
    click.echo(f"{file}: enabled; start it now: {start}")


for _command in (check, show, default):
    config.add_command(_command)
for _command in (print_unit, install):
    systemd.add_command(_command)

COMMANDS = (config, systemd)
