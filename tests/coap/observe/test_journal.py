"""coap/observe/journal.py: records, damage, rewriting, and the file."""

from __future__ import annotations

import asyncio
import errno
import os
from collections.abc import Callable
from pathlib import Path

import attrs
import pytest
from hypothesis import given
from hypothesis import strategies as st

from netota_coap import files
from netota_coap.coap.observe import journal as journal_module
from netota_coap.coap.observe.journal import (
    FILE,
    Journal,
    JournalFile,
    Record,
    RecordKind,
    StoredState,
    compacted,
    open_journal,
    replay,
)
from netota_coap.errors import ConfigError, InvalidDataError
from netota_coap.repository.loading import Loader
from tests.support.serving import until

E1, E2 = b"endpoint 1", b"endpoint 2"
SAID = [
    Record(RecordKind.VERSION, 1),
    Record(RecordKind.NUMBER, 70_000),
    Record(RecordKind.STREAM, 7, 0, b"essence.", b"sensor-node/stable"),
    Record(RecordKind.SUBJECT, 1, 0, b"state-1.", b"\x01request"),
    Record(RecordKind.OBSERVER, 1, 0x9000, E1, b"t"),
    Record(RecordKind.OBSERVER, 1, 12, E2, b""),
    Record(RecordKind.STATE, 1, 0, b"state-2."),
    Record(RecordKind.ACKNOWLEDGED, 0, 0x8001, E1, b"t"),
]


def written(*records: Record) -> bytes:
    return b"".join(record.encode() for record in records)


def summary(kept: StoredState) -> object:
    """Return what a journal says, whatever its words."""
    observers = {
        key: (
            kept.subjects[each.subject].request,
            kept.subjects[each.subject].digest,
            each.registration_id,
            kept.has_newest(each),
            each.message_id if kept.has_newest(each) else 0,
        )
        for key, each in kept.observers.items()
    }
    return kept.number, kept.sequences, observers


def test_replay() -> None:
    """A journal says who observes what, and who is known to have the newest state."""
    kept, end = replay(written(*SAID))

    assert end == len(written(*SAID))
    assert summary(kept) == (
        70_000,
        {("sensor-node", "stable"): (7, b"essence.")},
        {
            (E1, b"t"): (b"\x01request", b"state-2.", 0x9000, True, 0x8001),
            (E2, b""): (b"\x01request", b"state-2.", 12, False, 0),
        },
    )


def test_torn_at_the_end() -> None:
    """A record that a crash cut off is dropped, the rest is used."""
    last = len(SAID[-1].encode())
    data = written(*SAID)
    expected = summary(replay(written(*SAID[:-1]))[0])
    for cut in range(1, last + 1):
        kept, end = replay(data[:-cut])
        assert (end, kept.damaged) == (len(data) - last, 0)
        assert summary(kept) == expected


@given(st.data())
def test_damaged_in_the_middle(data: st.DataObject) -> None:
    """What cannot be read is left out, and nobody is believed to have the newest state."""
    records = [record.encode() for record in SAID]
    index = data.draw(st.integers(0, len(records) - 2))
    at = data.draw(st.integers(0, len(records[index]) - 1))
    damaged = bytearray(records[index])
    damaged[at] ^= data.draw(st.integers(1, 255))
    kept, end = replay(b"".join([*records[:index], bytes(damaged), *records[index + 1 :]]))

    assert end == len(b"".join(records))
    assert kept.damaged == len(damaged)
    assert not any(kept.has_newest(each) for each in kept.observers.values())
    if index not in (3, 4):
        assert (E1, b"t") in kept.observers


@given(st.binary(max_size=200))
def test_any_bytes(data: bytes) -> None:
    """Whatever a file holds, it is read without an error."""
    kept, end = replay(data)

    assert end <= len(data)
    assert kept.damaged <= len(data)


def test_missing_records() -> None:
    """Where records are known to be missing, nobody is believed to have the newest state."""
    kept, _ = replay(written(*SAID, Record(RecordKind.GAP)))

    assert kept.damaged
    assert not any(kept.has_newest(each) for each in kept.observers.values())


