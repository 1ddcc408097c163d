"""Loading, checking and locking of repositories."""

from __future__ import annotations

import shutil
from pathlib import Path

import attrs
import pytest

from netota_coap.encoding.codecs import Format
from netota_coap.encoding.documents import encode
from netota_coap.errors import InvalidDataError, Issue, RepositoryConflictError, RepositoryError
from netota_coap.model.values import Content, Offer, Package, stream_name
from netota_coap.publishing.archives import ArchiveSource
from netota_coap.repository import scaffold
from netota_coap.repository.check import advice, check
from netota_coap.repository.loading import Loader
from netota_coap.repository.store import DirectoryStore
from tests.support.publishing import publish
from tests.support.repositories import HISTORY, REPOSITORIES, STABLE, edit, refusal, stable
from tests.support.storing import PLACE, SHARD

BROKEN = (
    "case-clash",
    "control-characters",
    "digest-length",
    "directory",
    "duplicate-key",
    "duplicate-name",
    "empty-files",
    "encoding",
    "format",
    "half-written",
    "limits",
    "merge-conflict",
    "missing-field",
    "missing-repository-toml",
    "name",
    "replacement",
    "replacement-of-open-stream",
    "requires",
    "reserved-attribute",
    "time",
    "toml",
    "types",
    "unknown-key",
    "url",
)
"""What cannot be loaded."""

BROKEN_HISTORY = ("history", "history-name", "sequence-not-raised")
"""What can be loaded, but not agree with its history."""


# ----------------------------------------------------------------------------------------------
# The fixtures


def test_broken_fixtures_are_all_tested() -> None:
    """Each directory of broken things is in one of the two tables."""
    found = {path.name for path in REPOSITORIES.glob("broken-*")}
    assert {f"broken-{why}" for why in (*BROKEN, *BROKEN_HISTORY)} == found


@pytest.mark.parametrize("why", [*BROKEN, *BROKEN_HISTORY])
def test_check_reports_all_that_is_broken(why: str) -> None:
    """The errors are those of expected.txt, each with file, place and reason, and no others."""
    root = REPOSITORIES / f"broken-{why}"
    expected = (root / "expected.txt").read_text().splitlines()
    assert expected == [str(issue) for issue in check(root).errors]


@pytest.mark.parametrize("why", BROKEN)
def test_loader_refuses_what_is_broken(why: str) -> None:
    """The loader raises the very errors that check reports, and nothing is served."""
    root = REPOSITORIES / f"broken-{why}"
    assert check(root).errors == refusal(Loader(root)).issues
    assert check(root).repository is None


@pytest.mark.parametrize("why", BROKEN_HISTORY)
def test_loader_does_not_read_the_history(why: str) -> None:
    """A server loads a repository whose history is wrong."""
    root = REPOSITORIES / f"broken-{why}"
    assert Loader(root).load() == check(root).repository


@pytest.mark.parametrize("name", ["minimal", "typical"])
def test_good_fixtures_are_good(name: str) -> None:
    """Nothing is found in the fixtures that show how it is done, not even by the advice."""
    findings = check(REPOSITORIES / name)
    assert (findings.errors, findings.warnings) == ((), ())
    assert findings.repository is not None
    assert list(advice(findings.repository)) == []


def test_minimal_is_minimal() -> None:
    """One package with one stream with one archive, told by its envelope and one offer."""
    packages = Loader(REPOSITORIES / "minimal").load().packages
    (archive,) = packages["blinky"].streams["stable"].archives or ()
    assert (archive.name, archive.envelope.size, archive.content) == ("blinky", 18_432, Content())
    assert len(archive.offers) == 1


def test_typical_is_loaded_whole() -> None:
    """Packages, streams, sequences, versions and closed streams are those of the files."""
    packages = Loader(REPOSITORIES / "typical").load().packages
    assert {
        ("gateway-os", "beta", 11, "2026.11-rc1", None),
        ("gateway-os", "stable", 6, "2026.10", None),
        ("sensor-node", "beta", 9, "2.5.0-rc2", None),
        ("sensor-node", "edge", 213, "2.6.0-dev.41", None),
        ("sensor-node", "stable", 17, "2.4.1", None),
        ("sensor-node", "v1", 31, "1.9.7", ("sensor-node", "stable")),
    } == {
        (package, name, stream.sequence, stream.version, stream.replacement)
        for package, value in packages.items()
        for name, stream in value.streams.items()
    }


