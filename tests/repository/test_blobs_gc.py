"""Blobs are verified and removed, published and noticed."""

from __future__ import annotations

import asyncio
import contextlib
import fcntl
import os
import shutil
import threading
from collections.abc import Callable
from pathlib import Path

import attrs
import pytest

from netota_coap.errors import InvalidDataError, Issue, NotFoundError, RepositoryConflictError
from netota_coap.model.values import Stream
from netota_coap.publishing.archives import ArchiveSource
from netota_coap.repository import blobs as module
from netota_coap.repository import lock, store
from netota_coap.repository.blobs import INCOMING, Blob, Blobs
from netota_coap.repository.check import check
from netota_coap.repository.watch import Watcher
from tests.support.publishing import STABLE, promote, publish, remove, rollback, served
from tests.support.repositories import stable
from tests.support.serving import PATIENCE_S, PROJECT
from tests.support.storing import (
    ENVELOPE,
    FIRMWARE,
    PLACE,
    SHA256,
    SHARD,
    content,
    damage,
    digests,
    temporaries,
)

OUT_OF_REACH = Issue(
    "archives[0]",
    "has no offer, and its file is not stored here: nobody can download it",
    "packages/sensor-node/streams/stable.toml",
)

# ----------------------------------------------------------------------------------------------
# Verifying


@pytest.mark.parametrize("data", [b"Firmware", b"firmwar", b"firmware!", b""])
def test_a_damaged_blob_is_set_aside(blobs: Blobs, image: Path, data: bytes) -> None:
    """It is served no longer, but kept to be looked at; adding it again mends all."""
    blobs.add(image)
    publish(blobs.root, STABLE, "2.0", [ArchiveSource(image)])
    progress: list[int] = []
    assert blobs.verify(progress.append) == ()
    assert sum(progress) == 8
    damage(blobs.root / PLACE, data)
    (found,) = blobs.verify()
    assert (SHA256, len(data), True) == (found.sha256, found.size, found.damaged)
    assert digests(blobs.all()) == [(SHA256, True)]
    assert data == (blobs.root / "blobs/quarantine" / SHA256.hex()).read_bytes()
    with pytest.raises(NotFoundError):
        blobs.open(SHA256)
    reason = "was damaged and is not served: add it again, or let blob gc remove it"
    expected = Issue("", reason, f"blobs/quarantine/{SHA256.hex()}")
    assert (expected, OUT_OF_REACH) == check(blobs.root).warnings

    blobs.add(image)
    assert blobs.verify() == ()
    assert content(blobs) == FIRMWARE
    assert digests(blobs.all()) == [(SHA256, False), (SHA256, True)]
    assert digests(blobs.gc(0, grace_s=0)) == [(SHA256, True)]
    assert digests(blobs.all()) == [(SHA256, False)]


def test_a_blob_that_grows_is_damaged(blobs: Blobs, image: Path) -> None:
    """What changes while it is read is not what its name says."""
    blobs.add(image)
    path = blobs.root / PLACE
    assert digests(blobs.verify(lambda _: damage(path, bytes(9)))) == [(SHA256, True)]


def test_check_warns_of_another_size(blobs: Blobs, image: Path) -> None:
    """That is seen without reading the blob."""
    publish(blobs.root, STABLE, "2.0", [ArchiveSource(image)], store_files=True)
    assert check(blobs.root).warnings == ()
    damage(blobs.root / PLACE, b"x")
    expected = Issue("", "has 1 bytes, not 8: it is not served", PLACE)
    findings = check(blobs.root)
    assert ((), (expected, OUT_OF_REACH)) == (findings.errors, findings.warnings)


def test_what_goes_while_it_is_verified(blobs: Blobs, image: Path, tmp_path: Path) -> None:
    """A blob that is removed meanwhile is not damaged."""
    (tmp_path / "other").write_bytes(b"other")
    for file in (image, tmp_path / "other"):
        blobs.add(file)

    def meanwhile(_: int) -> None:
        blobs.gc(0, grace_s=0)

    assert blobs.verify(meanwhile) == ()
    assert blobs.all() == ()


# ----------------------------------------------------------------------------------------------
# Removing


def stored(blobs: Blobs, version: str, data: bytes) -> Stream:
    """Publish data as a version, with a blob."""
    file = blobs.root.parent / "image.bin"
    file.write_bytes(data)
    return publish(blobs.root, STABLE, version, [ArchiveSource(file)], store_files=True)


def held(blobs: Blobs) -> set[bytes]:
    """Return the contents of all blobs."""
    return {content(blobs, blob.sha256) for blob in blobs.all()}


