"""Stores what a server needs after a restart: its observers, and the highest sequences.

Records are appended to a file, which is rewritten without obsolete ones when these are more than
half of it. `Journal` makes the records, `replay` reads them, `JournalFile` is the file.
Source: `spec/resources.md`, rules C-60 to C-64.
"""

from __future__ import annotations

import asyncio
import contextlib
import enum
import errno
import fcntl
import hashlib
import logging
import os
import struct
import zlib
from collections.abc import AsyncIterator, Callable, Iterable, Iterator
from pathlib import Path

import attrs

from netota_coap.encoding.codecs import Format
from netota_coap.encoding.documents import encode
from netota_coap.errors import ConfigError, InvalidDataError
from netota_coap.files import make_directory, write
from netota_coap.model.values import Repository, Stream, StreamName
from netota_coap.repository.loading import sequence_hint, sequence_issue

FILE = "observers.journal"

_log = logging.getLogger(__name__)

_VERSION = 1
_MAGIC = b"\xc5\x0a"
_HEAD = struct.Struct(">2sHI")  # magic, length of the body, CRC-32 of the body
_BODY = struct.Struct(">BIHB")  # kind, number, message ID, length of the first part
WRITE_S = 0.05  # records are collected for as long before they are written
RETRY_S = 1.0  # after a failure
SMALLEST = 64 * 1_024  # bytes; a smaller file is never rewritten
MOST_WAITING = 4 * 2**20  # bytes of records while the disk is full
# These may pass while the service runs; other errors at its start are mistakes of the operator.
_FULL_OR_BROKEN = (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EIO, errno.EFBIG)


class RecordKind(enum.IntEnum):
    """The kinds of records; comments name the fields in use: number; message_id; first, second."""

    VERSION = 0  # version of the format
    SUBJECT = 1  # subject; digest of its response, request
    STATE = 2  # subject; digest of its new response, which no observer has yet
    OBSERVER = 3  # subject; message ID of the registration; endpoint, token
    ACKNOWLEDGED = 4  # message ID of a notification of the newest response; endpoint, token
    ENDED = 5  # endpoint, token
    NUMBER = 6  # upper bound of the Observe numbers used
    STREAM = 7  # sequence; digest of the essence, package/stream
    GAP = 8  # records are missing here


# How much a record makes obsolete, itself included, as a multiple of its own length.
_OBSOLETE = {
    RecordKind.STATE: 1,
    RecordKind.ACKNOWLEDGED: 1,
    RecordKind.ENDED: 3,
    RecordKind.NUMBER: 1,
    RecordKind.STREAM: 1,
}


@attrs.frozen
class Record:
    """One record of the journal.

    Attributes:
        kind: Gives the other fields their meaning.
        number: Below 2^32.
        message_id: Below 2^16.
        first: At most 255 bytes.
        second: At most 65,535 bytes, with the other fields.
    """

    kind: RecordKind
    number: int = 0
    message_id: int = 0
    first: bytes = b""
    second: bytes = b""

    def encode(self) -> bytes:
        """Encode the record."""
        return _encode(self.kind, self.number, self.message_id, self.first, self.second)


def _encode(kind: RecordKind, number: int, message_id: int, first: bytes, second: bytes) -> bytes:
    body = _BODY.pack(kind, number, message_id, len(first)) + first + second
    return _HEAD.pack(_MAGIC, len(body), zlib.crc32(body)) + body


@attrs.define
class StoredSubject:
    """A subject of the table; `version` counts its responses."""

    request: bytes
    digest: bytes
    version: int = 0


@attrs.define
class StoredObserver:
    """An observation.

    Attributes:
        message_id: That of the last acknowledged notification, or 0.
        version: Version of the subject's response that the observer has.
    """

    subject: int
    registration_id: int
    message_id: int
    version: int


