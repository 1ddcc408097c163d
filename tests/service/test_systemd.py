"""service/systemd.py: what the real command tells the service manager, and systemd's own tools."""

from __future__ import annotations

import asyncio
import math
import os
import signal
import socket
import stat
import subprocess
import sys
import time
from collections.abc import AsyncIterator
from pathlib import Path

import attrs
import pytest

from netota_coap.coap import options as coap
from netota_coap.errors import ConfigError
from netota_coap.service import systemd
from netota_coap.service.systemd import UNIT, Manager
from tests.support.device import device
from tests.support.environment import needs
from tests.support.publishing import NOW, publish
from tests.support.serving import COMMAND, PATIENCE_S, PROJECT, netota, run, served, until

PATH = "p/sensor-node/s/stable"
FILE = "packages/sensor-node/streams/stable.toml"

# ----------------------------------------------------------------------------------------------
# Telling it


@attrs.define
class Listener:
    """Stands where the service manager listens.

    Attributes:
        address: As NOTIFY_SOCKET has it.
        heard: Each datagram, split into lines.
    """

    address: str
    socket: socket.socket
    heard: list[list[str]] = attrs.field(factory=list)

    def all(self, name: str) -> list[str]:
        """Return the values of a variable so far."""
        while True:
            try:
                self.heard.append(self.socket.recv(65_536).decode().split("\n"))
            except BlockingIOError:
                break
        return [
            line.partition("=")[2]
            for lines in self.heard
            for line in lines
            if line.startswith(f"{name}=")
        ]

    def environment(self, **more: str) -> dict[str, str]:
        return {**os.environ, "NOTIFY_SOCKET": self.address, **more}


@pytest.fixture(params=["path", "abstract"])
async def listener(request: pytest.FixtureRequest, tmp_path: Path) -> AsyncIterator[Listener]:
    path = str(tmp_path / "notify")
    address = path if request.param == "path" else f"@{path}"
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as opened:
        opened.setblocking(False)
        opened.bind(address.replace("@", "\0"))
        yield Listener(address, opened)


async def test_told_of_a_life(sample: Path, listener: Listener) -> None:
    """READY when it listens, RELOADING and READY at SIGHUP, what is refused, STOPPING."""
    broken = "packages/sensor-node/streams/edge.toml"
    async with served(sample, environment=listener.environment()) as server:
        async with device(server.uri) as it:
            await it.observe(PATH)
        await until(lambda: listener.all("READY"))
        status = listener.all("STATUS")[-1]
        assert status.startswith("serving: 1 packages, 2 streams, 0 observers; loaded 20")
        before = time.clock_gettime_ns(time.CLOCK_MONOTONIC) // 1_000
        server.signal(signal.SIGHUP)
        await until(lambda: len(listener.all("READY")) == 2)
        (asked,) = listener.all("MONOTONIC_USEC")
        assert before <= int(asked) <= time.clock_gettime_ns(time.CLOCK_MONOTONIC) // 1_000
        assert ["RELOADING=1", f"MONOTONIC_USEC={asked}"] in listener.heard
        text = (sample / broken).read_text()
        (sample / broken).write_text("version=")
        await until(lambda: "not reloaded" in listener.all("STATUS")[-1])
        assert f"not reloaded: {broken}: is not valid TOML" in listener.all("STATUS")[-1]
        (sample / broken).write_text(text)
        await until(lambda: "not reloaded" not in listener.all("STATUS")[-1])
        assert listener.all("STOPPING") == []

    assert listener.all("STOPPING") == ["1"]
    assert len(listener.all("RELOADING")) == 1
    assert len(listener.all("READY")) == 2


async def test_beats(sample: Path, listener: Listener) -> None:
    """The watchdog hears of the event loop in half its time, and of observers with it."""
    environment = listener.environment(WATCHDOG_USEC="200000")
    async with served(sample, environment=environment) as server, device(server.uri) as it:
        await until(lambda: len(listener.all("WATCHDOG")) >= 3)
        known = len(listener.all("STATUS"))
        await it.observe(PATH)
        await until(lambda: "1 observers" in listener.all("STATUS")[-1])
        publish(sample, ("sensor-node", "stable"), "2.0", [], now=NOW)
        await it.notification()
        await until(lambda: "told 1 in 0." in listener.all("STATUS")[-1])
        # What did not change is not said again.
        beats = len(listener.all("WATCHDOG"))
        said = len(listener.all("STATUS"))
        await until(lambda: len(listener.all("WATCHDOG")) >= beats + 3)
        assert len(listener.all("STATUS")) == said > known


async def test_a_status_without_end(listener: Listener) -> None:
    """Whatever a status is, the watchdog hears of the event loop; of the status what fits."""
    manager = Manager.of({"NOTIFY_SOCKET": listener.address})
    beating = asyncio.create_task(manager.beat(lambda: "a\nWATCHDOG=trigger\n" + "é" * 1_000_000))
    await until(lambda: listener.all("WATCHDOG") and listener.all("STATUS"))
    beating.cancel()
    assert listener.heard[0] == ["WATCHDOG=1"]
    (status,) = listener.all("STATUS")
    assert status.startswith("a WATCHDOG=trigger éé")
    assert status.endswith("é…")
    assert 990 < len(status.encode()) < 1_010
    assert listener.all("WATCHDOG") == ["1"]


