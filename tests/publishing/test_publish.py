"""Publishing, closing and reopening streams."""

from __future__ import annotations

import functools
import hashlib
import subprocess
import sys
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path

import attrs
import pytest

from netota_coap.encoding.codecs import Format, load
from netota_coap.encoding.documents import encode
from netota_coap.errors import (
    InvalidDataError,
    NetotaError,
    NotFoundError,
    RepositoryConflictError,
    RepositoryError,
    RepositoryLockedError,
)
from netota_coap.model.values import Offer, Stream, StreamName
from netota_coap.publishing.archives import ArchiveSource, parse_offer
from netota_coap.repository import lock, store
from netota_coap.repository.loading import Loader
from tests.support.publishing import NOW, close, publish, reopen, served
from tests.support.repositories import HISTORY, STABLE

NAME = ("sensor-node", "stable")


def history(root: Path, name: StreamName = NAME) -> list[int]:
    """Return the sequences in the history."""
    directory = root / "packages" / name[0] / "history" / name[1]
    return sorted(int(path.stem) for path in directory.glob("*.toml"))


# ----------------------------------------------------------------------------------------------
# Publishing


def test_publish_replaces_archives_and_version(
    repository_dir: Path, release: Callable[..., Stream]
) -> None:
    """The new state is served with the next sequence, and the history has it."""
    progress: list[int] = []
    state = release("2.5.0", progress=progress.append)
    assert state == served(repository_dir)
    (archive,) = state.archives or ()
    assert (state.sequence, state.version, state.published) == (18, "2.5.0", NOW)
    assert (
        archive.name,
        archive.envelope.size,
        archive.envelope.sha256.hex(),
    ) == ("nrf52840dk", 8, hashlib.sha256(b"firmware").hexdigest())
    assert history(repository_dir) == [15, 16, 17, 18]
    written = (repository_dir / STABLE).read_bytes()
    assert written == (repository_dir / HISTORY.format(18)).read_bytes()
    assert progress == [8]


def test_publish_keeps_what_is_the_streams_own(release: Callable[..., Stream]) -> None:
    """Title and poll_s stay; author and message belonged to the state before."""
    state = release("2.5.0", ("sensor-node", "beta"))
    assert (state.title, state.poll_s, state.author, state.message) == ("Beta", 21_600, None, None)


def test_publish_offers_those_of_the_package(release: Callable[..., Stream]) -> None:
    """Without offers of its own, a publish takes the package's templates."""
    (archive,) = release("2.5.0").archives or ()
    assert (
        Offer(url="coap://example.com/2.5.0/nrf52840dk", metric=10),
        Offer(url="https://example.org/2.5.0/nrf52840dk", metric=100),
    ) == archive.offers
    (archive,) = release("2.5.1", offers=[parse_offer("/x,1")]).archives or ()
    assert (Offer(url="/x", metric=1),) == archive.offers


@pytest.mark.parametrize("name", [("sensor-node", "lts"), ("new", "stable")])
def test_publish_makes_what_is_missing(
    repository_dir: Path, release: Callable[..., Stream], name: StreamName
) -> None:
    """Stream and package come with the first publish, at sequence 1."""
    assert release("1.0", name) == served(repository_dir, name)
    assert (served(repository_dir, name).sequence, history(repository_dir, name)) == (1, [1])


@pytest.mark.parametrize(
    ("stream", "kept", "expected"),
    [
        (17, [15, 16, 17], (18, [15, 16, 17, 18])),
        (17, [], (18, [17, 18])),
        (17, [3], (18, [3, 17, 18])),
        (17, [17, 18], (19, [17, 19])),
        (17, [17, 18, 30], (31, [17, 31])),
        (None, [15, 16, 17], (18, [15, 16, 17, 18])),
        (None, [], (1, [1])),
        (99_999_998, [99_999_998], (99_999_999, [99_999_998, 99_999_999])),
        (99_999_999, [99_999_999], (100_000_000, [99_999_999, 100_000_000])),
    ],
)
def test_next_sequence(
    repository_dir: Path,
    release: Callable[..., Stream],
    stream: int | None,
    kept: list[int],
    expected: tuple[int, list[int]],
) -> None:
    """It is one above stream file and history; what an interrupted publish left is replaced."""
    before = served(repository_dir)
    (repository_dir / STABLE).unlink()
    for sequence in history(repository_dir):
        (repository_dir / HISTORY.format(sequence)).unlink()
    for sequence, file in [(stream, STABLE), *((n, HISTORY.format(n)) for n in kept)]:
        if sequence:
            state = attrs.evolve(before, sequence=sequence)
            (repository_dir / file).write_bytes(encode(state, Format.TOML))
    assert expected == (release("2.5.0").sequence, history(repository_dir))
    assert expected[0] == served(repository_dir).sequence


