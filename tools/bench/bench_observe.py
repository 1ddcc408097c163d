"""Measures how fast observers are notified of a publish, by netota_coap and by libcoap.

Usage: tools/bench/bench_observe.py [--observers N] [--runs N] [--seed N] [--variant KEY]...
   [--json]
Each run measures all variants, each with a server of its own on loopback, so that other load of
the machine affects all of them. Each observer is an endpoint of its own (`watch.c`). Observers
register, something is published, and they acknowledge it; another client requests the stream every
few ms, until 3.5 s after the last acknowledgement. Times run from the rename of the stream's file,
or from libcoap's PUT, to ACKs of the new state; after a restart, from the start of the server.
Figures are medians over the runs; observers that were not notified, or twice, are added up.

Variants: netota_coap; coap-server-notls of libcoap, with as many bytes and at most 10,000
observers, since it takes minutes to register many more; netota_coap with 1 % and 5 % of the
datagrams lost, each way; with 10 % of the observers silent after they registered; killed, and
restarted after the publish.
"""

from __future__ import annotations

import contextlib
import json
import random
import shutil
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import attrs
import click
from rich import box
from rich.console import Console
from rich.table import Table

from netota_coap.catalog.catalog import Catalog
from netota_coap.coap import options as coap
from netota_coap.coap.observe import journal as journal_module
from netota_coap.encoding.content_formats import ContentFormat
from netota_coap.publishing import publish
from netota_coap.publishing.publish import Edit
from netota_coap.repository import scaffold
from netota_coap.repository.loading import Loader
from netota_coap.repository.store import DirectoryStore
from tools.bench.peers import Process, free_port, together, until

SOURCE = Path(__file__).with_name("watch.c")
LIBCOAP = "coap-server-notls"
STABLE, EDGE = ("sensor-node", "stable"), ("sensor-node", "edge")
PATH = ("p", STABLE[0], "s", STABLE[1])
QUERY = ("machine=nrf52840dk",)
LONGEST_S = 50.0  # retransmissions end after 45 s, RFC 7252's MAX_TRANSMIT_SPAN
QUIET_S = 3.5  # after the last ACK; a lost ACK leads to a retransmission within 3 s
ASK_S = 0.005  # between two GETs during the fan-out
ANSWER_S = 1.0
GET, PUT = 1, 3

Figures = dict[str, float]


@attrs.frozen
class Variant:
    """A server and its conditions.

    Attributes:
        loss: Per cent of datagrams that are lost, each way.
        dead: Per cent of observers that are silent after they registered.
        restarts: Whether the server is killed before the publish, and restarted after it.
        is_ours: Otherwise the server is libcoap's.
        most: Limit of observers.
    """

    what: str
    loss: int = 0
    dead: int = 0
    restarts: bool = False
    is_ours: bool = True
    most: int = 200_000


VARIANTS = {
    "plain": Variant("ours"),
    "libcoap": Variant("libcoap", is_ours=False, most=10_000),
    "loss_1": Variant("1 % lost", loss=1),
    "loss_5": Variant("5 % lost", loss=5),
    "dead": Variant("10 % dead", dead=10),
    "restart": Variant("restart", restarts=True),
}


@attrs.frozen
class Goal:
    """A bound of a figure.

    Attributes:
        variant: Whose figure it is.
        most: Upper bound; with `of`, times the figure of that variant with as many observers.
        least: Lower bound.
        up_to: Number of observers up to which it applies.
    """

    variant: str
    figure: str
    most: float = float("inf")
    least: float = 0
    of: str | None = None
    up_to: int = 200_000


GOALS = (
    Goal("plain", "last_s", most=1, of="libcoap"),
    Goal("plain", "last_s", most=3, up_to=50_000),
    Goal("plain", "per_second", least=10_000),
    Goal("plain", "rss_per_observer", most=1_000),
    Goal("plain", "get_ms", most=20),
    Goal("loss_1", "last_s", most=45),
    Goal("dead", "last_s", most=1.25, of="plain"),
    Goal("restart", "last_s", most=2, up_to=10_000),
    *(
        Goal(key, figure, most=0)
        for key, variant in VARIANTS.items()
        if variant.is_ours and variant.loss <= 1  # with more loss, some receive nothing
        for figure in ("untold", "twice")
    ),
)

