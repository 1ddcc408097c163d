"""The command that serves on a developer's machine."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import sys
from collections.abc import Sequence
from pathlib import Path

import click
from rich.console import Console

from netota_coap.cli.common import FILE, STREAM, command
from netota_coap.model.values import StreamName
from netota_coap.monitoring import Metrics
from netota_coap.repository.scaffold import init
from netota_coap.service import dev as desk
from netota_coap.service.config import Config
from netota_coap.service.service import Service


@command("dev build --repository /tmp/fleet")
@click.argument("builds", metavar="[BUILD]...", type=FILE, nargs=-1)
@click.option(
    "--repository",
    metavar="DIR",
    type=FILE,
    default=Path(".netota-dev"),
    help="Directory of the repository; it is created if missing.",
)
@click.option(
    "--stream",
    "name",
    metavar="PKG/STREAM",
    type=STREAM,
    default="local/dev",
    help="Stream to publish to.",
)
@click.option(
    "--bind",
    default="localhost:5683",
    metavar="HOST:PORT",
    help="Address to listen on for CoAP; [::]:5683 for boards on the network.",
)
@click.option(
    "--http",
    default="localhost:8000",
    metavar="HOST:PORT",
    help="Address to listen on for HTTP.",
)
def dev(builds: Sequence[Path], repository: Path, name: StreamName, bind: str, http: str) -> None:
    """BUILD is a Zephyr build directory, a directory with a RAUC bundle, or a file.

    Each new build is published. Requests, publishes and the number of observers are shown: on one
    screen in a terminal, otherwise as lines.
    """
    if not (repository / "repository.toml").exists():
        init(repository, "Development")
    state = repository / ".state"
    config = Config(repository=repository, state=state, coap_bind=(bind,), http_bind=http)
    with contextlib.ExitStack() as stack:
        board: desk.Board = desk.Lines(click.echo)
        if sys.stdout.isatty():
            screen = desk.Screen(Console(), f"netota-coap dev, {repository}")
            stack.enter_context(screen.live())
            board = screen
        logging.basicConfig(level=logging.INFO, handlers=[desk.BoardHandler(board)], force=True)
        for quiet in ("netota_coap.aiocoap", "asyncio"):
            logging.getLogger(quiet).setLevel(logging.ERROR)
        metrics = Metrics(desk.heard(board))
        service = Service(
            config, lambda uri: board.say(f"listening on {uri}", "bold"), metrics=metrics
        )
        publishers = [desk.Publisher(repository, name, build) for build in builds]
        asyncio.run(desk.run(service, board, publishers))
