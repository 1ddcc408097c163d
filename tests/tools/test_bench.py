"""The benchmarks run, and measure what they say."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.bench

ROOT = Path(__file__).parents[2]


def bench(*arguments: str) -> str:
    """Run the benchmark of repositories on a small one."""
    command = [sys.executable, "tools/bench/bench_repository.py", "--streams", "20", "--runs", "1"]
    done = subprocess.run(
        [*command, *arguments],
        check=True,
        capture_output=True,
        text=True,
        cwd=ROOT,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
    )
    return done.stdout


@pytest.fixture(scope="module")
def figures() -> dict[str, float]:
    """What the benchmark prints for a program."""
    return json.loads(bench("--json"))


def test_figures_are_numbers(figures: dict[str, float]) -> None:
    """There is a number for each figure, and what was asked for."""
    assert {
        "streams": int,
        "runs": int,
        "load_s": float,
        "rss_mb": float,
        "reload_ms": float,
        "parsed": int,
        "stream_bytes": int,
        "head_bytes": int,
        "full_bytes": int,
        "json_bytes": int,
        "one_archive_bytes": int,
    } == {key: type(value) for key, value in figures.items()}
    assert (figures["streams"], figures["runs"]) == (20, 1)


def test_one_publish_costs_one_file(figures: dict[str, float]) -> None:
    """Only what changed is parsed."""
    assert figures["parsed"] == 1


def test_sizes_are_within_their_bounds(figures: dict[str, float]) -> None:
    """One datagram holds a stream; one archive with a 48-byte URL takes at most 204 bytes."""
    assert 0 < figures["head_bytes"] < figures["stream_bytes"] <= 256
    assert figures["one_archive_bytes"] <= 204
    assert figures["full_bytes"] < figures["json_bytes"]


def test_table_has_the_bounds() -> None:
    """People see the figures beside what is wanted."""
    table = bench()
    rows = [line for line in table.splitlines() if "reload after one publish" in line]
    assert [tuple(row.replace("│", " ").split()[-2:]) for row in rows] == [("50", "ms")]
