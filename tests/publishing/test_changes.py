"""Promoting, rolling back and removing streams, and how all changes are made."""

from __future__ import annotations

from collections.abc import Callable
from datetime import timedelta
from pathlib import Path

import attrs
import pytest

from netota_coap.encoding.codecs import Format
from netota_coap.encoding.documents import encode
from netota_coap.errors import (
    InvalidDataError,
    NetotaError,
    NotFoundError,
    RepositoryConflictError,
)
from netota_coap.model.values import Stream, StreamName
from netota_coap.publishing import publish as publishing
from netota_coap.publishing.archives import ArchiveSource
from netota_coap.publishing.publish import Edit
from netota_coap.repository import history
from netota_coap.repository.check import check
from netota_coap.repository.loading import Loader
from netota_coap.repository.store import Change, DirectoryStore
from tests.support.publishing import (
    EDIT,
    NOW,
    close,
    promote,
    publish,
    remove,
    reopen,
    rollback,
    served,
)
from tests.support.repositories import HISTORY, STABLE

NAME = ("sensor-node", "stable")


# ----------------------------------------------------------------------------------------------
# Promoting, rolling back, removing

BETA, EDGE = ("sensor-node", "beta"), ("sensor-node", "edge")
LATER = NOW + timedelta(days=1)


def test_promote_publishes_the_same_archives(repository_dir: Path) -> None:
    """The target gets archives and version; sequence, title and poll_s are its own."""
    beta, before = served(repository_dir, BETA), served(repository_dir)
    edit = attrs.evolve(EDIT, now=LATER, author="A", message="M")
    state = publishing.promote(DirectoryStore(repository_dir), BETA, NAME, edit=edit).after
    expected = attrs.evolve(
        before, version=beta.version, archives=beta.archives, sequence=18,
        published=LATER, author="A", message="M",
    )  # fmt: skip
    assert expected == state == served(repository_dir)
    assert beta == served(repository_dir, BETA)


@pytest.mark.parametrize("target", [("sensor-node", "lts"), ("new", "stable")])
def test_promote_makes_what_is_missing(repository_dir: Path, target: StreamName) -> None:
    """A target that is not there begins at sequence 1, also in another package."""
    state = promote(repository_dir, BETA, target)
    assert (1, served(repository_dir, BETA).archives) == (state.sequence, state.archives)


def test_promote_from_a_closed_stream(repository_dir: Path) -> None:
    """What a closed stream holds can go on elsewhere, where it is not closed."""
    state = promote(repository_dir, ("sensor-node", "v1"), ("sensor-node", "lts"))
    assert (state.closed, state.replacement, state.changed) == (False, None, None)


def test_rollback_is_a_new_publish_of_an_old_state(repository_dir: Path) -> None:
    """Version and archives are the old ones, all else as with any publish."""
    old, present = history.state_at(repository_dir, NAME, 16), served(repository_dir)
    edit = attrs.evolve(EDIT, now=LATER)
    state = publishing.rollback(DirectoryStore(repository_dir), NAME, edit=edit).after
    expected = attrs.evolve(
        present, version=old.version, archives=old.archives, sequence=18,
        published=LATER, author=None, message="rollback to sequence 16",
    )  # fmt: skip
    assert expected == state == served(repository_dir)
    assert (
        rollback(repository_dir, NAME, 15).version
        == history.state_at(repository_dir, NAME, 15).version
    )
    assert [s.sequence for s in history.history(repository_dir, NAME)] == [19, 18, 17, 16, 15]


def test_rollback_passes_over_states_that_were_the_same(repository_dir: Path) -> None:
    """Closing, reopening and repeated publishes of the same are not what one goes back to."""
    present = served(repository_dir)
    close(repository_dir, NAME)
    reopen(repository_dir, NAME)
    assert rollback(repository_dir, NAME).version != present.version
    assert rollback(repository_dir, NAME).archives == present.archives


def test_rollback_brings_a_removed_stream_back(repository_dir: Path) -> None:
    """A removed stream continues with what it held at last, above all its sequences."""
    before = served(repository_dir, EDGE)
    removed = remove(repository_dir, EDGE)
    assert (removed.sequence, removed.removed, removed.archives) == (214, True, ())
    state = rollback(repository_dir, EDGE)
    assert (215, before.version, before.archives) == (
        state.sequence,
        state.version,
        state.archives,
    )
    assert [s.removed for s in history.history(repository_dir, EDGE)][:3] == [
        False,
        True,
        False,
    ]


def test_rollback_of_a_stream_whose_file_was_deleted(repository_dir: Path) -> None:
    """What hands have removed comes back from the history just as well."""
    before = served(repository_dir)
    (repository_dir / STABLE).unlink()
    assert (18, before.version) == ((s := rollback(repository_dir, NAME)).sequence, s.version)