# ----------------------------------------------------------------------------------------------
# Places


def test_stream_name_is_package_and_stream() -> None:
    """The two names stand on either side of the slash."""
    assert stream_name("sensor-node/v1.0") == ("sensor-node", "v1.0")


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("sensor-node", "sensor-node: must be PACKAGE/STREAM"),
        ("", "must be PACKAGE/STREAM"),
        ("/stable", "'': must not be empty"),
        ("a/b/c", "'b/c': must consist of letters"),
        ("../x", "'..': must consist of letters"),
        ("a/\x1b[31m", r"'\x1b[31m': must not contain control characters"),
    ],
)
def test_stream_name_refuses(text: str, expected: str) -> None:
    """What is no name of a stream is told by its rule, printably."""
    with pytest.raises(InvalidDataError) as raised:
        stream_name(text)
    assert str(raised.value).startswith(expected)


# ----------------------------------------------------------------------------------------------
# Check


def test_check_lists_what_is_ignored(repository_dir: Path) -> None:
    """Files at no place that counts are warnings; blobs and hidden files are not."""
    blob = f"blobs/sha256/ab/{'ab' * 32}"
    ignored = [
        "blobs/sha256/ab/abcd",
        "packages/sensor-node/history/stable/000000017.toml",
        "packages/sensor-node/history/stable/17.toml",
        "packages/sensor-node/history/stable/١٢٣٤٥٦٧٨.toml",
        "packages/sensor-node/stable.toml",
        "packages/sensor-node/streams/stable.tml",
    ]
    for file in (*ignored, blob, ".hidden/config", "packages/.note"):
        (repository_dir / file).parent.mkdir(parents=True, exist_ok=True)
        (repository_dir / file).write_text("")
    findings = check(repository_dir)
    reason = "is ignored: it is no file of a repository"
    assert findings.errors == ()
    assert [Issue("", reason, file) for file in ignored] == sorted(
        findings.warnings, key=lambda issue: issue.file
    )


def test_check_warns_of_an_interrupted_publish(repository_dir: Path) -> None:
    """A history file above the stream's sequence is told, and does no harm."""
    state = attrs.evolve(stable(repository_dir), sequence=18)
    file = HISTORY.format(18)
    (repository_dir / file).write_bytes(encode(state, Format.TOML))
    reason = "is above the stream's sequence: an interrupted publish, which the next replaces"
    findings = check(repository_dir)
    assert ((), (Issue("", reason, file),)) == (findings.errors, findings.warnings)


@pytest.mark.parametrize("target", ["sensor-node/lts", "sensor-mode/stable"])
def test_check_warns_of_a_missing_replacement(repository_dir: Path, target: str) -> None:
    """A replacement that does not exist is a warning."""
    file = "packages/sensor-node/streams/v1.toml"
    for path in (file, "packages/sensor-node/history/v1/00000031.toml"):
        edit(repository_dir / path, '"sensor-node/stable"', f'"{target}"')
    findings = check(repository_dir)
    expected = Issue("replacement", f"there is no stream {target}", file)
    assert ((), (expected,)) == (findings.errors, findings.warnings)


OTHER = "https://example.com/x"


@pytest.mark.parametrize(
    ("urls", "held", "has"),
    [
        ((), b"", "no offer"),
        (("/b/x", "/b/y"), b"", "only offers of /b/"),
        (("/b/x", "/elsewhere"), b"", None),
        ((OTHER,), b"", None),
        ((), b"firmware", None),
        (("/b/x",), b"firmware", None),
        (("/b/x",), b"firmwar", "only offers of /b/"),
    ],
)
def test_check_warns_of_what_nobody_can_download(
    sample: Path, image: Path, urls: tuple[str, ...], held: bytes, has: str | None
) -> None:
    """An archive has an offer of somebody else, or its file is held here; one warning of each."""
    sources = [
        ArchiveSource(
            image,
            machine,
            content=Content(machine=machine),
            offers=tuple(Offer(url=url, metric=1) for url in offered),
        )
        for machine, offered in (("other", (OTHER,)), ("this", urls))
    ]
    publish(sample, ("sensor-node", "stable"), "2.0", sources)
    if held:
        (sample / SHARD).mkdir(parents=True)
        (sample / PLACE).write_bytes(held)
    place, file = "archives[1]", "packages/sensor-node/streams/stable.toml"
    reason = f"has {has}, and its file is not stored here: nobody can download it"
    found = [issue for issue in check(sample).warnings if issue.file != PLACE]
    assert found == ([Issue(place, reason, file)] if has else [])


