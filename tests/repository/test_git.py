"""Merges, reverts and authors of a repository kept in git, with the real git."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from netota_coap.model.values import Stream
from netota_coap.repository import git, lock, scaffold
from netota_coap.repository.check import Findings, check
from netota_coap.repository.loading import Loader
from tests.support import publishing
from tests.support.fleets import (
    BETA,
    EDGE,
    FILE,
    STABLE,
    Step,
    begin,
    clean,
    commit,
    released,
    run,
)
from tests.support.publishing import close, remove, rollback
from tests.support.repositories import refusal

HISTORY = "packages/sensor-node/history/stable/{:08}.toml"


@pytest.fixture(scope="module")
def begun(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return begin(tmp_path_factory.mktemp("begun") / "fleet")


@pytest.fixture
def fleet(tmp_path: Path, begun: Path) -> Path:
    """A repository in git; stable holds sequence 2 of version 2."""
    return Path(shutil.copytree(begun, tmp_path / "fleet"))


def closed(root: Path) -> Stream:
    return close(root, STABLE)


def removed(root: Path) -> Stream:
    return remove(root, STABLE)


def rolled_back(root: Path) -> Stream:
    return rollback(root, STABLE)


def merge(root: Path, ours: Step, theirs: Step, code: int) -> str:
    """Make a step on each of two branches, and merge them."""
    run(root, "git", "checkout", "-b", "theirs")
    theirs(root)
    commit(root, "theirs")
    run(root, "git", "checkout", "main")
    ours(root)
    commit(root, "ours")
    return run(root, "git", "merge", "--no-edit", "theirs", code=code)


def errors(findings: Findings) -> list[str]:
    return [str(issue) for issue in findings.errors]


# ----------------------------------------------------------------------------------------------
# Merges


def test_a_new_repository_is_ready_for_git(tmp_path: Path) -> None:
    """Nothing is left to be added but what matters, and files keep their line endings."""
    root = tmp_path / "new"
    scaffold.init(root, "Ours & theirs")
    with lock.locked(root):
        run(root, "git", "init")
        commit(root)
    tracked = run(root, "git", "ls-files", "--eol").splitlines()
    assert [line.split("\t")[1] for line in tracked] == [
        ".gitattributes",
        ".gitignore",
        "README.md",
        "repository.toml",
    ]
    assert tracked[3].split()[:4] == ["i/lf", "w/lf", "attr/text", "eol=lf"]
    assert (root / "README.md").read_text().startswith("# Ours & theirs\n")


def test_windows_line_endings_do_not_come_in(fleet: Path) -> None:
    """Who commits CRLF changes nothing: the bytes in git are the same."""
    (fleet / FILE).write_bytes((fleet / FILE).read_bytes().replace(b"\n", b"\r\n"))
    run(fleet, "git", "add", "--all")
    assert run(fleet, "git", "diff", "--cached", "--name-only") == ""


def test_branches_of_different_streams_merge(fleet: Path) -> None:
    """A server may serve the merge, and has both changes."""
    loader = Loader(fleet)
    loader.load()
    merge(fleet, released("3"), released("4", EDGE), code=0)
    streams = clean(fleet)
    assert (streams["stable"].version, streams["edge"].version) == ("3", "4")
    assert streams == dict(loader.load().packages["sensor-node"].streams)


CONFLICTS = [
    (released("3"), released("4")),
    (closed, released("4")),
    (released("3"), closed),
    (rolled_back, released("4")),
    (rolled_back, closed),
    (released("3"), removed),
    (removed, closed),
]


@pytest.mark.parametrize(("ours", "theirs"), CONFLICTS)
def test_branches_of_one_stream_conflict(fleet: Path, ours: Step, theirs: Step) -> None:
    """Git says so, a check too, and a server refuses a file with two states in it.

    If one side removed the stream, its file is that of the other side and can be served.
    """
    told = merge(fleet, ours, theirs, code=1)
    assert f"Merge conflict in {HISTORY.format(3)}" in told
    assert "<<<<<<< " in (fleet / HISTORY.format(3)).read_text()
    assert check(fleet).errors or removed in (ours, theirs)
    if removed not in (ours, theirs):
        assert any(i.file == FILE for i in refusal(Loader(fleet)).issues)


@pytest.mark.parametrize(
    ("ours", "theirs", "side"),
    [(*steps, ("--ours", "--theirs")[at % 2]) for at, steps in enumerate(CONFLICTS[:5])],
)
def test_one_side_is_not_enough(fleet: Path, ours: Step, theirs: Step, side: str) -> None:
    """Devices of the other side ignore the merge; after another publish all take it."""
    merge(fleet, ours, theirs, code=1)
    run(fleet, "git", "checkout", side, "--", "packages")
    commit(fleet, "merge")
    findings = check(fleet)
    reason = "must be above 3, which different states have in the commits"
    assert [f"{FILE}: sequence: {reason}"] == errors(findings)
    assert findings.hint.startswith("Devices ignore a sequence that they have seen.")

    loaders = [Loader(fleet), Loader(fleet)]
    for loader, branch in zip(loaders, ("main^1", "main^2"), strict=True):
        run(fleet, "git", "checkout", branch)
        loader.load()
    run(fleet, "git", "checkout", "main")
    if Loader(fleet).load().packages["sensor-node"].streams["stable"].closed:
        publishing.reopen(fleet, STABLE)
    state = released("5")(fleet)
    assert state == clean(fleet)["stable"]
    commit(fleet, "mend")
    assert state == clean(fleet)["stable"]
    assert [state, state] == [
        loader.load().packages["sensor-node"].streams["stable"] for loader in loaders
    ]


def test_another_spelling_is_no_other_state(fleet: Path) -> None:
    """A comment in a history file, or a conflict that was committed, is nothing devices saw."""
    history = fleet / FILE.replace("streams/stable", "history/stable/00000002")
    text = history.read_text()
    for spelling in (f"# Why\n{text}", f"<<<<<<< ours\n{text}", text):
        history.write_text(spelling)
        commit(fleet, "spelling")
    assert clean(fleet)["stable"].sequence == 2


def test_the_readme_tells_how_to_merge(fleet: Path) -> None:
    """What the README of a repository tells to do about such a merge can be typed as it stands."""
    readme = (fleet / "README.md").read_text()
    script = readme[readme.index("## Branches") :].split("```")[1].removeprefix("sh\n")
    release = 'version="5"\noffers=[{url="https://h/x",metric=1}]\n[[archives]]\nfile="3.bin"\n'
    (fleet.parent / "release.toml").write_text(release)
    for old, new in (("PKG", "sensor-node"), ("STREAM", "stable"), (" release", " ../release")):
        assert old in script
        script = script.replace(old, new)
    merge(fleet, released("3"), released("4"), code=1)
    run(fleet, "sh", "-ec", script, GIT_EDITOR="sh -c 'echo publish >$0'")
    assert (clean(fleet)["stable"].version, clean(fleet)["stable"].sequence) == ("5", 4)
    assert run(fleet, "git", "status", "--porcelain") == ""


@pytest.mark.parametrize("theirs", [released("4"), closed])
def test_a_removal_merged(fleet: Path, theirs: Step) -> None:
    """The side that has the stream is not enough; the other is, as its sequence goes on above."""
    merge(fleet, removed, theirs, code=1)
    run(fleet, "git", "checkout", "--theirs", "--", "packages")
    commit(fleet, "merge")
    assert [issue.reason for issue in check(fleet).errors] == [
        "must be above 3, which different states have in the commits"
    ]
    run(fleet, "git", "reset", "--hard", "main^1")
    run(fleet, "git", "merge", "--strategy", "ours", "theirs")
    assert "stable" not in clean(fleet)
    assert released("5")(fleet).sequence == 4
    assert clean(fleet)["stable"].version == "5"


# ----------------------------------------------------------------------------------------------
# Reverts


@pytest.mark.parametrize("step", [released("3"), closed, removed, rolled_back])
def test_a_revert_is_found(fleet: Path, step: Step) -> None:
    """It is refused with a hint; reverted itself and then rolled back, all devices take it."""
    loader = Loader(fleet)
    loader.load()
    step(fleet)
    commit(fleet, "change")
    loader.load()
    run(fleet, "git", "revert", "--no-edit", "HEAD")
    told = run(fleet, "netota-coap", "check", ".", code=1)
    assert f"error: {FILE}: sequence: must be above 3, which a commit before this one has" in told
    assert "hint: Devices ignore a sequence that they have seen." in told
    assert "netota-coap rollback" in told

    run(fleet, "git", "revert", "--no-edit", "HEAD")
    clean(fleet)
    if step is closed:
        publishing.reopen(fleet, STABLE)
    state = rollback(fleet, STABLE)
    commit(fleet, "roll back")
    assert (
        state == clean(fleet)["stable"] == loader.load().packages["sensor-node"].streams["stable"]
    )


def test_a_running_server_refuses_a_revert(fleet: Path) -> None:
    """What it has seen it remembers, without git."""
    loader = Loader(fleet)
    loader.load()
    run(fleet, "git", "checkout", "HEAD~", "--", FILE)
    assert [issue.file for issue in refusal(loader).issues] == [FILE]


def test_the_revert_of_a_first_publish(fleet: Path) -> None:
    """The stream is gone, which may be meant; that its sequence begins again is found."""
    released("1", BETA)(fleet)
    commit(fleet)
    run(fleet, "git", "revert", "--no-edit", "HEAD")
    history = "packages/sensor-node/history/beta"
    reason = "is gone: a new stream of this name would begin with sequences that were seen"
    findings = check(fleet)
    assert ([], [f"{history}: {reason}"]) == (errors(findings), list(map(str, findings.warnings)))
    assert released("2", BETA)(fleet).sequence == 1
    commit(fleet)
    assert [issue.reason for issue in check(fleet).errors] == [
        "must be above 1, which different states have in the commits"
    ]
    released("3", BETA)(fleet)
    assert clean(fleet)["beta"].version == "3"


def test_a_merge_that_makes_a_third_state(fleet: Path) -> None:
    """A state that only a merge has is seen as well."""
    merge(fleet, released("3"), released("4"), code=1)
    run(fleet, "git", "checkout", "--ours", "--", "packages")
    mixed = (fleet / HISTORY.format(3)).read_text().replace('"3"', '"3-and-4"')
    (fleet / HISTORY.format(3)).write_text(mixed)
    commit(fleet, "merge")
    blobs = git.committed(fleet, "packages/*/history/stable/*.toml")
    assert [len(blobs[HISTORY.format(sequence)]) for sequence in (1, 2, 3)] == [1, 1, 3]


def test_a_repository_below_the_top(tmp_path: Path, fleet: Path) -> None:
    """Git may keep other things too: what it says is of the repository's own files."""
    top = tmp_path / "top"
    shutil.copytree(fleet, top / "deep" / "fleet", ignore=shutil.ignore_patterns(".git"))
    run(top, "git", "init")
    commit(top)
    clean(top / "deep" / "fleet")
    released("3")(top / "deep" / "fleet")
    commit(top)
    run(top, "git", "revert", "--no-edit", "HEAD")
    assert len(check(top / "deep" / "fleet").errors) == 1


