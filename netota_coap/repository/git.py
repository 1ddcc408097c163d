"""Reads the git history of a repository; without git, or outside a work tree, it is empty."""

from __future__ import annotations

import os
import re
import subprocess
from pathlib import Path

from netota_coap.errors import printable
from netota_coap.model.values import LIMITS

_TIMEOUT_S = 60.0
# These override a user's configuration that would change the output.
_SETTINGS = (
    "core.quotePath=false",
    "log.diffMerges=separate",
    "log.follow=false",
    "log.showRoot=true",
    "log.showSignature=false",
)
_RAW = re.compile(r":\d+ \d+ \w+ (?P<blob>\w+) (?P<status>\w)\t(?P<path>[^\t]+)")


def _git(root: Path, *arguments: str) -> str:
    """Return what git prints; "" if it fails or is not installed."""
    settings = (argument for setting in _SETTINGS for argument in ("-c", setting))
    command = ["git", *settings, "-C", str(root), *arguments]
    try:
        done = subprocess.run(
            command, stdin=subprocess.DEVNULL, capture_output=True, timeout=_TIMEOUT_S, check=False
        )
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return done.stdout.decode(errors="replace") if done.returncode == 0 else ""


def author(root: Path) -> str | None:
    """Return the user as `Name <email>`, cut to the length that an author may have.

    `GIT_AUTHOR_NAME` and `GIT_AUTHOR_EMAIL` win over git's configuration, as they do for git;
    without either, it is the user that GitLab or GitHub names in CI.
    """
    told = _git(root, "config", "--null", "--get-regexp", r"^user\.(name|email)$").split("\0")
    configured = dict(entry.split("\n", 1) for entry in told if "\n" in entry)
    name = os.environ.get("GIT_AUTHOR_NAME") or configured.get("user.name")
    email = os.environ.get("GIT_AUTHOR_EMAIL") or configured.get("user.email")
    name = name or os.environ.get("GITLAB_USER_NAME") or os.environ.get("GITHUB_ACTOR")
    whole = " ".join(part for part in (name, f"<{email}>" if email else "") if part)
    # An odd name must not make a publish fail.
    return printable(whole).encode()[: LIMITS["title"].value].decode(errors="ignore") or None


def doubt(root: Path) -> str:
    """Return why git's history may be incomplete; "" if it is complete, or there is none."""
    real = Path(os.path.realpath(root))
    kept = "GIT_DIR" in os.environ or any(
        os.path.exists(directory / ".git")  # noqa: PTH110 - never raises
        for directory in (real, *real.parents)
    )
    if not kept:
        return ""
    shallow = _git(root, "rev-parse", "--is-shallow-repository").strip()
    if shallow == "false":
        return ""
    if shallow == "true":
        return (
            "is a shallow clone: what was published before it is not seen (git fetch --unshallow)"
        )
    return "is kept in git, but git fails here: git status says why"


def committed(root: Path, pattern: str) -> dict[str, set[str]]:
    """Return, by path, the git blobs of files in all commits before this one.

    Merged branches are included; `pattern` is a glob of git, relative to `root`, as the paths are.
    """
    log = ("log", "--format=", "--raw", "--no-abbrev", "--no-renames", "--relative", "-m")
    found: dict[str, set[str]] = {}
    for line in _git(root, *log, "HEAD", "--", f":(glob){pattern}").splitlines():
        match = _RAW.fullmatch(line)
        if match and match["status"] in "AM":
            found.setdefault(match["path"], set()).add(match["blob"])
    return found


def blob(root: Path, name: str) -> bytes:
    """Return the content of a git blob."""
    return _git(root, "cat-file", "blob", name).encode()
