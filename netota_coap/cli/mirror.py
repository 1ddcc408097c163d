"""The command that keeps a repository level with an upstream."""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import click

from netota_coap.cli.common import command, directory_argument, selecting

if TYPE_CHECKING:
    from netota_coap.gateway.mirror import Mirror
    from netota_coap.model.selection import Selection


@command("mirror coap://updates.example.com /var/lib/netota-coap/repository --machine nrf52840dk")
@click.argument("upstream")
@directory_argument
@click.option(
    "--package", "packages", metavar="PATTERN", multiple=True, help="Again for each. [default: *]"
)
@click.option(
    "--stream", "streams", metavar="PATTERN", multiple=True, help="Again for each. [default: *]"
)
@selecting
@click.option("--once", is_flag=True, help="Become level, and end: for cron.")
@click.option(
    "--announce",
    type=click.Choice(["fetched", "at-once"]),
    default="fetched",
    show_default=True,
    help="When devices hear of a new state: once its files are here, or before that.",
)
@click.option(
    "--limit-bytes-s", metavar="N", type=click.IntRange(min=1), help="Of all downloads together."
)
@click.option(
    "--keep-free",
    metavar="BYTES",
    type=click.IntRange(min=0),
    default=0,
    help="What is to stay free on the disk.",
)
@click.option(
    "--size-cap",
    metavar="BYTES",
    type=click.IntRange(min=0),
    help="Of all files together: those leave that no stream holds any more, the oldest first.",
)
@click.option(
    "--in-flight",
    type=click.IntRange(1, 64),
    default=1,
    show_default=True,
    help="Blocks that are asked for at a time over CoAP; a kill costs as many.",
)
def mirror(
    upstream: str,
    directory: Path,
    packages: Sequence[str],
    streams: Sequence[str],
    selection: Selection,
    once: bool,
    announce: str,
    limit_bytes_s: int | None,
    keep_free: int,
    size_cap: int | None,
    in_flight: int,
) -> int:
    """Keep a repository level with another server, UPSTREAM, and fetch the files that it names.

    UPSTREAM is coap://HOST, or of HTTP with its prefix, if it has one. DIR is made if it is no
    repository; streams in it that are not of this upstream stay as they are. A state of a stream
    takes its place when all of its files have come that are needed here: that suit a device as the
    options tell it, or all. It runs until SIGTERM or SIGINT. With --once, exit code 1: something
    is not level.
    """
    import asyncio
    import os

    from netota_coap.gateway.adoption import EVERYTHING, Choice
    from netota_coap.gateway.blob_fetcher import BlobFetcher
    from netota_coap.gateway.mirror import Mirror, Terms
    from netota_coap.repository.scaffold import init
    from netota_coap.service import logs

    choice = Choice(tuple(packages) or EVERYTHING, tuple(streams) or EVERYTHING, selection)
    fetcher = BlobFetcher(directory, limit_bytes_s, keep_free, size_cap, in_flight)
    it = Mirror(fetcher, upstream, choice, Terms(announce_at_once=announce == "at-once"))
    if not (directory / "repository.toml").exists():
        init(directory)
    logs.configure("info", "auto", os.environ)
    if not once:
        asyncio.run(_until_stopped(it))
        return 0
    status = asyncio.run(it.once())
    click.echo(f"{status.uri}: {status.behind} streams behind")
    return 1 if status.behind else 0


async def _until_stopped(mirror: Mirror) -> None:
    """Run until SIGTERM or SIGINT."""
    import asyncio
    import signal

    running = asyncio.ensure_future(mirror.run())
    for number in (signal.SIGTERM, signal.SIGINT):
        asyncio.get_running_loop().add_signal_handler(number, running.cancel)
    with contextlib.suppress(asyncio.CancelledError):
        await running


COMMANDS = (mirror,)
