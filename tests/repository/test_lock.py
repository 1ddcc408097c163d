"""The lock that whoever writes holds."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from netota_coap.errors import RepositoryError, RepositoryLockedError
from netota_coap.repository import lock

SINCE = r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\dZ"
HOLD = """
import sys
from pathlib import Path
from netota_coap.repository import lock
with lock.locked(Path(sys.argv[1])):
    print("held", flush=True)
    sys.stdin.read()
"""


def hold(root: Path) -> subprocess.Popen[bytes]:
    """Start a process that holds the lock until its standard input is closed."""
    command = [sys.executable, "-c", HOLD, str(root)]
    holder = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    assert holder.stdout is not None
    assert holder.stdout.readline() == b"held\n"
    return holder


def test_lock_is_seen_and_waited_for(repository_dir: Path) -> None:
    """While one process writes, the others know and give up in time."""
    assert not lock.is_locked(repository_dir)
    with hold(repository_dir) as holder:
        assert lock.is_locked(repository_dir)
        message = rf"process {holder.pid} of \w+ on \S+, since {SINCE}, is still writing"
        with (
            pytest.raises(RepositoryLockedError, match=message),
            lock.locked(repository_dir, timeout_s=0.05),
        ):
            pass
        holder.communicate()
    assert not lock.is_locked(repository_dir)


def test_killed_holder_leaves_no_lock(repository_dir: Path) -> None:
    """The kernel lets go of the lock; the file that stays means nothing."""
    with hold(repository_dir) as holder:
        holder.kill()
        holder.communicate()
    assert f"process {holder.pid} " in (repository_dir / ".lock").read_text()
    assert not lock.is_locked(repository_dir)
    with lock.locked(repository_dir, timeout_s=0):
        assert lock.is_locked(repository_dir)
        assert f"process {os.getpid()} " in (repository_dir / ".lock").read_text()
    assert (repository_dir / ".lock").read_text() == ""


def test_lock_needs_a_repository(tmp_path: Path) -> None:
    """Writing to what is no repository is refused, with the way to make one."""
    with pytest.raises(RepositoryError) as raised, lock.locked(tmp_path):
        pass
    assert f"{tmp_path}: not a repository, it has no repository.toml" == raised.value.detail
    assert f"Make one: netota-coap init {tmp_path}" == raised.value.hint
    assert not lock.is_locked(tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_pipes_do_not_hold_anybody_up(repository_dir: Path) -> None:
    """A pipe where a file is expected is no file, whoever put it there."""
    os.mkfifo(repository_dir / ".lock")
    assert not lock.is_locked(repository_dir)
    with (
        pytest.raises(RepositoryError, match="cannot be written"),
        lock.locked(repository_dir),
    ):
        pass


def test_holder_without_a_word(repository_dir: Path) -> None:
    """Who holds the lock without our words in it is somebody else; odd words are escaped."""
    for written, shown in (("", "somebody else"), ("\x1b[2Jme", r"\x1b[2Jme")):
        with lock.locked(repository_dir):
            (repository_dir / ".lock").write_text(written)
            with (
                pytest.raises(RepositoryLockedError) as raised,
                lock.locked(repository_dir, timeout_s=0),
            ):
                pass
        assert f"{repository_dir}: {shown} is still writing" in raised.value.detail
