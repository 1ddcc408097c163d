"""Measures how fast files are served block by block, by netota_coap and by libcoap.

Usage: tools/bench/bench_blob.py [--megabytes N] [--seconds S] [--runs N] [--json]
One client, and then a hundred at once, fetch the same file in blocks of 1,024 bytes, repeatedly.
A client waits for a block before it requests the next. The servers take turns; figures are
medians. Servers run on one processor and clients on another: whether they share one affects a
round trip more than the server does.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import random
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import attrs
import click
from rich import box
from rich.console import Console
from rich.table import Table

from netota_coap.repository.blobs import Blobs, blob_name
from netota_coap.repository.scaffold import init
from tools.bench import load
from tools.bench.peers import Process, free_port, together, until

BLOCK = 1_024
SZX = 6
CLIENTS = {"one": 1, "hundred": 100}
LIBCOAP_PATH = ("example_data",)
WARM_UP_S = 0.3

Figures = dict[str, float]

PEERS = {"ours": "ours", "libcoap": "libcoap"}
_COLUMNS = ("clients", "MB/s", "to libcoap", "median", "99 %", "CPU", "unfair", "grows", "bad")


@attrs.frozen
class Bench:
    """The file that is fetched, and the tools of all runs.

    Attributes:
        root: Our repository, which stores the file.
        path: Of the file, on our server.
        program: The load generator.
    """

    directory: Path
    file: Path
    root: Path
    path: tuple[str, ...]
    program: Path

    @classmethod
    def prepare(cls, directory: Path, size: int) -> Bench:
        """Create a file without equal blocks, and store it in a repository."""
        file, root = directory / "image.bin", directory / "repository"
        file.write_bytes(random.Random(size).randbytes(size))
        init(root, "Generated")
        Blobs(root).add(file)
        name = blob_name(hashlib.sha256(file.read_bytes()).digest())
        return cls(directory, file, root, ("b", name), load.build(directory))

    @contextlib.contextmanager
    def serving(self, key: str) -> Iterator[tuple[Process, load.Load, int]]:
        """Serve the file until the block ends; yields the server, a load for it and its port."""
        port = free_port()
        if key == "ours":
            command: list[str | Path] = [sys.executable, "-m", "netota_coap", "serve", self.root]
            command += ["--bind", f"127.0.0.1:{port}"]
            path = self.path
        else:
            program = shutil.which("coap-server-notls") or "coap-server-notls"
            command, path = [program, "-A", "127.0.0.1", "-p", str(port)], LIBCOAP_PATH
        lines = [load.options(path)]
        asking = load.Load.write(self.program, self.directory / f"{key}.requests", lines)
        asking = attrs.evolve(asking, szx=SZX)
        with contextlib.ExitStack() as stack:
            with on_processor(-1):
                log = self.directory / f"{key}.log"
                server = stack.enter_context(Process.start(command, log))
            until(lambda: server.still_runs() and _answers(asking, port), "no answer")
            if key == "libcoap":
                uri = f"coap://127.0.0.1:{port}/{LIBCOAP_PATH[0]}"
                put = ("coap-client-notls", "-m", "put", "-b", str(BLOCK), "-f", self.file, uri)
                subprocess.run(put, check=True, capture_output=True)
            yield server, asking, port


@contextlib.contextmanager
def on_processor(place: int) -> Iterator[None]:
    """Start processes on one of the available processors until the block ends."""
    before = os.sched_getaffinity(0)
    os.sched_setaffinity(0, {sorted(before)[place]})
    try:
        yield
    finally:
        os.sched_setaffinity(0, before)


def _answers(asking: load.Load, port: int) -> bool:
    try:
        return asking.run(port, 1, "-c", "1", "-r", "100").answers == 1
    except RuntimeError:
        return False


def measure(bench: Bench, key: str, seconds: float) -> dict[str, Figures]:
    """Measure a server once, with one client and with many."""
    figures = {}
    with bench.serving(key) as (server, asking, port), on_processor(0):
        size = bench.file.stat().st_size
        whole = asking.run(port, 60, "-c", str(-(-size // BLOCK)))
        if (whole.transfers, whole.payload_bytes) != (1, size):
            raise SystemExit(f"{key}: {whole.payload_bytes} bytes arrived, not {size}")
        for row, clients in CLIENTS.items():
            crowd = attrs.evolve(asking, window=clients, sockets=clients)
            crowd.run(port, WARM_UP_S)
            before, before_s = server.rss, server.cpu_s
            result = crowd.run(port, seconds)
            figures[row] = {
                "mb_per_second": result.per_second * BLOCK / 1e6,
                "median_us": result.median_us,
                "p99_us": result.p99_us,
                "cpu_us": (server.cpu_s - before_s) / max(result.answers, 1) * 1e6,
                "fairness": result.most / max(result.fewest, 1),
                "rss_growth_mb": (server.rss - before) / 1e6,
                "failed": result.failed,
            }
    return figures


def table(figures: Mapping[str, Mapping[str, Figures]], title: str) -> Table:
    """Return the figures as a table."""
    shown = Table(title=title, box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0))
    for column in ("", *_COLUMNS):
        shown.add_column(column, justify="left" if column == "" else "right")
    for row, clients in CLIENTS.items():
        for key, of_peer in figures.items():
            each = of_peer[row]
            other = figures.get("libcoap", {}).get(row)
            ratio = each["mb_per_second"] / other["mb_per_second"] if other else 0.0
            shown.add_row(
                PEERS[key],
                str(clients),
                f"{each['mb_per_second']:.1f}",
                f"{ratio:.2f}" if other else "",
                f"{each['median_us']:.0f}",
                f"{each['p99_us']:.0f}",
                f"{each['cpu_us']:.0f}",
                f"{each['fairness']:.2f}",
                f"{each['rss_growth_mb']:.1f} MB",
                f"{each['failed']:.0f}",
            )
    return shown


@click.command()
@click.option("--megabytes", type=click.IntRange(1, 100), default=10, show_default=True)
@click.option("--seconds", type=click.FloatRange(0.05, 20), default=2, show_default=True)
@click.option("--runs", type=click.IntRange(min=1), default=3, show_default=True)
@click.option("--json", "as_json", is_flag=True, help="Print the figures as JSON.")
def main(megabytes: int, seconds: float, runs: int, as_json: bool) -> None:
    """Measure how fast files are served block by block."""
    keys: Sequence[str] = list(PEERS)
    if shutil.which("coap-server-notls") is None:
        click.echo("libcoap: coap-server-notls is not installed, so it is not measured", err=True)
        keys = ["ours"]
    with tempfile.TemporaryDirectory() as name:
        bench = Bench.prepare(Path(name), megabytes * 1_000_000)
        every = [{key: measure(bench, key, seconds) for key in keys} for _ in range(runs)]
    figures = together(every, ("failed",))
    if as_json:
        print(json.dumps({"megabytes": megabytes, "runs": runs, **figures}))
    else:
        title = f"{megabytes} MB in blocks of {BLOCK} bytes, µs, medians of {runs} runs"
        Console().print(table(figures, title))


if __name__ == "__main__":
    main()
