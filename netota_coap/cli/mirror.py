"""The command that copies the streams of another server into a repository."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

import click

from netota_coap.cli.common import command, directory_argument, selecting
from netota_coap.cli.settings import setting_options
from netota_coap.model.selection import Selection
from netota_coap.repository.scaffold import init
from netota_coap.service import logs
from netota_coap.service.config import Config, decode_options

if TYPE_CHECKING:
    from netota_coap.gateway.mirror import Mirror


@command("mirror coap://updates.example.com /var/lib/netota-coap/repository --machine nrf52840dk")
@click.argument("upstream")
@directory_argument
@selecting
@click.option("--once", is_flag=True, help="Copy what is new, and exit; for cron.")
@setting_options("mirror")
def mirror(
    upstream: str,
    directory: Path,
    selection: Selection,
    once: bool,
    options: Mapping[str, object],
) -> int:
    """The repository DIR follows the server UPSTREAM, until SIGTERM or SIGINT.

    UPSTREAM is coap://HOST, or an HTTP URL with the server's prefix, if it has one. DIR is
    created if missing; its streams that are not of this upstream stay as they are. A new state of
    a stream is taken over once the files that suit the devices described, or all, have been
    fetched.

    Exit code 1, with --once: some streams could not be brought up to date.
    """
    # Imported here: they take 0.2 s, which the help does without.
    from netota_coap.gateway.mirror import Mirror
    from netota_coap.service.mirroring import parts_of

    config = Config(**decode_options(options, "mirror"))
    fetcher, choice, terms = parts_of(config, directory, selection)
    following = Mirror(fetcher, upstream, choice, terms)
    if not (directory / "repository.toml").exists():
        init(directory)
    logs.configure("info", "auto", os.environ)
    if not once:
        asyncio.run(_until_stopped(following))
        return 0
    status = asyncio.run(following.once())
    click.echo(f"{status.uri}: {status.behind} streams behind")
    return 1 if status.behind else 0


async def _until_stopped(mirror: Mirror) -> None:
    """Run until SIGTERM or SIGINT."""
    running = asyncio.ensure_future(mirror.run())
    for number in (signal.SIGTERM, signal.SIGINT):
        asyncio.get_running_loop().add_signal_handler(number, running.cancel)
    with contextlib.suppress(asyncio.CancelledError):
        await running