def test_history_under_another_spelling_does_not_count(
    repository_dir: Path, release: Callable[..., Stream]
) -> None:
    """A file that no publisher names so is neither counted nor replaced."""
    for name in ("000000042.toml", "٠٠٠٠٠٠٤٢.toml", "42.toml"):
        (repository_dir / HISTORY.format(0)).with_name(name).write_text("mine")
    assert release("2.5.0").sequence == 18
    assert served(repository_dir).sequence == 18


def test_last_sequence_is_the_last(repository_dir: Path, release: Callable[..., Stream]) -> None:
    """Beyond 2^32-1 nothing can be published."""
    state = attrs.evolve(served(repository_dir), sequence=2**32 - 1)
    (repository_dir / STABLE).write_bytes(encode(state, Format.TOML))
    with pytest.raises(InvalidDataError, match="sequence: must be from 1 to 4294967295"):
        release("2.5.0")
    assert state == served(repository_dir)


@pytest.mark.parametrize(
    ("name", "version", "options", "error", "detail"),
    [
        (NAME, "", {}, InvalidDataError, "version: must not be empty"),
        (NAME, "1", {"now": NOW.replace(microsecond=1)}, InvalidDataError, "whole seconds"),
        (NAME, "1", {"now": NOW.replace(tzinfo=None)}, InvalidDataError, "offset from UTC"),
        (("sensor-node", "v1"), "2", {}, RepositoryConflictError, "sensor-node/v1 is closed"),
        (("sensor-node", "Stable"), "2", {}, RepositoryConflictError, "'Stable' differs from"),
        (("Sensor-Node", "x"), "2", {}, RepositoryConflictError, "'Sensor-Node' differs from"),
        (("sensor-node", "a b"), "2", {}, InvalidDataError, "'a b': must consist of letters"),
        (("../x", "stable"), "2", {}, InvalidDataError, "'../x': must consist of letters"),
        (("a\0", "stable"), "2", {}, InvalidDataError, "must not contain control characters"),
    ],
)
def test_publish_refuses(
    repository_dir: Path,
    release: Callable[..., Stream],
    name: StreamName,
    version: str,
    options: dict[str, object],
    error: type[NetotaError],
    detail: str,
) -> None:
    """What breaks a rule, or does not go with what is there, changes no file."""
    before = {path: path.read_bytes() for path in repository_dir.rglob("*.toml")}
    with pytest.raises(error) as raised:
        release(version, name, **options)
    assert detail in raised.value.detail
    assert before == {path: path.read_bytes() for path in repository_dir.rglob("*.toml")}


def test_publish_refuses_archives_of_one_name(repository_dir: Path, image: Path) -> None:
    """Two archives of one name do not go together."""
    sources = [ArchiveSource(image, "a"), ArchiveSource(image, "A")]
    with pytest.raises(InvalidDataError, match=r"--archive A: 'A' differs from 'a' only"):
        publish(repository_dir, NAME, "2.5.0", sources, now=NOW)


@pytest.mark.parametrize("file", [STABLE, "repository.toml", "packages/sensor-node/package.toml"])
def test_publish_refuses_a_broken_repository(
    repository_dir: Path, release: Callable[..., Stream], file: str
) -> None:
    """What is there must be right before it is replaced."""
    (repository_dir / file).write_text("format = 0")
    with pytest.raises(InvalidDataError, match=file):
        release("2.5.0")
    assert (repository_dir / file).read_text() == "format = 0"


