"""What may befall a service in years: full disks, directories that are gone, clocks that jump."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import resource
import signal
import subprocess
from collections.abc import Callable, Iterator
from datetime import datetime
from pathlib import Path
from typing import Any

import pytest

from netota_coap.coap import options as coap
from tests.support.device import GET, Device, device
from tests.support.publishing import NOW, publish
from tests.support.serving import PATIENCE_S, served, until

pytestmark = pytest.mark.slow

STABLE = ("sensor-node", "stable")
PATH = "p/sensor-node/s/stable"
FAKETIME = next(iter(Path("/usr/lib").glob("*/faketime/libfaketime.so.1")), None)


async def status(it: Device) -> dict[str, Any]:
    """Return the status, in one block of 1,024 bytes."""
    answer = await it.ask(GET, "status", options=[(coap.BLOCK2, b"\x06")])
    plain: dict[str, Any] = json.loads(answer.payload)
    return plain


async def troubles(it: Device, known: bool) -> list[str]:
    """Return the troubles of the status once there are some, or none; it may be a second old."""
    async with asyncio.timeout(PATIENCE_S):
        while True:
            plain = await status(it)
            if ("troubles" in plain) == known:
                return list(plain.get("troubles", ()))
            await asyncio.sleep(0.1)  # who asks more often is turned away


# ----------------------------------------------------------------------------------------------
# The state directory


@contextlib.contextmanager
def full(state: Path, _pid: int) -> Iterator[None]:
    """Fill the file system that the state is on."""
    with (state / "filler").open("wb", buffering=0) as filler, contextlib.suppress(OSError):
        while filler.write(bytes(4_096)):
            pass
    yield
    (state / "filler").unlink()


@contextlib.contextmanager
def limited(_state: Path, pid: int) -> Iterator[None]:
    """Let files not become longer, as a quota would."""
    resource.prlimit(pid, resource.RLIMIT_FSIZE, (0, resource.RLIM_INFINITY))
    yield
    resource.prlimit(pid, resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY,) * 2)


@contextlib.contextmanager
def removed(state: Path, _pid: int) -> Iterator[None]:
    """Remove the directory, and let none be made."""
    for file in state.iterdir():
        file.unlink()
    state.rmdir()
    state.touch()
    yield
    state.unlink()


@pytest.fixture
def state(tmp_path: Path, request: pytest.FixtureRequest) -> Iterator[Path]:
    """A directory for the state, on a small disk of its own for who fills it."""
    directory = tmp_path / "state"
    directory.mkdir()
    if request.node.callspec.params["obstacle"] is not full:
        yield directory
        return
    command = ("mount", "-t", "tmpfs", "-o", "size=64k", "none", directory)
    if subprocess.run(command, capture_output=True).returncode:
        pytest.skip("a disk to be filled takes root")
    yield directory
    subprocess.run(("umount", directory), check=True)


@pytest.mark.parametrize("obstacle", [full, limited, removed])
async def test_state_that_cannot_be_written(
    sample: Path,
    state: Path,
    obstacle: Callable[[Path, int], contextlib.AbstractContextManager[None]],
) -> None:
    """Devices are served and told on; it is said once, and remembered again when it can be."""
    options = ("--bind", "127.0.0.1:0", "--state", str(state))
    async with contextlib.AsyncExitStack() as devices:
        async with served(sample, *options, code=-signal.SIGKILL) as server:
            one, two, many, asker = [
                await devices.enter_async_context(device(server.uri)) for _ in range(4)
            ]
            await one.observe(PATH)
            with obstacle(state, server.process.pid):
                await two.observe(PATH)
                # A disk that is full has room in the last block of a file.
                for number in range(40):
                    await many.observe(f"{PATH}?pad={number}{'x' * 200}")
                await until(lambda: server.log)
                (trouble,) = await troubles(asker, known=True)
                assert trouble.startswith(f"{state}/observers.journal: cannot be written: ")
                publish(sample, STABLE, "2.0", [], now=NOW)
                assert b"2.0" in (await one.notification()).payload
                assert b"2.0" in (await two.notification()).payload
            await until(lambda: any("can be written again" in line for line in server.log))
            await troubles(asker, known=False)
            server.signal(signal.SIGKILL)
            await server.process.wait()
        publish(sample, STABLE, "3.0", [], now=NOW)
        again = ("--bind", server.uri.removeprefix("coap://"), "--state", str(state))
        async with served(sample, *again):
            for it in (one, two):
                assert b"3.0" in (await it.notification()).payload

    assert sum("will be tried again" in line for line in server.log) == 1


async def test_started_on_a_full_disk(sample: Path, tmp_path: Path) -> None:
    """A service whose state cannot be written starts all the same."""
    state = tmp_path / "state"
    state.mkdir()
    # A child inherits the limit.
    options = ("--bind", "127.0.0.1:0", "--state", str(state))
    with limited(state, os.getpid()):
        serving = served(sample, *options)
        server = await serving.__aenter__()
    try:
        async with device(server.uri) as it:
            assert await troubles(it, known=True)
            await it.observe(PATH)
            with limited(state, server.process.pid):
                pass
            await until(lambda: any("can be written again" in line for line in server.log))
            assert b"stable" in (state / "observers.journal").read_bytes()
    finally:
        await serving.__aexit__(None, None, None)


# ----------------------------------------------------------------------------------------------
# The clock


@pytest.mark.skipif(FAKETIME is None, reason="takes Debian's faketime")
async def test_a_clock_that_jumps(sample: Path, tmp_path: Path) -> None:
    """A year forward, a year back: who observes is told, who asks is answered."""
    clock = tmp_path / "clock"
    clock.write_text("+0")
    environment = {
        **os.environ,
        "LD_PRELOAD": str(FAKETIME),
        "FAKETIME_TIMESTAMP_FILE": str(clock),
        "FAKETIME_NO_CACHE": "1",
        "FAKETIME_DONT_FAKE_MONOTONIC": "1",
        "DONT_FAKE_MONOTONIC": "1",
        "NO_FAKE_STAT": "1",
    }
    state = ("--state", str(tmp_path / "state"))
    options = ("--bind", "127.0.0.1:0", "--log-format", "json", *state)
    async with (
        served(sample, *options, environment=environment) as server,
        device(server.uri) as it,
    ):
        await it.observe(PATH)
        for number, offset in enumerate(("+365d", "-365d", "+0")):
            clock.write_text(offset)
            publish(sample, STABLE, f"2.{number}", [], now=NOW)
            assert f"2.{number}".encode() in (await it.notification()).payload
            assert (await it.ask(GET, PATH)).code == "2.05"
        assert 0 < (await status(it))["uptime_s"] < 60

    logged = [json.loads(line) for line in server.log]
    assert all(line["message"].startswith("reloaded 1 files") for line in logged)
    years = [datetime.fromisoformat(line["time"]).year for line in logged]
    assert years == [years[2] + 1, years[2] - 1, years[2]]
