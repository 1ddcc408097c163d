"""Commands that talk CoAP and HTTP: serve, be a device, ask others."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from netota_coap.cli.frame import (
    command,
    directory_argument,
    json_option,
    print_json,
    say,
)

if TYPE_CHECKING:
    from collections.abc import Sequence

    from netota_coap.catalog import ContentFormat
    from netota_coap.errors import TransferError
    from netota_coap.model import Stream
    from netota_coap.selection import Selection


@command("serve fleet --bind [::]:5683")
@directory_argument
@click.option(
    "--bind",
    "binds",
    metavar="HOST:PORT",
    multiple=True,
    help="Where to listen; port 0 is any free one. Again for each address. [default: [::]:5683]",
)
def serve(directory: Path, binds: Sequence[str]) -> None:
    """Serve a repository over CoAP, and notify devices of what is published.

    SIGHUP reloads at once, SIGTERM and SIGINT end it. A repository that is malformed is refused at
    the start; later the old state is served on, and the log says why.
    """
    import asyncio
    import logging
    import sys

    from netota_coap.coap.frontdoor import DEFAULT_BIND
    from netota_coap.service import Service

    logging.basicConfig(level=logging.INFO, format="%(levelname)s %(message)s", stream=sys.stderr)
    for name in ("netota_coap.aiocoap", "asyncio"):
        logging.getLogger(name).setLevel(logging.ERROR)
    service = Service(
        directory, binds or (DEFAULT_BIND,), lambda uri: click.echo(f"listening on {uri}")
    )
    asyncio.run(service.run())


@command("get coap://localhost/p/sensor-node/s/stable --query machine=nrf52840dk")
@click.argument("uri")
@click.option("--query", multiple=True, metavar="KEY=VALUE", help="Of the query. Again for each.")
@click.option(
    "--accept",
    type=click.Choice(["link", "json", "cbor"]),
    help="Format to ask for: link prints text, cbor its diagnostic form in JSON. "
    "[default: json, link for /.well-known/core]",
)
def get(uri: str, query: Sequence[str], accept: str | None) -> None:
    """Get a resource of a server and print it as JSON."""
    import asyncio

    from netota_coap.catalog import ContentFormat
    from netota_coap.client import Client
    from netota_coap.errors import printable

    async def fetch(fmt: ContentFormat) -> Any:
        async with Client() as client:
            return await client.get_plain(uri, query, fmt)

    default = "link" if "/.well-known/" in uri else "json"
    plain = asyncio.run(fetch(ContentFormat[(accept or default).upper()]))
    if isinstance(plain, str):
        for link in plain.replace(",<", ",\n<").splitlines():
            click.echo(printable(link))
    else:
        print_json(_readable(plain))


def _readable(plain: Any) -> Any:
    """Put CBOR's data into JSON's: keys become text, bytes hexadecimal digits."""
    if isinstance(plain, dict):
        return {str(key): _readable(value) for key, value in plain.items()}
    if isinstance(plain, list):
        return [_readable(value) for value in plain]
    if isinstance(plain, bytes):
        return plain.hex()
    return plain if isinstance(plain, str | int | float | None) else str(plain)


@command("watch coap://localhost/p/sensor-node/s/stable --query machine=nrf52840dk")
@click.argument("uri")
@click.option(
    "--query", multiple=True, metavar="KEY=VALUE", help="Say what the device is. Again for each."
)
@click.option(
    "--poll-s", type=click.FloatRange(min=1), help="Ask again at least this often, seconds."
)
@json_option
def watch(uri: str, query: Sequence[str], poll_s: float | None, as_json: bool) -> None:
    """Follow a stream of a server as a device does: one line for each state."""
    import asyncio
    from datetime import datetime

    from netota_coap.client import Client
    from netota_coap.formats import Format
    from netota_coap.wire import encode, selection_from_query

    async def follow(selection: Selection) -> None:
        def trouble(error: TransferError) -> None:
            say(f"waiting: {error.detail}")

        async with Client(on_trouble=trouble) as client:
            async for stream in client.observe(uri, selection, poll_s=poll_s):
                if as_json:
                    click.echo(encode(stream, Format.JSON).decode())
                else:
                    click.echo(f"{datetime.now().astimezone():%H:%M:%S.%f} {_one_line(stream)}")

    asyncio.run(follow(selection_from_query(query)))


def _one_line(stream: Stream) -> str:
    parts = [f"{stream.version} sequence {stream.sequence}"]
    if stream.closed:
        parts.append("closed")
    if stream.replacement:
        parts.append(f"replacement {'/'.join(stream.replacement)}")
    best = next(iter(stream.archives or ()), None)
    parts.append(f"{best.name}" if best else "nothing suits")
    parts += [offer.url for offer in (best.offers[:1] if best else ())]
    return ", ".join(parts)


COMMANDS = (serve, get, watch)
