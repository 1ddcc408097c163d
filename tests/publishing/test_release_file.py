"""The release file: all archives of one version in one description."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from netota_coap.errors import InvalidDataError
from netota_coap.model.values import Content, Offer
from netota_coap.publishing.archives import ArchiveSource
from netota_coap.publishing.release_file import (
    Release,
    ReleaseArchive,
    draft,
    read,
    sources,
    version_of,
)

WHOLE = """
version = "2.5.0"
message = "Faster"

[[offers]]
url = "https://cdn.example.com/{version}/{name}"
metric = 100

[[archives]]
file = "build/*/app.bin"
name = "{machine}"
media_type = "a/b"

  [archives.content]
  arch = "arm"
  ram = 64

  [[archives.offers]]
  url = "coap://example.com/{name}"
  metric = 1

[[archives]]
file = "os.img"
"""


def written(tmp_path: Path, text: str) -> Path:
    """Write a release file."""
    path = tmp_path / "release.toml"
    path.write_text(text)
    return path


def test_release_is_read(tmp_path: Path) -> None:
    """Everything that a release file can say is read."""
    expected = Release(
        version="2.5.0",
        message="Faster",
        offers=(Offer(url="https://cdn.example.com/{version}/{name}", metric=100),),
        archives=(
            ReleaseArchive(
                file="build/*/app.bin",
                name="{machine}",
                media_type="a/b",
                content=Content(arch="arm", attributes={"ram": 64}),
                offers=(Offer(url="coap://example.com/{name}", metric=1),),
            ),
            ReleaseArchive(file="os.img"),
        ),
    )
    assert expected == read(written(tmp_path, WHOLE))


@pytest.mark.parametrize(
    ("text", "issues"),
    [
        ("", ["archives: missing"]),
        ("archives = 1", ["archives: must be an array"]),
        ("[[archives]]", ["archives[0].file: missing"]),
        (
            'version = ""\n[[archives]]\nfile = ""\n',
            ["archives[0].file: must", "version: "],
        ),
        ("x = 1\narchives = []", ["x: unknown key; a release has version, message, offers"]),
        (
            '[[archives]]\nfile = "a"\nsha256 = "x"\n[[archives.offers]]\nurl = "x"\n',
            [
                "archives[0].offers[0].url: must",
                "archives[0].offers[0].metric",
                "archives[0].sha2",
            ],
        ),
        ('[[archives]]\nfile = "a"\ncontent = {head = "x"}', ["archives[0].content.head: is res"]),
        ("= 1", ["is not valid TOML"]),
    ],
)
def test_release_is_refused(tmp_path: Path, text: str, issues: list[str]) -> None:
    """All that is wrong is told, with file and place."""
    path = written(tmp_path, text)
    with pytest.raises(InvalidDataError) as raised:
        read(path)
    found = sorted(str(issue) for issue in raised.value.issues)
    expected = sorted(f"{path}: {issue}" for issue in issues)
    assert len(expected) == len(found)
    assert [True] * len(found) == [f.startswith(e) for f, e in zip(found, expected, strict=True)]


@pytest.mark.parametrize(
    ("place", "reason"),
    [("nix", "is not a file"), (".", "is not a file"), ("sealed", "cannot be")],
)
def test_release_that_cannot_be_read(tmp_path: Path, place: str, reason: str) -> None:
    """What is no file, or not for us to read, is told."""
    (tmp_path / "sealed").symlink_to("/proc/self/mem")
    with pytest.raises(InvalidDataError, match=reason):
        read(tmp_path / place)


@pytest.mark.parametrize(
    ("said", "given", "force", "expected"),
    [
        (None, None, False, None),
        ("1", None, False, "1"),
        (None, "2", False, "2"),
        ("2", "2", False, "2"),
        ("1", "2", True, "2"),
    ],
)
def test_version(said: str | None, given: str | None, force: bool, expected: str | None) -> None:
    """A version that is given wins over that of the file."""
    assert expected == version_of(Release(version=said, archives=()), given, force=force)


def test_versions_that_differ() -> None:
    """Two versions are one too many, unless it is forced."""
    with pytest.raises(InvalidDataError, match="version: is 1 in the release file, not 2"):
        version_of(Release(version="1", archives=()), "2")


# ----------------------------------------------------------------------------------------------
# Files


@pytest.fixture
def builds(tmp_path: Path) -> Path:
    """Files as a build leaves them."""
    for name in ("build/b/app.bin", "build/a/app.bin", "build/a/deep/app.bin", "odd [1].bin"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(name)
    (tmp_path / "build/c/app.bin").mkdir(parents=True)
    return tmp_path


@pytest.mark.parametrize(
    ("pattern", "expected"),
    [
        ("build/a/app.bin", ["build/a/app.bin"]),
        ("build/*/app.bin", ["build/a/app.bin", "build/b/app.bin"]),
        ("build/**/app.bin", ["build/a/app.bin", "build/a/deep/app.bin", "build/b/app.bin"]),
        ("build/../build/b/*.bin", ["build/b/app.bin"]),
        ("odd [1].bin", ["odd [1].bin"]),
    ],
)
def test_files_are_found(builds: Path, pattern: str, expected: list[str]) -> None:
    """A path or a glob, relative or absolute, finds files, in their order."""
    for prefix in ("", f"{builds}/"):
        release = Release(archives=(ReleaseArchive(file=prefix + pattern, name="x"),))
        found = sources(release, builds / "release.toml")
        assert expected == [str(s.path.resolve().relative_to(builds.resolve())) for s in found]
        assert {source.name for source in found} == {"x"}


def test_what_is_said_goes_along(builds: Path) -> None:
    """Each file that a glob finds is described alike."""
    archive = ReleaseArchive(
        file="build/*/app.bin",
        name="{machine}",
        media_type="a/b",
        content=Content(arch="arm"),
        offers=(Offer(url="/x", metric=1),),
    )
    expected = [
        ArchiveSource(
            builds / f"build/{n}/app.bin", "{machine}", "a/b", archive.content, archive.offers
        )
        for n in "ab"
    ]
    assert expected == sources(Release(archives=(archive,)), builds / "release.toml")


@pytest.mark.parametrize("pattern", ["build/x/*", "**x", "/nix/nothing", "[", "build/*/c"])
def test_files_that_are_not_there(builds: Path, pattern: str) -> None:
    """A path or a glob that finds nothing is told with its place."""
    release = Release(archives=(ReleaseArchive(file="odd [1].bin"), ReleaseArchive(file=pattern)))
    with pytest.raises(InvalidDataError) as raised:
        sources(release, builds / "release.toml")
    reason = f"archives[1].file: there is no file {pattern} in {builds}"
    assert raised.value.detail == f"{builds}/release.toml: {reason}"


def test_a_release_has_an_archive(tmp_path: Path) -> None:
    """A release of nothing is not published."""
    with pytest.raises(InvalidDataError, match="archives: must be at least one"):
        sources(Release(archives=()), tmp_path / "release.toml")


# ----------------------------------------------------------------------------------------------
# Drafts


def test_draft_can_be_read_back(builds: Path) -> None:
    """What is drafted is a release file that finds the same files."""
    (builds / "build/a/zephyr").mkdir()
    (builds / "build/a/zephyr/zephyr.signed.bin").write_bytes(b"plain")
    text = draft([builds / "build/a", builds / "odd [1].bin"], builds / "release.toml")
    release = read(written(builds, text))
    assert [archive.file for archive in release.archives] == [
        "build/a/zephyr/zephyr.signed.bin",
        "odd [1].bin",
    ]
    assert len(sources(release, builds / "release.toml")) == 2
    assert "# Not all files tell their version" in text
    assert release.offers[0].url.startswith("https://updates.example.com/{package}/")


def test_draft_elsewhere_names_the_way(builds: Path) -> None:
    """Files that are not beside the release file are named by the way to them."""
    text = draft([builds / "odd [1].bin"], builds / "ci" / "deep" / "release.toml")
    assert 'file = "../../odd [1].bin"' in text


def test_globs_start_from_any_directory(tmp_path: Path) -> None:
    """Characters of globs in the name of the directory mean nothing."""
    directory = tmp_path / "b[1]*"
    directory.mkdir()
    (directory / "a.bin").write_text("a")
    release = Release(archives=(ReleaseArchive(file="*.bin"),))
    (source,) = sources(release, directory / "release.toml")
    assert source.path == directory / "a.bin"


def test_an_encrypted_image_is_meant(builds: Path) -> None:
    """Of an image that is there plain and encrypted, the encrypted one is drafted."""
    zephyr = builds / "build/a/zephyr"
    zephyr.mkdir()
    for name in ("zephyr.signed.bin", "zephyr.signed.encrypted.bin"):
        (zephyr / name).write_bytes(b"plain")
    text = draft([builds / "build/a"], builds / "release.toml")
    assert re.findall('file = "(.*)"', text) == ["build/a/zephyr/zephyr.signed.encrypted.bin"]


def test_draft_of_nothing(builds: Path) -> None:
    """A directory with nothing to be published is told, and what is looked for."""
    with pytest.raises(InvalidDataError, match=r"there is nothing to publish: no \*\*/zephyr/"):
        draft([builds / "build/b"], builds / "release.toml")