@attrs.define
class StoredState:
    """The state that the records of a journal describe.

    Attributes:
        number: Upper bound of the Observe numbers used.
        observers: By endpoint and token.
        sequences: The highest sequence of each stream, and the digest of its essence.
        damaged: Unreadable bytes; 1 where only a gap was recorded. Then every observer counts as
            out of date.
    """

    number: int = 0
    subjects: dict[int, StoredSubject] = attrs.field(factory=dict)
    observers: dict[tuple[bytes, bytes], StoredObserver] = attrs.field(factory=dict)
    sequences: dict[StreamName, tuple[int, bytes]] = attrs.field(factory=dict)
    damaged: int = 0

    def has_newest(self, observer: StoredObserver) -> bool:
        """Tell whether an observer is known to have its subject's newest response."""
        return not self.damaged and observer.version == self.subjects[observer.subject].version

    def apply(self, record: Record) -> None:
        """Apply a record; see `replay`."""
        key = (record.first, record.second)
        match record.kind:
            case RecordKind.VERSION if record.number != _VERSION:
                raise ConfigError(
                    f"the state has format {record.number}, which this release cannot read",
                    hint="Use the release that wrote it, or another --state.",
                )
            case RecordKind.SUBJECT:
                self.subjects[record.number] = StoredSubject(record.second, record.first)
            case RecordKind.STATE if record.number in self.subjects:
                subject = self.subjects[record.number]
                subject.digest = record.first
                subject.version += 1
            case RecordKind.OBSERVER if record.number in self.subjects:
                version = self.subjects[record.number].version
                self.observers[key] = StoredObserver(record.number, record.message_id, 0, version)
            case RecordKind.ACKNOWLEDGED if key in self.observers:
                observer = self.observers[key]
                observer.message_id = record.message_id
                observer.version = self.subjects[observer.subject].version
            case RecordKind.ENDED:
                self.observers.pop(key, None)
            case RecordKind.NUMBER:
                self.number = record.number
            case RecordKind.STREAM:
                package, _, stream = record.second.decode(errors="replace").partition("/")
                self.sequences[package, stream] = (record.number, record.first)
            case RecordKind.GAP:
                self.damaged = self.damaged or 1

    def drop_replaced(self) -> None:
        """Drop observers of a subject that has a successor: the record of their end was lost."""
        newest = {subject.request: number for number, subject in self.subjects.items()}
        self.observers = {
            key: observer
            for key, observer in self.observers.items()
            if newest[self.subjects[observer.subject].request] == observer.subject
        }

    def records(self) -> Iterator[Record]:
        """Return the fewest records that add up to this state."""
        yield Record(RecordKind.VERSION, _VERSION)
        yield Record(RecordKind.NUMBER, self.number)
        for name, (sequence, digest) in self.sequences.items():
            yield Record(RecordKind.STREAM, sequence, 0, digest, "/".join(name).encode())
        used = {observer.subject for observer in self.observers.values()}
        for number in used:
            yield Record(RecordKind.SUBJECT, number, 0, b"", self.subjects[number].request)
        # Observers before the record of the newest state do not have it, those after it do.
        yield from self._observers(newest=False)
        for number in used:
            yield Record(RecordKind.STATE, number, 0, self.subjects[number].digest)
        yield from self._observers(newest=True)

    def _observers(self, *, newest: bool) -> Iterator[Record]:
        for key, observer in self.observers.items():
            if self.has_newest(observer) == newest:
                registration_id = observer.registration_id
                yield Record(RecordKind.OBSERVER, observer.subject, registration_id, *key)
                if newest and observer.message_id:
                    yield Record(RecordKind.ACKNOWLEDGED, 0, observer.message_id, *key)


def replay(data: bytes) -> tuple[StoredState, int]:
    """Read a journal: its state, and where its last whole record ends.

    Unreadable bytes are skipped. At the end, a crash left an incomplete record there; before it,
    they are damage: every observer then counts as out of date and is notified again.

    Raises:
        ConfigError: The journal has the format of another release.
    """
    stored = StoredState()
    at = end = 0
    while (at := data.find(_MAGIC, at)) >= 0:
        record, after = _read(data, at)
        if record is None:
            at += 1
            continue
        stored.damaged += at - end
        stored.apply(record)
        at = end = after
    stored.drop_replaced()
    return stored, end


def _read(data: bytes, at: int) -> tuple[Record | None, int]:
    body_at = at + _HEAD.size
    if body_at > len(data):
        return None, at
    _, length, checksum = _HEAD.unpack_from(data, at)
    body = data[body_at : body_at + length]
    if len(body) != length or length < _BODY.size or zlib.crc32(body) != checksum:
        return None, at
    kind, number, message_id, split = _BODY.unpack_from(body)
    if kind > max(RecordKind):
        return None, at
    rest = body[_BODY.size :]
    record = Record(RecordKind(kind), number, message_id, rest[:split], rest[split:])
    return record, body_at + length


def compacted(data: bytes) -> bytes:
    """Return a journal of the same state without obsolete records."""
    stored, _ = replay(data)
    small = bytearray()
    for record in stored.records():
        small += record.encode()
    return bytes(small)