@pytest.mark.parametrize(
    ("keep", "expected"),
    [
        (0, {b"4"}),
        (1, {b"4", b"3"}),
        (2, {b"4", b"3", b"2"}),
        (3, {b"4", b"3", b"2", b"1"}),
        (1_000_000, {b"4", b"3", b"2", b"1"}),
    ],
)
def test_gc_keeps_what_streams_hold(blobs: Blobs, keep: int, expected: set[bytes]) -> None:
    """The present state keeps its blobs, and so do as many before it as are asked for."""
    for version in ("1", "2", "3", "4"):
        stored(blobs, version, version.encode())
    would = blobs.gc(keep, grace_s=0, dry_run=True)
    assert {b"1", b"2", b"3", b"4"} == held(blobs)
    assert would == blobs.gc(keep, grace_s=0)
    assert expected == held(blobs)
    assert blobs.gc(keep, grace_s=0) == ()


def test_gc_knows_other_streams(blobs: Blobs) -> None:
    """What any stream holds is kept, and what was removed can be rolled back."""
    stored(blobs, "1", b"1")
    promote(blobs.root, STABLE, ("other", "one"))
    stored(blobs, "2", b"2")
    blobs.gc(0, grace_s=0)
    assert {b"1", b"2"} == held(blobs)
    remove(blobs.root, ("other", "one"))
    (blobs.root / "packages/other/history/a b").mkdir()  # no name of a stream
    (blobs.root / "packages/other/history/empty").mkdir()
    blobs.gc(1, grace_s=0)
    assert {b"1", b"2"} == held(blobs)
    rollback(blobs.root, ("other", "one"))
    blobs.gc(0, grace_s=0)
    assert {b"1", b"2"} == held(blobs)
    remove(blobs.root, ("other", "one"))
    blobs.gc(0, grace_s=0)
    assert {b"2"} == held(blobs)


def test_gc_leaves_the_young(blobs: Blobs, image: Path) -> None:
    """What was put there a short time ago may be published yet."""
    blobs.add(image)
    os.utime(blobs.root / PLACE, (1, 1))  # when the content was made does not matter
    assert blobs.gc(0) == ()
    assert digests(blobs.gc(0, grace_s=0)) == [(SHA256, False)]