def test_publish_needs_a_repository(tmp_path: Path, image: Path) -> None:
    """A directory without repository.toml is not written to."""
    with pytest.raises(RepositoryError, match=r"it has no repository\.toml"):
        publish(tmp_path, NAME, "1", [ArchiveSource(image, "a")], now=NOW)
    assert [image] == list(tmp_path.iterdir())


def test_publish_tells_what_it_cannot_write(
    repository_dir: Path, release: Callable[..., Stream]
) -> None:
    """A directory in the place of a file that is to be written is named."""
    (repository_dir / HISTORY.format(18)).with_name(".00000018.toml.tmp").mkdir()
    with pytest.raises(RepositoryError, match=r"00000018\.toml\.tmp: cannot be written: Is a dir"):
        release("2.5.0")
    assert served(repository_dir).sequence == 17


# ----------------------------------------------------------------------------------------------
# Closing and reopening


def test_close_and_reopen_are_new_states(repository_dir: Path) -> None:
    """Each raises the sequence and keeps all the rest, the time of publishing included."""
    before = served(repository_dir)
    closed = close(repository_dir, NAME, ("sensor-node", "beta"))
    before = attrs.evolve(before, changed=NOW, author=None, message=None)
    expected = attrs.evolve(before, sequence=18, closed=True, replacement=("sensor-node", "beta"))
    assert expected == closed == served(repository_dir)
    opened = reopen(repository_dir, NAME)
    assert attrs.evolve(before, sequence=19) == opened == served(repository_dir)
    assert history(repository_dir) == [15, 16, 17, 18, 19]


def test_replacement_of_a_closed_stream_can_change(repository_dir: Path) -> None:
    """Closing again with another replacement, or none, is a change."""
    name = ("sensor-node", "v1")
    assert (
        close(repository_dir, name, ("sensor-node", "edge")).sequence,
        served(repository_dir, name).replacement,
    ) == (32, ("sensor-node", "edge"))
    assert (
        close(repository_dir, name).sequence,
        served(repository_dir, name).replacement,
    ) == (33, None)


def test_reopened_stream_can_be_published(
    repository_dir: Path, release: Callable[..., Stream]
) -> None:
    """The hint of the refused publish works."""
    name = ("sensor-node", "v1")
    with pytest.raises(RepositoryConflictError) as raised:
        release("1.9.8", name)
    expected = f"Open it again first: netota-coap reopen {repository_dir} sensor-node/v1"
    assert expected == raised.value.hint
    reopen(repository_dir, name)
    assert attrs.astuple(
        release("1.9.8", name),
        recurse=False,
        filter=lambda field, _: field.name in ("sequence", "closed", "replacement"),
    ) == (33, False, None)


@pytest.mark.parametrize(
    ("call", "error", "detail"),
    [
        (lambda root: close(root, ("sensor-node", "x")), NotFoundError, "no stream sensor-node/x"),
        (lambda root: close(root, ("x", "stable")), NotFoundError, "no stream x/stable"),
        (
            lambda root: close(root, NAME, ("sensor-node", "x")),
            NotFoundError,
            "no stream sensor-node/x to be the replacement",
        ),
        (
            lambda root: close(root, ("sensor-node", "v1"), NAME),
            RepositoryConflictError,
            "sensor-node/v1 is closed already",
        ),
        (lambda root: reopen(root, NAME), RepositoryConflictError, "sensor-node/stable is open"),
        (lambda root: reopen(root, ("x", "y")), NotFoundError, "no stream x/y"),
        (lambda root: close(root, ("..", "y")), InvalidDataError, "'..': must consist"),
    ],
)
def test_close_and_reopen_refuse(
    repository_dir: Path, call: Callable[[Path], Stream], error: type[NetotaError], detail: str
) -> None:
    """What is not there, or is so already, is an error that changes nothing."""
    before = Loader(repository_dir).load()
    with pytest.raises(error, match=detail):
        call(repository_dir)
    assert before == Loader(repository_dir).load()
    assert not (repository_dir / "packages/x").exists()


