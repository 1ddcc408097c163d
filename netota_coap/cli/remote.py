"""Commands that ask servers over CoAP or HTTP, or find them."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Awaitable, Callable, Mapping, Sequence
from datetime import UTC, datetime
from typing import Any, TypeVar

import click

from netota_coap.cli import json_output
from netota_coap.cli.common import command, json_option, print_json, print_table, say_waiting
from netota_coap.client import discovery
from netota_coap.client.coap_client import ANY_DEVICE, Client
from netota_coap.encoding.codecs import Format
from netota_coap.encoding.content_formats import ContentFormat
from netota_coap.encoding.documents import encode, selection_from_query
from netota_coap.errors import printable
from netota_coap.model.selection import Selection
from netota_coap.model.values import Stream, StreamName

T = TypeVar("T")

_UNITS = ((86_400, "d"), (3_600, "h"), (60, "min"), (1, "s"))


def ask(question: Callable[[Client], Awaitable[T]]) -> T:
    """Return the answer to a question that a client asks a server."""

    async def run() -> T:
        async with Client() as client:
            return await question(client)

    return asyncio.run(run())


@command("status coap://localhost")
@click.argument("uri", default="coap://localhost")
@json_option
def status(uri: str, as_json: bool) -> None:
    """By default a server shows its status only to its own machine."""
    path = f"{uri.rstrip('/')}/status"
    status = ask(lambda client: client.get_plain(path, (), ContentFormat.JSON))
    if as_json:
        print_json(status)
    else:
        print_table(("", ""), _lines(status))


def _lines(plain: Mapping[str, Any]) -> list[tuple[str, str]]:
    served = f"{plain['packages']} packages, {plain['streams']} streams"
    lines = [
        ("version", plain["version"]),
        ("uptime", duration(plain["uptime_s"])),
        ("serves", f"{served}, loaded {plain['reloaded']}"),
        ("observers", str(plain["observers"])),
    ]
    if fan_out := plain.get("fan_out"):
        lines.append(("last change", f"{fan_out['told']} notified in {fan_out['seconds']:.3f} s"))
    lines += [("upstream", _upstream(each)) for each in plain.get("upstreams", ())]
    lines += [("not reloaded", issue) for issue in plain.get("issues", ())]
    lines += [("trouble", trouble) for trouble in plain.get("troubles", ())]
    return lines


def _upstream(plain: Mapping[str, Any]) -> str:
    contact = "no contact yet"
    if "last_contact" in plain:
        then = datetime.fromisoformat(plain["last_contact"])
        age_s = (datetime.now(UTC) - then).total_seconds()
        contact = f"last contact {duration(max(age_s, 0.0))} ago"
    behind = f"{plain['behind']} streams behind" if plain["behind"] else ""
    refused = f"{plain['refused']} states refused" if plain["refused"] else ""
    parts = (plain["uri"], contact, behind, refused, plain.get("error"))
    return ", ".join(filter(None, parts))


def duration(seconds: float) -> str:
    """Return a duration in the largest unit that it fills."""
    size, unit = next((each for each in _UNITS if seconds >= each[0]), _UNITS[-1])
    return f"{seconds / size:.1f} {unit}"


@command("discover --on eth0")
@click.option(
    "--on",
    "interfaces",
    metavar="INTERFACE",
    multiple=True,
    help="Network interface to search on. Repeatable. [default: all]",
)
@click.option("--port", type=click.IntRange(1, 65_535), default=5683, help="Port of the servers.")
@click.option(
    "--wait-s",
    type=click.FloatRange(0.1, 60),
    default=6.0,
    help="How long to wait for answers, seconds; a server takes up to 5.",
)
def discover(interfaces: Sequence[str], port: int, wait_s: float) -> None:
    """Only servers that run with `serve --multicast` answer. A URI is printed for each."""

    async def show() -> None:
        async for uri in discovery.discover(interfaces, port, wait_s):
            click.echo(uri)

    asyncio.run(show())


@command("get coap://localhost/p/sensor-node/s/stable --query machine=nrf52840dk")
@click.argument("uri")
@click.option("--query", multiple=True, metavar="KEY=VALUE", help="Part of the query. Repeatable.")
@click.option(
    "--accept",
    type=click.Choice(["link", "json", "cbor"]),
    help="Format to request; cbor is printed as JSON, link as text. "
    "[default: json, or link for /.well-known/core]",
)
def get(uri: str, query: Sequence[str], accept: str | None) -> None:
    """Give the URI of the resource, as coap://HOST/p/PKG/s/STREAM."""
    default = "link" if "/.well-known/" in uri else "json"
    fmt = ContentFormat[(accept or default).upper()]
    content = ask(lambda client: client.get_plain(uri, query, fmt))
    if isinstance(content, str):
        for link in content.replace(",<", ",\n<").splitlines():
            click.echo(printable(link))
    else:
        print_json(_readable(content))


def _readable(plain: Any) -> Any:
    """Turn CBOR data into JSON data: keys into text, bytes into hexadecimal digits."""
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
    "--query", multiple=True, metavar="KEY=VALUE", help="Attribute of the device. Repeatable."
)
@click.option(
    "--poll-s", type=click.FloatRange(min=1), help="Ask again at least this often, seconds."
)
@json_option
def watch(uri: str, query: Sequence[str], poll_s: float | None, as_json: bool) -> None:
    """A line is printed for each new state, until you stop the command."""

    async def follow(selection: Selection) -> None:
        async with Client(on_trouble=say_waiting) as client:
            async for stream in client.observe(uri, selection, poll_s=poll_s):
                if as_json:
                    click.echo(json.dumps(json.loads(encode(stream, Format.JSON))))
                else:
                    click.echo(f"{datetime.now().astimezone():%H:%M:%S.%f} {_one_line(stream)}")

    asyncio.run(follow(selection_from_query(query)))


def _one_line(stream: Stream) -> str:
    best = next(iter(stream.archives or ()), None)
    parts = (
        f"{stream.version} sequence {stream.sequence}",
        "closed" if stream.closed else "",
        f"replacement {'/'.join(stream.replacement)}" if stream.replacement else "",
        best.name if best else "nothing suits",
        *(offer.url for offer in (best.offers[:1] if best else ())),
    )
    return ", ".join(filter(None, parts))


def list_rows(uri: str) -> list[dict[str, Any]]:
    """Return the rows of `list` for a server."""

    async def fetch(client: Client) -> list[dict[str, Any]]:
        return [
            json_output.row(package, entry.title, name, stream)
            for package, entry in (await client.packages(uri)).items()
            for name, stream in (await client.streams(uri, package)).items()
        ]

    return ask(fetch)


def get_stream(uri: str, name: StreamName | None, selection: Selection = ANY_DEVICE) -> Stream:
    """Return a stream of a server; without a name, the one that the URI names."""
    path = f"{uri.rstrip('/')}/p/{name[0]}/s/{name[1]}" if name else uri
    return ask(lambda client: client.stream(path, selection))
