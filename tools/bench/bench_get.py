"""Measures how fast GETs are answered by netota_coap, aiocoap, libcoap and npm's coap.

Usage: tools/bench/bench_get.py [--runs N] [--seconds S] [--archives N] [--peer KEY]... [--json]
Each run starts all peers on loopback and measures each row for one after the other, so that other
load of the machine affects all of them. Figures are medians over the runs; ratios are ratios of
medians. The others serve as many bytes as netota_coap. A peer that is not installed is left out.

Peers: netota_coap bound to one address, and to the wildcard; netota_coap without its front door,
by aiocoap alone; a bare resource of aiocoap; coap-server-notls of libcoap; coap of npm.
Rows: a narrowed stream, 1, 32 and 64 requests in flight; 10,000 distinct selections in rotation,
and the same right after a swap, 32 in flight; `?full`, 8 transfers by blocks of 1,024 bytes.
"""

from __future__ import annotations

import contextlib
import functools
import json
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import attrs
import click
from rich import box
from rich.console import Console
from rich.table import Table

from netota_coap.catalog.catalog import Catalog
from netota_coap.encoding.content_formats import ContentFormat
from netota_coap.repository.loading import Loader
from netota_coap.repository.scaffold import init
from tools.bench import load as load_generator
from tools.bench.peers import PATIENCE_S, Process, free_port, together, until

NARROWED = ("machine=board-000", "scheme=https")
NARROWINGS = 10_000
BOARDS = 20
SMALL, LARGE = "small", "large"
NODE_SERVER = """
const coap = require('coap'), fs = require('fs');
const [port, ...files] = process.argv.slice(2);
const payloads = new Map(files.map(file => ['/' + file.split('/').pop(), fs.readFileSync(file)]));
const server = coap.createServer((request, response) =>
    response.end(payloads.get(request.url.split('?')[0])));
server.listen(Number(port), '127.0.0.1');
"""


@attrs.frozen
class Row:
    """A kind of load.

    Attributes:
        stream: The requested stream; others serve a file of as many bytes.
        queries: Sent in rotation.
        window: Requests in flight; with `szx`, transfers in flight.
        sockets: Number of sockets that send them.
        szx: Block size exponent, if blocks are requested.
    """

    what: str
    stream: str
    queries: Sequence[Sequence[str]]
    window: int
    sockets: int
    szx: int | None = None


# `unit` is an attribute of no archive: it narrows nothing, but makes the requests distinct.
_DISTINCT = [
    (f"machine=board-{index % BOARDS:03}", "scheme=https", f"unit={index:05}")
    for index in range(NARROWINGS)
]
ROWS = {
    "narrowed_1": Row("window 1", SMALL, [NARROWED], 1, 1),
    "narrowed_32": Row("window 32", SMALL, [NARROWED], 32, 4),
    "narrowed_64": Row("window 64", SMALL, [NARROWED], 64, 4),
    "distinct_32": Row("10,000 in turn", SMALL, _DISTINCT, 32, 4),
    "full_8": Row("?full by blocks", LARGE, [("full",)], 8, 8, szx=6),
}


AT_LEAST = {
    ("narrowed_32", "door", "libcoap"): 1.4,
    ("narrowed_32", "door", "aiocoap"): 25,
    ("narrowed_32", "wildcard", "libcoap"): 1.2,
    ("distinct_32", "door", "libcoap"): 0.8,
    ("full_8", "door", "libcoap"): 0.7,
}
"""Row, peer, other peer, and the ratio of responses per second that is required."""

MEDIAN_AT_MOST = {("narrowed_1", "door"): 1.5}
"""Row, peer, and the ratio to the median latency of libcoap that is allowed."""

SWAP_AT_LEAST = 15_000  # responses per second, none of them 4.29


# ----------------------------------------------------------------------------------------------
# The repository


