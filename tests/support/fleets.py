"""A repository kept in git, and what is done to it there, with the real git."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Callable
from pathlib import Path

from netota_coap.model.values import Offer, Stream, StreamName
from netota_coap.publishing import publish
from netota_coap.publishing.archives import ArchiveSource
from netota_coap.repository import scaffold
from netota_coap.repository.check import check
from netota_coap.repository.store import DirectoryStore
from tests.support import publishing
from tests.support.publishing import NOW

STABLE, EDGE, BETA = (("sensor-node", stream) for stream in ("stable", "edge", "beta"))
FILE = "packages/sensor-node/streams/stable.toml"
OFFER = Offer(url="https://example.com/{version}/{name}", metric=1)


def run(root: Path, *command: str, code: int = 0, **variables: str) -> str:
    """Run a command in a directory; return what it prints."""
    done = subprocess.run(
        command,
        cwd=root,
        env=os.environ | variables,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=60,
        check=False,
    )
    assert code == done.returncode, done.stdout
    return done.stdout


def commit(root: Path, message: str = "change") -> None:
    run(root, "git", "add", "--all")
    run(root, "git", "commit", "-m", message)


Step = Callable[[Path], Stream]


def released(version: str, name: StreamName = STABLE) -> Step:
    """Return the step that publishes a version."""

    def step(root: Path) -> Stream:
        file = root.parent / f"{version}.bin"
        file.write_text(version)
        sources = [ArchiveSource(file, "nrf52840dk", offers=(OFFER,))]
        return publishing.publish(root, name, version, sources)

    return step


def clean(root: Path) -> dict[str, Stream]:
    """Return the streams of sensor-node, after a check that found nothing at all."""
    findings = check(root)
    assert (findings.errors, findings.warnings) == ((), ())
    assert findings.repository is not None
    return dict(findings.repository.packages["sensor-node"].streams)


def begin(root: Path) -> Path:
    """Make a repository in git; stable holds sequence 2 of version 2."""
    scaffold.init(root, "Ours")
    publish.sample(DirectoryStore(root), NOW)
    run(root, "git", "init")
    commit(root, "begin")
    released("2")(root)
    commit(root, "publish 2")
    return root
