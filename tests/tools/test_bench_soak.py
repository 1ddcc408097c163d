"""The soak runs, measures what it says, and sees what grows."""

from __future__ import annotations

import io
import itertools
import json
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from netota_coap.errors import InvalidDataError
from netota_coap.repository.loading import Loader
from tests.support.serving import PROJECT, run
from tools.bench import bench_soak
from tools.bench.bench_soak import ROWS, TURNS, Publisher, Sample
from tools.bench.crowd import FATES, KINDS, traffic

pytestmark = pytest.mark.bench

SECONDS, RATE, OBSERVERS, MUTATED = 3, 200, 60, 300
ASKED = {
    "seconds": SECONDS,
    "rate": RATE,
    "observers": OBSERVERS,
    "mutated": MUTATED,
    "seed": 1,
}
REFUSED = """\
ERROR not reloaded, the old state is still served:
ERROR   packages/sensor-node/streams/{}.toml: invalid value
"""


@pytest.fixture(scope="module")
def figures() -> Any:
    """What the soak prints for a program."""
    import asyncio

    options = itertools.chain(*((f"--{key}", str(value)) for key, value in ASKED.items()))
    command = (sys.executable, PROJECT / "tools/bench/bench_soak.py", *options, "--json")
    code, out, err = asyncio.run(run(*command, timeout_s=60))
    assert err == ""
    figures = json.loads(out)
    assert code == bool(figures["over"])
    return figures


def sample(at_s: float, **given: float) -> Sample:
    return {"at_s": at_s, **dict.fromkeys(ROWS, 100.0), **given}


def judged(
    rss: float = 1.0, handles: float = 1.0, mutated: float = 1.0, **log: int
) -> dict[str, Any]:
    """Figures, of which these are not as they should be."""
    counts = {"tracebacks": 0, "expected": 2, "errors": 0}
    same = {key: bench_soak.row_of(100, 100, 100) for key in ROWS}
    grown = {
        "rss": bench_soak.row_of(100, 100 * rss, 100 * rss),
        "handles": bench_soak.row_of(100, 100 * handles, 100 * handles),
    }
    return {
        "soak": same | grown,
        "mutated": {"rss": bench_soak.row_of(100, 100 * mutated, 100)},
        "log": {"soak": counts | log, "mutated": counts},
    }


def test_figures(figures: Any) -> None:
    """All kinds are sent, nearly all are answered, observers are told, and nothing is hidden."""
    assert figures["asked"] == ASKED
    assert set(figures["sent"]) == set(KINDS)
    sent = sum(figures["sent"].values())
    assert 0 < sent <= RATE * (SECONDS + 1)
    assert set(figures["codes"]) >= {"2.xx", "4.xx"}
    assert 0.8 * sent < sum(figures["codes"].values()) <= sent
    assert set(figures["fates"]) <= set(FATES)
    assert figures["fates"]["acknowledges"] > 0
    assert SECONDS <= figures["changes"] <= SECONDS + 1
    assert set(figures["soak"]) == set(ROWS)
    for phase, key in (("soak", "rss"), ("soak", "handles"), ("soak", "cpu"), ("mutated", "rss")):
        row = figures[phase][key]
        assert 0 < max(row["first"], row["end"]) <= row["largest"]
        assert row["ratio"] == pytest.approx(row["end"] / row["first"])
    assert figures["soak"]["state"]["end"] > 0


def test_log(figures: Any) -> None:
    """The damage that was done is in the log, and nothing else is."""
    assert figures["log"] == {
        "soak": {"tracebacks": 0, "expected": 2, "errors": 0},
        "mutated": {"tracebacks": 0, "expected": 0, "errors": 0},
    }


def test_table(figures: Any) -> None:
    """People see each figure of each phase, and what is wanted beside it."""
    out = io.StringIO()
    Console(file=out, width=80).print(bench_soak.table(figures))
    shown = out.getvalue().splitlines()
    for key, figure in ROWS.items():
        assert any(line.strip().startswith(f"{figure.what} ") for line in shown), key
    assert sum("≤ 1.1 " in line for line in shown) == 2
    assert sum("≤ 1.01" in line for line in shown) == 1
    assert max(map(len, shown)) <= 80


