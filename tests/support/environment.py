"""The environment that tests run in, whoever runs them, wherever; and what they take of it."""

from __future__ import annotations

import contextlib
import os
import re
import shutil
import socket
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

PATH = f"{os.environ['PATH']}:/usr/sbin"
"""Where programs are looked for: some are in no user's path."""

# What would change how git, the service, its HTTP clients or its tables behave.
_INHERITED = re.compile(
    r"(GIT|GITLAB|GITHUB|NETOTA_COAP|XDG|LC|WATCHDOG)_.*|LANG|LANGUAGE"
    r"|NOTIFY_SOCKET|JOURNAL_STREAM|(CONFIGURATION|STATE)_DIRECTORY"
    r"|COLUMNS|LINES|NO_COLOR|FORCE_COLOR|TTY_.*|(?i:[a-z]+_proxy)"
)

# What a user may have configured must not matter.
_GITCONFIG = """\
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
def somebodys(home: Path) -> Iterator[None]:
    """Be somebody with a home and a git identity of their own; the project's command is found."""
    # This would merge without a conflict, and make one stream of two.
    (home / "attributes").write_text("*.toml merge=union\n")
    (home / ".gitconfig").write_text(_GITCONFIG.format(attributes=home / "attributes"))
    umask = os.umask(0o022)
    with pytest.MonkeyPatch.context() as patch:
        for name in filter(_INHERITED.fullmatch, os.environ.copy()):
            patch.delenv(name)
        patch.setenv("HOME", str(home))
        patch.setenv("GIT_CONFIG_GLOBAL", str(home / ".gitconfig"))
        patch.setenv("GIT_CONFIG_NOSYSTEM", "1")
        patch.setenv("LC_ALL", "C.UTF-8")
        patch.setenv("PATH", f"{Path(sys.executable).parent}:{os.environ['PATH']}")
        yield
    os.umask(umask)


def needs(*programs: str) -> pytest.MarkDecorator:
    """Skip where a program is missing that `tools/setup dev` installs or names; fail in CI."""
    missing = ", ".join(program for program in programs if not shutil.which(program, path=PATH))
    skipped = bool(missing) and os.environ.get("CI") != "true"
    return pytest.mark.skipif(skipped, reason=f"missing: {missing}; run tools/setup dev as root")


def _has_ipv6() -> bool:
    try:
        with socket.socket(socket.AF_INET6) as probe:
            probe.bind(("::1", 0))
    except OSError:
        return False
    return True


needs_ipv6 = pytest.mark.skipif(not _has_ipv6(), reason="there is no IPv6 on loopback")