def test_gc_removes_what_the_dead_left(
    blobs: Blobs, image: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Temporary files that nobody writes any more go after a minute; others stay."""
    blobs.add(image)
    stale = blobs.root / SHARD / f".{SHA256.hex()}.0123abcd.tmp"
    alive = blobs.root / SHARD / f".{SHA256.hex()}.89abcdef.tmp"
    other = blobs.root / SHARD / ".mine.tmp"
    for file in (stale, other):
        file.write_bytes(b"half")
    with alive.open("wb") as stream:
        fcntl.flock(stream, fcntl.LOCK_SH)
        blobs.gc(0, grace_s=0)
        assert {stale, alive, other} == set(temporaries(blobs.root))
        monkeypatch.setattr(module, "STALE_S", 0)
        blobs.gc(0)
        assert {alive, other} == set(temporaries(blobs.root))


REMOVALS: dict[str, Callable[[Blobs], tuple[Blob, ...]]] = {
    "gc": lambda blobs: blobs.gc(0, grace_s=0),
    "dry run": lambda blobs: blobs.gc(0, grace_s=0, dry_run=True),
    "shrink": lambda blobs: blobs.shrink(0),
}


@pytest.mark.parametrize("removal", REMOVALS)
def test_what_is_yet_to_take_its_place_is_kept(
    blobs: Blobs, image: Path, tmp_path: Path, removal: str
) -> None:
    """A blob whose name lies where files arrive stays, however old; others go."""
    (tmp_path / "other").write_bytes(b"other")
    other = blobs.add(tmp_path / "other")
    blobs.add(image)
    place = blobs.root / INCOMING
    place.mkdir()
    (place / SHA256.hex()).touch()
    for name in (f".{other.sha256.hex()}.part", other.sha256.hex().upper(), "notes"):
        (place / name).touch()
    expected = [(other.sha256, False)]
    assert digests(REMOVALS[removal](blobs)) == expected
    (place / SHA256.hex()).unlink()
    assert (SHA256, False) in digests(REMOVALS[removal](blobs))


@pytest.mark.parametrize("removal", REMOVALS)
def test_where_files_arrive_is_no_link(
    blobs: Blobs, image: Path, tmp_path: Path, removal: str
) -> None:
    """A link in its place is not followed, as nowhere below blobs."""
    blobs.add(image)
    (tmp_path / "outside").mkdir()
    (tmp_path / "outside" / SHA256.hex()).touch()
    (blobs.root / INCOMING).symlink_to(tmp_path / "outside")
    assert digests(REMOVALS[removal](blobs)) == [(SHA256, False)]


def test_gc_of_a_broken_repository(blobs: Blobs, image: Path) -> None:
    """Where it is not sure what is needed, nothing is removed."""
    stored(blobs, "1", b"1")
    stored(blobs, "2", b"2")
    blobs.add(image)
    before = held(blobs)
    for file in ("history/stable/00000002.toml", "streams/edge.toml"):
        path = blobs.root / "packages/sensor-node" / file
        good = path.read_bytes()
        path.write_bytes(b"version = 1")
        with pytest.raises(InvalidDataError, match=file):
            blobs.gc(1, grace_s=0)
        path.write_bytes(good)
    assert before == held(blobs)
    blobs.gc(1, grace_s=0)
    assert {b"1", b"2"} == held(blobs)


def test_a_removed_blob_is_read_to_its_end(blobs: Blobs, image: Path) -> None:
    """Who has opened it does not notice."""
    blobs.add(image)
    with os.fdopen(blobs.open(SHA256), "rb") as stream:
        blobs.gc(0, grace_s=0)
        assert blobs.all() == ()
        assert stream.read() == FIRMWARE


def test_gc_waits_for_publishers(blobs: Blobs, image: Path) -> None:
    """It takes the lock; a dry run does not."""
    blobs.add(image)
    done = threading.Event()
    with lock.locked(blobs.root):
        assert digests(blobs.gc(0, grace_s=0, dry_run=True)) == [(SHA256, False)]
        thread = threading.Thread(target=lambda: (blobs.gc(0, grace_s=0), done.set()))
        thread.start()
        assert not done.wait(0.05)
        assert digests(blobs.all()) == [(SHA256, False)]
    thread.join()
    assert blobs.all() == ()


# ----------------------------------------------------------------------------------------------
# Publishing


def test_publish_stores(blobs: Blobs, image: Path) -> None:
    """The files are held, and archives without an offer are served by whoever has them."""
    state = publish(blobs.root, STABLE, "2.0", [ArchiveSource(image)], store_files=True)
    assert state == served(blobs.root)
    assert content(blobs) == FIRMWARE
    assert check(blobs.root).warnings == ()


def test_a_refused_publish_stores_nothing(blobs: Blobs, image: Path) -> None:
    """The same again, and a lost build, are refused before anything is copied."""
    state = publish(blobs.root, STABLE, "2.0", [ArchiveSource(image)], store_files=True)
    blobs.gc(0, grace_s=0)
    shutil.rmtree(blobs.root / "blobs")
    with pytest.raises(RepositoryConflictError, match="already"):
        publish(blobs.root, STABLE, "2.0", [ArchiveSource(image)], store_files=True)
    assert not (blobs.root / "blobs").exists()
    again = publish(
        blobs.root, STABLE, "2.0", [ArchiveSource(image)], store_files=True, force=True
    )
    assert state.sequence + 1 == again.sequence
    assert content(blobs) == FIRMWARE


def test_publish_of_a_file_that_changes(blobs: Blobs, image: Path) -> None:
    """A file that is another one when it is copied is refused, and nothing is published."""

    def change(_: int) -> None:
        # After it was read to its end for the first time.
        image.with_name("new").write_bytes(b"FIRMWARE")
        image.with_name("new").replace(image)

    with pytest.raises(InvalidDataError, match=r"has SHA-256 \w+, not \w+"):
        publish(
            blobs.root, STABLE, "2.0", [ArchiveSource(image)], store_files=True, progress=change
        )
    assert stable(blobs.root).version == "1.0.0"
    assert blobs.all() == ()


def test_what_is_removed_before_the_publish_is_stored_again(
    blobs: Blobs, image: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A blob that goes between being stored and being named is put back, under the lock."""
    locked = lock.locked

    def meanwhile(root: Path) -> contextlib.AbstractContextManager[None]:
        assert len(blobs.gc(0, grace_s=0)) == 1
        return locked(root)

    monkeypatch.setattr(store, "locked", meanwhile)
    publish(blobs.root, STABLE, "2.0", [ArchiveSource(image)], store_files=True)
    assert content(blobs) == FIRMWARE


# ----------------------------------------------------------------------------------------------
# Being noticed


@pytest.mark.parametrize("what", ["first", "another", "damaged"])
async def test_servers_notice(blobs: Blobs, image: Path, what: str) -> None:
    """What watches a repository wakes up when what it holds has changed, and only then."""
    if what != "first":
        blobs.add(image)
    if what == "damaged":
        damage(blobs.root / PLACE, b"other")
    changes: dict[str, Callable[[], object]] = {
        "first": lambda: blobs.add(image),
        "another": lambda: blobs.add(PROJECT / "LICENSE"),
        "damaged": blobs.verify,
    }
    async with Watcher(blobs.root) as watcher, asyncio.timeout(PATIENCE_S):
        if what != "first":
            blobs.add(image, ENVELOPE if what != "damaged" else attrs.evolve(ENVELOPE, size=5))
            with pytest.raises(TimeoutError):
                await asyncio.wait_for(watcher.settled(), 0.1)
        await asyncio.to_thread(changes[what])
        await watcher.settled()