ADDED = ("refused", "untold", "twice", "repeated", "old", "strays")
"""Figures that are added up, since a median would hide them."""


# ----------------------------------------------------------------------------------------------
# Servers


@attrs.frozen
class Bench:
    """The tools of all runs.

    Attributes:
        program: `watch.c`, compiled.
        observers: Number of observers, unless a variant has a lower limit.
        size: Of a notification's payload, bytes.
    """

    directory: Path
    program: Path
    observers: int
    size: int

    @classmethod
    def prepare(cls, directory: Path, observers: int) -> Bench:
        """Compile the observers, and measure the payload of a notification."""
        program = directory / "watch"
        subprocess.run(["cc", "-O2", "-o", program, SOURCE], check=True)
        catalog = Catalog.of(Loader(_sample(directory)).load())
        view = catalog.find(PATH).represent(QUERY, ContentFormat.CBOR, "coap")
        return cls(directory, program, observers, len(view.payload))


@attrs.frozen
class Server:
    """A server to be measured.

    Attributes:
        target: Options of a request for the observed resource.
        change: Changes that resource; returns when, ns since the epoch.
        first: Its first payload, to be PUT there; b"" if it exists already.
        journal: The journal of observers, if there is one.
    """

    command: Sequence[str | Path]
    port: int
    target: Sequence[coap.Option]
    change: Callable[[Server], int]
    first: bytes = b""
    journal: Path | None = None

    def ask(self, code: int, payload: bytes = b"") -> bool:
        """Tell whether a request is answered in time, and with success."""
        message_id = random.randbytes(2)
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as opened:
            opened.settimeout(ANSWER_S)
            opened.connect(("127.0.0.1", self.port))
            try:
                opened.send(bytes((0x40, code)) + message_id + coap.encode(self.target, payload))
                return opened.recv(2_048)[1] >> 5 == 2
            except OSError:
                return False

    def is_ready(self) -> bool:
        """Tell whether the server answers, with the first payload if there is one."""
        return self.ask(PUT, self.first) if self.first else self.ask(GET)

    def remembers(self, observers: int) -> bool:
        """Tell whether all observers would survive a crash."""
        assert self.journal
        kept, _ = journal_module.replay(self.journal.read_bytes())
        return len(kept.observers) == observers

    def registration(self) -> str:
        """Return the options of a registration in hexadecimal digits."""
        return coap.encode([(coap.OBSERVE, b""), *self.target]).hex()


def _now() -> datetime:
    return datetime.now(UTC).replace(microsecond=0)


def _sample(directory: Path) -> Path:
    root = directory / "repository"
    scaffold.init(root)
    publish.sample(DirectoryStore(root), _now())
    return root


def _ours(_bench: Bench, directory: Path) -> Server:
    root, state = _sample(directory), directory / "state"

    def change(_server: Server) -> int:
        publish.promote(DirectoryStore(root), EDGE, STABLE, edit=Edit(now=_now()))
        file = root / "packages" / STABLE[0] / "streams" / f"{STABLE[1]}.toml"
        return file.stat().st_ctime_ns

    port = free_port()
    command = (sys.executable, "-m", "netota_coap", "serve", root)
    options = ("--bind", f"127.0.0.1:{port}", "--state", state)
    target = [(coap.URI_PATH, segment.encode()) for segment in PATH]
    target += [(coap.URI_QUERY, parameter.encode()) for parameter in QUERY]
    return Server((*command, *options), port, target, change, journal=state / journal_module.FILE)


def _libcoap(bench: Bench, _directory: Path) -> Server:
    def change(server: Server) -> int:
        start_ns = time.time_ns()
        if not server.ask(PUT, b"1" * bench.size):
            raise SystemExit(f"libcoap: no answer to PUT in {ANSWER_S:g} s")
        return start_ns

    port = free_port()
    target = [(coap.URI_PATH, b"example_data")]
    command = (LIBCOAP, "-A", "127.0.0.1", "-p", str(port))
    return Server(command, port, target, change, b"0" * bench.size)


