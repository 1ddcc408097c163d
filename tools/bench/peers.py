"""What benchmarks share: servers in processes of their own, and what is made of several runs."""

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
    """Return a port that nothing is bound to, of any address."""
    with socket.socket(socket.AF_INET6, socket.SOCK_DGRAM) as opened:
        opened.bind(("::", 0))
        port: int = opened.getsockname()[1]
        return port


def until(condition: Callable[[], bool], what: str) -> None:
    """Wait for a condition.

    Raises:
        SystemExit: It took too long; `what` is the case until then.
    """
    end_s = time.monotonic() + PATIENCE_S
    while not condition():
        if time.monotonic() > end_s:
            raise SystemExit(f"{what} in {PATIENCE_S:g} s")
        time.sleep(0.01)


@attrs.frozen
class Process:
    """A server that runs.

    Attributes:
        log: What it says.
    """

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
        """End it as a crash would."""
        self._running.kill()
        self._running.wait()

    def still_runs(self) -> bool:
        """Return True.

        Raises:
            SystemExit: It has ended; what it said last.
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
    """Return the medians of figures that have the same places in each run.

    Args:
        runs: Mappings, of mappings or figures.
        added: Figures that are added up, since no median may hide them.
        figure: That the runs are of.
    """
    if isinstance(runs[0], dict):
        return {key: together([run[key] for run in runs], added, key) for key in runs[0]}
    return sum(runs) if figure in added else statistics.median(runs)
