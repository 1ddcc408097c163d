"""The command that serves a repository."""

from __future__ import annotations

import asyncio
import logging
import os
from collections.abc import Mapping
from pathlib import Path

import click

from netota_coap.cli.common import FILE, command
from netota_coap.cli.settings import setting_options
from netota_coap.service import logs
from netota_coap.service.config import Effective, assemble


@command("serve fleet --bind [::]:5683")
@click.option(
    "--config",
    "file",
    metavar="FILE",
    type=FILE,
    help="Configuration file; environment variables and options override it. "
    "[default: /etc/netota-coap/config.toml, if it exists]",
)
@setting_options("serve")
def serve(file: Path | None, options: Mapping[str, object]) -> None:
    """Devices are served over CoAP, and over HTTP with --http, and notified of each change.

    DIR is not needed if the configuration names it. SIGHUP reloads the repository and the
    settings that can change while serving; SIGTERM and SIGINT end the command. A malformed
    repository is refused at the start; later, the last valid state is still served, and the log
    says what is wrong.
    """
    # Imported here: they take 0.2 s, which the help does without.
    from netota_coap.service.gc_pauses import short_pauses
    from netota_coap.service.service import Service
    from netota_coap.service.systemd import Manager

    def read() -> Effective:
        return assemble(file, os.environ, options)

    effective = read()
    config = effective.config
    logs.configure(config.log_level, config.log_format, os.environ)
    for name in effective.strays:
        logging.getLogger("netota_coap").warning("%s: unknown setting, ignored", name)
    manager = Manager.of(os.environ)
    listening = lambda uri: click.echo(f"listening on {uri}")  # noqa: E731
    service = Service(config, listening, lambda: read().config, manager)
    with short_pauses():  # here, since it concerns the whole process
        asyncio.run(service.run())