def test_remove_keeps_the_sequence(repository_dir: Path, release: Callable[..., Stream]) -> None:
    """The stream is gone, its history stays, and the next publish goes on counting."""
    loader = Loader(repository_dir)
    loader.load()
    edit = attrs.evolve(EDIT, now=LATER, author="A", message="gone")
    publishing.remove(DirectoryStore(repository_dir), NAME, edit=edit)
    assert "stable" not in loader.load().packages["sensor-node"].streams
    assert not (repository_dir / STABLE).exists()
    assert check(repository_dir).errors == ()
    last = history.history(repository_dir, NAME)[0]
    assert (
        last.sequence, last.removed, last.changed, last.author, last.message,
    ) == (18, True, LATER, "A", "gone")  # fmt: skip
    assert release("3.0").sequence == 19
    assert loader.load().packages["sensor-node"].streams["stable"].version == "3.0"


def test_removed_is_for_the_history_only(repository_dir: Path) -> None:
    """A stream file that says it was removed is neither served nor changed."""
    path = repository_dir / STABLE
    path.write_text(path.read_text().replace("[[archives]]", "removed = true\n[[archives]]", 1))
    reason = f"{STABLE}: removed: only a state in the history has it"
    with pytest.raises(InvalidDataError, match=reason):
        Loader(repository_dir).load()
    with pytest.raises(InvalidDataError, match=reason):
        reopen(repository_dir, NAME)


@pytest.mark.parametrize(
    ("call", "error", "detail"),
    [
        (lambda r: promote(r, NAME, NAME), RepositoryConflictError, "promoted to itself"),
        (lambda r: promote(r, ("a", "b"), NAME), NotFoundError, "no stream a/b"),
        (lambda r: promote(r, NAME, ("sensor-node", "v1")), RepositoryConflictError, "is closed"),
        (lambda r: promote(r, NAME, ("a", "../b")), InvalidDataError, "must consist of letters"),
        (
            lambda r: (promote(r, BETA, NAME), promote(r, BETA, NAME)),
            RepositoryConflictError,
            "sensor-node/stable holds 2.5.0-rc2 with these archives already",
        ),
        (lambda r: rollback(r, ("a", "b")), NotFoundError, "no stream a/b, and never was"),
        (
            lambda r: rollback(r, NAME, 3),
            NotFoundError,
            "stable has no sequence 3",
        ),
        (lambda r: rollback(r, NAME, 17), RepositoryConflictError, "with these archives already"),
        (
            lambda r: (publish(r, ("n", "s"), "1", []), rollback(r, ("n", "s"))),
            NotFoundError,
            "n/s never held anything else",
        ),
        (
            lambda r: (remove(r, EDGE), rollback(r, EDGE, 214)),
            NotFoundError,
            "sensor-node/edge was removed at sequence 214: it held nothing",
        ),
        (lambda r: rollback(r, ("sensor-node", "v1")), RepositoryConflictError, "v1 is closed"),
        (lambda r: remove(r, ("sensor-node", "x")), NotFoundError, "no stream sensor-node/x"),
        (
            lambda r: (remove(r, EDGE), remove(r, EDGE)),
            NotFoundError,
            "no stream sensor-node/edge",
        ),
        (lambda r: (remove(r, EDGE), close(r, EDGE)), NotFoundError, "no stream sensor-node/e"),
    ],
)
def test_changes_refuse(
    repository_dir: Path, call: Callable[[Path], object], error: type[NetotaError], detail: str
) -> None:
    """What cannot be done is told, and leaves a repository without errors."""
    with pytest.raises(error, match=detail):
        call(repository_dir)
    assert check(repository_dir).errors == ()


def test_publishing_the_same_again(repository_dir: Path, release: Callable[..., Stream]) -> None:
    """What is there already is not published once more, unless it is forced."""
    assert release("3.0").sequence == 18
    with pytest.raises(RepositoryConflictError) as raised:
        release("3.0")
    assert raised.value.hint == "If it is to be published again, give --force."
    assert release("3.0", force=True).sequence == 19


def test_what_follows_a_removal_and_was_interrupted(repository_dir: Path) -> None:
    """It is no state of the stream, before the next publish nor after it."""
    remove(repository_dir, EDGE)
    left = attrs.evolve(served(repository_dir), sequence=215, version="left")
    file = "packages/sensor-node/history/edge/00000215.toml"
    (repository_dir / file).write_bytes(encode(left, Format.TOML))
    assert history.history(repository_dir, EDGE)[0].removed
    state = rollback(repository_dir, EDGE)
    assert (state.sequence, state.version == "left") == (216, False)
    assert [s.sequence for s in history.history(repository_dir, EDGE)][:2] == [216, 214]
    assert not (repository_dir / file).exists()


