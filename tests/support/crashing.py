"""Runs what changes a repository again and again, each time into another trouble.

For each n a copy of BASE is changed by the command, or call, in a forked child, and left at
OUT/<n>; the last one is of the command that came to its end. Troubles are
* faults: the n-th step goes wrong. A step is what the kernel is asked to do to a file; one that
  writes goes wrong half-way;
* shortages: the copy is on a small disk, at OUT/disk, with n - 1 of something left on it. Once
  there is room again, the same command runs once more; what it makes is at OUT/<n>-again. Such a
  disk is mounted for one process: python -m tests.support.crashing SHORTAGE SCENARIO BASE OUT.
  What became of the copies is printed as JSON.
"""

from __future__ import annotations

import contextlib
import errno
import importlib
import io
import itertools
import json
import os
import re
import shlex
import shutil
import signal
import sys
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import attrs

from netota_coap import cli
from netota_coap.gateway import adoption
from netota_coap.model.values import Archive, Offer, Stream
from netota_coap.repository.store import DirectoryStore
from tests.support.publishing import NOW, STABLE
from tests.support.storing import ENVELOPE

_BUILD = "9.9.9 --archive ROOT/repository.toml,name=image --allow-missing"
SCENARIOS = {
    "publish": f"publish ROOT sensor-node/stable {_BUILD}",
    "first": f"publish ROOT new/stable {_BUILD}",
    "again": f"publish ROOT sensor-node/stable {_BUILD}",
    "by hand": f"publish ROOT sensor-node/stable {_BUILD}",
    "release": "publish ROOT sensor-node/stable --release ROOT/.release.toml --allow-missing",
    "store": f"publish ROOT sensor-node/stable {_BUILD} --store",
    "promote": "promote ROOT sensor-node/beta sensor-node/stable --allow-missing",
    "rollback": "rollback ROOT sensor-node/stable --allow-missing",
    "remove": "remove ROOT sensor-node/stable",
    "close": "close ROOT sensor-node/stable --replacement sensor-node/beta",
    "reopen": "reopen ROOT sensor-node/v1",
    "init": "init ROOT",
    "sample": "init ROOT --sample",
    "draft": "release ROOT/repository.toml -o ROOT/.draft.toml",
}
"""Commands; ROOT is the copy."""


def take_over(root: Path, sequence: int, host: str = "h") -> Stream | None:
    """Take over a state of sensor-node/stable from an upstream."""
    version = f"{sequence}.0"
    offer = Offer(url=f"coap://{host}/{version}", metric=1)
    archive = Archive(name="image", envelope=ENVELOPE, offers=(offer,))
    offered = Stream(version=version, sequence=sequence, published=NOW, archives=(archive,))
    origin = "coap://upstream.example.com"
    decide = partial(adoption.adopt, offered=offered, origin=origin)
    return adoption.take_over(DirectoryStore(root), STABLE, decide)


CALLS: dict[str, Callable[[Path], object]] = {
    "adopt first": lambda root: take_over(root, 18),
    "adopt": lambda root: take_over(root, 18),
    "adopt again": lambda root: take_over(root, 18),
    "adopt the same": lambda root: take_over(root, 18),
    "adopt by hand": lambda root: take_over(root, 18),
    "adopt offers": lambda root: take_over(root, 17, host="other"),
    "adopt back": lambda root: take_over(root, 17),
    "drop": lambda root: DirectoryStore(root).drop(STABLE),
}
"""What a mirror does to a repository, for which there is no command of its own."""

_MODULES = ("cli.publish", "cli.blobs")  # imported once, not in each child


def _fail(number: int) -> None:
    raise OSError(number, os.strerror(number))


FAULTS: dict[str, Callable[[], object]] = {
    "killed": lambda: signal.raise_signal(signal.SIGKILL),
    "interrupted": lambda: signal.raise_signal(signal.SIGINT),
    "full": lambda: _fail(errno.ENOSPC),
    "broken": lambda: _fail(errno.EIO),
}
"""What happens at a step; broken is broken for all that follow, too."""

SHORTAGES = ("pages", "inodes")


