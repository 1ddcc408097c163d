"""Loading a repository, again and again."""

from __future__ import annotations

import os
import re
import shutil
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from netota_coap.errors import Issue
from netota_coap.model.values import LIMITS
from netota_coap.repository.check import check
from netota_coap.repository.loading import Loader
from tests.support.repositories import STABLE, age, edit, refusal

# ----------------------------------------------------------------------------------------------
# Reading again


def test_unchanged_files_are_not_parsed_again(repository_dir: Path) -> None:
    """A second load parses nothing and returns the very same streams."""
    age(repository_dir)
    loader = Loader(repository_dir)
    first = loader.load()
    assert loader.parsed == 9  # repository.toml, two packages, six streams
    second = loader.load()
    assert loader.parsed == 0
    assert first == second
    for name, package in first.packages.items():
        for stream in package.streams:
            assert package.streams[stream] is second.packages[name].streams[stream]


def test_only_the_changed_file_is_parsed_again(repository_dir: Path) -> None:
    """The other streams are the very same objects as before."""
    age(repository_dir)
    loader = Loader(repository_dir)
    before = loader.load().packages["sensor-node"].streams
    edit(repository_dir / STABLE, '"Stable"', '"Steady"')
    after = loader.load().packages["sensor-node"].streams
    assert loader.parsed == 1
    assert after["stable"].title == "Steady"
    assert {"stable"} == {name for name in before if before[name] is not after[name]}


@pytest.mark.parametrize(
    ("age_ms", "parsed"), [(0, 1), (19, 1), (20, 0), (3_600_000, 0), (-3_600_000, 1)]
)
def test_young_files_are_read_again(
    repository_dir: Path, monkeypatch: pytest.MonkeyPatch, age_ms: int, parsed: int
) -> None:
    """A file of the last 20 ms, or of the future, may change without looking different."""
    age(repository_dir)
    now = time.time_ns()
    monkeypatch.setattr(time, "time_ns", lambda: now)
    then = now - age_ms * 1_000_000
    os.utime(repository_dir / STABLE, ns=(then, then))
    loader = Loader(repository_dir)
    loader.load()
    loader.load()
    assert parsed == loader.parsed


def test_same_size_and_time_is_noticed_by_the_inode(repository_dir: Path) -> None:
    """A file that was exchanged for one of the same length and time is read again."""
    age(repository_dir)
    loader = Loader(repository_dir)
    loader.load()
    path = repository_dir / STABLE
    status = path.stat()
    other = path.with_name(".other")
    other.write_text(path.read_text().replace("brown-out", "black-out"))
    os.utime(other, ns=(status.st_atime_ns, status.st_mtime_ns))
    other.replace(path)
    assert (status.st_size, status.st_mtime_ns) == (path.stat().st_size, path.stat().st_mtime_ns)
    message = loader.load().packages["sensor-node"].streams["stable"].message
    assert message == "Fixes the clock after a black-out"


def test_failed_load_forgets_nothing(repository_dir: Path) -> None:
    """After the mistake was mended only the mended file is parsed."""
    age(repository_dir)
    loader = Loader(repository_dir)
    before = loader.load()
    edit(repository_dir / STABLE, "sequence", "sequense")
    refusal(loader)
    edit(repository_dir / STABLE, "sequense", "sequence")
    assert before == loader.load()
    assert loader.parsed == 1


# ----------------------------------------------------------------------------------------------
# The sequence

Edit = Callable[[str], str]


def swap(old: str, new: str) -> Edit:
    """Return the replacement of all occurrences."""
    return lambda text: text.replace(old, new)


def insert(line: str) -> Edit:
    """Return the insertion of a line at the top."""
    return lambda text: f"{line}\n{text}"


ESSENTIAL = {
    "version": swap('"2.4.1"', '"2.4.2"'),
    "published": swap("09:30:00Z", "09:30:01Z"),
    "closed": insert("closed = true"),
    "replacement": insert('closed = true\nreplacement = "sensor-node/beta"'),
    "archive removed": lambda text: text[: text.rindex("[[archives]]")],
    "archive renamed": swap('"nrf9160"', '"nrf91"'),
    "type": swap("octet-stream", "cbor"),
    "size": swap("size   = ", "size   = 1"),
    "digest": lambda text: re.sub(r'sha256 = ".{8}', 'sha256 = "00000000', text),
    "content": swap("debug   = true", "debug   = false"),
    "attribute": swap("  debug", "  secure = true\n  debug"),
    "sequence lowered": swap("= 17", "= 16"),
    "revert": lambda text: text.replace("= 17", "= 16").replace("2.4.1", "2.4.0"),
}
INCIDENTAL = {
    "offer": swap("https://example.org/", "https://cdn.example.org/"),
    "metric": swap("metric = 100", "metric = 7"),
    "title": swap('"Stable"', '"Steady"'),
    "author": swap("Release team", "Somebody"),
    "message": swap("brown-out", "blackout"),
    "poll_s": insert("poll_s = 60"),
    "comment": insert("# All is well."),
    "time zone": swap("T09:30:00Z", "T10:30:00+01:00"),
    "x-key": insert('x-ticket = "4711"'),
}