# ----------------------------------------------------------------------------------------------
# Measuring


@attrs.frozen
class Watching:
    """Running observers."""

    _running: subprocess.Popen[str]

    @classmethod
    @contextlib.contextmanager
    def start(
        cls, bench: Bench, variant: Variant, server: Server, seed: int
    ) -> Iterator[Watching]:
        """Start observers, which register, and end them with the block."""
        observers = min(bench.observers, variant.most)
        asked: dict[str, float] = {"-n": observers, "-s": seed, "-t": LONGEST_S, "-q": QUIET_S}
        asked |= {"-l": variant.loss, "-d": variant.dead}
        arguments = [str(part) for pair in asked.items() for part in pair]
        target = ("127.0.0.1", str(server.port), server.registration())
        pipe = subprocess.PIPE
        with subprocess.Popen(
            [bench.program, *arguments, *target], stdout=pipe, stderr=pipe, text=True
        ) as running:
            try:
                yield cls(running)
            finally:
                running.kill()

    def line(self) -> Any:
        """Wait for the next line of output.

        Raises:
            SystemExit: The program ended; the text is its error output.
        """
        assert self._running.stdout and self._running.stderr
        line = self._running.stdout.readline()
        if not line:
            raise SystemExit(self._running.stderr.read().strip() or "watch: ended")
        return json.loads(line)


@contextlib.contextmanager
def asking(server: Server) -> Iterator[list[float]]:
    """Request the observed resource every few ms until the block ends; yields the times, s."""
    waits: list[float] = []
    ended = threading.Event()

    def ask_on() -> None:
        while not waits or not ended.wait(ASK_S):
            start_s = time.perf_counter()
            server.ask(GET)
            waits.append(time.perf_counter() - start_s)

    thread = threading.Thread(target=ask_on)
    thread.start()
    try:
        yield waits
    finally:
        ended.set()
        thread.join()


def measure(bench: Bench, variant: Variant, seed: int) -> Figures:
    """Measure a variant once, with a server of its own.

    Raises:
        SystemExit: The variant cannot be measured; the text says why.
    """
    with contextlib.ExitStack() as stack:
        name = stack.enter_context(tempfile.TemporaryDirectory(dir=bench.directory))
        log = Path(name) / "log"
        server = (_ours if variant.is_ours else _libcoap)(bench, Path(name))
        process = stack.enter_context(Process.start(server.command, log))
        until(lambda: process.still_runs() and server.is_ready(), "the server does not answer")
        rss, cpu_s = process.rss, process.cpu_s
        watching = stack.enter_context(Watching.start(bench, variant, server, seed))
        registered = watching.line()
        count = registered["registered"]
        if not count:
            raise SystemExit(f"{variant.what}: the server accepted no observer")
        figures: Figures = {
            "registered": count,
            "refused": registered["refused"],
            "per_second": count / registered["seconds"],
            "register_cpu_s": process.cpu_s - cpu_s,
            "rss_per_observer": (process.rss - rss) / count,
        }
        if variant.restarts:
            until(lambda: server.remembers(count), "not all observers are in the journal")
            process.kill()
            server.change(server)
            start_ns, cpu_s = time.time_ns(), 0.0
            process = stack.enter_context(Process.start(server.command, log))
        else:
            cpu_s = process.cpu_s
            start_ns = server.change(server)
        waits = stack.enter_context(asking(server))
        told = watching.line()
        process.still_runs()
        figures["cpu_s"] = process.cpu_s - cpu_s
        ended = watching.line()
        figures["get_ms"] = max(waits) * 1e3
    counts = {name: ended[name] for name in ("twice", "repeated", "old", "strays")}
    counts["untold"] = told["living"] - len(told["told_ns"])
    return figures | _times(told["told_ns"], start_ns) | counts


