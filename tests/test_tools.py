"""tools/ and README.md: what a newcomer types."""

from __future__ import annotations

import re
import stat
import sys
from pathlib import Path

import pytest

from netota_coap.cli import cli
from tests.serving import PROJECT, run

README = (PROJECT / "README.md").read_text()
TOOLS = sorted(path for path in (PROJECT / "tools").iterdir() if path.is_file())
HEADS = {"": "#!/bin/sh\n# ", ".py": '"""', ".c": "/* "}


async def test_demo() -> None:
    """The demo shows two devices told in one datagram each, with their own builds, and one not."""
    code, out, err = await run(sys.executable, PROJECT / "tools/demo.py", "--once")

    assert code == 0, err
    builds = re.findall(
        r"(\S+) on stable +heard after +[\d.]+ ms, "
        r"in one datagram of (\d+) bytes: 2\.5\.0, its build (\w+)",
        out,
    )
    assert [(machine, build) for machine, _, build in builds] == [
        ("nrf52840dk", "nrf52840"),
        ("nrf9160dk", "nrf9160"),
    ]
    assert all(int(size) <= 256 for _, size, _ in builds)
    assert out.count("closed, go to sensor-node/edge") == 2
    assert out.count("on edge       heard nothing") == 2


def test_commands_of_the_readme() -> None:
    """Each command and option that the README shows exists."""
    shown = re.findall(r"^\$ netota-coap (\S+)(.*)$", README, re.MULTILINE)
    assert len(shown) >= 6
    for name, rest in shown:
        options = {option for param in cli.commands[name].params for option in param.opts}
        assert set(re.findall(r"--[a-z-]+", rest)) <= options


def test_links_of_the_readme() -> None:
    """Each link to a file leads somewhere."""
    links = re.findall(r"\]\((?!https?:)([^)]+)\)", README)
    assert links
    assert [link for link in links if not (PROJECT / link).exists()] == []


@pytest.mark.parametrize("path", TOOLS, ids=lambda path: path.name)
def test_tools_explain_themselves(path: Path) -> None:
    """Each tool says in its head what it is for; what has no suffix can be run."""
    text = path.read_text()
    executable = bool(path.stat().st_mode & stat.S_IXUSR)
    assert executable == (path.suffix == "")
    assert text.startswith(HEADS[path.suffix])


def test_house() -> None:
    """The top level is what the customer fixed, and no file has more than 600 lines."""
    entries = {path.name for path in PROJECT.iterdir() if not path.name.startswith(".")}
    allowed = {
        "pyproject.toml",
        "LICENSE",
        "README.md",
        "netota_coap",
        "tests",
        "fixtures",
        "tools",
    }
    assert entries <= allowed
    long = {
        path.name: lines
        for directory in ("netota_coap", "tests", "tools")
        for path in (PROJECT / directory).rglob("*.py")
        if (lines := len(path.read_text().splitlines())) > 600
    }
    assert long == {}
