"""Measures what an idle service costs: time to start, memory, wake-ups.

Usage: tools/bench/bench_service.py [--streams N] [--idle SECONDS] [--runs N] [--json]
Each run starts the command on the same generated repository, sends requests until the first
response, leaves it idle for a while, and reads its counters from the kernel. Figures are medians.
"""

from __future__ import annotations

import json
import os
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

import attrs
import click
from rich.console import Console
from rich.table import Table

from netota_coap.coap import options as coap
from tools.bench.bench_repository import generate
from tools.bench.peers import free_port

PATIENCE_S = 30.0
SETTLE_S = 1.0  # after the first response, until the work of the start is done
VARIANTS = {"coap": (), "http": ("--http", "127.0.0.1:0")}
WATCHDOG_S = 10.0


@attrs.frozen
class Figure:
    """A measured figure: its name, unit, and upper bound."""

    what: str
    unit: str
    bound: float


FIGURES = {
    "coap_start_s": Figure("start to first answer", "s", 0.5),
    "coap_rss_mb": Figure("memory, idle", "MB", 45),
    "coap_wakes": Figure("wake-ups while idle", "/s", 0),
    "watchdog_wakes": Figure("with a watchdog fed each 5 s", "/s", 0.21),
    "http_start_s": Figure("start to first answer, with HTTP", "s", 0.5),
    "http_rss_mb": Figure("memory, idle, with HTTP", "MB", 75),
    "http_wakes": Figure("wake-ups while idle, with HTTP", "/s", 0),
}


def _answers(port: int) -> bool:
    """Tell whether a request is answered within 5 ms."""
    tail = coap.encode([(coap.URI_PATH, b"p")])
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as opened:
        opened.settimeout(0.005)
        opened.connect(("127.0.0.1", port))
        try:
            opened.send(bytes((0x40, 1, 0, 1)) + tail)
            return bool(opened.recv(2_048))
        except OSError:
            return False


def _of_status(process: int, *names: str) -> int:
    """Add up numbers of the kernel over all threads of a process."""
    total = 0
    for status in Path(f"/proc/{process}/task").glob("*/status"):
        for line in status.read_text().splitlines():
            name, _, value = line.partition(":")
            if name in names:
                total += int(value.split()[0])
    return total


def _wakes(process: int) -> int:
    return _of_status(process, "voluntary_ctxt_switches")


def _memory_mb(process: int) -> float:
    pages = int(Path(f"/proc/{process}/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE") / 2**20


def _measure(
    root: Path, more: Sequence[str], idle_s: float, environment: dict[str, str]
) -> tuple[float, float, float]:
    """Return seconds to the first response, MB, and wake-ups per second while idle."""
    port = free_port()
    command = [sys.executable, "-m", "netota_coap", "serve", str(root)]
    command += ["--bind", f"127.0.0.1:{port}", "--state", str(root.with_name("state")), *more]
    quiet = subprocess.DEVNULL
    start = time.perf_counter()
    process = subprocess.Popen(command, stdout=quiet, stderr=quiet, env=os.environ | environment)
    try:
        while not _answers(port):
            if process.poll() is not None or time.perf_counter() - start > PATIENCE_S:
                raise SystemExit(f"tools/bench/bench_service.py: no answer: {' '.join(command)}")
        started_s = time.perf_counter() - start
        time.sleep(SETTLE_S)
        before = _wakes(process.pid)
        time.sleep(idle_s)
        return started_s, _memory_mb(process.pid), (_wakes(process.pid) - before) / idle_s
    finally:
        process.terminate()
        process.wait()


def _run(root: Path, idle_s: float) -> dict[str, float]:
    figures: dict[str, float] = {}
    for key, more in VARIANTS.items():
        of_variant = _measure(root, more, idle_s, {})
        names = (f"{key}_start_s", f"{key}_rss_mb", f"{key}_wakes")
        figures |= dict(zip(names, of_variant, strict=True))
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as manager:
        manager.bind(str(root.with_name("notify")))
        environment = {
            "NOTIFY_SOCKET": manager.getsockname(),
            "WATCHDOG_USEC": str(int(WATCHDOG_S * 1e6)),
        }
        figures["watchdog_wakes"] = _measure(root, (), idle_s, environment)[2]
        Path(manager.getsockname()).unlink()
    return figures


def _table(figures: dict[str, float], streams: int, idle_s: float, runs: int) -> Table:
    title = f"{streams} streams, {idle_s:g} s idle, medians of {runs} runs"
    table = Table(title=title)
    for column in ("", "measured", "at most", "unit"):
        table.add_column(column, justify="right" if column in ("measured", "at most") else "left")
    for key, figure in FIGURES.items():
        value = figures[key]
        shown = f"{value:.2f}"
        shown = shown if value <= figure.bound else f"[red]{shown}[/red]"
        table.add_row(figure.what, shown, f"{figure.bound:g}", figure.unit)
    return table


@click.command()
@click.option("--streams", type=click.IntRange(min=1), default=100, show_default=True)
@click.option("--idle", "idle_s", type=click.FloatRange(0.1, 600), default=20, show_default=True)
@click.option("--runs", type=click.IntRange(min=1), default=3, show_default=True)
@click.option("--json", "as_json", is_flag=True, help="Print the figures as JSON.")
def main(streams: int, idle_s: float, runs: int, as_json: bool) -> None:
    """Measure what an idle service costs."""
    with tempfile.TemporaryDirectory() as directory:
        root = Path(directory) / "repository"
        generate(root, streams)
        every = [_run(root, idle_s) for _ in range(runs)]
    figures = {key: statistics.median(run[key] for run in every) for key in FIGURES}
    if as_json:
        print(json.dumps({"streams": streams, "idle_s": idle_s, "runs": runs, **figures}))
    else:
        Console().print(_table(figures, streams, idle_s, runs))


if __name__ == "__main__":
    main()
