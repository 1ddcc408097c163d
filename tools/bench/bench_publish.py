"""Measures what publishing costs: how fast and how often files are read, and the whole command.

Usage: tools/bench/bench_publish.py [--files N] [--size-mb N] [--runs N] [--json]
Each run measures everything once, one after the other, so that other load of the machine affects
all of it. Figures are medians, those of ratios too. Some builds of sha256sum do not use the SHA
instructions of processors and are slow, so openssl, which does, is measured as well.
"""

from __future__ import annotations

import json
import os
import shutil
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

from netota_coap.publishing import inspection
from netota_coap.repository.scaffold import init

MB = 10**6
OPENSSL = shutil.which("openssl")


@attrs.frozen
class Figure:
    """A measured figure: its name, unit, and upper bound."""

    what: str
    unit: str
    bound: float | None = None


FIGURES = {
    "sha256sum_s": Figure("sha256sum of all files", "s"),
    "openssl_s": Figure("openssl dgst -sha256 of all files", "s"),
    "read_s": Figure("inspection.read of all files", "s"),
    "publish_s": Figure("publish of all files, the whole command", "s"),
    "read_ratio": Figure("reading, to sha256sum", "times", 1.2),
    "openssl_ratio": Figure("reading, to openssl", "times", 1.2),
    "publish_ratio": Figure("publish, to sha256sum", "times", 1.2),
    "read_times": Figure("bytes read, to bytes of the files", "times", 1.01),
    "growth_mb": Figure("memory, above that of a small publish", "MB", 8),
    "rss_mb": Figure("memory at most", "MB"),
    "small_s": Figure("publish of one small archive", "s", 0.4),
    "help_s": Figure("netota-coap --help", "s", 0.15),
    "python_s": Figure("python -c pass", "s"),
}


# ----------------------------------------------------------------------------------------------
# Measuring


_REPORTING = """
import atexit
import sys
from pathlib import Path

def report():
    counts = (Path("/proc/self") / name for name in ("status", "io"))
    report_to.write_text("\\n".join(file.read_text() for file in counts))

report_to = Path(sys.argv.pop(1))
atexit.register(report)
from netota_coap.cli import main
main()
"""
# The process reports its own memory: the peak that the kernel reports to the parent (ru_maxrss) is
# never below the memory of that parent.


@attrs.frozen
class Cost:
    """What a publish took.

    Attributes:
        rss_mb: The peak of its memory.
        read: Bytes read, including Python modules.
    """

    time_s: float
    rss_mb: float
    read: int


def _time_s(*command: str | Path) -> float:
    start = time.perf_counter()
    subprocess.run(list(map(str, command)), check=True, capture_output=True)
    return time.perf_counter() - start


def _publish(root: Path, stream: str, version: str, files: Sequence[Path]) -> Cost:
    archives = [part for file in files for part in ("--archive", f"{file},type=image")]
    report = root.with_name("report")
    command = (sys.executable, "-c", _REPORTING, report, "publish", root, f"bench/{stream}")
    time_s = _time_s(*command, version, *archives)
    told = dict(line.split(":", 1) for line in report.read_text().splitlines() if line)
    return Cost(time_s, int(told["VmHWM"].split()[0]) / 1_024, int(told["rchar"]))


def _measure(root: Path, files: Sequence[Path], small: Path, version: str) -> dict[str, float]:
    python_s = _time_s(sys.executable, "-c", "pass")
    help_s = _time_s(sys.executable, "-m", "netota_coap", "--help")
    little = _publish(root, "small", version, [small])
    sha256sum_s = _time_s("sha256sum", *files)
    start = time.perf_counter()
    for file in files:
        inspection.read(file)
    read_s = time.perf_counter() - start
    much = _publish(root, "large", version, files)
    figures = {
        "sha256sum_s": sha256sum_s,
        "read_s": read_s,
        "publish_s": much.time_s,
        "read_ratio": read_s / sha256sum_s,
        "publish_ratio": much.time_s / sha256sum_s,
        "read_times": (much.read - little.read) / sum(file.stat().st_size for file in files),
        "growth_mb": much.rss_mb - little.rss_mb,
        "rss_mb": much.rss_mb,
        "small_s": little.time_s,
        "help_s": help_s,
        "python_s": python_s,
    }
    if OPENSSL:
        figures["openssl_s"] = _time_s(OPENSSL, "dgst", "-sha256", *files)
        figures["openssl_ratio"] = read_s / figures["openssl_s"]
    return figures


def _generate(directory: Path, files: int, size: int) -> list[Path]:
    """Create files that differ, and in which no format is recognized."""
    block = os.urandom(MB)
    paths = [directory / f"image-{index:02}.bin" for index in range(files)]
    for index, path in enumerate(paths):
        with path.open("wb") as stream:
            stream.write(f"image {index:10}".encode())
            while stream.tell() < size:
                stream.write(block[: size - stream.tell()])
    return paths


# ----------------------------------------------------------------------------------------------
# Output


def _table(figures: dict[str, float], files: int, size_mb: int, runs: int) -> Table:
    table = Table(title=f"{files} files of {size_mb} MB, median of {runs} runs")
    for column in ("", "measured", "at most", "unit"):
        table.add_column(column, justify="right" if column in ("measured", "at most") else "left")
    for key, figure in FIGURES.items():
        if key not in figures:
            continue
        value = figures[key]
        met = figure.bound is None or value <= figure.bound
        bound = "" if figure.bound is None else f"{figure.bound:g}"
        shown = f"{value:.3f}"
        table.add_row(figure.what, shown if met else f"[red]{shown}[/red]", bound, figure.unit)
    return table


@click.command()
@click.option("--files", type=click.IntRange(min=1), default=20, show_default=True)
@click.option("--size-mb", type=click.IntRange(min=1), default=50, show_default=True)
@click.option("--runs", type=click.IntRange(min=1), default=5, show_default=True)
@click.option("--json", "as_json", is_flag=True, help="Print the figures as JSON.")
def main(files: int, size_mb: int, runs: int, as_json: bool) -> None:
    """Measure what publishing costs."""
    with tempfile.TemporaryDirectory() as name:
        directory = Path(name)
        root, small = directory / "repository", directory / "small.bin"
        init(root)
        small.write_bytes(b"a stand-in for an image")
        paths = _generate(directory, files, size_mb * MB)
        _publish(root, "small", "0.9.0", [small])  # the first one compiles the modules
        every = [_measure(root, paths, small, f"1.0.{run}") for run in range(runs)]
    figures = {
        key: statistics.median(run[key] for run in every) for key in FIGURES if key in every[0]
    }
    if as_json:
        print(json.dumps({"files": files, "size_mb": size_mb, "runs": runs, **figures}))
    else:
        Console().print(_table(figures, files, size_mb, runs))


if __name__ == "__main__":
    main()
