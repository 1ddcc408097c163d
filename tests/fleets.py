"""A repository kept in git, and what is done to it there, with the real git."""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from netota_coap import publish, repository
from netota_coap.checks import check
from netota_coap.model import Offer, Stream, StreamName
from netota_coap.sources import ArchiveSource
from tests import publishing
from tests.conftest import NOW

STABLE, EDGE, BETA = (("sensor-node", stream) for stream in ("stable", "edge", "beta"))
FILE = "packages/sensor-node/streams/stable.toml"
OFFER = Offer(url="https://example.com/{version}/{name}", metric=1)

# What a user may have configured must not matter.
CONFIGURATION = """\
[user]
    name = Somebody
    email = somebody@example.com
[init]
    defaultBranch = main
[color]
    ui = always
[core]
    quotePath = true
    fsync = none
    attributesFile = {attributes}
[diff]
    renames = copies
    noprefix = true
[log]
    diffMerges = combined
    showSignature = true
    showRoot = false
    follow = true
[merge]
    conflictStyle = diff3
[commit]
    gpgSign = false
"""


@contextlib.contextmanager
def somebodys_git(home: Path) -> Iterator[None]:
    """Let git be another person's, whoever runs the tests; the project's command is found."""
    # This would merge without a conflict, and make one stream of two.
    (home / "attributes").write_text("*.toml merge=union\n")
    (home / ".gitconfig").write_text(CONFIGURATION.format(attributes=home / "attributes"))
    with pytest.MonkeyPatch.context() as patch:
        for name in os.environ:
            if name.startswith(("GIT_", "GITLAB_", "GITHUB_")):
                patch.delenv(name)
        patch.setenv("HOME", str(home))
        patch.setenv("GIT_CONFIG_GLOBAL", str(home / ".gitconfig"))
        patch.setenv("GIT_CONFIG_NOSYSTEM", "1")
        patch.setenv("PATH", f"{Path(sys.executable).parent}:{os.environ['PATH']}")
        yield


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
    repository.init(root, "Ours")
    publish.sample(root, NOW)
    run(root, "git", "init")
    commit(root, "begin")
    released("2")(root)
    commit(root, "publish 2")
    return root
