"""The service manager: what it is told of a service, and the unit by which it runs one.

Source: sd_notify(3), systemd.service(5); `spec/operation.md`.
"""

from __future__ import annotations

import asyncio
import importlib.resources
import logging
import math
import os
import re
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path

import attrs

from netota_coap.errors import ConfigError
from netota_coap.files import write

_log = logging.getLogger(__name__)

UNIT = "netota-coapd.service"

# ----------------------------------------------------------------------------------------------
# Telling it

_SEND_TIMEOUT_S = 1.0  # its queue is short, while it is busy with booting
_LONGEST_STATUS = 1_000  # bytes: what `systemctl status` shows is one line


@attrs.define
class Manager:
    """Told what a service does; where there is none, nobody is.

    Attributes:
        address: Of its socket; "": there is none.
        watchdog_s: How long it may hear nothing; infinite: for ever.
    """

    address: str = ""
    watchdog_s: float = math.inf
    _status: str = attrs.field(init=False, default="")

    @classmethod
    def of(cls, environment: Mapping[str, str]) -> Manager:
        """Return the one that started this process."""
        address = environment.get("NOTIFY_SOCKET", "")
        if address.startswith("@"):
            address = "\0" + address[1:]
        meant = environment.get("WATCHDOG_PID", str(os.getpid())) == str(os.getpid())
        microseconds = environment.get("WATCHDOG_USEC", "")
        watched = meant and microseconds.isascii() and microseconds.isdecimal()
        return cls(address, (int(microseconds) / 1e6 if watched else 0) or math.inf)

    def ready(self, status: str) -> None:
        """Say that the start, or a reload, is done."""
        self._tell("READY=1", *self._news(status))

    def reloading(self) -> None:
        """Say that a reload has begun; `ready` ends it."""
        # Its own clock, which is the kernel's and not the event loop's.
        now = time.clock_gettime_ns(time.CLOCK_MONOTONIC) // 1_000
        self._tell("RELOADING=1", f"MONOTONIC_USEC={now}")

    def stopping(self) -> None:
        """Say that the end has begun."""
        self._tell("STOPPING=1")

    def status(self, status: str) -> None:
        """Say what the service does, if that changed."""
        self._tell(*self._news(status))

    async def beat(self, status: Callable[[], str]) -> None:
        """Say for ever that the event loop is alive, and what the service does if that changed.

        An idle service is woken up by nothing else, so what changes by itself is told here.
        """
        while True:
            # By itself, so that nothing in a status can keep it from being heard.
            self._tell("WATCHDOG=1")
            self.status(status())
            await asyncio.sleep(self.watchdog_s / 2)

    def _news(self, status: str) -> tuple[str, ...]:
        if status == self._status:
            return ()
        self._status = status
        return (f"STATUS={_line(status)}",)

    def _tell(self, *lines: str) -> None:
        if not self.address or not lines:
            return
        try:
            with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as opened:
                opened.settimeout(_SEND_TIMEOUT_S)
                opened.connect(self.address)
                opened.send("\n".join(lines).encode())
        except OSError as error:
            _log.warning("the service manager cannot be told: %s", error)


def _line(status: str) -> str:
    """Keep a status from being another variable, or more than a datagram takes."""
    data = status.replace("\n", " ").encode(errors="replace")
    if len(data) <= _LONGEST_STATUS:
        return data.decode()
    return data[:_LONGEST_STATUS].decode(errors="ignore") + "…"


# ----------------------------------------------------------------------------------------------
# The unit

_HOMES = (Path("/home"), Path("/root"), Path("/run/user"))
_SYSTEM_ONLY = re.compile(r"# From here .*?\n(?=\n)", re.DOTALL)


def unit(*, user: bool = False) -> str:
    """Return the unit that runs this installation.

    Args:
        user: For the manager of a user, which can do less.
    """
    template = (importlib.resources.files("netota_coap") / UNIT).read_text(encoding="utf-8")
    if user:
        template = _SYSTEM_ONLY.sub("", template)
    return template.replace("@COMMAND@", f"{_quoted(sys.executable)} -P -m netota_coap").replace(
        "@TARGET@", "default.target" if user else "multi-user.target"
    )


def _quoted(path: str) -> str:
    escaped = path.replace("\\", r"\\").replace('"', r"\"").replace("%", "%%")
    return f'"{escaped}"' if escaped != path or " " in path else path


def unit_directory(environment: Mapping[str, str], *, user: bool = False) -> Path:
    """Return where an administrator, or a user, keeps units."""
    if not user:
        return Path("/etc/systemd/system")
    config = environment.get("XDG_CONFIG_HOME")
    return (Path(config) if config else Path.home() / ".config") / "systemd/user"


def install(directory: Path, *, user: bool = False) -> Path:
    """Write the unit, and let it be started from now on at each boot, or log-in.

    Args:
        directory: As `unit_directory` has it.
        user: For the manager of a user.

    Returns:
        The file.

    Raises:
        ConfigError: It cannot be written, or the manager refuses.
    """
    if not user:
        _check_place()
    if shutil.which("systemctl") is None:
        raise ConfigError("there is no systemctl here", hint=_BY_HAND)
    file = directory / UNIT
    try:
        write(file, unit(user=user).encode())
    except OSError as error:
        hint = "Do it as root, or for yourself: netota-coap systemd install --user"
        raise ConfigError(f"{file}: cannot be written: {error.strerror}", hint=hint) from error
    for action in (("daemon-reload",), ("enable", UNIT)):
        command = ("systemctl", *(("--user",) if user else ()), *action)
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode:
            said = " ".join(done.stderr.split()) or f"exit code {done.returncode}"
            raise ConfigError(
                f"{' '.join(command)}: {said}", hint=f"{file} is written. {_BY_HAND}"
            )
    return file


_BY_HAND = "What runs it in another way finds the command in: netota-coap systemd print"


def _check_place() -> None:
    """A service of the system sees no home directories, and so no Python that is there."""
    for path in (Path(sys.executable), Path(sys.executable).resolve(), Path(__file__).resolve()):
        if any(path.is_relative_to(home) for home in _HOMES):
            raise ConfigError(
                f"{path}: is in a home directory, which a service does not see",
                hint="Install into /opt: python3 -m venv /opt/netota-coap; or use --user.",
            )
