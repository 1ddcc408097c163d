"""The benchmark of GETs runs, and measures what it says."""

from __future__ import annotations

import io
import json
import sys
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from tests.support.environment import needs
from tests.support.serving import PROJECT, run
from tools.bench import bench_get
from tools.bench.bench_get import ADDED, PEERS, ROWS, Bench, Running
from tools.bench.peers import together, until

SMALL = ("--runs", "1", "--seconds", "0.05", "--archives", "12", "--json")
pytestmark = [pytest.mark.bench, needs("cc", "coap-server-notls")]

SEEN = ("door", "no_door", "aiocoap", "libcoap")  # npm's would have to be installed


@pytest.fixture(scope="module")
def figures() -> Any:
    """What the benchmark prints for a program."""
    import asyncio

    chosen = (part for key in SEEN for part in ("--peer", key))
    command = (sys.executable, PROJECT / "tools/bench/bench_get.py", *SMALL, *chosen)
    code, out, err = asyncio.run(run(*command, timeout_s=60))
    assert (code, err) == (0, "")
    return json.loads(out)


def shown(figures: Any) -> list[str]:
    """The lines of the table."""
    out = io.StringIO()
    Console(file=out, width=80).print(bench_get.table(figures, "title"))
    return out.getvalue().splitlines()


def test_figures(figures: Any) -> None:
    """Each peer answers each row, without a failure, within the bytes that are wanted."""
    assert set(figures) == {"runs", "seconds", "archives", "bytes", *ROWS, "swap"}
    assert (figures["runs"], figures["seconds"], figures["archives"]) == (1, 0.05, 12)
    assert figures["bytes"]["small"] <= 256 < figures["bytes"]["large"]
    for row in ROWS:
        assert set(figures[row]) == set(SEEN)
        for measured in figures[row].values():
            assert measured["failed"] == 0
            assert measured["per_second"] > 0
            assert 0 < measured["median_us"] <= measured["p99_us"]


def test_swap(figures: Any) -> None:
    """Ours answers on while something is published."""
    measured = figures["swap"]["door"]
    assert set(figures["swap"]) == {"door"}
    assert (measured["failed"], measured["refused"]) == (0, 0)
    assert measured["per_second"] > 0
    assert measured["max_ms"] > 0


def test_table(figures: Any) -> None:
    """People see each peer in each row, and what is wanted beside what was measured."""
    measured = {"per_second": 1_400.0, "median_us": 15.0, "p99_us": 90.0, "failed": 0}
    libcoap = {"per_second": 1_000.0, "median_us": 10.0, "p99_us": 90.0, "failed": 3}
    known = {"door": measured, "libcoap": libcoap}
    swap = {"door": {"per_second": 15_000.0, "refused": 0, "failed": 1}}
    lines = shown({**dict.fromkeys(ROWS, known), "swap": swap})

    assert [line.split() for line in lines if "libcoap" in line][1:] == [
        ["libcoap", "1,000", "10", "90", "1.00", "3"]
    ] * len(ROWS)
    ours = [line.split("address")[1].split() for line in lines if "ours, address" in line]
    assert ours == [
        ["1,400", "15", "≤", "15", "90", "1.40", "0"],
        ["1,400", "15", "90", "1.40", "≥", "1.4", "0"],
        ["1,400", "15", "90", "1.40", "0"],
        ["1,400", "15", "90", "1.40", "≥", "0.8", "0"],
        ["1,400", "15", "90", "1.40", "≥", "0.7", "0"],
        ["15,000", "≥", "15,000", "1"],
    ]
    assert max(map(len, shown(figures))) <= 80


@pytest.mark.parametrize(("factor", "red"), [(1.0, 0), (0.1, 6)])
def test_what_falls_short_is_red(factor: float, red: int) -> None:
    """What falls short of what is wanted is seen at once."""
    ours = {"per_second": 3_000 * factor, "median_us": 1 / factor, "p99_us": 9, "failed": 0}
    libcoap = {"per_second": 1_000, "median_us": 1, "p99_us": 9, "failed": 0}
    swap = {"door": {"per_second": 20_000 * factor, "refused": 0, "failed": 0}}
    figures = {row: {"door": ours, "libcoap": libcoap} for row in ROWS} | {"swap": swap}
    cells = [cell for column in bench_get.table(figures, "").columns for cell in column.cells]

    assert sum("[red]" in str(cell) for cell in cells) == red - (red > 0)


def test_runs_together() -> None:
    """Figures are medians over the runs; no median hides what failed."""
    runs = [
        {"row": {"peer": {"per_second": rate, "failed": failed}}}
        for rate, failed in ((1, 0), (9, 0), (2, 7))
    ]
    assert together(runs, ADDED) == {"row": {"peer": {"per_second": 2, "failed": 7}}}


@pytest.mark.parametrize("key", ["libcoap", "node"])
def test_peers_that_are_not_there(
    key: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """A peer whose program is not installed is left out, with a line that says so."""
    monkeypatch.setenv("PATH", str(tmp_path))
    bench = Bench(tmp_path, tmp_path, tmp_path, {})
    for _ in range(2):
        with Running.start(bench, key) as running:
            assert running is None
    line = f"{PEERS[key].what}: it is not installed, so it is not measured\n"
    assert capsys.readouterr().err == line * 2


def test_other_bytes(tmp_path: Path) -> None:
    """A peer that answers with something else is not measured."""
    bench = Bench.prepare(tmp_path, 12)
    with Running.start(bench, "aiocoap") as running:
        assert running
        until(lambda: running.answers(bench), "no answer")
        bench.payloads["large"].write_bytes(b"others")
        with pytest.raises(SystemExit, match="aiocoap: 1024 bytes arrived, not 6"):
            bench_get.measure(bench, ROWS["full_8"], running, 0.1)


def test_narrowings_differ() -> None:
    """There are 10,000 of them, and each is a request of its own."""
    queries = ROWS["distinct_32"].queries
    assert len({tuple(query) for query in queries}) == len(queries) == 10_000
