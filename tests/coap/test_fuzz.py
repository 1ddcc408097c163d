"""Bad input at a live server: it answers the next good request, and ends cleanly."""

from __future__ import annotations

from itertools import islice
from pathlib import Path

import pytest
from hypothesis import settings

from tests.support.device import GET, device
from tests.support.serving import served
from tools.bench.mutated import datagrams

COUNT = 100 * settings().max_examples


@pytest.mark.fuzz
async def test_mutated_datagrams(sample: Path) -> None:
    """Thousands of generated and mutated datagrams leave no trace but answers."""
    async with served(sample) as server, device(server.uri) as fuzzer, device(server.uri) as good:
        for number, data in enumerate(islice(datagrams(7252), COUNT)):
            fuzzer.send(data)
            if number % 100 == 99:
                # Also keeps the socket's buffer from running over, so that all are looked at.
                answer = await good.ask(GET, "p")
                assert answer.code == "2.05"

    assert not any("Traceback" in line or line.startswith("ERROR") for line in server.log), (
        server.log[-40:]
    )
