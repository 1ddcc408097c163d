"""systemd: notifications to the service manager, and the unit that it runs.

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

_SEND_TIMEOUT_S = 1.0  # the manager's queue may be full while the machine boots
_LONGEST_STATUS = 1_000  # bytes; `systemctl status` shows one line


@attrs.define
class Manager:
    """Notifies the service manager; without one, it does nothing."""

    address: str = ""  # of the manager's socket
    watchdog_s: float = math.inf  # a service that is silent for longer is restarted
    _status: str = attrs.field(init=False, default="")

    @classmethod
    def of(cls, environment: Mapping[str, str]) -> Manager:
        """Return the manager that started this process."""
        address = environment.get("NOTIFY_SOCKET", "")
        if address.startswith("@"):
            address = "\0" + address[1:]
        is_ours = environment.get("WATCHDOG_PID", str(os.getpid())) == str(os.getpid())
        microseconds = environment.get("WATCHDOG_USEC", "")
        watched = is_ours and microseconds.isascii() and microseconds.isdecimal()
        return cls(address, (int(microseconds) / 1e6 if watched else 0) or math.inf)

    def ready(self, status: str) -> None:
        """Report that the start, or a reload, is done."""
        self._tell("READY=1", *self._news(status))

    def reloading(self) -> None:
        """Report that a reload has begun; `ready` ends it."""
        # sd_notify(3) demands this clock, which is not always the event loop's.
        now = time.clock_gettime_ns(time.CLOCK_MONOTONIC) // 1_000
        self._tell("RELOADING=1", f"MONOTONIC_USEC={now}")

    def stopping(self) -> None:
        """Report that the service is stopping."""
        self._tell("STOPPING=1")

    def status(self, status: str) -> None:
        """Report what the service does, if that changed."""
        self._tell(*self._news(status))

    async def beat(self, status: Callable[[], str]) -> None:
        """Feed the watchdog, and report the status if it changed, until cancelled.

        An idle service has no other wake-ups, so this also reports what changes by itself.
        """
        while True:
            # It is a message of its own, so that no status can spoil it.
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
            _log.warning("the service manager cannot be notified: %s", error)


def _line(status: str) -> str:
    """Return a status as one line that fits into a notification."""
    data = status.replace("\n", " ").encode(errors="replace")
    if len(data) <= _LONGEST_STATUS:
        return data.decode()
    return data[:_LONGEST_STATUS].decode(errors="ignore") + "…"


HOMES = (Path("/home"), Path("/root"), Path("/run/user"))
_SYSTEM_ONLY = re.compile(r"# From here .*?\n(?=\n)", re.DOTALL)


def unit(*, user: bool = False) -> str:
    """Return the unit for this installation, or the part of it that a user's manager supports."""
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
    """Return the directory for units of an administrator or a user."""
    if not user:
        return Path("/etc/systemd/system")
    config = environment.get("XDG_CONFIG_HOME")
    return (Path(config) if config else Path.home() / ".config") / "systemd/user"


def install(directory: Path, *, user: bool = False) -> Path:
    """Write the unit, enable it for each boot or log-in, and return its file.

    Raises:
        ConfigError: The file cannot be written, or systemd refuses it.
    """
    if not user:
        _check_place()
    if shutil.which("systemctl") is None:
        raise ConfigError("systemctl is not installed on this machine", hint=_BY_HAND)
    file = directory / UNIT
    try:
        write(file, unit(user=user).encode())
    except OSError as error:
        hint = "Run it as root, or install for your user only: netota-coap systemd install --user"
        raise ConfigError(f"{file}: cannot be written: {error.strerror}", hint=hint) from error
    for action in (("daemon-reload",), ("enable", UNIT)):
        command = ("systemctl", *(("--user",) if user else ()), *action)
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode:
            said = " ".join(done.stderr.split()) or f"exit code {done.returncode}"
            detail = f"{' '.join(command)}: {said}"
            raise ConfigError(detail, hint=f"{file} is written. {_BY_HAND}")
    return file


_BY_HAND = "To run the service by other means, see its command in: netota-coap systemd print"


def _check_place() -> None:
    """Refuse a Python in a home directory, which the unit hides from the service."""
    for path in (Path(sys.executable), Path(sys.executable).resolve(), Path(__file__).resolve()):
        if any(path.is_relative_to(home) for home in HOMES):
            raise ConfigError(
                f"{path}: is in a home directory, which a system service cannot see",
                hint="Install into /opt: python3 -m venv /opt/netota-coap; or use --user.",
            )
