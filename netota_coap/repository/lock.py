"""Locks a repository by `flock`, which the kernel releases when the process ends.

The file names the writer for others to read; the text that a dead process left blocks nobody.
Source: rules R-20 and R-31.
"""

from __future__ import annotations

import contextlib
import fcntl
import getpass
import os
import socket
import time
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path

from netota_coap.errors import RepositoryError, RepositoryLockedError, printable
from netota_coap.files import open_nofollow, open_nonblocking, writing

FILE = ".lock"
_LONGEST = 200  # bytes of a writer's name that are read
_RETRY_S = 0.01


def require_repository(root: Path) -> None:
    """Raise a `RepositoryError` where there is no repository."""
    if not (root / "repository.toml").is_file():
        raise RepositoryError(
            f"{root}: not a repository, it has no repository.toml",
            hint=f"Make one: netota-coap init {root}",
        )


@contextlib.contextmanager
def locked(root: Path, timeout_s: float = 10.0) -> Iterator[None]:
    """Hold the lock of a repository.

    Raises:
        RepositoryLockedError: Another process held it for `timeout_s` seconds.
        RepositoryError: There is no repository, or it cannot be written to.
    """
    require_repository(root)
    deadline = time.monotonic() + timeout_s
    with writing(root), open(root / FILE, "ab", buffering=0, opener=open_nofollow) as lock:
        while True:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                if time.monotonic() >= deadline:
                    who = _holder(root)
                    raise RepositoryLockedError(
                        f"{root}: {who} is still writing after {timeout_s:g} s of waiting",
                        hint="Try again when the other publisher is done.",
                    ) from None
                time.sleep(_RETRY_S)
        lock.truncate(0)
        # On a full disk the lock is held without a name in it.
        with contextlib.suppress(OSError):
            lock.write(_signature().encode())
        try:
            yield
        finally:
            lock.truncate(0)


def is_locked(root: Path) -> bool:
    """Tell whether a process holds the lock."""
    try:
        with open(root / FILE, "rb", opener=open_nonblocking) as lock:
            fcntl.flock(lock, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    except OSError:
        return False
    return False


def _signature() -> str:
    try:
        user = getpass.getuser()
    except (OSError, KeyError):  # a user id without a name
        user = str(os.getuid())
    now = datetime.now(UTC)
    return f"process {os.getpid()} of {user} on {socket.gethostname()}, since {now:%FT%TZ},"


def _holder(root: Path) -> str:
    with contextlib.suppress(OSError), open(root / FILE, "rb", opener=open_nonblocking) as lock:
        return printable((lock.read(_LONGEST) or b"").decode(errors="replace")) or "somebody else"
    return "somebody else"