# ----------------------------------------------------------------------------------------------
# How changes are made

CAREFUL = attrs.evolve(EDIT, allow_missing=False)
Call = Callable[[DirectoryStore, Edit], Change]
CHANGES: dict[str, Call] = {
    "publish": lambda store, edit: publishing.publish(store, NAME, "3.0", [], edit=edit),
    "promote": lambda store, edit: publishing.promote(store, EDGE, NAME, edit=edit),
    "rollback": lambda store, edit: publishing.rollback(store, NAME, 15, edit=edit),
    "close": lambda store, edit: publishing.close(store, NAME, edit=edit),
    "reopen": lambda store, edit: publishing.reopen(store, ("sensor-node", "v1"), edit=edit),
    "remove": lambda store, edit: publishing.remove(store, EDGE, edit=edit),
}


@pytest.mark.parametrize("call", CHANGES.values(), ids=CHANGES)
def test_dry_run_tells_and_does_nothing(repository_dir: Path, call: Call) -> None:
    """A dry run returns what the change then does; author, message and time are in the record."""
    before = {path: path.read_bytes() for path in repository_dir.rglob("*") if path.is_file()}
    edit = attrs.evolve(EDIT, now=LATER, author="A <a@b>", message="Because")
    told = call(DirectoryStore(repository_dir), attrs.evolve(edit, dry_run=True))
    after = {path: path.read_bytes() for path in repository_dir.rglob("*") if path.is_file()}
    assert before == after
    assert told == call(DirectoryStore(repository_dir), edit)
    recorded = history.history(repository_dir, told.name)[0]
    assert (
        recorded.author, recorded.message, recorded.changed or recorded.published,
    ) == ("A <a@b>", "Because", LATER)  # fmt: skip


@pytest.mark.parametrize("command", ["publish", "promote"])
def test_loss_of_a_build_is_refused(repository_dir: Path, command: str) -> None:
    """Devices that had a build keep one, unless their loss is allowed; a dry run only tells."""
    before = served(repository_dir)
    call = CHANGES[command]
    edge = served(repository_dir, EDGE)
    few = attrs.evolve(edge, archives=(edge.archives or ())[:1], sequence=214)
    (repository_dir / STABLE.replace("stable", "edge")).write_bytes(encode(few, Format.TOML))
    with pytest.raises(RepositoryConflictError) as raised:
        call(DirectoryStore(repository_dir), CAREFUL)
    assert raised.value.detail.startswith("sensor-node/stable: nothing would be left for arch=arm")
    assert raised.value.hint == "Add the builds, or give --allow-missing if that is meant."
    assert before == served(repository_dir)
    assert (
        call(DirectoryStore(repository_dir), attrs.evolve(CAREFUL, dry_run=True)).before == before
    )
    assert call(DirectoryStore(repository_dir), EDIT).after.sequence == 18


@pytest.mark.parametrize("command", ["close", "reopen", "remove"])
def test_ends_are_no_loss(repository_dir: Path, command: str) -> None:
    """Closing and removing say themselves what they are."""
    assert CHANGES[command](DirectoryStore(repository_dir), CAREFUL).after


@pytest.mark.parametrize(
    ("edit", "issues"),
    [
        ({"message": ""}, ["message: must not be empty"]),
        (
            {"message": "a\nb", "author": "x" * 101},
            ["author: must be", "message: must not"],
        ),
    ],
)
def test_notes_keep_to_their_rules(
    repository_dir: Path, edit: dict[str, str], issues: list[str]
) -> None:
    """What is said of a change is told to be wrong before files are read."""
    source = ArchiveSource(Path("no such file"), "a")
    with pytest.raises(InvalidDataError) as raised:
        publishing.publish(
            DirectoryStore(repository_dir), NAME, "1", [source], edit=attrs.evolve(EDIT, **edit)
        )
    found = [str(issue) for issue in raised.value.issues]
    assert [True] * len(issues) == [f.startswith(i) for f, i in zip(found, issues, strict=True)]


def test_history_leaves_interruptions_out(repository_dir: Path) -> None:
    """What an interrupted publish left was never in effect, and is no state of the stream."""
    left = attrs.evolve(served(repository_dir), sequence=18)
    (repository_dir / HISTORY.format(18)).write_bytes(encode(left, Format.TOML))
    states = history.history(repository_dir, NAME)
    assert [state.sequence for state in states] == [17, 16, 15]
    with pytest.raises(NotFoundError, match="has no sequence 18"):
        history.state_at(repository_dir, NAME, 18)
