"""A change that is killed, interrupted or out of room leaves the old state or the new one."""

from __future__ import annotations

import hashlib
import itertools
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import attrs
import pytest

from netota_coap.encoding.codecs import Format
from netota_coap.encoding.documents import encode
from netota_coap.model.values import Repository, Stream, StreamName
from netota_coap.publishing.archives import ArchiveSource
from netota_coap.repository.blobs import Blobs
from netota_coap.repository.check import check
from netota_coap.repository.loading import Loader
from netota_coap.repository.lock import is_locked
from netota_coap.repository.scaffold import init
from netota_coap.repository.store import DirectoryStore
from tests.conftest import FIXTURES
from tests.support import crashing
from tests.support.crashing import End, take_over
from tests.support.publishing import NOW, publish, reopen, served
from tests.support.repositories import HISTORY, stable
from tests.support.serving import PROJECT
from tests.support.storing import can_clone

pytestmark = pytest.mark.slow

STABLE = ("sensor-node", "stable")
WRITE = ["open {}", "write", "fsync {}", "replace {}", "fsync {directory}"]


def written(file: str, directory: str) -> list[str]:
    """Return the steps of writing a file so that it is there whole or not at all."""
    return [step.format(f".{file}.tmp", directory=directory) for step in WRITE]


def made(*directories: str) -> list[str]:
    """Return the steps of making directories, one in the other; the first is there."""
    pairs = itertools.pairwise(directories)
    return [step for above, name in pairs for step in (f"mkdir {name}", f"fsync {above}")]


REPLACED = [*written("00000018.toml", "stable"), *written("stable.toml", "streams")]
STORED = hashlib.sha256((FIXTURES / "repositories/typical/repository.toml").read_bytes())
SHARD, BLOB = STORED.hexdigest()[:2], STORED.hexdigest()
SCENARIOS: dict[str, tuple[StreamName, list[str]]] = {
    "publish": (STABLE, REPLACED),
    "release": (STABLE, REPLACED),
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
    "by hand": (STABLE, [*written("00000017.toml", "stable"), *REPLACED]),
    "store": (
        STABLE,
        [*made("ROOT", "blobs", "sha256", SHARD), *written(BLOB, SHARD), *REPLACED],
    ),
    "promote": (STABLE, REPLACED),
    "rollback": (STABLE, REPLACED),
    "remove": (
        STABLE,
        [*written("00000018.toml", "stable"), "unlink stable.toml", "fsync streams"],
    ),
    "close": (STABLE, REPLACED),
    "reopen": (
        ("sensor-node", "v1"),
        [*written("00000032.toml", "v1"), *written("v1.toml", "streams")],
    ),
}
"""The stream that is changed, and all steps of its change in their order."""


def stream_of(repository: Repository, name: StreamName) -> Stream | None:
    """Return a stream, or None; whenever it was published."""
    package = repository.packages.get(name[0])
    stream = package.streams.get(name[1]) if package else None
    return attrs.evolve(stream, published=NOW, changed=None) if stream else None


def roots_of(out: Path) -> list[Path]:
    return sorted(path for path in out.iterdir() if path.name.isdecimal())


def faulty(trouble: str, scenario: str, base: Path, out: Path) -> tuple[list[Path], list[End]]:
    """Let a command fail at each of its steps; what is left, and how it ended."""
    ends = list(crashing.fault(trouble, scenario, base, out))
    return roots_of(out), ends


@pytest.fixture
def base(repository_dir: Path, tmp_path: Path, request: pytest.FixtureRequest) -> Path:
    """What there is before: mostly one stream of the typical repository."""
    empty = tmp_path / "empty"
    shutil.rmtree(repository_dir / "packages/gateway-os")
    needed = {"promote": "beta", "close": "beta", "reopen": "v1"}.get(request.param)
    for other in {"beta", "edge", "v1"} - {needed}:
        shutil.rmtree(repository_dir / "packages/sensor-node/history" / other)
        (repository_dir / f"packages/sensor-node/streams/{other}.toml").unlink()
    match request.param:
        case "init" | "sample":
            empty.mkdir()
            return empty
        case "first":
            init(empty)
            return empty
        case "by hand":
            (repository_dir / HISTORY.format(17)).unlink()
        case "again":
            for sequence in (18, 19):
                left = attrs.evolve(stable(repository_dir), sequence=sequence, version="left")
                (repository_dir / HISTORY.format(sequence)).write_bytes(encode(left, Format.TOML))
    archives = (f'[[archives]]\nfile = "repository.toml"\nname = "a{n}"\n' for n in range(20))
    (repository_dir / ".release.toml").write_text('version = "9.9.9"\n' + "".join(archives))
    return repository_dir