@attrs.define(eq=False)
class Journal:
    """Collects records for the file.

    Attributes:
        wake: Called with the first record since `take`; None: there is no file, and records are
            dropped.
        obsolete: Approximate number of bytes that the records made obsolete.
    """

    wake: Callable[[], object] | None = None
    obsolete: int = attrs.field(init=False, default=0)
    _waiting: list[bytes] = attrs.field(init=False, factory=list)
    _bytes: int = attrs.field(init=False, default=0)

    def append(
        self,
        kind: RecordKind,
        number: int = 0,
        message_id: int = 0,
        first: bytes = b"",
        second: bytes = b"",
    ) -> None:
        """Add a record; the arguments are those of `Record`."""
        if self.wake is None:
            return
        if not self._waiting:
            self.wake()
        data = _encode(kind, number, message_id, first, second)
        self.obsolete += _OBSOLETE.get(kind, 0) * len(data)
        self.put(data)

    def put(self, data: bytes, at: int | None = None) -> None:
        """Add encoded records, at the end or before others.

        Beyond the bound on memory, all are replaced by one that records the gap.
        """
        self._waiting.insert(len(self._waiting) if at is None else at, data)
        self._bytes += len(data)
        if self._bytes > MOST_WAITING:
            gap = Record(RecordKind.GAP).encode()
            self._waiting[:] = [gap]
            self._bytes = len(gap)

    def take(self) -> bytes:
        """Return all records since the last call."""
        taken = b"".join(self._waiting)
        self._waiting.clear()
        self._bytes = 0
        return taken


