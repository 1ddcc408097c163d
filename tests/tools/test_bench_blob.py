"""The benchmark of files runs, and measures what it says."""

from __future__ import annotations

import io
import json
import sys

import pytest
from rich.console import Console

from tests.support.environment import needs
from tests.support.serving import PROJECT, run
from tools.bench import bench_blob

pytestmark = [pytest.mark.bench, needs("cc", "coap-server-notls")]


async def test_it_measures_both() -> None:
    """Whole files come from each peer, without a failure; people see them side by side."""
    command = (sys.executable, PROJECT / "tools/bench/bench_blob.py", "--json")
    small = ("--megabytes", "1", "--seconds", "0.1", "--runs", "1")
    code, out, err = await run(*command, *small, timeout_s=60)
    assert (code, err) == (0, "")
    figures = json.loads(out)
    assert {"megabytes", "runs", "ours", "libcoap"} == set(figures)
    for key in bench_blob.PEERS:
        for row in bench_blob.CLIENTS:
            measured = figures[key][row]
            assert measured["failed"] == 0
            assert measured["mb_per_second"] > 0
            assert measured["fairness"] >= 1
            assert 0 <= measured["cpu_us"] < 10_000
    shown = io.StringIO()
    peers = {key: figures[key] for key in bench_blob.PEERS}
    Console(file=shown, width=80).print(bench_blob.table(peers, "title"))
    assert [line.split()[:2] for line in shown.getvalue().splitlines() if " MB " in line] == [
        ["ours", "1"],
        ["libcoap", "1"],
        ["ours", "100"],
        ["libcoap", "100"],
    ]