@pytest.mark.parametrize(
    ("given", "over"),
    [
        ({}, []),
        ({"rss": 1.1, "handles": 1.1, "mutated": 1.01, "expected": 60}, []),
        ({"rss": 1.101}, ["soak: memory grew 1.101 times, more than 1.1"]),
        ({"rss": 0.5}, []),
        ({"handles": 2}, ["soak: open handles grew 2.000 times, more than 1.1"]),
        ({"mutated": 1.02}, ["mutated: memory grew 1.020 times, more than 1.01"]),
        (
            {"tracebacks": 1, "errors": 3},
            ["soak: 1 tracebacks in the log", "soak: 3 errors in the log"],
        ),
    ],
)
def test_judgement(given: dict[str, Any], over: list[str]) -> None:
    """What is over its bound, or was logged and not expected, is told."""
    assert bench_soak.judge(judged(**given)) == over


@pytest.mark.parametrize(("given", "red"), [({}, 0), ({"rss": 2, "mutated": 2}, 2)])
def test_what_is_over_is_red(given: dict[str, Any], red: int) -> None:
    """What is over its bound is seen at once."""
    told = {"asked": ASKED, "sent": {"mutated": 3}, "changes": 3, "fates": {}, **judged(**given)}
    cells = [cell for column in bench_soak.table(told).columns for cell in column.cells]
    assert sum("[red]" in str(cell) for cell in cells) == red


def test_summary() -> None:
    """Medians after the first minute and at the end are compared; the largest counts from then."""
    samples = [sample(second, rss=second) for second in range(1, 601)]
    samples[5] = sample(6, rss=9_999)  # before the first minute is over
    samples[599] = sample(600, rss=8_888)  # one at the end is not the end
    assert bench_soak.summary(samples, 60)["rss"] == {
        "first": 64.5,
        "end": 595.5,
        "largest": 8_888,
        "ratio": pytest.approx(595.5 / 64.5),
    }


@pytest.mark.parametrize(("count", "first", "end"), [(1, 1, 1), (3, 1, 3), (30, 4, 29)])
def test_summary_of_a_short_run(count: int, first: float, end: float) -> None:
    """A short run has its first and its last samples."""
    samples = [sample(second, rss=second) for second in range(1, count + 1)]
    row = bench_soak.summary(samples, count / 10)["rss"]
    assert (row["first"], row["end"]) == (first, end)


def test_nothing_at_first() -> None:
    """What was nothing at first has no ratio."""
    row = bench_soak.summary([sample(1, state=0)], 1)["state"]
    assert row == {"first": 0, "end": 0, "largest": 0, "ratio": None}


@pytest.mark.parametrize(
    ("log", "tracebacks", "expected", "errors"),
    [
        ("", 0, 0, 0),
        ("INFO reloaded 1 files in 0.9 ms\nWARNING Traceback\n", 0, 0, 0),
        (REFUSED.format("damaged"), 0, 2, 0),
        (REFUSED.format("stable"), 0, 1, 1),
        ("ERROR bug: it failed\nTraceback (most recent call last):\nKeyError: 1\n", 1, 0, 1),
        ("CRITICAL no\n", 0, 0, 1),
    ],
)
def test_errors_of(log: str, tracebacks: int, expected: int, errors: int) -> None:
    """Damage that was done on purpose is told from what should not be in a log."""
    counts = {"tracebacks": tracebacks, "expected": expected, "errors": errors}
    assert bench_soak.errors_of(log) == counts


def test_changes(tmp_path: Path) -> None:
    """Each round damages the repository once, mends it, and leaves all streams as they were."""
    publisher = Publisher.prepare(tmp_path / "repository")
    loader = Loader(publisher.root)
    states = []
    for _ in range(2 * len(TURNS)):
        publisher.change()
        try:
            edge = loader.load().packages["sensor-node"].streams.get("edge")
            states.append("open" if edge and not edge.closed else "closed" if edge else "none")
        except InvalidDataError:
            states.append("damaged")
    assert Counter(states) == {"open": 14, "damaged": 2, "closed": 2, "none": 2}
    assert states[-1] == "open"


def test_settles(tmp_path: Path) -> None:
    """A run that ends while the repository is damaged leaves it mended."""
    publisher = Publisher.prepare(tmp_path / "repository")
    publisher.damage()
    publisher.settle()
    assert set(Loader(publisher.root).load().packages) == {"sensor-node", "gateway"}


def test_traffic() -> None:
    """The same seed makes the same datagrams, of all kinds as often as is said."""
    first, again, other = (list(itertools.islice(traffic(seed), 5_000)) for seed in (1, 1, 2))
    assert first == again != other
    counts = Counter(kind for kind, _ in first)
    assert sum(KINDS.values()) == 100
    for kind, percent in KINDS.items():
        assert counts[kind] == pytest.approx(50 * percent, rel=0.25)


def test_fates() -> None:
    """What observers do adds up to a hundred."""
    assert sum(FATES.values()) == 100
