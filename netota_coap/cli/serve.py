"""Commands that serve."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from netota_coap.cli.common import FILE, STREAM, command

if TYPE_CHECKING:
    from netota_coap.model.values import StreamName


@command("serve fleet --bind [::]:5683")
@click.argument("repository", metavar="[DIR]", type=FILE, required=False)
@click.option(
    "--config",
    "file",
    metavar="FILE",
    type=FILE,
    help="Of the service; other options win over it. "
    "[default: /etc/netota-coap/config.toml, if it is there]",
)
@click.option(
    "--bind",
    "coap_bind",
    metavar="HOST:PORT",
    multiple=True,
    help="Where to listen; port 0 is any free one. Again for each address. [default: [::]:5683]",
)
@click.option(
    "--multicast",
    "coap_multicast",
    metavar="IFACE",
    multiple=True,
    help="Interface on which to be found. Again for each.",
)
@click.option(
    "--http",
    "http_bind",
    metavar="HOST:PORT",
    help="Where to listen for HTTP, as localhost:8000. [default: nowhere]",
)
@click.option(
    "--state",
    metavar="DIR",
    type=FILE,
    help="Where to remember observers and sequences over a restart. [default: $STATE_DIRECTORY]",
)
@click.option(
    "--max-age-s",
    "coap_max_age_s",
    type=int,
    help="How long caches may keep an answer, seconds. [default: 60]",
)
@click.option(
    "--keep-trying",
    is_flag=True,
    default=None,
    help="Wait for a repository that can be served, instead of exiting.",
)
@click.option(
    "--log-format",
    type=click.Choice(["auto", "plain", "journal", "json"]),
    help="[default: auto: journal under systemd, else plain]",
)
def serve(file: Path | None, **given: Any) -> None:
    """Serve a repository over CoAP, and HTTP if asked; notify devices of what is published.

    DIR need not be given where the configuration names it. SIGHUP reloads at once, the repository
    and what of the configuration can change at run time; SIGTERM and SIGINT end it. A repository
    that is malformed is refused at the start; later the old state is served on, and the log says
    why.
    """
    import asyncio
    import logging
    import os

    from netota_coap.service import logs
    from netota_coap.service.config import Effective, assemble
    from netota_coap.service.service import Service
    from netota_coap.service.systemd import Manager

    options = {name: value for name, value in given.items() if value not in (None, ())}

    def read() -> Effective:
        return assemble(file, os.environ, options)

    effective = read()
    config = effective.config
    logs.configure(config.log_level, config.log_format, os.environ)
    for name in effective.strays:
        logging.getLogger("netota_coap").warning("%s: no setting is called so", name)
    manager = Manager.of(os.environ)
    listening = lambda uri: click.echo(f"listening on {uri}")  # noqa: E731
    service = Service(config, listening, lambda: read().config, manager)
    asyncio.run(service.run())


@command("dev build --repository /tmp/fleet")
@click.argument("builds", metavar="[BUILD]...", type=FILE, nargs=-1)
@click.option(
    "--repository",
    metavar="DIR",
    type=FILE,
    default=Path(".netota-dev"),
    help="Made if it is not there. [default: .netota-dev]",
)
@click.option(
    "--stream",
    "name",
    metavar="PKG/STREAM",
    type=STREAM,
    default="local/dev",
    help="To publish to. [default: local/dev]",
)
@click.option(
    "--bind",
    default="localhost:5683",
    metavar="HOST:PORT",
    show_default=True,
    help="Of CoAP. For boards on the network: [::]:5683.",
)
@click.option(
    "--http", default="localhost:8000", metavar="HOST:PORT", show_default=True, help="Of HTTP."
)
def dev(builds: Sequence[Path], repository: Path, name: StreamName, bind: str, http: str) -> None:
    """Serve on this machine while you develop, and publish each new build.

    BUILD is a directory with a Zephyr build or a RAUC bundle in it, or a file; whenever it is
    another one, it is published. Requests and publishes are shown as they come, and how many
    devices observe: on one screen in a terminal, else in lines.
    """
    import asyncio
    import logging

    from netota_coap.monitoring import Metrics
    from netota_coap.repository.scaffold import init
    from netota_coap.service import dev as desk
    from netota_coap.service.config import Config
    from netota_coap.service.service import Service

    if not (repository / "repository.toml").exists():
        init(repository, "Development")
    state = repository / ".state"
    config = Config(repository=repository, state=state, coap_bind=(bind,), http_bind=http)
    with contextlib.ExitStack() as stack:
        board: desk.Board = desk.Lines(click.echo)
        if sys.stdout.isatty():
            from rich.console import Console

            screen = desk.Screen(Console(), f"netota-coap dev, {repository}")
            stack.enter_context(screen.live())
            board = screen
        logging.basicConfig(level=logging.INFO, handlers=[desk.logged(board)], force=True)
        for quiet in ("netota_coap.aiocoap", "asyncio"):
            logging.getLogger(quiet).setLevel(logging.ERROR)
        metrics = Metrics(desk.heard(board))
        service = Service(
            config, lambda uri: board.say(f"listening on {uri}", "bold"), metrics=metrics
        )
        publishers = [desk.Publisher(repository, name, build) for build in builds]
        asyncio.run(desk.run(service, board, publishers))


COMMANDS = (serve, dev)