def commit_of(steps: tuple[str, ...]) -> int:
    """Return the index of the step that makes the change."""
    return max(i for i, step in enumerate(steps) if step.startswith(("replace", "unlink")))


def temporaries(root: Path) -> list[Path]:
    return sorted(root.rglob(".*.tmp"))


@pytest.mark.parametrize(("base", "scenario"), [(s, s) for s in SCENARIOS], indirect=["base"])
def test_killed_at_every_step(
    base: Path, scenario: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Killed before any step, or half-way through a write, a change is made or not made.

    What is left has no errors and no lock, a long-lived reader takes it, and the next publish
    works, with a sequence that was never in effect.
    """
    monkeypatch.setattr("netota_coap.repository.blobs.STALE_S", 0)
    name, expected_steps = SCENARIOS[scenario]
    if scenario == "store" and can_clone(tmp_path):
        expected_steps = list(expected_steps)
        expected_steps.remove("write")
    roots, ends = faulty("killed", scenario, base, tmp_path / "out")
    steps = ends[-1].steps
    assert tuple(expected_steps) == steps
    assert [-9] * len(steps) + [0] == [end.code for end in ends]
    old = stream_of(Loader(base).load(), name)
    new = stream_of(Loader(roots[-1]).load(), name)
    assert old != new

    records = re.findall(r"open \.(\d+)\.toml", "\n".join(steps))
    before, after = old.sequence if old else 0, int(records[-1])
    for index, root in enumerate(roots):
        done = index > commit_of(steps)
        findings = check(root)
        assert findings.errors == ()
        assert findings.repository is not None
        state = stream_of(findings.repository, name)
        assert (new if done else old) == state
        assert not is_locked(root)

        loader = Loader(root)
        loader.load()
        if state and state.closed:
            reopen(root, name)
        image = root / "repository.toml"
        blobs = Blobs(root)
        assert blobs.verify() == ()
        if scenario == "store" and done:
            os.close(blobs.open(STORED.digest()))
        next_ = publish(root, name, "10.0.0", [ArchiveSource(image, "image")])
        assert next_.sequence > (after if done else before)
        assert attrs.evolve(next_, changed=None) == stream_of(loader.load(), name)
        again = check(root)
        assert again.errors == ()
        assert [issue for issue in again.warnings if "/history/" in issue.file] == []
        blobs.gc(1_000, grace_s=0)
        assert temporaries(root) == []


ADOPTED = written("stable.toml", "streams")
CALLS: dict[str, list[str]] = {
    "adopt first": [
        *made("packages", "sensor-node", "history", "stable"),
        *written("00000018.toml", "stable"),
        *made("sensor-node", "streams"),
        *ADOPTED,
    ],
    "adopt": REPLACED,
    "adopt again": [
        *written("00000018.toml", "stable"),
        "unlink 00000019.toml",
        *ADOPTED,
    ],
    "adopt the same": ADOPTED,
    "adopt by hand": [*written("00000017.toml", "stable"), *REPLACED],
    "adopt offers": ADOPTED,
    "adopt back": ADOPTED,
    "drop": ["unlink stable.toml", "fsync streams"],
}
"""All steps of what a mirror does to a stream."""


@pytest.fixture
def mirrored(tmp_path: Path, request: pytest.FixtureRequest) -> Path:
    """What a mirror has before."""
    root = tmp_path / "mirrored"
    init(root)
    if request.param != "adopt first":
        take_over(root, 17)
    match request.param:
        case "adopt again" | "adopt the same":
            adopted = attrs.evolve(stable(root), sequence=18)
            versions = ("18.0",) if request.param == "adopt the same" else ("left", "left")
            for sequence, version in enumerate(versions, 18):
                left = attrs.evolve(adopted, sequence=sequence, version=version)
                (root / HISTORY.format(sequence)).write_bytes(encode(left, Format.TOML))
        case "adopt by hand":
            (root / HISTORY.format(17)).unlink()
        case "adopt back":
            DirectoryStore(root).drop(STABLE)
    return root


@pytest.mark.parametrize(("mirrored", "scenario"), [(s, s) for s in CALLS], indirect=["mirrored"])
def test_a_mirror_killed_at_every_step(mirrored: Path, scenario: str, tmp_path: Path) -> None:
    """A state is taken over or not, a stream removed or not; the next start goes on from there.

    It finds the same at the upstream, or a later state.
    """
    roots, ends = faulty("killed", scenario, mirrored, tmp_path / "out")
    steps = ends[-1].steps
    assert tuple(CALLS[scenario]) == steps
    assert [-9] * len(steps) + [0] == [end.code for end in ends]
    old, new = (stream_of(Loader(root).load(), STABLE) for root in (mirrored, roots[-1]))
    assert old != new
    for index, root in enumerate(roots):
        done = index > commit_of(steps)
        findings = check(root)
        assert findings.errors == ()
        assert [issue for issue in findings.warnings if "/history/" not in issue.file] == []
        assert findings.repository is not None
        assert (new if done else old) == stream_of(findings.repository, STABLE)
        assert not is_locked(root)

        later = Path(shutil.copytree(root, root.with_name(f"{root.name}-later")))
        take_over(later, 20)
        loader = Loader(root)
        loader.load()
        crashing.CALLS[scenario](root)
        assert new == stream_of(loader.load(), STABLE)
        assert temporaries(root) == []
        take_over(root, 20)
        assert loader.load() == Loader(later).load()
        for each in (root, later):
            assert (check(each).errors, check(each).warnings) == ((), ())
            assert served(each).sequence == 20


NO_SPACE = (
    r"error: \S+: cannot be written: No space left on device\n"
    r"hint: Make room on the disk, then try again\.\n"
)
TOLD = {
    "interrupted": (130, r"\n"),
    "full": (3, NO_SPACE),
    "broken": (3, r"error: \S+: cannot be written: Input/output error\n"),
}
"""By fault, the exit code and what is printed."""


@pytest.mark.parametrize(
    ("fault", "base", "scenario"),
    [
        ("interrupted", "first", "first"),
        ("full", "first", "first"),
        ("broken", "first", "first"),
        ("interrupted", "by hand", "by hand"),
        ("full", "by hand", "by hand"),
        ("interrupted", "remove", "remove"),
        ("full", "remove", "remove"),
        ("interrupted", "store", "store"),
        ("full", "store", "store"),
        ("broken", "store", "store"),
    ],
    indirect=["base"],
)
def test_failed_at_every_step(base: Path, scenario: str, fault: str, tmp_path: Path) -> None:
    """An error at any step, or Ctrl-C, is told in a line, and the change is made or not made.

    Nothing is left of one that is not made, unless the disk refuses that as well.
    """
    name, _ = SCENARIOS[scenario]
    roots, ends = faulty(fault, scenario, base, tmp_path / "out")
    steps = ends[-1].steps
    code, err = TOLD[fault]
    assert [code] * len(steps) + [0] == [end.code for end in ends]
    states = [stream_of(Loader(root).load(), name) for root in (base, roots[-1])]
    warnings = [check(root).warnings for root in (base, roots[-1])]
    for index, (root, end) in enumerate(zip(roots[:-1], ends[:-1], strict=True)):
        assert re.fullmatch(err, end.err), end.err
        done = index > commit_of(steps)
        findings = check(root)
        assert findings.errors == ()
        assert findings.repository is not None
        assert states[done] == stream_of(findings.repository, name)
        assert not is_locked(root)
        if fault != "broken":
            assert set(findings.warnings) <= set(warnings[done])
            assert temporaries(root) == []


@pytest.mark.parametrize("trouble", ["killed", "interrupted", "full"])
@pytest.mark.parametrize(("base", "scenario"), [("init", "init")], indirect=["base"])
def test_repository_is_made_in_one_step(
    base: Path, scenario: str, trouble: str, tmp_path: Path
) -> None:
    """There is a repository when its last file is there; before that, init begins anew."""
    roots, ends = faulty(trouble, scenario, base, tmp_path / "out")
    steps = ends[-1].steps
    assert made("ROOT", "packages") == list(steps[:2])
    assert written("repository.toml", "ROOT") == list(steps[-5:])
    code, err = TOLD.get(trouble, (-9, ""))
    for index, (root, end) in enumerate(zip(roots[:-1], ends[:-1], strict=True)):
        assert code == end.code
        assert re.fullmatch(err, end.err), end.err
        done = index > commit_of(steps)
        assert done == (root / "repository.toml").exists()
        if not done:
            init(root)
        assert (check(root).errors, check(root).warnings) == ((), ())
        assert temporaries(root) == []


@pytest.mark.parametrize("base", ["sample"], indirect=True)
def test_sample_stream_by_stream(base: Path, tmp_path: Path) -> None:
    """A sample that is interrupted is a repository with fewer streams."""
    roots, ends = faulty("killed", "sample", base, tmp_path / "out")
    steps = ends[-1].steps
    streams = ("stable", "edge")
    commits = [steps.index(f"replace .{stream}.toml.tmp") for stream in streams]
    first = steps.index("replace .repository.toml.tmp") + 1
    for index, root in enumerate(roots[first:], first):
        findings = check(root)
        assert findings.errors == ()
        assert findings.repository is not None
        package = findings.repository.packages.get("sensor-node")
        expected = {s for s, commit in zip(streams, commits, strict=True) if index > commit}
        assert expected == set(package.streams if package else ())


@pytest.mark.parametrize("trouble", ["killed", "full"])
@pytest.mark.parametrize("base", ["draft"], indirect=True)
def test_release_file_is_whole_or_not_there(base: Path, trouble: str, tmp_path: Path) -> None:
    """A draft that comes to grief leaves nothing where the release file would be, or all of it."""
    roots, ends = faulty(trouble, "draft", base, tmp_path / "out")
    assert tuple(written(".draft.toml", "ROOT")) == ends[-1].steps
    texts = {
        root: (root / ".draft.toml").read_text().replace(root.name, "")
        for root in roots
        if (root / ".draft.toml").exists()
    }
    assert roots[-2:] == list(texts)
    assert len(set(texts.values())) == 1


@pytest.fixture
def disk(tmp_path: Path) -> tuple[Path, list[str]]:
    """A directory, and the command that makes it a small disk for the command after it."""
    out = tmp_path / "out"
    (out / "disk").mkdir(parents=True)
    mount = 'mount -t tmpfs -o size=1M,nr_inodes=200 none "$0" && exec "$@"'
    # Root needs no namespace of users, in which a checkout of somebody else is out of reach.
    alone = "-m" if os.geteuid() == 0 else "-rm"
    within = ["unshare", alone, "sh", "-c", mount, str(out / "disk")]
    try:
        subprocess.run([*within, "true"], check=True, capture_output=True)
    except (OSError, subprocess.CalledProcessError) as error:
        if os.environ.get("CI") == "true" and os.geteuid() == 0:
            raise
        pytest.skip(f"no disk can be mounted: {error}")
    return out, within


NO_ROOM = {
    ("pages", "release"): 5,
    ("pages", "first"): 3,
    ("pages", "store"): 4,
    ("pages", "promote"): 3,
    ("pages", "rollback"): 3,
    ("pages", "close"): 3,
    ("pages", "remove"): 2,
    ("inodes", "first"): 7,
}
"""By what there is too little of, and the change: how many of it are enough."""


@pytest.mark.parametrize(
    ("what", "base", "scenario"), [(w, s, s) for w, s in NO_ROOM], indirect=["base"]
)
def test_full_disk(
    what: str, base: Path, scenario: str, disk: tuple[Path, list[str]], tmp_path: Path
) -> None:
    """A disk too full for a change is told as such, and holds the old state; later it works."""
    name, _ = SCENARIOS[scenario]
    out, within = disk
    command = [
        *within,
        sys.executable,
        "-m",
        "tests.support.crashing",
        what,
        scenario,
        str(base),
        str(out),
    ]
    done = subprocess.run(command, check=True, capture_output=True, text=True, cwd=PROJECT)
    roots, told = roots_of(out), json.loads(done.stdout)
    assert NO_ROOM[what, scenario] == len(told) - 1
    old, new = (stream_of(Loader(root).load(), name) for root in (base, roots[-1]))
    code, err = TOLD["full"]
    warnings = check(base).warnings
    for root, (end, again) in zip(roots[:-1], told[:-1], strict=True):
        assert code == end["code"]
        assert re.fullmatch(err, end["err"]), end["err"]
        findings = check(root)
        assert (findings.errors, findings.warnings) == ((), warnings)
        assert findings.repository is not None
        assert old == stream_of(findings.repository, name)
        assert temporaries(root) == []

        later = root.with_name(f"{root.name}-again")
        assert again["code"] == 0
        assert new == stream_of(Loader(later).load(), name)
        assert check(later).errors == ()
