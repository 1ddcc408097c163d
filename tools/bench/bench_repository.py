"""Measures what a large repository costs: time to load, memory, time to reload after a publish.

Usage: tools/bench/bench_repository.py [--streams N] [--runs N] [--json]
Each run loads the same generated repository in a process of its own; figures are medians.
"""

from __future__ import annotations

import gc
import hashlib
import json
import statistics
import subprocess
import sys
import tempfile
import time
from datetime import UTC, datetime
from pathlib import Path

import attrs
import click
from rich.console import Console
from rich.table import Table

from netota_coap.catalog.catalog import Catalog
from netota_coap.encoding.codecs import Format
from netota_coap.encoding.content_formats import ContentFormat
from netota_coap.encoding.documents import encode
from netota_coap.model.values import Archive, Content, Envelope, Offer, Stream
from netota_coap.publishing.archives import ArchiveSource
from netota_coap.publishing.publish import Edit, publish
from netota_coap.repository.loading import Loader
from netota_coap.repository.scaffold import init
from netota_coap.repository.store import DirectoryStore

STREAMS_PER_PACKAGE = 50
BOARDS = ("nrf52840dk", "nrf9160dk")
NOW = datetime(2026, 11, 20, 9, 30, tzinfo=UTC)


@attrs.frozen
class Figure:
    """A measured figure: its name, unit, and upper bound."""

    what: str
    unit: str
    bound: float | None = None


FIGURES = {
    "load_s": Figure("load of all streams", "s", 3),
    "rss_mb": Figure("memory after it", "MB", 150),
    "reload_ms": Figure("reload after one publish", "ms", 50),
    "parsed": Figure("files parsed by it", "files"),
    "stream_bytes": Figure("stream", "bytes", 256),
    "head_bytes": Figure("stream, ?head", "bytes", 256),
    "full_bytes": Figure("stream, ?full", "bytes"),
    "json_bytes": Figure("stream, JSON", "bytes"),
    "one_archive_bytes": Figure("stream of one archive with a 48-byte URL", "bytes", 204),
}


# ----------------------------------------------------------------------------------------------
# The repository


def _archive(label: str, board: str, debug: bool) -> Archive:
    name = f"{board}-debug" if debug else board
    digest = hashlib.sha256(f"{label}/{name}".encode()).digest()
    url = f"https://cdn.example.com/{name}/".ljust(48, "0")
    return Archive(
        name=name,
        envelope=Envelope(type="application/octet-stream", size=214_016, sha256=digest),
        content=Content(type="zephyr-image", arch="arm", machine=board, debug=debug),
        offers=(Offer(url=url, metric=100),),
    )


def _stream(label: str) -> Stream:
    archives = tuple(_archive(label, board, debug) for board in BOARDS for debug in (False, True))
    return Stream(version="2.4.1", sequence=1, published=NOW, archives=archives)


def generate(root: Path, streams: int) -> None:
    """Write a repository of streams with 4 archives each."""
    init(root, "Generated")
    for index in range(streams):
        package, stream = divmod(index, STREAMS_PER_PACKAGE)
        directory = root / f"packages/package-{package:04}/streams"
        directory.mkdir(parents=True, exist_ok=True)
        data = encode(_stream(str(index)), Format.TOML)
        (directory / f"stream-{stream:02}.toml").write_bytes(data)


# ----------------------------------------------------------------------------------------------
# One run, in a process of its own


def _memory_mb() -> float:
    status = Path("/proc/self/status").read_text()
    line = next(line for line in status.splitlines() if line.startswith("VmRSS:"))
    return int(line.split()[1]) / 1_024


def _sizes(catalog: Catalog, one: Stream) -> dict[str, float]:
    resource = catalog.find(("p", "package-0000", "s", "stream-00"))

    def size(query: list[str], fmt: ContentFormat = ContentFormat.CBOR) -> int:
        return len(resource.represent(query, fmt, "coap").payload)

    return {
        "stream_bytes": size([]),
        "head_bytes": size(["head"]),
        "full_bytes": size(["full"]),
        "json_bytes": size([], ContentFormat.JSON),
        "one_archive_bytes": len(encode(one, Format.CBOR)),
    }


def _measure(root: Path) -> dict[str, float]:
    loader = Loader(root)
    start = time.perf_counter()
    catalog = Catalog.of(loader.load())
    loaded = time.perf_counter()
    memory = _memory_mb()

    image = root / ".image"
    image.write_bytes(b"a stand-in for an image")
    edit = Edit(now=NOW, allow_missing=True)
    name, source = ("package-0000", "stream-01"), ArchiveSource(image, "a")
    store = DirectoryStore(root)
    publish(store, name, "2.5.0", [source], edit=edit, force=True)  # each run publishes the same
    gc.collect()  # so that the reload does not collect the garbage of the publish
    published = time.perf_counter()
    Catalog.of(loader.load(), catalog)
    reloaded = time.perf_counter()
    return {
        "load_s": loaded - start,
        "rss_mb": memory,
        "reload_ms": (reloaded - published) * 1_000,
        "parsed": loader.parsed,
        **_sizes(
            catalog, attrs.evolve(_stream("one"), archives=(_archive("one", BOARDS[0], False),))
        ),
    }


# ----------------------------------------------------------------------------------------------
# Output


def _table(figures: dict[str, float], streams: int, runs: int) -> Table:
    table = Table(title=f"{streams} streams of 4 archives, median of {runs} runs")
    for column in ("", "measured", "at most", "unit"):
        table.add_column(column, justify="right" if column in ("measured", "at most") else "left")
    for key, figure in FIGURES.items():
        value = figures[key]
        met = figure.bound is None or value <= figure.bound
        shown = f"{value:.0f}" if figure.unit in ("bytes", "files") else f"{value:.2f}"
        bound = "" if figure.bound is None else f"{figure.bound:g}"
        table.add_row(figure.what, shown if met else f"[red]{shown}[/red]", bound, figure.unit)
    return table


@click.command()
@click.option("--streams", type=click.IntRange(min=2), default=5_000, show_default=True)
@click.option("--runs", type=click.IntRange(min=1), default=3, show_default=True)
@click.option("--json", "as_json", is_flag=True, help="Print the figures as JSON.")
@click.option("--measure", type=click.Path(path_type=Path), hidden=True)
def main(streams: int, runs: int, as_json: bool, measure: Path | None) -> None:
    """Measure what a large repository costs."""
    if measure:
        print(json.dumps(_measure(measure)))
        return
    with tempfile.TemporaryDirectory() as directory:
        root = Path(directory) / "repository"
        generate(root, streams)
        command = [sys.executable, __file__, "--measure", str(root)]
        outputs = [
            subprocess.run(command, check=True, capture_output=True).stdout for _ in range(runs)
        ]
    every = [json.loads(output) for output in outputs]
    figures = {key: statistics.median(run[key] for run in every) for key in FIGURES}
    if as_json:
        print(json.dumps({"streams": streams, "runs": runs, **figures}))
    else:
        Console().print(_table(figures, streams, runs))


if __name__ == "__main__":
    main()