async def test_waiting_for_a_repository(tmp_path: Path, sample: Path, listener: Listener) -> None:
    """Who keeps trying is started, and says what it waits for; it serves as soon as it can."""
    root = tmp_path / "later"
    process = await asyncio.create_subprocess_exec(
        *COMMAND, "serve", str(root), "--keep-trying", "--bind", "127.0.0.1:0",
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, cwd=PROJECT,
        env=listener.environment(WATCHDOG_USEC="100000"),
    )  # fmt: skip
    assert process.stdout
    try:
        await until(lambda: listener.all("READY"))
        status = f"waiting for a repository: {root}: is not a directory"
        assert listener.all("STATUS")[-1] == status
        process.send_signal(signal.SIGHUP)
        await until(lambda: len(listener.all("READY")) == 2)
        beats = len(listener.all("WATCHDOG"))
        await until(lambda: len(listener.all("WATCHDOG")) > beats)
        sample.rename(root)
        async with asyncio.timeout(PATIENCE_S):
            uri = (await process.stdout.readline()).decode().split()[-1]
        async with device(uri) as it:
            assert (await it.observe(PATH)).uint(coap.OBSERVE)
        await until(lambda: listener.all("STATUS")[-1].startswith("serving: "))
    finally:
        process.terminate()
        _, log = await process.communicate()

    assert process.returncode == 0
    assert log.decode().splitlines()[1:] == [
        "ERROR nothing is served until this is fixed:",
        f"ERROR   {root}: is not a directory",
    ]


async def test_stopped_while_it_waits(tmp_path: Path) -> None:
    """SIGTERM ends a service that has nothing to serve yet."""
    process = await asyncio.create_subprocess_exec(
        *COMMAND, "serve", str(tmp_path / "nix"), "--keep-trying",
        stderr=subprocess.PIPE, cwd=PROJECT,
    )  # fmt: skip
    assert process.stderr
    async with asyncio.timeout(PATIENCE_S):
        while b"is not a directory" not in await process.stderr.readline():
            pass
        process.terminate()
        await process.communicate()

    assert process.returncode == 0


@pytest.mark.parametrize(
    ("environment", "watchdog_s"),
    [
        ({}, math.inf),
        ({"WATCHDOG_USEC": "30000000"}, 30.0),
        ({"WATCHDOG_USEC": "30000000", "WATCHDOG_PID": str(os.getpid())}, 30.0),
        ({"WATCHDOG_USEC": "30000000", "WATCHDOG_PID": "1"}, math.inf),
        ({"WATCHDOG_USEC": "soon"}, math.inf),
        ({"WATCHDOG_USEC": "0"}, math.inf),
    ],
)
def test_whose_watchdog(environment: dict[str, str], watchdog_s: float) -> None:
    """A watchdog counts if it is there, and is meant for this process."""
    assert Manager.of(environment) == Manager("", watchdog_s)


