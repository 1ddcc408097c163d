"""Helpers of all benchmarks: servers in processes of their own, and medians over runs."""

from __future__ import annotations

import contextlib
import os
import socket
import statistics
import subprocess
import time
from collections.abc import Callable, Collection, Iterator, Sequence
from pathlib import Path
from typing import Any

import attrs

PATIENCE_S = 30.0


def free_port() -> int:
    """Return a UDP port that no socket is bound to, on any address."""
    with socket.socket(socket.AF_INET6, socket.SOCK_DGRAM) as opened:
        opened.bind(("::", 0))
        port: int = opened.getsockname()[1]
        return port


def until(condition: Callable[[], bool], what: str) -> None:
    """Wait until a condition holds.

    Raises:
        SystemExit: It took too long; `what` says what is missing.
    """
    end_s = time.monotonic() + PATIENCE_S
    while not condition():
        if time.monotonic() > end_s:
            raise SystemExit(f"{what} in {PATIENCE_S:g} s")
        time.sleep(0.01)


@attrs.frozen
class Process:
    """A running server; `log` is the file with its output."""

    log: Path
    _running: subprocess.Popen[bytes]

    @classmethod
    @contextlib.contextmanager
    def start(cls, command: Sequence[str | Path], log: Path) -> Iterator[Process]:
        """Run a server until the block ends."""
        with log.open("w") as stream:
            running = subprocess.Popen(list(map(str, command)), stdout=stream, stderr=stream)
        try:
            yield cls(log, running)
        finally:
            running.terminate()
            try:
                running.wait(PATIENCE_S)
            except subprocess.TimeoutExpired:
                running.kill()
                running.wait()

    def kill(self) -> None:
        """Kill the server without warning, as a crash would."""
        self._running.kill()
        self._running.wait()

    def still_runs(self) -> bool:
        """Return True.

        Raises:
            SystemExit: The server has ended; the text has its last line of output.
        """
        if self._running.poll() is not None:
            last = self.log.read_text(errors="replace").strip().rpartition("\n")[2]
            raise SystemExit(f"the server ended, code {self._running.returncode}: {last}")
        return True

    @property
    def cpu_s(self) -> float:
        """User and system time so far."""
        stat = self._proc("stat").rpartition(")")[2].split()
        return (int(stat[11]) + int(stat[12])) / os.sysconf("SC_CLK_TCK")

    @property
    def rss(self) -> int:
        """Memory, bytes."""
        return int(self._proc("statm").split()[1]) * os.sysconf("SC_PAGE_SIZE")

    def _proc(self, name: str) -> str:
        return Path(f"/proc/{self._running.pid}/{name}").read_text()


def together(runs: Sequence[Any], added: Collection[str], figure: str = "") -> Any:
    """Return the medians of nested figures over several runs.

    Args:
        runs: Mappings with the same keys, or numbers.
        added: Names of figures that are added up, since a median would hide them.
        figure: Name of the figure, if `runs` are numbers.
    """
    if isinstance(runs[0], dict):
        return {key: together([run[key] for run in runs], added, key) for key in runs[0]}
    return sum(runs) if figure in added else statistics.median(runs)
