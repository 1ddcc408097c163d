"""Commands that ask servers how they are, and where."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import click

from netota_coap.cli.frame import command, json_option, print_json, table, text

_UNITS = ((86_400, "d"), (3_600, "h"), (60, "min"), (1, "s"))


@command("status coap://localhost")
@click.argument("uri", default="coap://localhost")
@json_option
def status(uri: str, as_json: bool) -> None:
    """Tell what a service does now; it tells its own machine only, by default."""
    import asyncio

    from netota_coap.catalog import ContentFormat
    from netota_coap.client import Client

    async def fetch() -> Any:
        async with Client() as client:
            return await client.get_plain(f"{uri.rstrip('/')}/status", (), ContentFormat.JSON)

    plain = asyncio.run(fetch())
    if as_json:
        print_json(plain)
        return
    from netota_coap.cli.frame import console

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
    lines += [("not reloaded", issue) for issue in plain.get("issues", ())]
    lines += [("trouble", trouble) for trouble in plain.get("troubles", ())]
    return lines


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

    from netota_coap.discovery import discover as find

    async def show() -> None:
        async for uri in find(interfaces, port, wait_s):
            click.echo(uri)

    asyncio.run(show())


COMMANDS = (status, discover)
