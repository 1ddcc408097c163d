"""Commands that ask servers: what they have, how they are, where they are; or are a device."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from netota_coap.cli.common import (
    FILE,
    STREAM,
    command,
    json_option,
    print_json,
    progress,
    say,
    selecting,
    store_of,
    table,
    text,
)

if TYPE_CHECKING:
    from netota_coap.encoding.content_formats import ContentFormat
    from netota_coap.errors import TransferError
    from netota_coap.model.selection import Selection
    from netota_coap.model.values import Archive, Stream, StreamName

_UNITS = ((86_400, "d"), (3_600, "h"), (60, "min"), (1, "s"))


@command("status coap://localhost")
@click.argument("uri", default="coap://localhost")
@json_option
def status(uri: str, as_json: bool) -> None:
    """Tell what a service does now; it tells its own machine only, by default."""
    import asyncio

    from netota_coap.client.coap_client import Client
    from netota_coap.encoding.content_formats import ContentFormat

    async def fetch() -> Any:
        async with Client() as client:
            return await client.get_plain(f"{uri.rstrip('/')}/status", (), ContentFormat.JSON)

    plain = asyncio.run(fetch())
    if as_json:
        print_json(plain)
        return
    from netota_coap.cli.common import console

    shown = table("", "")
    shown.show_header = False
    for name, value in _lines(plain):
        shown.add_row(name, text(value))
    console().print(shown)


def _lines(plain: Mapping[str, Any]) -> list[tuple[str, str]]:
    served = f"{plain['packages']} packages, {plain['streams']} streams"
    lines = [
        ("version", plain["version"]),
        ("up for", _duration(plain["uptime_s"])),
        ("serves", f"{served}, loaded {plain['reloaded']}"),
        ("observers", str(plain["observers"])),
    ]
    fan_out = plain.get("fan_out")
    if fan_out:
        lines.append(("last change", f"told {fan_out['told']} in {fan_out['seconds']:.3f} s"))
    lines += [("upstream", _upstream(each)) for each in plain.get("upstreams", ())]
    lines += [("not reloaded", issue) for issue in plain.get("issues", ())]
    lines += [("trouble", trouble) for trouble in plain.get("troubles", ())]
    return lines


def _upstream(plain: Mapping[str, Any]) -> str:
    heard = "not heard of yet"
    if "last_contact" in plain:
        then = datetime.fromisoformat(plain["last_contact"])
        age_s = (datetime.now(UTC) - then).total_seconds()
        heard = f"heard of {_duration(max(age_s, 0.0))} ago"
    parts = [plain["uri"], heard]
    if plain["behind"]:
        parts.append(f"{plain['behind']} streams behind")
    if plain["refused"]:
        parts.append(f"{plain['refused']} states refused")
    return ", ".join([*parts, *filter(None, [plain.get("error")])])


def _duration(seconds: float) -> str:
    size, unit = next((each for each in _UNITS if seconds >= each[0]), _UNITS[-1])
    return f"{seconds / size:.1f} {unit}"


@command("discover --on eth0")
@click.option("--on", "interfaces", metavar="IFACE", multiple=True, help="[default: all]")
@click.option(
    "--port", type=click.IntRange(1, 65_535), default=5683, show_default=True, help="Of servers."
)
@click.option(
    "--wait-s",
    type=click.FloatRange(0.1, 60),
    default=6.0,
    show_default=True,
    help="For answers; a server takes up to 5 s.",
)
def discover(interfaces: Sequence[str], port: int, wait_s: float) -> None:
    """Find servers of the network that want to be found (serve --multicast): a URI each line."""
    import asyncio

    from netota_coap.client.discovery import discover as find

    async def show() -> None:
        async for uri in find(interfaces, port, wait_s):
            click.echo(uri)

    asyncio.run(show())


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

    from netota_coap.client.coap_client import Client
    from netota_coap.encoding.content_formats import ContentFormat
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

    from netota_coap.client.coap_client import Client
    from netota_coap.encoding.codecs import Format
    from netota_coap.encoding.documents import encode, selection_from_query

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


@command("download coap://gateway.local sensor-node/stable --machine nrf9160dk -o app.bin")
@click.argument("source", metavar="DIR|URI")
@click.argument("name", metavar="PKG/STREAM", type=STREAM)
@click.option("-o", "--output", metavar="FILE", type=FILE, required=True)
@selecting
@click.option("--server", metavar="URI", help="That relative offers of DIR are meant for.")
@click.option(
    "--in-flight",
    type=click.IntRange(1, 64),
    default=1,
    show_default=True,
    help="Blocks that are asked for at a time over CoAP; more make it faster where the way is "
    "long.",
)
@json_option
def download(
    source: str,
    name: StreamName,
    output: Path,
    selection: Selection,
    server: str | None,
    in_flight: int,
    as_json: bool,
) -> None:
    """Download the best archive for a device, as a repository or a server (`coap://HOST`) has it.

    What is there of an interrupted download is used; what arrives is verified. A server that says
    when it will have the file is waited for: 10 minutes in all, or a day if it says a minute or
    less each time.
    """
    import asyncio

    from netota_coap.cli import json_output
    from netota_coap.client.download import download as fetch

    def trouble(error: TransferError) -> None:
        say(f"waiting: {error.detail}")

    archive = asyncio.run(_best(source, name, selection))
    relative_to = source if "://" in source else server
    with progress("downloading", archive.envelope.size) as advance:
        fetching = fetch(
            *(archive, output),
            server=relative_to,
            progress=advance,
            in_flight=in_flight,
            on_trouble=trouble,
        )
        offer = asyncio.run(fetching)
    if as_json:
        print_json(json_output.downloaded(output, archive, offer))
    else:
        origin = f"from {offer.url}" if offer else "was there already"
        click.echo(f"{output}: {archive.name}, {archive.envelope.size} bytes, {origin}")


async def _best(source: str, name: StreamName, selection: Selection) -> Archive:
    from netota_coap.client.coap_client import Client
    from netota_coap.encoding.documents import selection_to_query
    from netota_coap.errors import NotFoundError
    from netota_coap.publishing import publish

    if "://" in source:
        async with Client() as client:
            uri = f"{source.rstrip('/')}/p/{name[0]}/s/{name[1]}"
            archives = (await client.stream(uri, selection)).archives or ()
    else:
        archives = publish.existing(store_of(Path(source)), name).archives or ()
        archives = selection.narrow(archives, "coap")
    if not archives:
        said = " ".join(selection_to_query(selection))
        raise NotFoundError(
            f"nothing of {'/'.join(name)} suits {said or 'any device'}",
            hint=f"See what there is: netota-coap show {source} {'/'.join(name)}",
        )
    return archives[0]


COMMANDS = (get, watch, download, status, discover)
