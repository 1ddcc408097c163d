"""Changes a repository and is killed on the way, once at each step; run by test_crash.py.

Usage: python -m tests.crashing SCENARIO BASE OUT
For each n a copy of BASE is made at OUT/<n>, changed by a child that ends without warning at its
n-th step, and left for others to look at. A step is what the kernel is asked to do to a file; a
step that writes ends with half of the bytes. The last copy is of the child that came to its end;
the names of its steps are printed.
"""

from __future__ import annotations

import io
import os
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from netota_coap.sources import ArchiveSource
from tests.publishing import close, publish, reopen

STABLE = ("sensor-node", "stable")


def release(root: Path, name: tuple[str, str]) -> None:
    """Publish the file beside the repository."""
    image = root / "repository.toml"
    publish(root, name, "9.9.9", [ArchiveSource(image, "image")])


SCENARIOS: dict[str, Callable[[Path], object]] = {
    "publish": lambda root: release(root, STABLE),
    "first": lambda root: release(root, ("new", "stable")),
    "again": lambda root: release(root, STABLE),
    "close": lambda root: close(root, STABLE, ("sensor-node", "beta")),
    "reopen": lambda root: reopen(root, ("sensor-node", "v1")),
}


class Steps:
    """Counts the steps, and ends the process at one of them."""

    def __init__(self, last: int) -> None:
        self.last = last
        self.names: list[str] = []

    def take(self, name: str, at_the_end: Callable[[], object] = lambda: None) -> None:
        """Take a step, unless the process ends here."""
        self.names.append(name)
        if len(self.names) == self.last:
            at_the_end()
            os._exit(9)

    def watch(self, name: str, describe: Callable[..., str]) -> None:
        """Make each call of a function of `os` a step."""
        function = getattr(os, name)

        def watched(*arguments: Any, **options: Any) -> Any:
            self.take(f"{name} {describe(*arguments)}")
            return function(*arguments, **options)

        setattr(os, name, watched)

    def open(self, path: Path, mode: str = "r", *arguments: Any, **options: Any) -> Any:
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


OPEN = io.open


def name_of(path: os.PathLike[str] | str, *_: object) -> str:
    """Return the last part of a path."""
    return Path(path).name


def run(scenario: str, root: Path, last: int) -> list[str] | None:
    """Change a repository in a child that ends at a step; None if it did."""
    reading, writing = os.pipe()
    child = os.fork()
    if child == 0:
        steps = Steps(last)
        steps.watch("mkdir", name_of)
        steps.watch("replace", name_of)
        steps.watch("unlink", name_of)
        steps.watch("fsync", lambda fd: Path(f"/proc/self/fd/{fd}").readlink().name)
        io.open = steps.open  # type: ignore[assignment]
        SCENARIOS[scenario](root)
        os.write(writing, "\n".join(steps.names).encode())
        os._exit(0)
    os.close(writing)
    with os.fdopen(reading) as stream:
        names = stream.read().splitlines()
    _, status = os.waitpid(child, 0)
    code = os.waitstatus_to_exitcode(status)
    if code not in (0, 9):
        raise AssertionError(f"the child failed: {code}")
    return None if code else names


def main(scenario: str, base: str, out: str) -> None:
    """Make the copies until a child comes to its end."""
    names, last = None, 0
    while names is None:
        last += 1
        root = Path(out) / f"{last:03}"
        shutil.copytree(base, root)
        names = run(scenario, root, last)
    sys.stdout.write("\n".join(names))


if __name__ == "__main__":
    main(*sys.argv[1:])