def test_check_allows_a_repository_without_history(repository_dir: Path) -> None:
    """The history is made by the first change."""
    shutil.rmtree(repository_dir / "packages/sensor-node/history")
    findings = check(repository_dir)
    assert (findings.errors, findings.warnings) == ((), ())


def test_check_gives_the_hint_only_where_it_helps(repository_dir: Path) -> None:
    """The hint about edited streams stands with a sequence that was not raised."""
    edit(repository_dir / STABLE, "2.4.1", "2.4.2")
    assert check(repository_dir).hint.startswith("Devices ignore")
    edit(repository_dir / STABLE, "= 17", "= 0")
    assert check(repository_dir).hint == ""


# ----------------------------------------------------------------------------------------------
# init and packages


def test_init_makes_an_empty_repository(tmp_path: Path) -> None:
    """It can be checked, and git leaves out what is not to be kept."""
    root = tmp_path / "deep" / "down"
    scaffold.init(root, "Ours")
    findings = check(root)
    assert findings.repository is not None
    assert (
        findings.repository.title,
        findings.repository.packages,
        findings.errors,
        findings.warnings,
    ) == ("Ours", {}, (), ())
    assert (root / ".gitignore").read_text() == "/.lock\n/blobs/\n.*.tmp\n"
    assert "*.toml text eol=lf merge\n" in (root / ".gitattributes").read_text()
    assert (root / "README.md").read_text().startswith("# Ours\n")


def test_init_keeps_what_is_there(tmp_path: Path) -> None:
    """A directory in use is not robbed of its own files."""
    (tmp_path / ".gitignore").write_text("*.o")
    (tmp_path / ".gitattributes").write_text("")
    (tmp_path / "README.md").write_text("Mine")
    scaffold.init(tmp_path)
    assert (tmp_path / ".gitignore").read_text() == "*.o\n/.lock\n/blobs/\n.*.tmp\n"
    assert (tmp_path / ".gitattributes").read_text() == ""
    assert (tmp_path / "README.md").read_text() == "Mine"


def test_init_refuses_a_repository(repository_dir: Path) -> None:
    """What is there stays."""
    before = (repository_dir / "repository.toml").read_bytes()
    with pytest.raises(RepositoryConflictError, match="there is a repository already"):
        scaffold.init(repository_dir)
    assert before == (repository_dir / "repository.toml").read_bytes()


def test_init_tells_what_it_cannot_write(tmp_path: Path) -> None:
    """A file in the way is named."""
    (tmp_path / "file").write_text("")
    with pytest.raises(RepositoryError, match=r"file.* cannot be written"):
        scaffold.init(tmp_path / "file" / "repository")


def test_write_package_is_read_back(repository_dir: Path) -> None:
    """A package's file is written, its streams are left alone."""
    before = Loader(repository_dir).load().packages["sensor-node"]
    changed = attrs.evolve(before, title="Sensor", summary=None, poll_s=None)
    DirectoryStore(repository_dir).write_package("sensor-node", changed)
    assert changed == Loader(repository_dir).load().packages["sensor-node"]


@pytest.mark.parametrize(
    ("name", "error"),
    [
        ("../x", InvalidDataError),
        ("a b", InvalidDataError),
        ("Sensor-Node", RepositoryConflictError),
    ],
)
def test_write_package_refuses_names(repository_dir: Path, name: str, error: type) -> None:
    """Nothing is made that could not be loaded."""
    with pytest.raises(error):
        DirectoryStore(repository_dir).write_package(name, Package())
    assert {"sensor-node", "gateway-os"} == Loader(repository_dir).load().packages.keys()