@attrs.frozen
class Bench:
    """The repository, files and tools of all runs.

    Attributes:
        root: Our repository.
        program: The load generator.
        payloads: By stream, files with as many bytes as our responses.
    """

    directory: Path
    root: Path
    program: Path
    payloads: Mapping[str, Path]

    @classmethod
    def prepare(cls, directory: Path, archives: int) -> Bench:
        """Generate the repository, and measure the size of its responses."""
        root = directory / "repository"
        init(root, "Generated")
        (directory / "image.bin").write_bytes(b"a stand-in for an image")
        for stream, count in ((SMALL, BOARDS), (LARGE, archives)):
            (directory / f"{stream}.toml").write_text(_release(count))
            _publish(root, stream, "1.0.0")
        catalog = Catalog.of(Loader(root).load())
        payloads = {}
        for row in ROWS.values():
            resource = catalog.find(_path(row.stream))
            view = resource.represent(row.queries[0], ContentFormat.CBOR, "coap")
            payloads[row.stream] = directory / row.stream
            payloads[row.stream].write_bytes(bytes(len(view.payload)))
        return cls(directory, root, load_generator.build(directory), payloads)

    def load(self, row: Row, peer: Peer) -> load_generator.Load:
        """Write the requests of a row for a peer."""
        if peer.is_ours:
            path, queries = _path(row.stream), row.queries
        else:
            path = (peer.resource or row.stream,)
            queries = row.queries if len(row.queries) > 1 else [()]
        lines = (load_generator.options(path, query) for query in queries)
        made = load_generator.Load.write(self.program, self.directory / "requests", lines)
        return attrs.evolve(made, window=row.window, sockets=row.sockets, szx=row.szx)


def _path(stream: str) -> tuple[str, ...]:
    return ("p", "bench", "s", stream)


def _release(archives: int) -> str:
    offers = "".join(
        f'[[offers]]\nurl = "{scheme}://cdn.example.com/{{version}}/{{name}}.bin"\n'
        f"metric = {metric}\n"
        for scheme, metric in (("https", 100), ("http", 200))
    )
    each = (
        f'[[archives]]\nfile = "image.bin"\nname = "board-{index:03}"\n'
        'media_type = "application/vnd.mcuboot.image"\n'
        '[archives.content]\ntype = "zephyr-image"\narch = "arm"\n'
        f'machine = "board-{index:03}"\ndebug = false\n'
        for index in range(archives)
    )
    return offers + "".join(each)


def _publish(root: Path, stream: str, version: str) -> None:
    command = (sys.executable, "-m", "netota_coap", "publish", root, f"bench/{stream}", version)
    release = ("--release", root.with_name(f"{stream}.toml"))
    subprocess.run(list(map(str, (*command, *release))), check=True, capture_output=True)


# ----------------------------------------------------------------------------------------------
# Peers


@attrs.frozen
class Peer:
    """A server to be measured.

    Attributes:
        what: Its name in the output.
        command: Returns the command that starts it on a port; None if it is not installed.
        is_ours: Whether it serves our repository; others serve files.
        resource: Its only resource, filled by PUT; "": one resource for each file.
        reloads: Whether it serves what is published meanwhile.
    """

    what: str
    command: Callable[[Bench, int], Sequence[str | Path] | None]
    is_ours: bool = False
    resource: str = ""
    reloads: bool = False


def _serve(host: str, *more: str) -> Callable[[Bench, int], Sequence[str | Path]]:
    def command(bench: Bench, port: int) -> Sequence[str | Path]:
        serve = (sys.executable, "-m", "netota_coap", "serve", bench.root)
        return (*serve, "--bind", f"{host}:{port}", *more)

    return command


def _plain(bench: Bench, port: int, *paths: Path) -> Sequence[str | Path]:
    return (sys.executable, Path(__file__).with_name("plain_server.py"), str(port), *paths)


def _libcoap(_bench: Bench, port: int) -> Sequence[str | Path] | None:
    program = shutil.which("coap-server-notls")
    return program and (program, "-A", "127.0.0.1", "-p", str(port))


def _node(bench: Bench, port: int) -> Sequence[str | Path] | None:
    directory = bench.directory / "node"
    if not directory.exists():
        directory.mkdir()
        (directory / "server.js").write_text(NODE_SERVER)
        npm = shutil.which("npm")
        command = (str(npm), "install", "--silent", "--prefix", directory, "coap")
        if npm is None or subprocess.run(command, check=False, capture_output=True).returncode:
            return None
    if not (directory / "node_modules").exists():
        return None
    return ("node", directory / "server.js", str(port), *bench.payloads.values())


