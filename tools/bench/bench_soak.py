"""Runs a server under mixed load for minutes, and checks that its memory stays the same.

Usage: tools/bench/bench_soak.py [--seconds N] [--rate N] [--observers N] [--mutated N] [--seed N]
                           [--json]
A first server gets requests, observers, mutated datagrams and a publish each second; its resources
are sampled each second. A second server gets mutated datagrams alone, after twice as many with
other seeds. The same seed generates the same datagrams in the same order, at other times.

It ends with 1 if a figure exceeds its bound, or the log has unexpected errors.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import json
import random
import re
import statistics
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import attrs
import click
from rich import box
from rich.console import Console
from rich.table import Table

from netota_coap.model.values import Content, Offer, StreamName
from netota_coap.publishing import publish as publishing
from netota_coap.publishing.archives import ArchiveSource
from netota_coap.repository.scaffold import init
from netota_coap.repository.store import DirectoryStore
from tools.bench.crowd import (
    BOARDS,
    CON,
    EDGE,
    LARGE,
    LONGEST,
    STABLE,
    Crowd,
    Fleet,
    board,
    connected,
    message,
    request,
    send,
    traffic,
)
from tools.bench.mutated import datagrams
from tools.bench.peers import PATIENCE_S, Process, until

FIRST_S = 60.0  # the warm-up; a tenth of a shorter run
SPAN = 10  # samples whose median is a figure; a tenth of all if those are fewer than 100
# Rounds of mutated datagrams before the measured one, which fill the allocator's memory, and what
# aiocoap remembers of one source within a minute.
WARM = 2
BETWEEN = 100  # mutated datagrams between two valid requests
DAMAGED = "damaged.toml"


@attrs.frozen
class Figure:
    """A sampled figure: its name, the unit in the table, and how many of its own make one."""

    what: str
    unit: str = ""
    scale: float = 1


ROWS = {
    "rss": Figure("memory", "MB", 1e6),
    "handles": Figure("open handles"),
    "threads": Figure("threads"),
    "cpu": Figure("CPU", "%", 0.01),
    "answers": Figure("answers", "/s"),
    "notifications": Figure("notifications", "/s"),
    "state": Figure("directory of the state", "kB", 1e3),
}

AT_MOST = {("soak", "rss"): 1.1, ("soak", "handles"): 1.1, ("mutated", "rss"): 1.01}
"""Phase, figure, and the ratio of its last to its first value that is allowed."""

# The server logs a damaged repository once, with the reasons.
EXPECTED = re.compile(rf"ERROR (not reloaded, |  .*{DAMAGED})")


# ----------------------------------------------------------------------------------------------
# Publishing


@attrs.define
class Publisher:
    """Changes a repository, each time in another way.

    Attributes:
        turn: Number of changes so far.
        version: Of the last publish.
    """

    root: Path
    turn: int = 0
    version: int = 0

    @classmethod
    def prepare(cls, root: Path) -> Publisher:
        """Create the repository."""
        init(root, "Soaked")
        root.with_name("image.bin").write_bytes(b"a stand-in for an image")
        publisher = cls(root)
        for name in BOARDS:
            publisher.publish(name)
        return publisher

    def publish(self, name: StreamName) -> None:
        """Publish the next version of a stream."""
        self.version += 1
        image = self.root.with_name("image.bin")
        sources = [
            ArchiveSource(image, board, content=Content(arch="arm", machine=board))
            for board in map(board, range(BOARDS[name]))
        ]
        offers = [
            Offer(url=f"{scheme}://cdn.example.com/{{version}}/{{name}}.bin", metric=metric)
            for scheme, metric in (("https", 100), ("coap", 200))
        ]
        version = f"1.{self.version}.0"
        publishing.publish(DirectoryStore(self.root), name, version, sources, offers, edit=_edit())

    @property
    def _damage(self) -> Path:
        return self.root.joinpath("packages", STABLE[0], "streams", DAMAGED)

    def damage(self) -> None:
        """Make the repository malformed."""
        self._damage.write_bytes(b"version =")

    def mend(self) -> None:
        """Repair the repository, and publish."""
        self._damage.unlink()
        self.publish(STABLE)

    def change(self) -> None:
        """Make the next of the changes in `TURNS`."""
        change = TURNS[self.turn % len(TURNS)]
        self.turn += 1
        change(self)

    async def live(self) -> None:
        """Make a change each second."""
        loop = asyncio.get_running_loop()
        start_s = loop.time()
        while True:
            await asyncio.to_thread(self.change)
            await asyncio.sleep(1 - (loop.time() - start_s) % 1)

    def settle(self) -> None:
        """Repair the repository if it is malformed."""
        self._damage.unlink(missing_ok=True)


TURNS: Sequence[Callable[[Publisher], object]] = (
    lambda publisher: publisher.publish(STABLE),
    Publisher.damage,
    Publisher.mend,
    lambda publisher: publisher.publish(LARGE),
    lambda publisher: publishing.close(DirectoryStore(publisher.root), EDGE, STABLE, edit=_edit()),
    lambda publisher: publishing.reopen(DirectoryStore(publisher.root), EDGE, edit=_edit()),
    lambda publisher: publishing.remove(DirectoryStore(publisher.root), EDGE, edit=_edit()),
    lambda publisher: publisher.publish(EDGE),
    lambda publisher: publisher.publish(LARGE),
    lambda publisher: publisher.publish(STABLE),
)


def _edit() -> publishing.Edit:
    return publishing.Edit(now=datetime.now(UTC).replace(microsecond=0))


# ----------------------------------------------------------------------------------------------
# Samples

Sample = Mapping[str, float]
"""Resources in one second, by the keys of `ROWS`; `at_s` is the time since the start."""


@attrs.frozen
class Served(Process):
    """A server whose resources are sampled."""

    @classmethod
    @contextlib.contextmanager
    def serve(cls, root: Path, state: Path) -> Iterator[Served]:
        """Serve a repository until the block ends; the log is a file beside the state."""
        command = (sys.executable, "-m", "netota_coap", "serve", root, "--bind", "127.0.0.1:0")
        with cls.start((*command, "--state", state), state.with_suffix(".log")) as served:
            assert isinstance(served, cls)
            until(lambda: served.still_runs() and bool(served.ports), "the server does not start")
            yield served

    @property
    def ports(self) -> Sequence[int]:
        """Ports of 127.0.0.1 on which the server listens."""
        return [int(port) for port in re.findall(r"listening on \S+:(\d+)\n", self.said)]

    @property
    def said(self) -> str:
        """All of its log."""
        return self.log.read_text(errors="replace")

    def held(self, state: Path) -> dict[str, float]:
        """Return what the server uses now; `state` is its directory."""
        process = Path(f"/proc/{self._running.pid}")
        size = 0
        for path in state.iterdir():
            # Files are replaced by a rename, so one may vanish here.
            with contextlib.suppress(FileNotFoundError):
                size += path.stat().st_size
        return {
            "rss": self.rss,
            "handles": len(list(process.joinpath("fd").iterdir())),
            "threads": len(list(process.joinpath("task").iterdir())),
            "state": size,
        }


async def _sample(
    served: Served, state: Path, counted: Callable[[], Mapping[str, float]], seconds: int
) -> list[Sample]:
    """Take a sample each second; `counted` returns counters."""

    def counts() -> dict[str, float]:
        return {"at_s": loop.time() - start_s, "cpu": served.cpu_s, **counted()}

    loop = asyncio.get_running_loop()
    start_s = loop.time()
    samples: list[Sample] = []
    before = counts()
    for second in range(1, seconds + 1):
        await asyncio.sleep(start_s + second - loop.time())
        served.still_runs()
        now = counts()
        took_s = now["at_s"] - before["at_s"]
        rates = {key: (now[key] - before[key]) / took_s for key in now}
        samples.append({**rates, **served.held(state), "at_s": now["at_s"]})
        before = now
    return samples


# ----------------------------------------------------------------------------------------------
# Phases


@attrs.frozen
class Soak:
    """The parameters of a run.

    Attributes:
        seconds: Duration of the mixed load.
        rate: Datagrams per second, besides those of observers.
        observers: Number of observers at a time.
        mutated: Datagrams to the second server in the measured round.
    """

    seconds: int
    rate: int
    observers: int
    mutated: int
    seed: int

    def run(self, directory: Path) -> dict[str, Any]:
        """Run both phases, and return their figures."""
        publisher = Publisher.prepare(directory / "repository")
        with Served.serve(publisher.root, directory / "soaked") as served:
            figures = asyncio.run(self._mixed(publisher, served, directory / "soaked"))
            log = {"soak": errors_of(served.said)}
        publisher.settle()
        with Served.serve(publisher.root, directory / "mutated") as served:
            rss = [self._mutated(served, self.seed + each) for each in range(1, WARM + 2)]
            before, after = rss[-2:]
            figures["mutated"] = {"rss": row_of(before, after, max(before, after))}
            log["mutated"] = errors_of(served.said)
        figures = {"asked": attrs.asdict(self), **figures, "log": log}
        return figures | {"over": judge(figures)}

    async def _mixed(self, publisher: Publisher, served: Served, state: Path) -> dict[str, Any]:
        (port,) = served.ports
        crowd, fleet = Crowd(port), Fleet(port, random.Random(self.seed))

        def counted() -> dict[str, float]:
            return {"answers": crowd.answers.total(), "notifications": fleet.fates.total()}

        for _ in range(self.observers):
            fleet.come()
        async with asyncio.TaskGroup() as group:
            load = (crowd.ask(traffic(self.seed), self.rate), fleet.live(), publisher.live())
            tasks = [group.create_task(each) for each in load]
            samples = await _sample(served, state, counted, self.seconds)
            for task in tasks:
                task.cancel()
        crowd.leave()
        fleet.leave()
        return {
            "sent": crowd.sent,
            "codes": {f"{code}.xx": count for code, count in sorted(crowd.answers.items())},
            "fates": fleet.fates,
            "changes": publisher.turn,
            "soak": summary(samples, min(FIRST_S, self.seconds / 10)),
        }

    def _mutated(self, served: Served, seed: int) -> int:
        """Send mutated datagrams only, and return the RSS after them, bytes."""
        (port,) = served.ports
        good = message(seed, CON, b"good", request(("p",)))
        with connected(port) as hostile, connected(port) as friend:
            friend.settimeout(PATIENCE_S)
            for number, data in enumerate(itertools.islice(datagrams(seed), self.mutated), 1):
                send(hostile, data)
                if number % BETWEEN == 0 or number == self.mutated:
                    # Waiting for a response also keeps the socket's buffer from overflowing.
                    friend.send(good)
                    friend.recv(LONGEST)
        return served.rss


# ----------------------------------------------------------------------------------------------
# Results

Row = dict[str, float | None]


def summary(samples: Sequence[Sample], first_s: float) -> dict[str, Row]:
    """Compare the end of a run with its state after the warm-up.

    Args:
        samples: In the order of time, at least one.
        first_s: End of the warm-up, seconds since the start.

    Returns:
        For each key of `ROWS`: medians after the warm-up and at the end, the largest value since
        the warm-up, and the ratio of the medians.
    """
    span = max(1, min(SPAN, len(samples) // 10))
    settled = [each for each in samples if each["at_s"] >= first_s] or samples[-1:]
    return {
        key: row_of(
            statistics.median(each[key] for each in settled[:span]),
            statistics.median(each[key] for each in settled[-span:]),
            max(each[key] for each in settled),
        )
        for key in ROWS
    }


def row_of(first: float, end: float, largest: float) -> Row:
    ratio = end / first if first else None
    return {"first": first, "end": end, "largest": largest, "ratio": ratio}


def errors_of(log: str) -> dict[str, int]:
    """Count tracebacks, errors about the damaged repository, and other errors."""
    lines = log.splitlines()
    bad = [line for line in lines if line.startswith(("ERROR", "CRITICAL"))]
    expected = [line for line in bad if EXPECTED.match(line)]
    tracebacks = sum(line.startswith("Traceback ") for line in lines)
    return {
        "tracebacks": tracebacks,
        "expected": len(expected),
        "errors": len(bad) - len(expected),
    }


def judge(figures: Mapping[str, Any]) -> list[str]:
    """Return the figures over their bounds, and the unexpected errors."""
    grown = (
        (phase, ROWS[key].what, figures[phase][key]["ratio"], most)
        for (phase, key), most in AT_MOST.items()
    )
    over = [
        f"{phase}: {what} grew {ratio:.3f} times, more than {most:g}"
        for phase, what, ratio, most in grown
        if ratio > most
    ]
    over += [
        f"{phase}: {counts[key]} {key} in the log"
        for phase, counts in figures["log"].items()
        for key in ("tracebacks", "errors")
        if counts[key]
    ]
    return over


# ----------------------------------------------------------------------------------------------
# Output


def table(figures: Mapping[str, Any]) -> Table:
    """Return the figures as a table."""
    sent, mutated = sum(figures["sent"].values()), figures["sent"]["mutated"]
    asked = figures["asked"]
    title = (
        f"{asked['seconds']} s, {sent:,} datagrams, {mutated:,} of them mutated, "
        f"{figures['changes']} changes, {sum(figures['fates'].values()):,} notifications "
        f"to {asked['observers']} observers"
    )
    shown = Table(title=title, box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0))
    shown.add_column("", no_wrap=True)
    for column in ("first", "at the end", "largest", "ratio"):
        shown.add_column(column, justify="right")
    for phase, what in (("soak", "mixed load"), ("mutated", "mutated datagrams alone")):
        shown.add_row(f"[bold]{what}[/bold]")
        for key, row in figures[phase].items():
            cells = [_shown(ROWS[key], row[column]) for column in ("first", "end", "largest")]
            shown.add_row(f"  {ROWS[key].what}", *cells, _ratio(row, AT_MOST.get((phase, key))))
        for key, count in figures["log"][phase].items():
            shown.add_row(f"  {key} in the log", "", f"{count:,}")
        shown.add_section()
    return shown


def _shown(figure: Figure, value: float) -> str:
    digits = 1 if figure.unit in ("MB", "%") else 0
    return f"{value / figure.scale:,.{digits}f} {figure.unit}".rstrip()


def _ratio(row: Row, most: float | None) -> str:
    ratio = row["ratio"]
    if ratio is None or most is None:
        return "" if ratio is None else f"{ratio:.3f}"
    text = f"{ratio:.3f} ≤ {most:g}"
    return text if ratio <= most else f"[red]{text}[/red]"


@click.command()
@click.option("--seconds", type=click.IntRange(1, 3_600), default=600, show_default=True)
@click.option(
    "--rate",
    type=click.IntRange(1, 5_000),
    default=3_000,
    show_default=True,
    help="Datagrams per second, besides those of observers.",
)
@click.option("--observers", type=click.IntRange(1, 1_000), default=200, show_default=True)
@click.option(
    "--mutated",
    type=click.IntRange(1, 1_000_000),
    default=10_000,
    show_default=True,
    help="Mutated datagrams to the second server while it is measured.",
)
@click.option("--seed", type=click.IntRange(0), default=7252, show_default=True)
@click.option("--json", "as_json", is_flag=True, help="Print the figures as JSON.")
def main(as_json: bool, **asked: Any) -> None:
    """Run a server under mixed load."""
    with tempfile.TemporaryDirectory() as directory:
        figures = Soak(**asked).run(Path(directory))
    if as_json:
        print(json.dumps(figures))
    else:
        Console().print(table(figures))
        for line in figures["over"]:
            print(line)
    sys.exit(bool(figures["over"]))


if __name__ == "__main__":
    main()