# ----------------------------------------------------------------------------------------------
# Several publishers

PUBLISH = """
import sys
from datetime import UTC, datetime
from pathlib import Path
from netota_coap.publishing.archives import ArchiveSource
from tests.support.publishing import publish
root, image, who = Path(sys.argv[1]), Path(sys.argv[2]), sys.argv[3]
print("ready", flush=True)
sys.stdin.readline()
for n in range(10):
    now = datetime(2026, 11, 20, tzinfo=UTC)
    source = ArchiveSource(image, "a")
    print(publish(root, ("sensor-node", "stable"), f"{who}.{n}", [source], now=now).sequence)
"""


def test_two_publishers_lose_nothing(repository_dir: Path, image: Path) -> None:
    """Two processes that publish at once wait for each other, and no sequence is used twice."""
    publishers = {
        who: subprocess.Popen(
            [sys.executable, "-c", PUBLISH, str(repository_dir), str(image), who],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        for who in ("one", "two")
    }
    for publisher in publishers.values():
        assert publisher.stdout is not None
        assert publisher.stdout.readline() == "ready\n"
    for publisher in publishers.values():
        assert publisher.stdin is not None
        publisher.stdin.write("go\n")
        publisher.stdin.flush()
    published: dict[int, str] = {}
    for who, publisher in publishers.items():
        output, _ = publisher.communicate(timeout=60)
        assert publisher.returncode == 0
        sequences = [int(line) for line in output.split()]
        assert sequences == sorted(sequences)
        published |= {sequence: f"{who}.{n}" for n, sequence in enumerate(sequences)}
    assert list(range(18, 38)) == sorted(published)
    assert (37, published[37]) == (
        served(repository_dir).sequence,
        served(repository_dir).version,
    )
    files = {n: (repository_dir / HISTORY.format(n)).read_bytes() for n in published}
    assert published == {n: load(data, Format.TOML)["version"] for n, data in files.items()}


def test_publisher_gives_up_at_last(
    repository_dir: Path, release: Callable[..., Stream], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where somebody else never stops writing, nothing is changed and the error says so."""
    short = functools.partial(lock.locked, timeout_s=0.05)
    with lock.locked(repository_dir):
        monkeypatch.setattr(store, "locked", short)
        with pytest.raises(RepositoryLockedError, match="is still writing"):
            release("2.5.0")
    assert served(repository_dir).sequence == 17
    assert release("2.5.0", now=NOW + timedelta(days=1)).sequence == 18


def test_errors_of_offers_name_the_file(repository_dir: Path, image: Path) -> None:
    """A template that becomes too long is told with the file that it was filled in for."""
    offer = Offer(url="https://example.com/" + "x" * 180 + "/{sha256}", metric=1)
    with pytest.raises(InvalidDataError) as caught:
        publish(repository_dir, NAME, "1", [ArchiveSource(image, "a")], [offer], now=NOW)
    assert str(caught.value).startswith(f"{image}: url: must be at most 255 bytes long")


def test_what_is_wrong_is_told_before_files_are_read(repository_dir: Path) -> None:
    """A version that breaks its rule is told without reading what may be large."""
    source = ArchiveSource(Path("no such file"), "a")
    with pytest.raises(InvalidDataError, match=r"^version: must not be empty$"):
        publish(repository_dir, NAME, "", [source], now=NOW)


def test_own_replacement(repository_dir: Path) -> None:
    """A stream is not its own replacement."""
    with pytest.raises(RepositoryConflictError, match="its own replacement"):
        close(repository_dir, NAME, NAME)


@pytest.mark.parametrize("name", ["00000050.toml", "9999999999.toml"])
def test_strays_in_the_history(
    repository_dir: Path, release: Callable[..., Stream], name: str
) -> None:
    """What cannot be a state does not count, and does not stop a publish."""
    stray = repository_dir / HISTORY.format(0).replace("00000000.toml", name)
    if name.startswith("9"):
        stray.write_text("")
    else:
        stray.mkdir()
    assert release("2.5.0").sequence == 18
    assert stray.exists()
