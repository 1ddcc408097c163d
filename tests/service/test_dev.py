"""service/dev.py and its command: publishes what is built, and shows what devices do."""

from __future__ import annotations

import asyncio
import hashlib
import logging
import os
import pty
import signal
import sys
from datetime import UTC, datetime
from io import StringIO
from pathlib import Path

import httpx2
import pytest
from rich.console import Console

from netota_coap.errors import NetotaError
from netota_coap.monitoring import Exchange
from netota_coap.publishing import publish
from netota_coap.repository import scaffold
from netota_coap.repository.blobs import Blobs, blob_name
from netota_coap.repository.store import DirectoryStore
from netota_coap.service.dev import BoardHandler, Lines, Publisher, Screen, heard
from tests.support.device import GET, device
from tests.support.serving import COMMAND, PATIENCE_S, PROJECT, netota, until

NAME = ("local", "dev")
NOW = datetime(2026, 11, 24, 9, 30, tzinfo=UTC)
REQUEST = Exchange("coap", "GET", ["p", "a"], ["x=1", "y"], "2.05", 20, "127.0.0.1:4711", 43.2)


def built(directory: Path, image: Path) -> Path:
    """Put an image where Zephyr's build system puts it."""
    target = directory / "zephyr" / "zephyr.signed.bin"
    target.parent.mkdir(parents=True, exist_ok=True)
    target.write_bytes(image.read_bytes())
    return target


@pytest.fixture
def publisher(tmp_path: Path, image: Path) -> Publisher:
    scaffold.init(tmp_path / "repository")
    built(tmp_path / "build", image)
    return Publisher(tmp_path / "repository", NAME, tmp_path / "build")


def test_a_new_build_is_published_once(publisher: Publisher) -> None:
    """When it did not change between two looks; the same again is not; another one is."""
    assert publisher.look(NOW) is None
    first = publisher.look(NOW)
    assert first and first.archives
    assert first.version.endswith("+dev.20261124093000")
    held = [blob.sha256 for blob in Blobs(publisher.root).all()]
    assert held == [archive.envelope.sha256 for archive in first.archives]
    assert publisher.look(NOW) is None
    (file,) = publisher.build.rglob("*.bin")
    file.write_bytes(file.read_bytes())
    os.utime(file, ns=(1, 1))
    assert [publisher.look(NOW) for _ in range(3)] == [None] * 3  # the same bytes
    data = bytearray(file.read_bytes())
    data[-1] ^= 1  # outside of what the image's own hash covers
    file.write_bytes(data)
    assert publisher.look(NOW) is None
    second = publisher.look(NOW)
    assert second and second.sequence == first.sequence + 1


def test_a_build_that_is_under_way_is_waited_for(publisher: Publisher) -> None:
    """Without its files nothing happens."""
    (file,) = publisher.build.rglob("*.bin")
    data = file.read_bytes()
    file.unlink()
    assert [publisher.look(NOW) for _ in range(2)] == [None] * 2
    file.write_bytes(data)
    assert publisher.look(NOW) is None
    assert publisher.look(NOW) == publish.existing(DirectoryStore(publisher.root), NAME)


def test_what_cannot_be_published_is_said_once(publisher: Publisher) -> None:
    """It is tried again with the next build."""
    stream = publisher.root / "packages/local/streams/dev.toml"
    stream.parent.mkdir(parents=True)
    stream.write_text("no TOML")
    assert publisher.look(NOW) is None
    with pytest.raises(NetotaError):
        publisher.look(NOW)
    stream.unlink()
    assert publisher.look(NOW) is None
    (file,) = publisher.build.rglob("*.bin")
    file.write_bytes(b"another")
    assert [publisher.look(NOW) is not None for _ in range(2)] == [False, True]


def test_lines() -> None:
    """A line for each thing that happened; counts only when they are others."""
    lines: list[str] = []
    board = Lines(lines.append)
    heard(board)(REQUEST)
    board.observers({"a/b": 0})
    board.observers({"a/b": 2})
    board.observers({"a/b": 2})
    board.observers({})
    BoardHandler(board).emit(
        logging.makeLogRecord({"msg": "reloaded\x1b", "levelno": logging.INFO})
    )
    assert [line[9:] for line in lines] == [
        "coap GET /p/a?x=1&y → 2.05 20 bytes, 127.0.0.1:4711, 43 µs",
        "observers of a/b: 2",
        "observers of a/b: 0",
        "reloaded\\x1b",
    ]


