"""Measures a gateway: many devices behind it download a new version over a slow uplink.

Usage: tools/bench/bench_gateway.py [--devices N] [--kilobytes N] [--scheme coap|http]
   [--bytes-s N] [--json]
An upstream that stores the file publishes a version. A gateway follows it through a relay, which
limits and counts the bytes from the upstream. The devices observe the stream at the gateway, and
when they are notified of the version, they download it block by block, one block at a time. This
is measured twice: with a gateway that fetches the file when the first device requests it, and with
one that fetches it before it notifies devices.

It ends with 1 if a device did not get the right file.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import random
import statistics
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path

import attrs
import click
from rich import box
from rich.console import Console
from rich.table import Table

from netota_coap.publishing import publish as publishing
from netota_coap.publishing.archives import ArchiveSource
from netota_coap.publishing.publish import Edit
from netota_coap.repository.blobs import path_of
from netota_coap.repository.scaffold import init
from netota_coap.repository.store import DirectoryStore
from tools.bench.devices import Device, Devices, Image
from tools.bench.peers import PATIENCE_S, Process, free_port, until
from tools.bench.uplink import Uplink

NAME = ("sensor-node", "stable")
CACHES = ("on-demand", "ahead")
LONGEST_S = 600.0

_CONFIGURATION = """\
[coap]
bind = ["127.0.0.1:{port}"]

[blobs]
cache = "{cache}"