def test_nobody_listens(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """A manager that is gone is said, and harms nothing; where there is none, nothing is said."""
    Manager.of({}).ready("serving")
    assert caplog.messages == []
    Manager.of({"NOTIFY_SOCKET": str(tmp_path / "nix")}).ready("serving")
    assert "the service manager cannot be notified: " in caplog.messages[0]


# ----------------------------------------------------------------------------------------------
# The unit

analyze = needs("systemd-analyze")


@pytest.fixture
async def unit(tmp_path: Path) -> Path:
    """The unit as it is printed."""
    code, out, _ = await netota("systemd", "print")
    assert code == 0
    path = tmp_path / UNIT
    path.write_text(out)
    return path


@analyze
def test_verified(unit: Path) -> None:
    """There is nothing that systemd says of it."""
    done = subprocess.run(["systemd-analyze", "verify", unit], capture_output=True, text=True)

    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


@analyze
async def test_verified_for_a_user(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nor of that for a user's own manager, which can do less."""
    _, out, _ = await netota("systemd", "print", "--user")
    (tmp_path / UNIT).write_text(out)
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(tmp_path))
    done = await run("systemd-analyze", "--user", "verify", tmp_path / UNIT)

    assert done == (0, "", "")
    assert "WantedBy=default.target" in out
    assert not [line for line in out.splitlines() if line.startswith(("Dynamic", "Private"))]


@analyze
def test_secure(unit: Path) -> None:
    """The exposure that systemd finds is at most 1.5 of 10."""
    done = subprocess.run(
        ["systemd-analyze", "security", "--offline=true", "--threshold=15", unit],
        capture_output=True,
        text=True,
    )

    assert done.returncode == 0, done.stdout


async def test_the_command_of_the_unit(unit: Path, sample: Path) -> None:
    """What the unit runs serves, without what the sandbox takes: writable code in memory."""
    lines = unit.read_text().splitlines()
    command = next(line for line in lines if line.startswith("ExecStart=")).partition("=")[2]
    # PR_SET_MDWE, which Linux has since 6.3; before, there is nothing to be seen here.
    child = (
        "import ctypes, os, sys; ctypes.CDLL(None).prctl(65, 1, 0, 0, 0); "
        "os.execv(sys.argv[1], sys.argv[1:])"
    )
    state = sample.parent
    sample.rename(state / "repository")
    process = await asyncio.create_subprocess_exec(
        sys.executable, "-c", child, *command.split(),
        stdout=subprocess.PIPE, cwd="/",
        env={
            "STATE_DIRECTORY": str(state), "CONFIGURATION_DIRECTORY": str(state),
            "NETOTA_COAP_COAP_BIND": "127.0.0.1:0", "PYTHONPATH": str(PROJECT),
        },
    )  # fmt: skip
    assert process.stdout
    try:
        async with asyncio.timeout(PATIENCE_S):
            line = (await process.stdout.readline()).decode()
        async with device(line.split()[-1]) as it:
            assert (await it.observe(PATH)).uint(coap.OBSERVE)
            publish(state / "repository", ("sensor-node", "stable"), "2.0", [], now=NOW)
            await it.notification()
    finally:
        process.terminate()
        await process.communicate()

    assert process.returncode == 0
    assert (state / "observers.journal").exists()


@pytest.mark.parametrize(
    ("path", "said"),
    [
        ("/opt/x/bin/python", "/opt/x/bin/python -P"),
        ("/opt/a b/python", '"/opt/a b/python" -P'),
        ('/opt/a"b%\\/python', '"/opt/a\\"b%%\\\\/python" -P'),
    ],
)
def test_any_path(path: str, said: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The unit's command is what it was written by, wherever that is."""
    monkeypatch.setattr(sys, "executable", path)

    assert f"\nExecStart={said} -m netota_coap serve --keep-trying\n" in systemd.unit()


# ----------------------------------------------------------------------------------------------
# Installing it


@pytest.fixture
def systemctl(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Stand where systemctl is, since no systemd runs here; the file has how it was called."""
    program = tmp_path / "bin" / "systemctl"
    program.parent.mkdir()
    called = tmp_path / "called"
    program.write_text(f'#!/bin/sh\necho "$@" >> {called}\n')
    program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{program.parent}:/bin")
    # The Python of the tests may be at home.
    monkeypatch.setattr(systemd, "HOMES", (Path("/home/ada"),))
    return called


def test_installed(systemctl: Path, tmp_path: Path) -> None:
    """The unit is written, and systemd told to read and to enable it."""
    directory = tmp_path / "units"
    file = systemd.install(directory, user=True)

    assert file.read_text() == systemd.unit(user=True)
    assert stat.S_IMODE(file.stat().st_mode) & 0o444 == 0o444
    assert systemctl.read_text() == f"--user daemon-reload\n--user enable {UNIT}\n"
    systemd.install(directory)
    assert file.read_text() == systemd.unit()


async def test_installed_by_the_command(
    systemctl: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """`systemd install --user` says what it did and what comes next."""
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path))
    code, out, _ = await netota("systemd", "install", "--user")

    file = tmp_path / "systemd/user" / UNIT
    said = f"{file}: enabled; start it now: systemctl --user start {UNIT}\n"
    assert (code, out) == (0, said)


def test_where_units_are(monkeypatch: pytest.MonkeyPatch) -> None:
    """An administrator's are the system's, a user's under the home directory."""
    monkeypatch.setenv("HOME", "/home/ada")

    assert systemd.unit_directory({}) == Path("/etc/systemd/system")
    assert systemd.unit_directory({}, user=True) == Path("/home/ada/.config/systemd/user")
    assert systemd.unit_directory({"XDG_CONFIG_HOME": "/x"}, user=True) == Path("/x/systemd/user")


def test_what_keeps_it_from_being_installed(
    systemctl: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each time it is said what to do."""
    (tmp_path / "file").touch()
    with pytest.raises(ConfigError, match="cannot be written") as caught:
        systemd.install(tmp_path / "file" / "units")
    assert "as root" in caught.value.hint
    (tmp_path / "bin/systemctl").write_text("#!/bin/sh\necho No bus >&2; exit 1\n")
    with pytest.raises(ConfigError, match="systemctl daemon-reload: No bus") as caught:
        systemd.install(tmp_path / "units")
    assert "is written" in caught.value.hint
    (tmp_path / "bin/systemctl").unlink()
    monkeypatch.setenv("PATH", str(tmp_path / "bin"))
    with pytest.raises(ConfigError, match="systemctl is not installed") as caught:
        systemd.install(tmp_path / "units")
    assert "systemd print" in caught.value.hint
    monkeypatch.setattr(sys, "executable", "/home/ada/venv/bin/python")
    with pytest.raises(ConfigError, match="which a system service cannot see") as caught:
        systemd.install(tmp_path / "units")
    assert "/opt" in caught.value.hint