def test_a_screen_holds_what_fits() -> None:
    """Counts above, the newest lines below; what devices send is no markup."""
    out = StringIO()
    console = Console(file=out, width=60, height=12, force_terminal=True, color_system=None)
    screen = Screen(console, "netota-coap dev")
    screen.observers({"local/dev": 3})
    for number in range(50):
        screen.say(f"[red]line {number} {'x' * 100}")
    console.print(screen)
    shown = out.getvalue()
    assert "local/dev  3" in shown
    assert "[red]line 49" in shown
    assert "line 10 " not in shown
    assert len(shown.splitlines()) <= 12
    with screen.live():
        pass


@pytest.mark.slow
async def test_the_command(tmp_path: Path, image: Path) -> None:
    """Lines where it is no terminal; it ends on Ctrl-C."""
    build, root = tmp_path / "build", tmp_path / "repository"
    arguments = (build, "--repository", root, "--bind", "127.0.0.1:0", "--http", "127.0.0.1:0")
    process = await asyncio.create_subprocess_exec(
        *(*COMMAND, "dev", *map(str, arguments)),
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.PIPE,
        cwd=PROJECT,
    )
    assert process.stdout and process.stderr
    lines: list[str] = []

    async def read(stream: asyncio.StreamReader) -> None:
        while data := await stream.readline():
            lines.append(data.decode().rstrip())

    reading = asyncio.create_task(read(process.stdout))

    def line(part: str) -> str:
        return next((line for line in lines if part in line), "")

    try:
        await until(lambda: line("listening on http") or process.returncode is not None)
        built(build, image)
        await until(lambda: line("local/dev: published") and line("reloaded"))
        coap = line("listening on coap").split()[-1]
        async with device(coap) as it, asyncio.timeout(PATIENCE_S):
            # The blob alone may have been reloaded yet.
            while (await it.observe("p/local/s/dev")).code != "2.05":
                pass
            name = blob_name(hashlib.sha256(image.read_bytes()).digest())
            assert (await it.ask(GET, f"b/{name}")).payload == image.read_bytes()
            await it.ask(GET, "p/nothing")
            await until(lambda: line("observers of local/dev: 1"))
        async with httpx2.AsyncClient() as client:
            await client.get(line("listening on http").split()[-1] + "/p/local?a=b")
        await until(lambda: line("http GET /p/local?a=b → 200"))
        assert line("coap GET /p/nothing → 4.04")
    finally:
        process.send_signal(signal.SIGINT)
        async with asyncio.timeout(PATIENCE_S):
            await process.wait()
            await reading
    assert (process.returncode, await process.stderr.read()) == (0, b"")


async def test_the_command_in_a_terminal(tmp_path: Path) -> None:
    """One screen: it fills, and leaves the terminal as it was."""
    leader, follower = pty.openpty()
    arguments = ("--repository", tmp_path / "r", "--bind", "127.0.0.1:0", "--http", "127.0.0.1:0")
    process = await asyncio.create_subprocess_exec(
        *(*COMMAND, "dev", *map(str, arguments)),
        stdin=follower,
        stdout=follower,
        stderr=follower,
        cwd=PROJECT,
        env=os.environ | {"TERM": "xterm", "COLUMNS": "100", "LINES": "20"},
    )
    os.close(follower)
    shown = bytearray()
    loop = asyncio.get_running_loop()
    loop.add_reader(leader, lambda: shown.extend(_read(leader)))
    try:
        await until(lambda: b"listening on http" in shown)
    finally:
        process.send_signal(signal.SIGINT)
        async with asyncio.timeout(PATIENCE_S):
            await process.wait()
        loop.remove_reader(leader)
        shown.extend(_read(leader))
        os.close(leader)
    assert process.returncode == 0
    assert b"\x1b[?1049h" in shown  # the other screen, and back
    assert b"\x1b[?1049l" in shown


def _read(descriptor: int) -> bytes:
    try:
        return os.read(descriptor, 65_536)
    except OSError:
        return b""


async def test_an_address_that_is_taken(tmp_path: Path) -> None:
    """It is said, as `serve` says it."""
    code, _, err = await netota(
        *("dev", "--repository", tmp_path / "r", "--bind", "192.0.2.1:0", "--http", "127.0.0.1:0")
    )
    assert (code, "cannot listen on 192.0.2.1:0" in err) == (4, True), (sys.version, err)