@pytest.mark.parametrize("change", ESSENTIAL.values(), ids=ESSENTIAL)
def test_change_without_higher_sequence_is_refused(repository_dir: Path, change: Edit) -> None:
    """What a device must learn of needs a higher sequence, and the error says what to do."""
    loader = Loader(repository_dir)
    loader.load()
    path = repository_dir / STABLE
    path.write_text(change(path.read_text()))
    error = refusal(loader)
    expected = Issue("sequence", "must be above 17, the sequence of another state", STABLE)
    assert (expected,) == error.issues
    assert error.hint.startswith("Devices ignore a sequence that they have seen")


@pytest.mark.parametrize("change", ESSENTIAL.values(), ids=ESSENTIAL)
def test_change_with_higher_sequence_is_taken(repository_dir: Path, change: Edit) -> None:
    """The same changes are fine with the next sequence."""
    loader = Loader(repository_dir)
    loader.load()
    path = repository_dir / STABLE
    path.write_text(re.sub("sequence  = .*", "sequence  = 18", change(path.read_text())))
    assert loader.load().packages["sensor-node"].streams["stable"].sequence == 18


@pytest.mark.parametrize("change", INCIDENTAL.values(), ids=INCIDENTAL)
def test_incidental_change_is_taken(repository_dir: Path, change: Edit) -> None:
    """Offers, texts for people, poll_s and comments may change at any time."""
    loader = Loader(repository_dir)
    loader.load()
    path = repository_dir / STABLE
    before = path.read_text()
    path.write_text(change(before))
    assert before != path.read_text()
    assert loader.load().packages["sensor-node"].streams["stable"].sequence == 17
    assert check(repository_dir).errors == ()


@pytest.mark.parametrize(
    ("sequence", "version", "taken"),
    [
        (17, "2.4.1", True),
        (17, "2.4.2", False),
        (16, "2.4.1", False),
        (1, "2.4.2", False),
        (18, "2.4.2", True),
    ],
)
def test_removed_stream_is_remembered(
    repository_dir: Path, sequence: int, version: str, taken: bool
) -> None:
    """A stream that comes back must be the same as it was, or have a higher sequence."""
    loader = Loader(repository_dir)
    loader.load()
    path = repository_dir / STABLE
    text = path.read_text()
    path.unlink()
    assert "stable" not in loader.load().packages["sensor-node"].streams
    path.write_text(text.replace("= 17", f"= {sequence}").replace('"2.4.1"', f'"{version}"'))
    if taken:
        assert sequence == loader.load().packages["sensor-node"].streams["stable"].sequence
    else:
        assert [issue.place for issue in refusal(loader).issues] == ["sequence"]


def test_highest_state_is_remembered_over_a_refusal(repository_dir: Path) -> None:
    """What was refused was never in effect, and its sequence is still free."""
    loader = Loader(repository_dir)
    before = loader.load()
    edit(repository_dir / STABLE, "= 17", "= 99")
    (repository_dir / "repository.toml").write_text("format = 2\n")
    refusal(loader)
    edit(repository_dir / STABLE, "= 99", "= 17")
    (repository_dir / "repository.toml").write_text('format = 1\ntitle = "Other"\n')
    assert before.packages == loader.load().packages


def test_removed_package_is_gone(repository_dir: Path) -> None:
    """A missing directory is a removal, not an error."""
    loader = Loader(repository_dir)
    loader.load()
    shutil.rmtree(repository_dir / "packages/sensor-node")
    assert {"gateway-os"} == loader.load().packages.keys()
    shutil.rmtree(repository_dir / "packages")
    assert loader.load().packages == {}


# ----------------------------------------------------------------------------------------------
# Odd things in the file system


def test_missing_root_is_an_error(tmp_path: Path) -> None:
    """A root that is not there is malformed, not empty."""
    root = tmp_path / "nowhere"
    expected = (Issue("", "is not a directory", str(root)),)
    assert expected == refusal(Loader(root)).issues == check(root).errors


def test_empty_root_lacks_repository_toml(tmp_path: Path) -> None:
    """A directory alone is no repository."""
    assert tuple(map(str, refusal(Loader(tmp_path)).issues)) == ("repository.toml: is missing",)


@pytest.mark.parametrize("make", [Path.mkdir, os.mkfifo], ids=["directory", "pipe"])
@pytest.mark.parametrize("file", ["repository.toml", "packages/sensor-node/package.toml", STABLE])
def test_what_is_no_file_is_refused(
    repository_dir: Path, make: Callable[[Path], None], file: str
) -> None:
    """A directory or a pipe in the place of a file is an error, and nobody waits for a pipe."""
    (repository_dir / file).unlink()
    make(repository_dir / file)
    issues = refusal(Loader(repository_dir)).issues
    assert (Issue("", "is not a regular file", file),) == issues