PEERS = {
    "door": Peer("ours, address", _serve("127.0.0.1"), is_ours=True, reloads=True),
    "wildcard": Peer("ours, wildcard", _serve("[::]"), is_ours=True, reloads=True),
    "http": Peer("ours, HTTP idle", _serve("127.0.0.1", "--http", "127.0.0.1:0"), is_ours=True),
    "no_door": Peer(
        "ours, no door", lambda bench, port: _plain(bench, port, bench.root), is_ours=True
    ),
    "aiocoap": Peer("aiocoap", lambda bench, port: _plain(bench, port, *bench.payloads.values())),
    "libcoap": Peer("libcoap", _libcoap, resource="example_data"),
    "node": Peer("coap of npm", _node),
}


@attrs.frozen
class Running:
    """A running server."""

    peer: Peer
    port: int
    log: Path

    @classmethod
    @contextlib.contextmanager
    def start(cls, bench: Bench, key: str) -> Iterator[Running | None]:
        """Run a server until the block ends; yields None if it is not installed."""
        peer, port = PEERS[key], free_port()
        command = peer.command(bench, port)
        if command is None:
            click.echo(f"{peer.what}: it is not installed, so it is not measured", err=True)
            yield None
            return
        with Process.start(command, bench.directory / f"{key}.log") as process:
            yield cls(peer, port, process.log)

    def answers(self, bench: Bench) -> bool:
        """Tell whether the server answers."""
        try:
            asking = bench.load(ROWS["narrowed_1"], self.peer)
            return asking.run(self.port, 1, "-c", "1", "-r", "100").answers == 1
        except RuntimeError:
            return False

    def fill(self, payload: Path) -> None:
        """Send the payload by PUT to a server with only one resource."""
        if self.peer.resource:
            uri = f"coap://127.0.0.1:{self.port}/{self.peer.resource}"
            client = ("coap-client-notls", "-m", "put", "-b", "1024", "-f", payload, uri)
            subprocess.run(client, check=True, capture_output=True)


# ----------------------------------------------------------------------------------------------
# Measuring

Figures = dict[str, float]

ADDED = ("failed", "refused")
"""Figures that are added up, since a median would hide them."""


def measure(bench: Bench, row: Row, running: Running, seconds: float) -> Figures:
    """Check one response, warm up, and measure."""
    running.fill(bench.payloads[row.stream])
    asking = bench.load(row, running.peer)
    size = bench.payloads[row.stream].stat().st_size
    blocks = 1 if row.szx is None else -(-size // (16 << row.szx))
    single = attrs.evolve(asking, window=1, sockets=1)
    whole = single.run(running.port, PATIENCE_S, "-c", str(blocks))
    if (whole.transfers, whole.payload_bytes) != (1, size):
        raise SystemExit(f"{running.peer.what}: {whole.payload_bytes} bytes arrived, not {size}")
    asking.run(running.port, seconds, "-c", str(2 * NARROWINGS))
    result = asking.run(running.port, seconds)
    figures = ("per_second", "median_us", "p99_us", "cpu_s")
    return {name: getattr(result, name) for name in figures} | {"failed": result.failed}


def _measure_swap(bench: Bench, running: Running, seconds: float, version: str) -> Figures:
    """Publish under load, and measure from the reload on."""
    asking = bench.load(ROWS["distinct_32"], running.peer)
    reloads = _reloads(running.log)
    loading = asking.start(running.port, 2 * PATIENCE_S)
    try:
        _publish(bench.root, SMALL, version)
        until(lambda: _reloads(running.log) > reloads, "the server did not reload")
        swapped_s = time.monotonic()
        time.sleep(seconds)
    finally:
        loading.terminate()
        result = load_generator.result(loading)
    slices = result.between(swapped_s, swapped_s + seconds)
    return {
        "per_second": sum(slices) / seconds,
        "max_ms": result.max_us / 1_000,
        "refused": result.by_code.get("4.29", 0),
        "failed": result.failed,
    }


def _reloads(log: Path) -> int:
    return log.read_text().count("reloaded ")


def _run(bench: Bench, keys: Sequence[str], seconds: float, run: int) -> dict[str, Any]:
    figures: dict[str, Any] = {name: {} for name in (*ROWS, "swap")}
    with contextlib.ExitStack() as stack:
        started = {key: stack.enter_context(Running.start(bench, key)) for key in keys}
        servers = {key: running for key, running in started.items() if running}
        for running in servers.values():
            until(functools.partial(running.answers, bench), f"{running.peer.what}: no answer")
        for name, row in ROWS.items():
            for key, running in servers.items():
                figures[name][key] = measure(bench, row, running, seconds)
        reloading = [key for key, running in servers.items() if running.peer.reloads]
        for index, key in enumerate(reloading):
            version = f"2.{run}.{index}"
            figures["swap"][key] = _measure_swap(bench, servers[key], seconds, version)
    return figures


# ----------------------------------------------------------------------------------------------
# Output

Measured = Mapping[str, Mapping[str, Figures]]
"""Figures by row and peer."""


def table(figures: Measured, title: str) -> Table:
    """Return the figures as a table."""
    shown = Table(title=title, box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0))
    shown.add_column("", no_wrap=True)
    for column in ("answers/s", "median", "99 %", "to libcoap", "to aiocoap", "bad"):
        shown.add_column(column, justify="right")
    for name, row in ROWS.items():
        shown.add_row(f"[bold]{row.what}[/bold]")
        for key, measured in figures[name].items():
            shown.add_row(
                f"  {PEERS[key].what}",
                f"{measured['per_second']:,.0f}",
                _median(figures, name, key),
                f"{measured['p99_us']:,.0f}",
                _ratio(figures, name, key, "libcoap"),
                _ratio(figures, name, key, "aiocoap"),
                f"{measured['failed']:.0f}",
            )
        shown.add_section()
    if figures["swap"]:
        shown.add_row("[bold]after a swap[/bold]")
    for key, measured in figures["swap"].items():
        met = measured["per_second"] >= SWAP_AT_LEAST and not measured["refused"]
        rate = _coloured(f"{measured['per_second']:,.0f} ≥ {SWAP_AT_LEAST:,}", met)
        shown.add_row(f"  {PEERS[key].what}", rate, *("",) * 4, f"{measured['failed']:.0f}")
    return shown


