"""Changes are planned without the lock, and committed only to what they were planned on."""

from __future__ import annotations

from pathlib import Path

import attrs
import pytest

from netota_coap.errors import RepositoryConflictError
from netota_coap.model.values import Stream
from netota_coap.repository.store import Change, DirectoryStore, Snapshot, update
from tests.support.publishing import NOW, STABLE, close, publish
from tests.support.repositories import STABLE as FILE
from tests.support.repositories import edit


@pytest.fixture
def store(repository_dir: Path) -> DirectoryStore:
    return DirectoryStore(repository_dir)


def another(snapshot: Snapshot) -> Change:
    """Plan another version of a stream."""
    assert snapshot.present
    return snapshot.next(attrs.evolve(snapshot.present, version="other", message=None))


@pytest.mark.parametrize("by_hand", [False, True])
def test_commit_refuses_what_has_changed(store: DirectoryStore, *, by_hand: bool) -> None:
    """A change is not written to a stream that is another one by now; what is there stays."""
    planned = another(store.read(STABLE))
    if by_hand:
        edit(store.root / FILE, "nrf52840dk", "nrf52833dk")
    else:
        close(store.root, STABLE)
    now = store.read(STABLE)
    assert not store.commit(planned)
    assert store.read(STABLE) == now
    assert store.commit(another(now))


def test_commit_refuses_a_similar_name(store: DirectoryStore) -> None:
    """Two names that differ only in case are refused also where both were planned at once."""
    state = Stream(version="1", sequence=1, published=NOW, archives=())
    one, other = (store.read((name, "stable")).next(state) for name in ("new", "New"))
    assert store.commit(one)
    with pytest.raises(RepositoryConflictError, match="'New' differs from 'new' only in case"):
        store.commit(other)


def test_update_plans_again(store: DirectoryStore) -> None:
    """Where somebody else was faster, the change is planned on what is there then."""
    seen: list[int] = []

    def plan(snapshot: Snapshot) -> Change:
        seen.append(snapshot.sequence)
        if len(seen) < 3:
            publish(store.root, STABLE, f"faster {len(seen)}", [])
        return another(snapshot)

    assert update(store, STABLE, plan).after.sequence == 20
    assert seen == [17, 18, 19]
    assert [state.version for state in store.history(STABLE)[:3]] == [
        "other", "faster 2", "faster 1",
    ]  # fmt: skip