def test_a_lost_end_of_an_observation() -> None:
    """Observers of a request's old entry are none when there is a new one."""
    again = Record(RecordKind.SUBJECT, 2, 0, b"state-3.", b"\x01request")
    kept, _ = replay(written(*SAID, again, Record(RecordKind.OBSERVER, 2, 1, b"new", b"t")))

    assert list(kept.observers) == [(b"new", b"t")]


def test_another_format() -> None:
    """A file of a newer release is refused, not thrown away."""
    with pytest.raises(ConfigError, match="format 2"):
        replay(written(Record(RecordKind.VERSION, 2)))


some_records = st.one_of(
    st.builds(
        Record,
        st.sampled_from([RecordKind.SUBJECT, RecordKind.STATE]),
        st.integers(1, 3),
        st.just(0),
        st.binary(max_size=2),
    ),
    st.builds(
        Record,
        st.sampled_from([RecordKind.OBSERVER, RecordKind.ACKNOWLEDGED, RecordKind.ENDED]),
        st.integers(1, 3),
        st.integers(0, 65_535),
        st.sampled_from([E1, E2]),
        st.sampled_from([b"", b"t"]),
    ),
    st.builds(Record, st.just(RecordKind.NUMBER), st.integers(0, 2**24 - 1)),
    st.builds(
        Record, st.just(RecordKind.STREAM), st.integers(1, 9), st.just(0), st.just(b"x"),
        st.sampled_from([b"a/b", b"c/d"]),
    ),
)  # fmt: skip


@given(st.lists(some_records, max_size=30))
def test_rewriting_says_the_same(records: list[Record]) -> None:
    """The rewritten journal says the same, and rewriting it again changes nothing."""
    numbered = [
        attrs.evolve(record, second=b"%d" % record.number)
        if record.kind == RecordKind.SUBJECT
        else record
        for record in records
    ]
    data = written(*numbered)
    small = compacted(data)

    assert summary(replay(small)[0]) == summary(replay(data)[0])
    assert replay(compacted(small)) == replay(small)


async def settled(keeper: JournalFile) -> None:
    """Wait until all is on the disk."""
    await until(
        lambda: not keeper.journal._waiting and keeper._size == keeper._path.stat().st_size
    )


async def test_the_file(tmp_path: Path) -> None:
    """What is said is there the next time, also what was said just before the end."""
    directory = tmp_path / "new" / "state"
    async with open_journal(directory) as keeper:
        for record in SAID[1:]:
            keeper.journal.append(*attrs.astuple(record))
    async with open_journal(directory) as keeper:
        assert summary(keeper.stored) == summary(replay(written(*SAID))[0])


