"""What git knows of a repository that is kept in it. Without git, or outside of it: nothing."""

from __future__ import annotations

import os
import re
import subprocess
from pathlib import Path

from netota_coap.errors import printable
from netota_coap.model.values import LIMITS

_TIMEOUT_S = 60.0
# What a user may have configured otherwise, to the loss of what is read here.
_SETTINGS = (
    "core.quotePath=false",
    "log.diffMerges=separate",
    "log.follow=false",
    "log.showRoot=true",
    "log.showSignature=false",
)
_RAW = re.compile(r":\d+ \d+ \w+ (?P<blob>\w+) (?P<status>\w)\t(?P<path>[^\t]+)")


def _git(root: Path, *arguments: str) -> str:
    """Return what git prints; "" if it fails or is not there."""
    settings = (argument for setting in _SETTINGS for argument in ("-c", setting))
    command = ["git", *settings, "-C", str(root), *arguments]
    try:
        done = subprocess.run(
            command,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            timeout=_TIMEOUT_S,
            check=False,
        )
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return done.stdout.decode(errors="replace") if done.returncode == 0 else ""


def author(root: Path) -> str | None:
    """Return who is at work here: `Name <email>`, at most as long as an author may be.

    `GIT_AUTHOR_NAME` and `GIT_AUTHOR_EMAIL` win over git's configuration, as they do for git;
    where there is neither, in CI, it is the user that GitLab or GitHub name.
    """
    told = _git(root, "config", "--null", "--get-regexp", r"^user\.(name|email)$").split("\0")
    configured = dict(entry.split("\n", 1) for entry in told if "\n" in entry)
    name = os.environ.get("GIT_AUTHOR_NAME") or configured.get("user.name")
    email = os.environ.get("GIT_AUTHOR_EMAIL") or configured.get("user.email")
    name = name or os.environ.get("GITLAB_USER_NAME") or os.environ.get("GITHUB_ACTOR")
    whole = " ".join(part for part in (name, f"<{email}>" if email else "") if part)
    # Whoever it is, it must not keep a publish from being made.
    return printable(whole).encode()[: LIMITS["title"].value].decode(errors="ignore") or None


def doubt(root: Path) -> str:
    """Return why git may not tell all that it should, or "" if it does, or has nothing to tell."""
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
    return "is kept in git, which cannot be asked: git status says why"


def committed(root: Path, pattern: str) -> dict[str, set[str]]:
    """Return what the commits that led to this one have put at paths, merged branches included.

    Args:
        root: Paths are relative to it.
        pattern: Of the paths that matter, as git's glob has it.

    Returns:
        By path, the names of the blobs.
    """
    log = ("log", "--format=", "--raw", "--no-abbrev", "--no-renames", "--relative", "-m")
    found: dict[str, set[str]] = {}
    for line in _git(root, *log, "HEAD", "--", f":(glob){pattern}").splitlines():
        match = _RAW.fullmatch(line)
        if match and match["status"] in "AM":
            found.setdefault(match["path"], set()).add(match["blob"])
    return found


def blob(root: Path, name: str) -> bytes:
    """Return the text that a blob holds."""
    return _git(root, "cat-file", "blob", name).encode()
