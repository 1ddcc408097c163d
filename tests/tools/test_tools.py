"""tools/ and README.md: what a newcomer types."""

from __future__ import annotations

import asyncio
import contextlib
import os
import re
import stat
import sys
from pathlib import Path

import click
import pytest

from netota_coap.cli import cli
from tests.support.serving import PROJECT, run, served, until

README = (PROJECT / "README.md").read_text()
TOOLS = sorted(
    path
    for path in (PROJECT / "tools").rglob("*")
    if path.is_file() and path.suffix in ("", ".py", ".c")
)
HEADS = {"": "#!/bin/sh\n# ", ".py": '"""', ".c": "/* "}


async def test_demo() -> None:
    """The demo shows two devices told in one datagram each, with their own builds, and one not."""
    code, out, err = await run(sys.executable, PROJECT / "tools/demo.py", "--once")

    assert code == 0, err
    builds = re.findall(
        r"(\S+) on stable +was notified after +[\d.]+ ms, "
        r"in one datagram of (\d+) bytes: version 2\.5\.0, build (\w+)",
        out,
    )
    assert [(machine, build) for machine, _, build in builds] == [
        ("nrf52840dk", "nrf52840"),
        ("nrf9160dk", "nrf9160"),
    ]
    assert all(int(size) <= 256 for _, size, _ in builds)
    assert out.count("the stream is closed, its replacement is sensor-node/edge") == 2
    assert out.count("on edge       got no notification") == 2


def test_commands_of_the_readme() -> None:
    """Each command and option that the README shows exists."""
    shown = re.findall(r"^\$ netota-coap (\S+)(.*)$", README, re.MULTILINE)
    assert len(shown) >= 6
    for name, rest in shown:
        command = cli.get_command(click.Context(cli), name)
        assert command is not None
        options = {option for param in command.params for option in param.opts}
        assert set(re.findall(r"--[a-z-]+", rest)) <= options


@pytest.mark.slow
async def test_tour_of_the_readme(tmp_path: Path) -> None:
    """The tour prints what the README shows; times and names of blobs may differ."""
    tour = README.partition("## Five minutes")[2].partition("\n## ")[0]
    blocks = "".join(re.findall(r"^```\n(.*?)^```$", tour, re.MULTILINE | re.DOTALL))
    steps = re.split(r"^\$ ", blocks, flags=re.MULTILINE)[1:]
    assert len(steps) > 10
    skipped = ("python3", "netota-coap serve", "netota-coap watch", "coap-client")
    async with contextlib.AsyncExitStack() as stack:
        for step in steps:
            found = re.match(r"(cat .*^END|[^\n]*)\n(.*)", step, re.MULTILINE | re.DOTALL)
            assert found
            command, shown = found.groups()
            if command.startswith("netota-coap serve"):
                server = await stack.enter_async_context(served(tmp_path / "fleet"))
            if command.startswith("netota-coap download"):
                await until(lambda log=server.log: "reloaded 1 files" in "\n".join(log))
                command = command.replace("coap://localhost", server.uri)
            if not command.startswith(skipped):
                assert unvarying(await typed(command, tmp_path)) == unvarying(shown), command


async def typed(command: str, directory: Path) -> str:
    """Return what a shell prints for a command."""
    path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    author = {"GIT_AUTHOR_NAME": "Ada", "GIT_AUTHOR_EMAIL": "ada@example.com"}
    process = await asyncio.create_subprocess_shell(
        command,
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.STDOUT,
        cwd=directory,
        env={**os.environ, **author, "PATH": path},
    )
    return (await process.communicate())[0].decode()


def unvarying(text: str) -> list[str]:
    """Return the lines without what differs from run to run."""
    text = re.sub(r"\d{4}-\d\d-\d\dT[\d:]+Z", "<time>", text)
    return [line.rstrip() for line in re.sub(r"/b/\S+", "/b/<digest>", text).strip().splitlines()]


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
