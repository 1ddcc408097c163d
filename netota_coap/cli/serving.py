"""Commands that talk CoAP and HTTP: serve, be a device, ask others."""

from __future__ import annotations

import functools
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from netota_coap.cli.frame import (
    FILE,
    STREAM,
    command,
    json_option,
    print_json,
    progress,
    say,
)

if TYPE_CHECKING:
    from netota_coap.catalog import ContentFormat
    from netota_coap.errors import TransferError
    from netota_coap.model import Archive, Stream, StreamName
    from netota_coap.selection import Selection


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
    "--tcp",
    "coap_tcp",
    metavar="HOST:PORT",
    multiple=True,
    help="Where to listen for CoAP over TCP. Again for each address.",
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
    import os

    from netota_coap import logs
    from netota_coap.config import Config, assemble
    from netota_coap.service import Service
    from netota_coap.systemd import Manager

    options = {name: value for name, value in given.items() if value not in (None, ())}

    def read() -> Config:
        return assemble(file, os.environ, options).config

    config = read()
    logs.configure(config.log_level, config.log_format, os.environ)
    manager = Manager.of(os.environ)
    service = Service(config, lambda uri: click.echo(f"listening on {uri}"), read, manager)
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
                    click.echo(json.dumps(json.loads(encode(stream, Format.JSON))))
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


def _selecting(function: Callable[..., None]) -> Callable[..., None]:
    """Give a command the options by which a device says what it is."""
    attributes = (*("type", "arch", "machine", "debug", "filesystem", "compression"), "scheme")

    @functools.wraps(function)
    def run(query: Sequence[str], **given: Any) -> None:
        from netota_coap.wire import selection_from_query

        said = [f"{name}={value}" for name in attributes for value in given.pop(name)]
        function(selection=selection_from_query([*said, *query]), **given)

    wrapped: Callable[..., None] = click.option(
        "--query", metavar="KEY=VALUE", multiple=True, help="Any other attribute. Again for each."
    )(run)
    for name in reversed(attributes):
        text = "Of offers." if name == "scheme" else "Of the device; the first is preferred."
        option = click.option(f"--{name}", metavar="VALUE", multiple=True, help=text)
        wrapped = option(wrapped)
    return wrapped


@command("download coap://gateway.local sensor-node/stable --machine nrf9160dk -o app.bin")
@click.argument("source", metavar="DIR|URI")
@click.argument("name", metavar="PKG/STREAM", type=STREAM)
@click.option("-o", "--output", metavar="FILE", type=FILE, required=True)
@_selecting
@click.option("--server", metavar="URI", help="That relative offers of DIR are meant for.")
@json_option
def download(
    source: str,
    name: StreamName,
    output: Path,
    selection: Selection,
    server: str | None,
    as_json: bool,
) -> None:
    """Download the best archive for a device, as a repository or a server (`coap://HOST`) has it.

    What is there of an interrupted download is used; what arrives is verified.
    """
    import asyncio

    from netota_coap.cli import plain
    from netota_coap.download import download as fetch

    archive = asyncio.run(_best(source, name, selection))
    relative_to = source if "://" in source else server
    with progress("downloading", archive.envelope.size) as advance:
        offer = asyncio.run(fetch(archive, output, server=relative_to, progress=advance))
    if as_json:
        print_json(plain.downloaded(output, archive, offer))
    else:
        origin = f"from {offer.url}" if offer else "was there already"
        click.echo(f"{output}: {archive.name}, {archive.envelope.size} bytes, {origin}")


async def _best(source: str, name: StreamName, selection: Selection) -> Archive:
    from netota_coap import publish
    from netota_coap.client import Client
    from netota_coap.errors import NotFoundError
    from netota_coap.wire import selection_to_query

    if "://" in source:
        async with Client() as client:
            uri = f"{source.rstrip('/')}/p/{name[0]}/s/{name[1]}"
            archives = (await client.stream(uri, selection)).archives or ()
    else:
        archives = publish.existing(Path(source), name).archives or ()
        archives = selection.narrow(archives, "coap")
    if not archives:
        said = " ".join(selection_to_query(selection))
        raise NotFoundError(
            f"nothing of {'/'.join(name)} suits {said or 'any device'}",
            hint=f"See what there is: netota-coap show {source} {'/'.join(name)}",
        )
    return archives[0]


COMMANDS = (serve, get, watch, download)