def _ratio(figures: Measured, row: str, peer: str, other: str) -> str:
    if other not in figures[row] or not figures[row][other]["per_second"]:
        return ""
    ratio = figures[row][peer]["per_second"] / figures[row][other]["per_second"]
    wanted = AT_LEAST.get((row, peer, other))
    if wanted is None:
        return f"{ratio:.2f}"
    return _coloured(f"{ratio:.2f} ≥ {wanted:g}", ratio >= wanted)


def _median(figures: Measured, row: str, peer: str) -> str:
    median_us = figures[row][peer]["median_us"]
    times = MEDIAN_AT_MOST.get((row, peer))
    if times is None or "libcoap" not in figures[row]:
        return f"{median_us:,.0f}"
    wanted_us = times * figures[row]["libcoap"]["median_us"]
    return _coloured(f"{median_us:,.0f} ≤ {wanted_us:,.0f}", median_us <= wanted_us)


def _coloured(text: str, met: bool) -> str:
    return text if met else f"[red]{text}[/red]"


@click.command()
@click.option("--runs", type=click.IntRange(min=1), default=5, show_default=True)
@click.option(
    "--seconds",
    type=click.FloatRange(0.01, 20),
    default=2,
    show_default=True,
    help="Duration of a measurement; the warm-up before it takes at most as long.",
)
@click.option(
    "--archives",
    type=click.IntRange(1, 1_000),
    default=480,
    show_default=True,
    help="Number of archives of the stream that is requested with ?full.",
)
@click.option(
    "--peer",
    "peers",
    type=click.Choice(list(PEERS)),
    multiple=True,
    help="Measure only this peer; repeatable.",
)
@click.option("--json", "as_json", is_flag=True, help="Print the figures as JSON.")
def main(runs: int, seconds: float, archives: int, peers: Sequence[str], as_json: bool) -> None:
    """Measure how fast GETs are answered."""
    with tempfile.TemporaryDirectory() as directory:
        bench = Bench.prepare(Path(directory), archives)
        keys = [key for key in PEERS if key in (peers or PEERS)]
        measured = [_run(bench, keys, seconds, run) for run in range(runs)]
        figures = together(measured, ADDED)
        sizes = {name: path.stat().st_size for name, path in bench.payloads.items()}
    if as_json:
        told = {"runs": runs, "seconds": seconds, "archives": archives, "bytes": sizes}
        print(json.dumps(told | figures))
    else:
        title = (
            f"{sizes[SMALL]} and {sizes[LARGE]:,} bytes, {seconds:g} s each, µs, "
            f"medians of {runs} runs"
        )
        Console().print(table(figures, title))


if __name__ == "__main__":
    main()