@attrs.define(eq=False)
class JournalFile:
    """The file of a journal, written in the background.

    Attributes:
        stored: What the file contained at the start.
        running: The task that writes.
        trouble: Why nothing can be written now, or "".
    """

    journal: Journal
    stored: StoredState
    running: asyncio.Task[None] = attrs.field(init=False)
    trouble: str = attrs.field(init=False, default="")
    _directory: int = -1
    _path: Path = Path()
    _unwritten: bytes = attrs.field(init=False, default=b"")
    _size: int = attrs.field(init=False, default=0)
    _descriptor: int = attrs.field(init=False, default=-1)
    _due: asyncio.Event = attrs.field(init=False, factory=asyncio.Event)
    _closing: asyncio.Event = attrs.field(init=False, factory=asyncio.Event)
    _reviewed: dict[StreamName, Stream] = attrs.field(init=False, factory=dict)

    @classmethod
    def open(cls, directory: Path | None) -> JournalFile:
        """Read the file in a directory, or create both; None: nothing is stored.

        Raises:
            ConfigError: The directory cannot be used, or another server uses it.
        """
        if directory is None:
            _log.info("no --state: observers are forgotten when the server stops")
            return cls(Journal(), StoredState())
        path = directory.absolute() / FILE
        try:
            make_directory(path.parent)
            descriptor = _locked(path.parent)
            try:
                return cls._read(path, descriptor)
            except BaseException:
                os.close(descriptor)
                raise
        except BlockingIOError as error:
            raise ConfigError(
                f"{directory}: another server stores its state there",
                hint="Give each server a --state of its own.",
            ) from error
        except OSError as error:
            detail = f"{directory}: no state can be stored there: {error.strerror}"
            raise ConfigError(detail, hint="Choose another --state.") from error

    @classmethod
    def _read(cls, path: Path, directory: int) -> JournalFile:
        data = path.read_bytes() if path.exists() else b""
        stored, _ = replay(data)
        if stored.damaged:
            damage = "%s: damaged, %d bytes are skipped; all observers are notified again"
            _log.warning(damage, path, stored.damaged)
        file = cls(Journal(), stored, directory, path)
        file.journal.wake = file._due.set
        try:
            file._rewrite(data)
        except OSError as error:
            if error.errno not in _FULL_OR_BROKEN:
                raise
            file._unwritten = data
            file._due.set()  # to try again
        return file

    def review(self, repository: Repository) -> list[Record]:
        """Compare the sequences of a repository with the highest ones served so far.

        Returns:
            New sequences, to be passed to `learn` when the repository is served.

        Raises:
            InvalidDataError: A sequence was served with another state.

        Source: rule R-9.
        """
        if self.journal.wake is None:
            return []
        issues, records = [], []
        for package_name, package in repository.packages.items():
            for own, stream in package.streams.items():
                name = (package_name, own)
                if self._reviewed.get(name) is stream:
                    continue
                digest = hashlib.sha256(encode(stream.essence(), Format.TOML)).digest()[:8]
                sequence, seen = self.stored.sequences.get(name, (0, b""))
                if stream.sequence <= sequence and digest != seen:
                    file = f"packages/{package_name}/streams/{own}.toml"
                    issues.append(sequence_issue(sequence, "the sequence of another state", file))
                elif digest != seen:
                    second = "/".join(name).encode()
                    records.append(Record(RecordKind.STREAM, stream.sequence, 0, digest, second))
                self._reviewed[name] = stream
        if issues:
            self._reviewed.clear()
            raise InvalidDataError(issues, hint=sequence_hint(issues))
        return records

    def learn(self, records: Iterable[Record]) -> None:
        """Store the records that `review` returned."""
        for record in records:
            self.stored.apply(record)
            self.journal.append(*attrs.astuple(record))

    async def run(self) -> None:
        """Write records until `close`."""
        closing = False
        while not closing:
            await self._due.wait()
            self._due.clear()
            closing = self._closing.is_set()
            await asyncio.sleep(0 if closing else WRITE_S)
            data = self.journal.take()
            failed = await asyncio.to_thread(self._try, data)
            if failed:
                self.journal.put(data, 0)
                if not self.trouble:
                    _log.error(
                        "%s: cannot be written, will be tried again: %s", self._path, failed
                    )
                self.trouble = f"{self._path}: cannot be written: {failed}"
                await asyncio.sleep(0 if closing else RETRY_S)
                self._due.set()
            elif self.trouble:
                self.trouble = ""
                _log.info("%s: can be written again", self._path)

    async def close(self) -> None:
        """Write the remaining records, and close the file."""
        self._closing.set()
        self._due.set()
        await self.running
        for descriptor in (self._descriptor, self._directory):
            if descriptor >= 0:
                os.close(descriptor)

    def _try(self, data: bytes) -> str:
        """Write records, or none of them; return why that failed, or ""."""
        if self._directory < 0 or (self._descriptor >= 0 and not data):
            return ""
        try:
            self._ensure_in_place()
            os.lseek(self._descriptor, self._size, os.SEEK_SET)
            os.truncate(self._descriptor, self._size)
            view = memoryview(data)
            while view:
                view = view[os.write(self._descriptor, view) :]
            os.fsync(self._descriptor)
        except OSError as error:
            return error.strerror or str(error)
        self._size += len(data)
        if self._size > SMALLEST and self.journal.obsolete > self._size / 2:
            # Without room for both files, the long one is as good.
            with contextlib.suppress(OSError):
                self._rewrite(self._path.read_bytes())
        return ""

    def _ensure_in_place(self) -> None:
        """Write the file anew if it was removed, or could not be created at the start."""
        if self._descriptor < 0:
            self._rewrite(self._unwritten)
            self._unwritten = b""
            return
        with contextlib.suppress(FileNotFoundError):
            if os.path.samestat(os.fstat(self._descriptor), self._path.stat()):
                return
        make_directory(self._path.parent)
        if not os.path.samestat(os.fstat(self._directory), self._path.parent.stat()):
            directory = _locked(self._path.parent)
            os.close(self._directory)
            self._directory = directory
        self._rewrite(os.pread(self._descriptor, self._size, 0))
        _log.warning("%s: was removed; it is written anew", self._path)

    def _rewrite(self, data: bytes) -> None:
        """Write the file anew, without obsolete records."""
        small = compacted(data)
        write(self._path, small)
        fresh = os.open(self._path, os.O_RDWR | os.O_CLOEXEC)
        if self._descriptor >= 0:
            os.close(self._descriptor)
        self._descriptor = fresh
        self._size = len(small)
        self.journal.obsolete = 0


def _locked(directory: Path) -> int:
    """Open and lock a directory; BlockingIOError: another server has it."""
    descriptor = os.open(directory, os.O_RDONLY | os.O_DIRECTORY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BaseException:
        os.close(descriptor)
        raise
    return descriptor


@contextlib.asynccontextmanager
async def open_journal(directory: Path | None) -> AsyncIterator[JournalFile]:
    """Write a journal while the block runs; argument and errors are `JournalFile.open`'s."""
    file = await asyncio.to_thread(JournalFile.open, directory)
    file.running = asyncio.create_task(file.run())
    try:
        yield file
    finally:
        await file.close()