# ----------------------------------------------------------------------------------------------
# Without git


def test_without_a_work_tree(sample: Path) -> None:
    """Nothing is known, and nothing is wrong."""
    assert git.committed(sample, "**") == {}
    clean(sample)


def test_before_the_first_commit(sample: Path) -> None:
    """A work tree without commits is as none."""
    run(sample, "git", "init")
    assert git.committed(sample, "**") == {}
    clean(sample)


def test_without_git(fleet: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where git is not installed, a repository works all the same; a check has its doubts."""
    monkeypatch.setenv("PATH", str(fleet))
    assert (git.committed(fleet, "**"), git.author(fleet)) == ({}, None)
    reason = "is kept in git, but git fails here: git status says why"
    findings = check(fleet)
    assert ((), [f"{fleet}: {reason}"]) == (findings.errors, list(map(str, findings.warnings)))


def test_a_shallow_clone(fleet: Path) -> None:
    """A check says that it cannot see what a shallow clone lacks."""
    run(fleet, "git", "clone", "--quiet", "--depth", "1", f"file://{fleet}", "../shallow")
    (warning,) = check(fleet.parent / "shallow").warnings
    assert warning.reason.startswith(
        "is a shallow clone: what was published before it is not seen"
    )


# ----------------------------------------------------------------------------------------------
# Authors

SOMEBODY = "Somebody <somebody@example.com>"
NOBODY = {"GIT_CONFIG_GLOBAL": "/dev/null"}


@pytest.mark.parametrize(
    ("variables", "author"),
    [
        ({}, SOMEBODY),
        ({"GITLAB_USER_NAME": "Lab", "GITHUB_ACTOR": "hub"}, SOMEBODY),
        ({"GIT_AUTHOR_NAME": "Ann"}, "Ann <somebody@example.com>"),
        ({"GIT_AUTHOR_EMAIL": "ann@example.com"}, "Somebody <ann@example.com>"),
        ({"GIT_AUTHOR_NAME": "Ann", "GIT_AUTHOR_EMAIL": "a@b"}, "Ann <a@b>"),
        (NOBODY, None),
        (NOBODY | {"GIT_AUTHOR_EMAIL": "a@b"}, "<a@b>"),
        (NOBODY | {"GITLAB_USER_NAME": "Lab", "GITHUB_ACTOR": "hub"}, "Lab"),
        (NOBODY | {"GITHUB_ACTOR": "hub"}, "hub"),
        (NOBODY | {"GITHUB_ACTOR": ""}, None),
        (NOBODY | {"GITHUB_ACTOR": "x" * 101}, "x" * 100),
        (NOBODY | {"GITHUB_ACTOR": "ä" * 60}, "ä" * 50),
        (NOBODY | {"GITHUB_ACTOR": "x" + "ä" * 60}, "x" + "ä" * 49),
        (NOBODY | {"GITHUB_ACTOR": "two\nlines \x1b[31m"}, r"two\nlines \x1b[31m"),
        (NOBODY | {"GITHUB_ACTOR": "not UTF-8: \udcff"}, r"not UTF-8: \udcff"),
    ],
)
def test_author(
    fleet: Path, variables: dict[str, str], author: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As git would call the author, else as CI does; whoever it is, a publish can be made."""
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    assert author == git.author(fleet)
    assert Stream.rules()["author"](author) is None


def test_the_author_of_a_work_tree(fleet: Path) -> None:
    """Its own configuration wins over the user's; odd characters are told, not obeyed."""
    run(fleet, "git", "config", "user.name", "Ann\u2028user.email x\n\x1b[2J")
    run(fleet, "git", "config", "user.email", "ann@example.com")
    assert git.author(fleet) == r"Ann\u2028user.email x\n\x1b[2J <ann@example.com>"