[mirror]
upstreams = ["{scheme}://127.0.0.1:{uplink}"]
"""

Figures = dict[str, float]

_COLUMNS = {
    "uplink": ("uplink", "{:.3f}"),
    "at_gateway_s": ("here", "{:.1f}"),
    "median_s": ("half", "{:.1f}"),
    "all_s": ("all", "{:.1f}"),
    "begun_before": ("early", "{:.0f}"),
    "put_off": ("5.03", "{:.0f}"),
    "repeated": ("again", "{:.0f}"),
    "rss_mb": ("RSS MB", "{:.1f}"),
    "rss_growth_mb": ("grows", "{:.1f}"),
    "failed": ("bad", "{:.0f}"),
}
"""Heading and format of each figure."""


def _publish(root: Path, version: str, data: bytes) -> None:
    image = root.with_name("image.bin")
    image.write_bytes(data)
    edit = Edit(now=datetime.now(UTC).replace(microsecond=0))
    source = ArchiveSource(image, "image")
    publishing.publish(DirectoryStore(root), NAME, version, [source], edit=edit, store_files=True)


def _listens(process: Process) -> bool:
    return process.still_runs() and "listening on" in process.log.read_text()


async def _until(condition: Callable[[], bool], what: str, patience_s: float = PATIENCE_S) -> None:
    """Wait until a condition holds, while the relay and the devices run."""
    end_s = time.monotonic() + patience_s
    while not condition():
        if time.monotonic() > end_s:
            raise SystemExit(f"{what} in {patience_s:g} s")
        await asyncio.sleep(0.01)


@attrs.frozen
class Bench:
    """One measurement.

    Attributes:
        devices: Number of devices.
        size: Of the file, bytes.
        scheme: By which the gateway follows its upstream.
        bytes_s: Limit of the uplink, bytes per second.
    """

    directory: Path
    devices: int
    size: int
    scheme: str
    bytes_s: float

    @contextlib.contextmanager
    def _upstream(self, root: Path) -> Iterator[int]:
        """Serve a repository until the block ends; yields its port."""
        ports = {"coap": free_port(), "http": free_port()}
        command = [sys.executable, "-m", "netota_coap", "serve", str(root)]
        command += ["--bind", f"127.0.0.1:{ports['coap']}"]
        command += ["--http", f"127.0.0.1:{ports['http']}"] if self.scheme == "http" else []
        with Process.start(command, root.with_name("upstream.log")) as process:
            until(lambda: _listens(process), "the upstream did not start")
            yield ports[self.scheme]

    @contextlib.contextmanager
    def _gateway(self, place: Path, cache: str, uplink: int) -> Iterator[tuple[Process, int]]:
        """Run a gateway until the block ends; yields its process and port."""
        port, file = free_port(), place / "gateway.toml"
        given = {"port": port, "cache": cache, "scheme": self.scheme, "uplink": uplink}
        file.write_text(_CONFIGURATION.format(**given))
        serve = (sys.executable, "-m", "netota_coap", "serve")
        command = (*serve, place / "gateway", "--config", file)
        with Process.start(command, place / "gateway.log") as process:
            yield process, port

    async def measure(self, cache: str) -> Figures:
        """Measure one value of `blobs.cache`."""
        place = self.directory / cache
        root = place / "upstream"
        place.mkdir()
        init(root, "Generated")
        _publish(root, "1.0", b"what the devices run")
        data = random.Random(self.size).randbytes(self.size)
        image = Image.of("2.0", NAME, data)
        held = place / "gateway" / path_of(image.sha256)
        async with contextlib.AsyncExitStack() as stack:
            uplink = Uplink(stack.enter_context(self._upstream(root)), self.bytes_s)
            carrying = uplink.of_streams if self.scheme == "http" else uplink.of_datagrams
            await stack.enter_async_context(carrying())
            gateway, port = stack.enter_context(self._gateway(place, cache, uplink.port))
            # It listens once it has reached the upstream, through the relay in this process.
            await _until(lambda: _listens(gateway), "the gateway did not start")
            devices = Devices.at(port, self.devices, image)
            living = asyncio.create_task(devices.live())
            stack.callback(living.cancel)
            every = devices.every
            is_quiet = lambda: gateway.still_runs() and all(d.registered for d in every)  # noqa: E731
            await _until(is_quiet, "not all devices were registered")
            before = _so_far(gateway, uplink, every)
            start_s = time.monotonic()
            await asyncio.to_thread(_publish, root, "2.0", data)
            await _until(lambda: gateway.still_runs() and held.exists(), "no file", LONGEST_S)
            at_gateway_s = time.monotonic() - start_s
            begun = sum(device.begun for device in every)
            await _until(lambda: all(d.is_over for d in every), "not all have ended", LONGEST_S)
            after = _so_far(gateway, uplink, every)
            return {
                "uplink": (after["carried"] - before["carried"]) / self.size,
                "at_gateway_s": at_gateway_s,
                **_downloads(every, start_s),
                "begun_before": begun,
                "put_off": after["put_off"] - before["put_off"],
                "repeated": after["repeated"] - before["repeated"],
                "rss_mb": after["rss"] / 1e6,
                "rss_growth_mb": (after["rss"] - before["rss"]) / 1e6,
            }


def _so_far(gateway: Process, uplink: Uplink, every: Sequence[Device]) -> Mapping[str, int]:
    return {
        "carried": uplink.carried,
        "put_off": sum(device.put_off for device in every),
        "repeated": sum(device.repeated for device in every),
        "rss": gateway.rss,
    }


def _downloads(every: Sequence[Device], start_s: float) -> Figures:
    failures = Counter(device.failure for device in every if device.failure)
    for failure, count in failures.items():
        click.echo(f"{count} devices: {failure}", err=True)
    ended = sorted(device.ended_s - start_s for device in every if device.ended_s) or [0.0]
    return {
        "median_s": statistics.median(ended),
        "all_s": ended[-1],
        "failed": failures.total(),
    }


def table(figures: Mapping[str, Figures], title: str) -> Table:
    """Return the figures as a table."""
    shown = Table(title=title, box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0))
    for heading in ("", *(heading for heading, _ in _COLUMNS.values())):
        shown.add_column(heading, justify="right" if heading else "left", no_wrap=True)
    for cache, each in figures.items():
        shown.add_row(cache, *(form.format(each[key]) for key, (_, form) in _COLUMNS.items()))
    return shown


@click.command()
@click.option("--devices", type=click.IntRange(1, 10_000), default=500, show_default=True)
@click.option("--kilobytes", type=click.IntRange(1, 100_000), default=1_000, show_default=True)
@click.option("--scheme", type=click.Choice(["coap", "http"]), default="coap", show_default=True)
@click.option("--bytes-s", type=click.IntRange(min=1), default=125_000, show_default=True)
@click.option("--json", "as_json", is_flag=True, help="Print the figures as JSON.")
def main(devices: int, kilobytes: int, scheme: str, bytes_s: int, as_json: bool) -> None:
    """Measure a gateway with many devices behind it."""
    with tempfile.TemporaryDirectory() as name:
        bench = Bench(Path(name), devices, kilobytes * 1_000, scheme, bytes_s)
        figures = {cache: asyncio.run(bench.measure(cache)) for cache in CACHES}
    if as_json:
        given = {"devices": devices, "kilobytes": kilobytes, "scheme": scheme, "bytes_s": bytes_s}
        print(json.dumps({**given, **figures}))
    else:
        title = f"{devices} devices, {kilobytes} kB by {scheme} at {bytes_s} bytes a second"
        Console().print(table(figures, title))
    if any(each["failed"] for each in figures.values()):
        raise SystemExit(1)


if __name__ == "__main__":
    main()
