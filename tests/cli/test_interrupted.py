"""The command is stopped while it reads, and many of them change a repository at once."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import sys
from pathlib import Path

import pytest

from netota_coap.repository import history
from netota_coap.repository.check import check
from netota_coap.repository.loading import Loader
from tests.support.serving import COMMAND, PATIENCE_S, PROJECT, until

LARGE = 16 << 30  # bytes, none of them on the disk: seconds of reading
HELD = """
import resource
import sys
from pathlib import Path
from netota_coap.repository import lock

_, most = resource.getrlimit(resource.RLIMIT_FSIZE)
resource.setrlimit(resource.RLIMIT_FSIZE, (0, most))
with lock.locked(Path(sys.argv[1])):
    print(lock.is_locked(Path(sys.argv[1])))
resource.setrlimit(resource.RLIMIT_FSIZE, (most, most))
"""

TELLING = """
import sys
from pathlib import Path
from netota_coap.repository import lock

with lock.locked(Path(sys.argv[1])):
    print((Path(sys.argv[1]) / ".lock").read_text())
"""


def tree(root: Path) -> dict[str, bytes]:
    """Return all files below a directory."""
    files = (path for path in root.rglob("*") if path.is_file())
    return {path.relative_to(root).as_posix(): path.read_bytes() for path in files}


def reads(process: int, file: Path) -> bool:
    """Tell whether a process has read some of a file."""
    for descriptor in Path(f"/proc/{process}/fd").iterdir():
        try:
            if descriptor.readlink() == file:
                info = Path(f"/proc/{process}/fdinfo/{descriptor.name}").read_text()
                return "pos:\t0\n" not in info
        except FileNotFoundError:
            continue  # closed meanwhile
    return False


async def start(*command: str | Path, **environment: str) -> asyncio.subprocess.Process:
    """Start a command."""
    return await asyncio.create_subprocess_exec(
        *map(str, command),
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.PIPE,
        cwd=PROJECT,
        env=os.environ | environment,
    )


async def end(process: asyncio.subprocess.Process) -> tuple[int | None, str, str]:
    """Wait for the end of a command: exit code, standard output, standard error."""
    try:
        async with asyncio.timeout(PATIENCE_S):
            out, err = await process.communicate()
    finally:
        if process.returncode is None:
            process.kill()
    return process.returncode, out.decode(), err.decode()


@pytest.mark.parametrize(
    ("number", "expected"),
    [
        (signal.SIGINT, (130, "", "\n")),
        (signal.SIGTERM, (-signal.SIGTERM, "", "")),
        (signal.SIGKILL, (-signal.SIGKILL, "", "")),
    ],
)
async def test_stopped_while_it_reads(
    number: signal.Signals, expected: tuple[int, str, str], repository_dir: Path, tmp_path: Path
) -> None:
    """Whoever stops a publish that reads a large file finds the repository as it was."""
    image = tmp_path / "image.bin"
    with image.open("wb") as stream:
        stream.truncate(LARGE)
    before = tree(repository_dir)
    publisher = await start(
        *COMMAND, "publish", repository_dir, "sensor-node/stable", "9.9.9", "--archive", image
    )
    await until(lambda: reads(publisher.pid, image))
    publisher.send_signal(number)
    assert expected == await end(publisher)
    assert before == tree(repository_dir)


async def test_lock_without_words(repository_dir: Path) -> None:
    """Where not a byte can be written, as on a full disk, the lock is held all the same."""
    command = await start(sys.executable, "-c", HELD, repository_dir)
    assert await end(command) == (0, "True\n", "")
    assert (repository_dir / ".lock").read_bytes() == b""


async def test_holder_without_a_name(repository_dir: Path) -> None:
    """Where a user has a number and no name, as in many containers, the lock tells the number."""
    within = ("unshare", "-U", "--map-user=4242")
    if (await end(await start(*within, sys.executable, "-c", "")))[0]:
        pytest.skip("no user namespace can be made, or none that reaches this project")
    nameless = dict.fromkeys(("LOGNAME", "USER", "LNAME", "USERNAME"), "")
    command = await start(*within, sys.executable, "-c", TELLING, repository_dir, **nameless)
    code, out, err = await end(command)
    assert (code, err) == (0, "")
    assert f"process {command.pid} of 4242 on " in out


async def test_ctrl_c_while_python_starts(tmp_path: Path) -> None:
    """Ctrl-C before the command has begun is no traceback either."""
    (tmp_path / "click.py").write_text("import signal\nsignal.raise_signal(signal.SIGINT)\n")
    command = await start(*COMMAND, "--help", PYTHONPATH=str(tmp_path))
    assert await end(command) == (130, "", "")


CHANGE = """
import json
import random
import sys
from pathlib import Path
from netota_coap.publishing import publish
from netota_coap.repository.store import DirectoryStore
from netota_coap.errors import NotFoundError, RepositoryConflictError
from netota_coap.publishing.archives import ArchiveSource
from tests.support.publishing import NOW

root, who, times = Path(sys.argv[1]), sys.argv[2], int(sys.argv[3])
store = DirectoryStore(root)
choose = random.Random(who)
for n in range(times):
    edit = publish.Edit(now=NOW, author=who, message=str(n), allow_missing=True)
    one, other = choose.sample(STREAMS, 2)
    image = ArchiveSource(root / "repository.toml", "image")
    changes = (
        lambda: publish.publish(store, one, f"{who}.{n}", [image], edit=edit),
        lambda: publish.publish(store, one, f"{who}.{n}", [image], edit=edit),
        lambda: publish.promote(store, one, other, edit=edit),
        lambda: publish.rollback(store, one, edit=edit),
        lambda: publish.remove(store, one, edit=edit),
    )
    try:
        change = choose.choice(changes)()
    except (NotFoundError, RepositoryConflictError):
        continue  # another one was there first
    print(json.dumps([*change.name, change.after.sequence, who, str(n)]), flush=True)
"""
STREAMS = [("sensor-node", "stable"), ("sensor-node", "beta"), ("new", "stable")]


async def test_many_at_once(repository_dir: Path) -> None:
    """Each change of many publishers is in the history, once, in one row; readers see no error."""
    first = {
        name: max((state.sequence for state in history.history(repository_dir, name)), default=0)
        for name in STREAMS[:2]
    }
    code = CHANGE.replace("STREAMS", repr(STREAMS))
    publishers = [
        await start(sys.executable, "-c", code, repository_dir, f"p{n}", "25") for n in range(4)
    ]
    ending = asyncio.gather(*map(end, publishers))
    loader, loads = Loader(repository_dir), 0
    while not ending.done():
        loader.load()
        loads += 1
        await asyncio.sleep(0)
    ends = await ending
    assert [(code, err) for code, _, err in ends] == [(0, "")] * 4
    assert loads > 10

    told = sorted(json.loads(line) for _, out, _ in ends for line in out.splitlines())
    kept = [
        [*name, state.sequence, state.author, state.message]
        for name in STREAMS
        for state in history.history(repository_dir, name)
        if state.sequence > first.get(name, 0)
    ]
    assert told == sorted(kept)
    for name in STREAMS:
        sequences = [sequence for *stream, sequence, _, _ in told if tuple(stream) == name]
        lowest = first.get(name, 0) + 1
        assert list(range(lowest, lowest + len(sequences))) == sequences
        assert len(sequences) > 5
    assert check(repository_dir).errors == ()