@pytest.mark.parametrize(
    ("link", "shown"),
    [
        ("packages", "packages"),
        ("packages/loop", "packages/loop/package.toml"),
        ("packages/gateway-os/streams", "packages/gateway-os/streams"),
        ("packages/gateway-os/package.toml", "packages/gateway-os/package.toml"),
        ("packages/gateway-os/streams/loop.toml", "packages/gateway-os/streams/loop.toml"),
    ],
)
def test_what_cannot_be_read_is_no_removal(repository_dir: Path, link: str, shown: str) -> None:
    """A symbolic link that leads to itself stands for whatever the kernel refuses to read."""
    path = repository_dir / link
    if path.is_dir():
        shutil.rmtree(path)
    path.unlink(missing_ok=True)
    path.symlink_to(path.name)
    issues = refusal(Loader(repository_dir)).issues
    assert f"{shown}: cannot be read: Too many levels of symbolic links" == str(issues[0])


def test_unreadable_history_is_an_error(repository_dir: Path) -> None:
    """Check tells what it could not read."""
    path = repository_dir / "packages/sensor-node/history/stable"
    shutil.rmtree(path)
    path.symlink_to("stable")
    reason = "cannot be read: Too many levels of symbolic links"
    expected = Issue("", reason, "packages/sensor-node/history/stable")
    assert (expected,) == check(repository_dir).errors


def test_too_long_file_is_refused(repository_dir: Path) -> None:
    """A file over the limit of documents is not parsed."""
    with (repository_dir / STABLE).open("ab") as stream:
        stream.truncate(LIMITS["document"].value + 5)
    reason = "must be at most 8388608 bytes long, not 8388609"
    assert (Issue("", reason, STABLE),) == refusal(Loader(repository_dir)).issues


def test_hidden_and_other_files_do_not_count(repository_dir: Path) -> None:
    """What begins with a dot or has no place is not even looked at."""
    before = Loader(repository_dir).load()
    for file in (
        "packages/.git/streams/stable.toml",
        "packages/sensor-node/streams/.stable.toml.tmp",
        "packages/sensor-node/streams/.hidden.toml",
        "packages/sensor-node/streams/stable.toml~",
        "packages/sensor-node/streams/old/stable.toml",
        "packages/README.toml",
    ):
        (repository_dir / file).parent.mkdir(parents=True, exist_ok=True)
        (repository_dir / file).write_text("no TOML at all")
    assert before == Loader(repository_dir).load()


def test_root_may_be_a_symbolic_link(repository_dir: Path, tmp_path: Path) -> None:
    """A whole tree is deployed by exchanging a link, and the rule of sequences holds."""
    link, other = tmp_path / "link", tmp_path / "other"
    link.symlink_to(repository_dir)
    loader = Loader(link)
    assert Loader(repository_dir).load() == loader.load()
    shutil.copytree(repository_dir, other)
    edit(other / STABLE, "= 17", "= 18")
    link.unlink()
    link.symlink_to(other)
    assert loader.load().packages["sensor-node"].streams["stable"].sequence == 18
    link.unlink()
    link.symlink_to(repository_dir)
    assert [issue.place for issue in refusal(loader).issues] == ["sequence"]


@pytest.mark.parametrize(
    ("file", "shown"),
    [
        (b"\x1b[2J.toml", r"\x1b[2J.toml"),
        (b"\xff.toml", r"\udcff.toml"),
        (b"{x}.toml", "{x}.toml"),
        ("größe.toml".encode(), "größe.toml"),
    ],
)
def test_file_names_are_shown_printably(repository_dir: Path, file: bytes, shown: str) -> None:
    """A name that would rewrite a terminal is escaped wherever it is told."""
    streams = repository_dir / "packages/{p}/streams"
    streams.mkdir(parents=True)
    (streams / os.fsdecode(file)).write_text("no TOML")
    told = [str(issue) for issue in refusal(Loader(repository_dir)).issues]
    assert any(line.startswith(f"packages/{{p}}/streams/{shown}: ") for line in told)
    assert all(line.isprintable() for line in told)
    shutil.rmtree(streams.parent)
    (repository_dir / os.fsdecode(file)).write_text("")
    assert [f"{shown}: is ignored: it is no file of a repository"] == [
        str(issue) for issue in check(repository_dir).warnings
    ]


def test_a_million_issues_of_one_file(repository_dir: Path) -> None:
    """Of a file with ever so many issues the first are told, and how many more there are."""
    path = repository_dir / "packages/sensor-node/streams/stable.toml"
    path.write_text("\n".join(f"k{n} = 1" for n in range(5_000)))
    issues = refusal(Loader(repository_dir)).issues
    assert "4980 more unknown keys" in [issue.reason for issue in issues]
    assert len(issues) < 100
    offers = "\n".join("[[archives.offers]]" for _ in range(16))
    path.write_text("\n".join(f"[[archives]]\n{offers}" for _ in range(100)))
    issues = refusal(Loader(repository_dir)).issues
    assert len(issues) == 101
    assert issues[-1].reason.startswith("and ")