def _times(told_ns: Sequence[int], start_ns: int) -> Figures:
    if not told_ns:
        raise SystemExit(f"no observer was notified in {LONGEST_S:g} s")
    times = [(each_ns - start_ns) / 1e9 for each_ns in sorted(told_ns)]
    last = len(times) - 1
    places = {"first_s": 0, "median_s": last // 2, "p99_s": last * 99 // 100, "last_s": last}
    return {name: times[place] for name, place in places.items()}


# ----------------------------------------------------------------------------------------------
# Output

COLUMNS = {
    "per_second": ("reg/s", ",.0f"),
    "rss_per_observer": ("B each", ",.0f"),
    "first_s": ("first", ".3f"),
    "median_s": ("median", ".3f"),
    "p99_s": ("99 %", ".3f"),
    "last_s": ("last", ".3f"),
    "cpu_s": ("CPU s", ".2f"),
    "get_ms": ("GET ms", ".1f"),
    "untold": ("untold", ".0f"),
    "twice": ("twice", ".0f"),
}
"""Heading and format of each figure in the table."""

Measured = Mapping[str, Figures]
"""Figures by variant."""


def table(figures: Measured, title: str) -> Table:
    """Return the figures as a table."""
    shown = Table(title=title, box=box.SIMPLE_HEAD, padding=0)
    shown.add_column("", no_wrap=True)
    for heading, _ in COLUMNS.values():
        shown.add_column(heading, justify="right", no_wrap=True)
    for key, row in figures.items():
        cells = (format(row[name], spec) for name, (_, spec) in COLUMNS.items())
        shown.add_row(VARIANTS[key].what, *cells)
    return shown


def notes(figures: Measured, observers: int) -> Iterator[str]:
    """Yield which servers accepted fewer observers, and which figures miss their bounds."""
    for key, row in figures.items():
        if row["registered"] != observers:
            yield f"{VARIANTS[key].what}: {row['registered']:,.0f} observers"
    for goal in GOALS:
        if not {goal.variant, goal.of or goal.variant} <= set(figures):
            continue
        row, other = figures[goal.variant], figures[goal.of or goal.variant]
        if not other["registered"] == row["registered"] <= goal.up_to:
            continue
        most = goal.most * (other[goal.figure] if goal.of else 1)
        if not goal.least <= row[goal.figure] <= most:
            heading, spec = COLUMNS[goal.figure]
            wanted = f"≥ {goal.least:{spec}}" if goal.least else f"≤ {most:{spec}}"
            value = format(row[goal.figure], spec)
            yield f"[red]{VARIANTS[goal.variant].what}: {heading} {value}, wanted {wanted}[/red]"


@click.command()
@click.option("--observers", type=click.IntRange(1, 100_000), default=10_000, show_default=True)
@click.option("--runs", type=click.IntRange(min=1), default=3, show_default=True)
@click.option(
    "--seed",
    type=click.IntRange(0, 10**6),
    default=1,
    show_default=True,
    help="Decides which datagrams are lost and which observers fall silent; each run adds 1.",
)
@click.option(
    "--variant",
    "variants",
    type=click.Choice(list(VARIANTS)),
    multiple=True,
    help="Measure only this variant; repeatable.",
)
@click.option("--json", "as_json", is_flag=True, help="Print the figures as JSON.")
def main(observers: int, runs: int, seed: int, variants: Sequence[str], as_json: bool) -> None:
    """Measure how fast observers are notified of a publish."""
    keys = [key for key in VARIANTS if key in (variants or VARIANTS)]
    if "libcoap" in keys and shutil.which(LIBCOAP) is None:
        click.echo("libcoap: coap-server-notls is not installed, so it is not measured", err=True)
        keys.remove("libcoap")
    with tempfile.TemporaryDirectory() as directory:
        bench = Bench.prepare(Path(directory), observers)
        measured = [
            {key: measure(bench, VARIANTS[key], seed + run) for key in keys} for run in range(runs)
        ]
    figures = together(measured, ADDED)
    if as_json:
        print(json.dumps({"observers": observers, "runs": runs, "seed": seed} | figures))
        return
    title = f"{observers:,} observers, s after the publish, medians of {runs} runs"
    console = Console()
    console.print(table(figures, title))
    for note in notes(figures, observers):
        console.print(note)


if __name__ == "__main__":
    main()
