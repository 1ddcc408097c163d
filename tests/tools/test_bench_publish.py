"""The benchmark of publishing runs, and measures what it says."""

from __future__ import annotations

import json
import shutil
import sys

import pytest

from tests.support.serving import PROJECT, run

pytestmark = pytest.mark.bench

SMALL = ("--files", "2", "--size-mb", "2", "--runs", "1")
TIMES = {"sha256sum_s", "openssl_s", "read_s", "publish_s", "small_s", "help_s", "python_s"}
RATIOS = {"read_ratio", "openssl_ratio", "publish_ratio", "read_times"}


async def bench(*arguments: str) -> str:
    """Run the benchmark on small files."""
    code, out, err = await run(
        sys.executable, PROJECT / "tools/bench/bench_publish.py", *SMALL, *arguments
    )
    assert (code, err) == (0, "")
    return out


async def test_figures() -> None:
    """There is a number for each figure; files are read once, and take no memory by their size."""
    figures = json.loads(await bench("--json"))
    openssl = set() if shutil.which("openssl") else {"openssl_s", "openssl_ratio"}
    others = {"files", "size_mb", "runs", "growth_mb", "rss_mb"}
    assert (TIMES | RATIOS | others) - openssl == set(figures)
    assert (figures["files"], figures["size_mb"], figures["runs"]) == (2, 2, 1)
    assert all(figures[key] > 0 for key in (TIMES | RATIOS) - openssl)
    assert figures["python_s"] < figures["small_s"]
    assert figures["read_times"] == pytest.approx(1, abs=0.01)
    assert figures["growth_mb"] < 1 < figures["rss_mb"]


async def test_table_has_the_bounds() -> None:
    """People see the figures beside what is wanted."""
    rows = [line.replace("│", " ").split() for line in (await bench()).splitlines()]
    bounds = {row[0]: row[-2:] for row in rows if row[-2:-1] in (["1.2"], ["0.15"])}
    assert {"reading,", "publish,", "netota-coap"} == set(bounds)