async def test_nothing_is_kept_without_a_directory(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Without a place to keep it, nothing is, and the log says so."""
    with caplog.at_level("INFO"):
        async with open_journal(None) as keeper:
            keeper.journal.append(RecordKind.NUMBER, 5)
            assert keeper.journal.take() == b""
            assert keeper.review(Loader(tmp_path)) == []  # type: ignore[arg-type]

    assert caplog.messages == ["no --state: observers are forgotten when the server stops"]


async def test_rewritten_when_most_is_void(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The file stays small however often its observers are told."""
    monkeypatch.setattr(journal_module, "SMALLEST", 2_000)
    monkeypatch.setattr(journal_module, "WRITE_S", 0.0)
    async with open_journal(tmp_path) as keeper:
        for record in SAID[1:]:
            keeper.journal.append(*attrs.astuple(record))
        for number in range(30):
            for _ in range(20):
                keeper.journal.append(RecordKind.ACKNOWLEDGED, 0, 0x8000 + number, E1, b"t")
            await settled(keeper)
            assert (tmp_path / FILE).stat().st_size < 4_000
    kept, _ = replay((tmp_path / FILE).read_bytes())

    assert kept.observers[E1, b"t"].message_id == 0x8000 + 29
    assert not kept.has_newest(kept.observers[E2, b""])


async def test_a_full_disk(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """What cannot be written is said once, and written later; of too much, that it is missing."""
    monkeypatch.setattr(journal_module, "RETRY_S", 0.0)
    full, fsync = True, os.fsync
    tries = 0

    def no_space(descriptor: int) -> None:
        nonlocal tries
        tries += 1
        if full:
            raise OSError(errno.ENOSPC, "No space left on device")
        fsync(descriptor)

    async with open_journal(tmp_path) as keeper:
        monkeypatch.setattr(os, "fsync", no_space)
        for record in SAID[1:]:
            keeper.journal.append(*attrs.astuple(record))
        await until(lambda: tries > 2)
        full = False
        await settled(keeper)
        kept, _ = replay((tmp_path / FILE).read_bytes())
        assert summary(kept) == summary(replay(written(*SAID))[0])
        full = True
        monkeypatch.setattr(journal_module, "MOST_WAITING", 100)
        for _ in range(10):
            keeper.journal.append(RecordKind.ACKNOWLEDGED, 0, 0x8002, E1, b"t")
        await until(lambda: tries > 5)
        full = False
        await settled(keeper)
        kept, _ = replay((tmp_path / FILE).read_bytes())
        assert kept.damaged
        assert kept.observers.keys() == {(E1, b"t"), (E2, b"")}

    assert len([m for m in caplog.messages if "cannot be written" in m]) == 2


async def test_one_server_for_each_directory(tmp_path: Path) -> None:
    """A second server is refused; after the first has ended, it is not."""
    async with open_journal(tmp_path):
        with pytest.raises(ConfigError, match="another server"):
            JournalFile.open(tmp_path)
    async with open_journal(tmp_path):
        pass


def test_a_place_that_is_none(tmp_path: Path) -> None:
    """What is no directory is named."""
    (tmp_path / "file").touch()
    with pytest.raises(ConfigError, match=r"file: no state can be stored there: "):
        JournalFile.open(tmp_path / "file")


async def test_damage_is_said_once(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """A damaged file is read as far as it can be, and whole again afterwards."""
    data = bytearray(written(*SAID))
    data[len(written(*SAID[:2])) + 12] ^= 1
    (tmp_path / FILE).write_bytes(data)
    for _ in range(2):
        async with open_journal(tmp_path) as keeper:
            assert len(keeper.stored.observers) == 2

    assert [m.split(": ")[1] for m in caplog.messages] == [
        f"damaged, {len(SAID[2].encode())} bytes are skipped; all observers are notified again"
    ]


async def test_sequences(sample: Path, tmp_path: Path) -> None:
    """A state that stands for a sequence of before is refused if it is another one."""
    async with open_journal(tmp_path / "state") as keeper:
        keeper.learn(keeper.review(Loader(sample).load()))
        assert keeper.review(Loader(sample).load()) == []
    file = sample / "packages/sensor-node/streams/stable.toml"
    text = file.read_text()
    async with open_journal(tmp_path / "state") as keeper:
        assert keeper.review(Loader(sample).load()) == []
        file.write_text(text.replace('version = "1.0.0"', 'version = "0.9"'))
        for _ in range(2):
            with pytest.raises(
                InvalidDataError, match="must be above 1, the sequence of another state"
            ) as caught:
                keeper.review(Loader(sample).load())
        file.write_text(
            text.replace('version = "1.0.0"\nsequence = 1', 'version = "2"\nsequence = 2')
        )
        assert len(keeper.review(Loader(sample).load())) == 1

    assert "rollback" in caught.value.hint


async def test_writing_does_not_hold_up_the_loop(tmp_path: Path) -> None:
    """The loop runs on while a slow disk takes what it was given."""
    async with open_journal(tmp_path) as keeper:
        for number in range(20_000):
            keeper.journal.append(RecordKind.NUMBER, number)
        longest, last = 0.0, asyncio.get_running_loop().time()
        while keeper._size < 20_000:
            await asyncio.sleep(0)
            now = asyncio.get_running_loop().time()
            longest, last = max(longest, now - last), now

    assert longest < 0.5


def test_too_much_waits(monkeypatch: pytest.MonkeyPatch) -> None:
    """What waits for the disk is bounded."""
    monkeypatch.setattr(journal_module, "MOST_WAITING", 200)
    journal = Journal(lambda: None)
    for _ in range(1_000):
        journal.append(RecordKind.ACKNOWLEDGED, 0, 1, E1, b"t")
        assert journal._bytes <= 230
    kept, _ = replay(journal.take())

    assert kept.damaged


@pytest.mark.parametrize("gone", ["file", "directory"])
async def test_removed(gone: str, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """What is removed under a running server is made anew, with all that stood there."""
    directory = tmp_path / "state"
    async with open_journal(directory) as keeper:
        for record in SAID[1:-1]:
            keeper.journal.append(*attrs.astuple(record))
        await settled(keeper)
        if gone == "directory":
            # In one step: the keeper would make the file anew between two.
            directory.rename(tmp_path / "gone")
        else:
            (directory / FILE).unlink()
        keeper.journal.append(*attrs.astuple(SAID[-1]))
        await until(lambda: (directory / FILE).exists())
        await settled(keeper)
        with pytest.raises(ConfigError, match="another server"):
            JournalFile.open(directory)
        assert keeper.trouble == ""
    async with open_journal(directory) as keeper:
        assert summary(keeper.stored) == summary(replay(written(*SAID))[0])

    assert caplog.messages == [f"{directory / FILE}: was removed; it is written anew"]


async def test_removed_and_taken(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where another server has made itself at home meanwhile, its state is left alone."""
    monkeypatch.setattr(journal_module, "RETRY_S", 0.01)
    directory, away = tmp_path / "state", tmp_path / "away"
    async with open_journal(directory) as keeper:
        directory.rename(away)
        async with open_journal(directory) as other:
            keeper.journal.append(RecordKind.NUMBER, 5)
            await until(lambda: keeper.trouble)
            assert keeper.trouble.startswith(f"{directory / FILE}: cannot be written: ")
            other.journal.append(RecordKind.NUMBER, 7)
            await settled(other)
        await until(lambda: not keeper.trouble)
        await settled(keeper)
    kept, _ = replay((directory / FILE).read_bytes())

    assert kept.number == 5


def refusing(number: int) -> Callable[[Path, bytes], None]:
    def write(path: Path, _data: bytes) -> None:
        raise OSError(number, os.strerror(number), str(path))

    return write


async def test_a_full_disk_at_the_start(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What was there is used, and is there still when there is room again."""
    monkeypatch.setattr(journal_module, "RETRY_S", 0.01)
    (tmp_path / FILE).write_bytes(written(*SAID[:-1]))
    write = files.write
    monkeypatch.setattr(journal_module, "write", refusing(errno.ENOSPC))
    async with open_journal(tmp_path) as keeper:
        assert len(keeper.stored.observers) == 2
        keeper.journal.append(*attrs.astuple(SAID[-1]))
        await until(lambda: keeper.trouble)
        monkeypatch.setattr(journal_module, "write", write)
        await until(lambda: not keeper.trouble)
        await settled(keeper)
    kept, _ = replay((tmp_path / FILE).read_bytes())

    assert summary(kept) == summary(replay(written(*SAID))[0])


def test_a_place_of_somebody_else(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A directory that may not be written to is a mistake, not a trouble that passes."""
    monkeypatch.setattr(journal_module, "write", refusing(errno.EACCES))
    with pytest.raises(ConfigError, match="no state can be stored there: Permission denied"):
        JournalFile.open(tmp_path)


async def test_no_room_for_both(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where a shorter file cannot be written beside the long one, the long one is written on."""
    monkeypatch.setattr(journal_module, "SMALLEST", 100)
    async with open_journal(tmp_path) as keeper:
        for record in SAID[1:]:
            keeper.journal.append(*attrs.astuple(record))
        monkeypatch.setattr(journal_module, "write", refusing(errno.ENOSPC))
        for _ in range(20):
            keeper.journal.append(RecordKind.ACKNOWLEDGED, 0, 0x8001, E1, b"t")
        await settled(keeper)
        assert keeper.trouble == ""
    data = (tmp_path / FILE).read_bytes()

    assert summary(replay(data)[0]) == summary(replay(written(*SAID))[0])
    assert data.count(SAID[-1].encode()) == 21
