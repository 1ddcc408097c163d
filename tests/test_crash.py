"""A publisher that is killed at any instant leaves the old state or the new one."""

from __future__ import annotations

import itertools
import subprocess
import sys
from pathlib import Path

import attrs
import pytest

from netota_coap.checks import check
from netota_coap.formats import Format
from netota_coap.lock import is_locked
from netota_coap.model import Repository, Stream, StreamName
from netota_coap.repository import Loader, init
from netota_coap.sources import ArchiveSource
from netota_coap.wire import encode
from tests.conftest import NOW
from tests.publishing import publish, reopen
from tests.repositories import HISTORY, stable

STABLE = ("sensor-node", "stable")
WRITE = ["open {}", "write", "fsync {}", "replace {}", "fsync {directory}"]


def written(file: str, directory: str) -> list[str]:
    """Return the steps of writing a file so that it is there whole or not at all."""
    return [step.format(f".{file}.tmp", directory=directory) for step in WRITE]


def made(*directories: str) -> list[str]:
    """Return the steps of making directories, one in the other; the first is there."""
    pairs = itertools.pairwise(directories)
    return [step for above, name in pairs for step in (f"mkdir {name}", f"fsync {above}")]


SCENARIOS: dict[str, tuple[StreamName, list[str]]] = {
    "publish": (STABLE, [*written("00000018.toml", "stable"), *written("stable.toml", "streams")]),
    "first": (
        ("new", "stable"),
        [
            *made("packages", "new", "history", "stable"),
            *written("00000001.toml", "stable"),
            *made("new", "streams"),
            *written("stable.toml", "streams"),
        ],
    ),
    "again": (
        STABLE,
        [
            *written("00000020.toml", "stable"),
            "unlink 00000018.toml",
            "unlink 00000019.toml",
            *written("stable.toml", "streams"),
        ],
    ),
    "close": (STABLE, [*written("00000018.toml", "stable"), *written("stable.toml", "streams")]),
    "reopen": (
        ("sensor-node", "v1"),
        [*written("00000032.toml", "v1"), *written("v1.toml", "streams")],
    ),
}
"""The stream that is changed, and all steps of its change in their order."""


def stream_of(repository: Repository, name: StreamName) -> Stream | None:
    """Return a stream, or None."""
    package = repository.packages.get(name[0])
    return package.streams.get(name[1]) if package else None


def crash(scenario: str, base: Path, out: Path) -> list[str]:
    """Let a publisher die at each step; return the names of the steps."""
    command = [sys.executable, "-m", "tests.crashing", scenario, str(base), str(out)]
    root = Path(__file__).parent.parent
    done = subprocess.run(command, check=True, capture_output=True, text=True, cwd=root)
    return done.stdout.splitlines()


@pytest.fixture
def base(repository_dir: Path, tmp_path: Path, request: pytest.FixtureRequest) -> Path:
    """What there is before: the typical repository, an empty one, or one left by interruptions."""
    if request.param == "first":
        init(tmp_path / "empty")
        return tmp_path / "empty"
    if request.param == "again":
        for sequence in (18, 19):
            left = attrs.evolve(stable(repository_dir), sequence=sequence, version="left")
            (repository_dir / HISTORY.format(sequence)).write_bytes(encode(left, Format.TOML))
    return repository_dir


@pytest.mark.parametrize(("base", "scenario"), [(s, s) for s in SCENARIOS], indirect=["base"])
def test_every_step_leaves_the_old_or_the_new_state(
    base: Path, scenario: str, tmp_path: Path
) -> None:
    """Killed before any step, or half-way through a write, a change is made or not made.

    What is left has no errors and no lock, a long-lived reader takes it, and the next publish
    works, with a sequence that was never in effect.
    """
    name, expected_steps = SCENARIOS[scenario]
    steps = crash(scenario, base, tmp_path / "out")
    assert expected_steps == steps
    old = Loader(base).load()
    ends = sorted((tmp_path / "out").iterdir())
    new = Loader(ends[-1]).load()
    assert len(steps) + 1 == len(ends)
    assert old != new

    commit = max(index for index, step in enumerate(steps) if step.startswith("replace"))
    for index, root in enumerate(ends):
        findings = check(root)
        assert findings.errors == ()
        assert findings.repository is not None
        state = stream_of(findings.repository, name)
        assert stream_of(new if index > commit else old, name) == state
        assert not is_locked(root)

        loader = Loader(root)
        loader.load()
        if state and state.closed:
            state = reopen(root, name)
        image = root / "repository.toml"
        after = publish(root, name, "10.0.0", [ArchiveSource(image, "image")], now=NOW)
        assert after.sequence > (state.sequence if state else 0)
        assert after == stream_of(loader.load(), name)
        again = check(root)
        assert (again.errors, again.warnings) == ((), ())
