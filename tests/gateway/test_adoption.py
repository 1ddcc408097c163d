"""What becomes of an offered state: decided without a file or a network; and how it is written."""

from __future__ import annotations

from pathlib import Path

import attrs
import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from netota_coap.encoding.addresses import author_of
from netota_coap.encoding.codecs import Format
from netota_coap.encoding.documents import encode
from netota_coap.errors import IntegrityError, NetotaError, RepositoryConflictError, RollbackError
from netota_coap.gateway.adoption import Choice, adopt, take_over
from netota_coap.model.values import LIMITS, Archive, Offer, Stream
from netota_coap.repository import scaffold
from netota_coap.repository.check import check
from netota_coap.repository.layout import history_file, stream_file
from netota_coap.repository.store import DirectoryStore
from tests.support import strategies
from tests.support.publishing import NOW, STABLE
from tests.support.storing import ENVELOPE

ORIGIN = "coap://upstream.example.com"
whole = strategies.streams().filter(lambda state: state.archives is not None)
few = strategies.fewer(3)  # whole states take long to make


def state(sequence: int = 5, version: str = "1", *urls: str) -> Stream:
    """Return a state as an upstream offers it."""
    offers = tuple(Offer(url=url, metric=metric) for metric, url in enumerate(urls))
    archive = Archive(name="a", envelope=ENVELOPE, offers=offers)
    return Stream(version=version, sequence=sequence, published=NOW, archives=(archive,))


def ours(offered: Stream) -> Stream:
    """Return the same as it is written here."""
    adopted = adopt(None, offered, ORIGIN)
    assert adopted
    return adopted


@few
@given(whole)
def test_a_new_stream(offered: Stream) -> None:
    """A state is taken as it is, but for offers; taken again, it changes nothing."""
    adopted = ours(offered)
    assert adopted.author == author_of(ORIGIN)
    assert offered.essence() == adopted.essence()
    assert adopt(adopted, offered, ORIGIN) is None
    # As a mirror of this one would see it.
    assert adopt(adopted, attrs.evolve(adopted, author=None), ORIGIN) is None
    for archive in adopted.archives or ():
        urls = [offer.url for offer in archive.offers]
        assert len(urls) == len(set(urls))
        assert not any(url.startswith("/") for url in urls)
        assert sorted(o.metric for o in archive.offers) == [o.metric for o in archive.offers]


@few
@given(whole, whole)
def test_one_state_after_another(before: Stream, offered: Stream) -> None:
    """The sequence never goes back, and one sequence is one state."""
    local = ours(before)
    try:
        adopted = adopt(local, offered, ORIGIN)
    except RollbackError:
        assert offered.sequence < local.sequence
    except RepositoryConflictError:
        assert offered.sequence == local.sequence
        assert offered.essence() != local.essence()
    else:
        assert adopted is None or adopted.sequence >= local.sequence
        assert (adopted or local).essence() == offered.essence()


@few
@given(whole, whole, st.one_of(st.none(), strategies.texts("title")))
def test_somebody_elses(local: Stream, offered: Stream, author: str | None) -> None:
    """A stream of another author is left alone, whatever is offered."""
    assume(author != author_of(ORIGIN))
    with pytest.raises(RepositoryConflictError, match="is not a stream of this upstream here"):
        adopt(attrs.evolve(local, author=author), offered, ORIGIN)


@pytest.mark.parametrize(
    ("sequence", "error"), [(4, RollbackError), (5, RepositoryConflictError), (6, None)]
)
def test_a_removed_one(sequence: int, error: type[NetotaError] | None) -> None:
    """Who removed a stream has let go of it, but not of its sequence."""
    removed = attrs.evolve(state(5), archives=(), removed=True, author="Ada")
    if error is None:
        assert adopt(removed, state(sequence), ORIGIN) == ours(state(sequence))
    else:
        with pytest.raises(error):
            adopt(removed, state(sequence), ORIGIN)


