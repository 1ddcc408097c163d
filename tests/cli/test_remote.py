"""The commands that ask how a service is, and where servers are."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from netota_coap.cli.remote import duration
from tests.support.serving import netota, serving


async def test_status(sample: Path) -> None:
    """People see lines, programs JSON; what is refused is said."""
    async with serving(sample) as (uri,):
        code, out, err = await netota("status", uri)
        assert (code, err) == (0, "")
        assert [line.split("  ")[0].strip() for line in out.splitlines()] == [
            "version",
            "uptime",
            "serves",
            "observers",
        ]
        (sample / "packages/sensor-node/streams/edge.toml").write_text("no TOML")
        plain: dict[str, object] = {}

        async def refused() -> bool:
            nonlocal plain
            _, out, _ = await netota("status", uri, "--json")
            plain = json.loads(out)
            return "issues" in plain

        while not await refused():
            pass
        assert "edge.toml" in str(plain["issues"])
        _, out, _ = await netota("status", uri)
        assert "not reloaded" in out


async def test_status_of_nobody() -> None:
    """No server, or one that does not tell: exit 4 and a line."""
    code, out, err = await netota("status", "coap://127.0.0.1:9")
    assert (code, out) == (4, "")
    assert "127.0.0.1:9" in err


async def test_status_is_for_some(sample: Path) -> None:
    """Others are refused."""
    async with serving(sample, status_readers=("192.0.2.0/24",)) as (uri,):
        code, _, err = await netota("status", uri)
        assert (code, "only 192.0.2.0/24 may read it" in err) == (4, True)


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0.04, "0.0 s"), (59, "59.0 s"), (90, "1.5 min"), (5_400, "1.5 h"), (129_600, "1.5 d")],
)
def test_durations(seconds: float, text: str) -> None:
    """In the largest unit that fits."""
    assert text == duration(seconds)


async def test_discover() -> None:
    """Nobody is nothing; an interface that is not there is said."""
    assert await netota("discover", "--on", "lo", "--port", "9", "--wait-s", "0.1") == (0, "", "")
    code, _, err = await netota("discover", "--on", "nowhere0")
    assert (code, "no such interface" in err) == (2, True)