@attrs.define
class Steps:
    """Counts the steps, and lets one of them go wrong.

    Attributes:
        root: Of the repository.
        last: The number of the step that goes wrong, from 1.
        fault: How.
        names: The steps so far.
    """

    root: Path
    last: int
    fault: str
    names: list[str] = attrs.field(factory=list)

    def take(self, name: str, half: Callable[[], object] = lambda: None) -> None:
        """Take a step, unless it goes wrong."""
        self.names.append(_RANDOM.sub(".tmp", name))
        count = len(self.names)
        if count == self.last or (count > self.last and self.fault == "broken"):
            half()
            FAULTS[self.fault]()

    def watch(self, name: str) -> None:
        """Make each call of a function of `os` a step."""
        function = getattr(os, name)

        def watched(file: Any, *arguments: Any, **options: Any) -> Any:
            path = Path(f"/proc/self/fd/{file}").readlink() if isinstance(file, int) else file
            self.take(f"{name} {'ROOT' if path == self.root else Path(path).name}")
            return function(file, *arguments, **options)

        setattr(os, name, watched)

    def watch_blobs(self) -> None:
        """Make steps of how blobs are written: by descriptors, and to files that are new."""

        def opened(path: Any, flags: int, *arguments: Any, **options: Any) -> int:
            if flags & os.O_EXCL:
                self.take(f"open {path}")
            return OPEN_DESCRIPTOR(path, flags, *arguments, **options)

        def written(descriptor: int, data: memoryview) -> int:
            self.take("write", lambda: WRITE_DESCRIPTOR(descriptor, data[: len(data) // 2]))
            return WRITE_DESCRIPTOR(descriptor, data)

        os.open, os.write = opened, written

    def open(self, path: Any, mode: str = "r", *arguments: Any, **options: Any) -> Any:
        """Open a file, one that is written so that each write is a step."""
        if mode != "wb":
            return OPEN(path, mode, *arguments, **options)
        self.take(f"open {path.name}")
        return Writer(self, path)


class Writer(io.BufferedWriter):
    """A file whose writing may end half-way."""

    def __init__(self, steps: Steps, path: Path) -> None:
        super().__init__(io.FileIO(path, "w"))
        self.steps = steps

    def write(self, data: Any) -> int:
        """Write all, or half and never again."""

        def half() -> None:
            super(Writer, self).write(data[: len(data) // 2])
            self.flush()

        self.steps.take("write", half)
        return super().write(data)


OPEN, OPEN_DESCRIPTOR, WRITE_DESCRIPTOR = io.open, os.open, os.write
_RANDOM = re.compile(r"\.[0-9a-f]{8}\.tmp$")  # in the names of two that may write the same blob


@attrs.frozen
class End:
    """How a command ended.

    Attributes:
        code: Its exit code, or minus the signal that killed it.
        err: What it printed to standard error.
        steps: That it took; none if it was killed.
    """

    code: int
    err: str = ""
    steps: tuple[str, ...] = ()


def run(scenario: str, root: Path, steps: Steps | None = None) -> End:
    """Run a command in a child."""
    for module in _MODULES:
        importlib.import_module(f"netota_coap.{module}")
    reading, writing = os.pipe()
    child = os.fork()
    if child == 0:
        try:
            sys.settrace(None)  # who may be killed cannot tell what was covered
            arguments = shlex.split(SCENARIOS.get(scenario, "").replace("ROOT", str(root)))
            sys.argv = ["netota-coap", *arguments]
            sys.stdout, sys.stderr = io.StringIO(), io.StringIO()
            if steps:
                for name in ("mkdir", "replace", "unlink", "fsync"):
                    steps.watch(name)
                steps.watch_blobs()
                io.open = steps.open  # type: ignore[assignment]
            if scenario in CALLS:
                CALLS[scenario](root)
                sys.exit()
            cli.main()
        except SystemExit as end:
            names = steps.names if steps else []
            told = {"code": end.code or 0, "err": sys.stderr.getvalue(), "steps": names}
            WRITE_DESCRIPTOR(writing, json.dumps(told).encode())
        finally:
            os._exit(0)  # whatever happens, the child does not go on as its parent
    os.close(writing)
    with os.fdopen(reading) as stream:
        told = stream.read()
    _, status = os.waitpid(child, 0)
    if not told:
        return End(os.waitstatus_to_exitcode(status))
    found = json.loads(told)
    return End(found["code"], found["err"], tuple(found["steps"]))


def fault(name: str, scenario: str, base: Path, out: Path) -> Iterator[End]:
    """Let each step go wrong."""
    for last in itertools.count(1):
        root = out / f"{last:03}"
        shutil.copytree(base, root)
        end = run(scenario, root, Steps(root, last, name))
        yield end
        if end.code >= 0 and len(end.steps) < last:
            return


def shortage(what: str, scenario: str, base: Path, out: Path) -> Iterator[tuple[End, End]]:
    """Let a disk have less and less room."""
    disk = out / "disk"
    for left in itertools.count():
        root = disk / "repository"
        shutil.copytree(base, root)
        fill(disk / "filler", what, left)
        end = run(scenario, root)
        shutil.copytree(root, out / f"{left + 1:03}")
        shutil.rmtree(disk / "filler")
        again = run(scenario, root) if end.code else end
        shutil.copytree(root, out / f"{left + 1:03}-again")
        shutil.rmtree(root)
        yield end, again
        if end.code == 0:
            return


def fill(place: Path, what: str, left: int) -> None:
    """Leave so many pages or inodes on a disk."""
    place.mkdir()
    page = bytes(os.sysconf("SC_PAGE_SIZE"))
    count = 0
    with contextlib.suppress(OSError), (place / "pages").open("wb", buffering=0) as file:
        while what == "pages":
            file.write(page)
            count += 1
    if what == "pages":
        os.truncate(place / "pages", max(count - left, 0) * len(page))
    with contextlib.suppress(OSError):
        while what == "inodes":
            (place / str(count)).touch()
            count += 1
    if what == "inodes":
        for number in range(left):
            (place / str(number)).unlink()


def main(what: str, scenario: str, base: str, out: str) -> None:
    """Run the command until there is room enough."""
    ends = shortage(what, scenario, Path(base), Path(out))
    sys.stdout.write(json.dumps(list(ends), default=attrs.asdict))


if __name__ == "__main__":
    main(*sys.argv[1:])