@pytest.mark.parametrize("change", [{"archives": None}, {"more": True}])
def test_not_whole(change: dict[str, object]) -> None:
    """A state of which something was left out is refused."""
    with pytest.raises(IntegrityError, match="incomplete state"):
        adopt(None, attrs.evolve(state(), **change), ORIGIN)


def test_offers() -> None:
    """Relative offers are made absolute, doubles and the worst of too many left out."""
    digest = "/b/" + "x" * 43
    adopted = ours(state(5, "1", digest, "coap://h/a", ORIGIN + digest, "coap://h/a"))
    (archive,) = adopted.archives or ()
    assert [(offer.url, offer.metric) for offer in archive.offers] == [
        (ORIGIN + digest, 0),
        ("coap://h/a", 1),
    ]
    too_long = "/" + "x" * (LIMITS["url"].value - 1)
    (archive,) = ours(state(5, "1", too_long)).archives or ()
    assert archive.offers == ()


def test_title_stays() -> None:
    """A title that was given here stays; only that is for people."""
    local = attrs.evolve(ours(state(5)), title="Ours")
    adopted = adopt(local, state(6), ORIGIN)
    assert adopted
    assert adopted.title == "Ours"


@pytest.mark.parametrize(
    ("choice", "expected"),
    [
        (Choice(), True),
        (Choice(packages=("other", "sensor-*")), True),
        (Choice(packages=("Sensor-*",)), False),
        (Choice(streams=("s?able",)), True),
        (Choice(streams=("beta",)), False),
    ],
)
def test_choice(choice: Choice, expected: bool) -> None:
    """Patterns are those of a shell, and tell upper from lower case."""
    assert choice.has(STABLE) is expected


# ----------------------------------------------------------------------------------------------
# Written


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """An empty repository."""
    scaffold.init(tmp_path / "mirror")
    return tmp_path / "mirror"


def take(root: Path, offered: Stream) -> Stream | None:
    return take_over(DirectoryStore(root), STABLE, lambda last: adopt(last, offered, ORIGIN))


def sequences(root: Path) -> list[int]:
    return sorted(int(path.stem) for path in root.rglob("history/stable/*.toml"))


def test_written_under_its_own_sequence(root: Path) -> None:
    """Sequences are the upstream's; offers alone make no history; what is same is not written."""
    assert take(root, state(5)) == ours(state(5))
    file = stream_file(root, STABLE)
    before = file.stat().st_ino, file.stat().st_mtime_ns
    assert take(root, state(5)) is None
    assert before == (file.stat().st_ino, file.stat().st_mtime_ns)
    assert take(root, state(5, "1", "coap://h/a")) == DirectoryStore(root).read(STABLE).present
    assert take(root, state(9, "2")) == ours(state(9, "2"))
    assert sequences(root) == [5, 9]
    assert check(root).errors == ()


@pytest.mark.parametrize("version", ["2", "3"])
def test_after_a_kill(root: Path, version: str) -> None:
    """A history file that a kill left above the stream is no obstacle, nor lost."""
    take(root, state(5))
    history_file(root, STABLE, 6).write_bytes(encode(ours(state(6, "2")), Format.TOML))
    history_file(root, STABLE, 7).write_bytes(encode(ours(state(7, "9")), Format.TOML))
    assert take(root, state(6, version)) == ours(state(6, version))
    assert [each.version for each in DirectoryStore(root).history(STABLE)] == [version, "1"]
    assert check(root).errors == ()


def test_dropped_and_back(root: Path) -> None:
    """A stream that was dropped may return as it was, and not as another one."""
    take(root, state(5))
    DirectoryStore(root).drop(STABLE)
    DirectoryStore(root).drop(STABLE)
    assert DirectoryStore(root).read(STABLE).present is None
    assert DirectoryStore(root).read(STABLE).last == ours(state(5))
    with pytest.raises(RepositoryConflictError):
        take(root, state(5, "2"))
    with pytest.raises(RollbackError):
        take(root, state(4))
    assert take(root, state(5)) == ours(state(5))
    assert sequences(root) == [5]
