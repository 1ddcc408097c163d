"""What a server remembers over a restart: its observers, and the highest sequences.

A journal: records are appended, and now and then the file is rewritten without what later records
made void. `Journal` makes the records, `replay` reads them, `Keeper` is the file.
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
_WRITE_S = 0.05  # from a record to its way to the disk
_RETRY_S = 1.0  # after a failure
_SMALLEST = 64 * 1_024  # bytes: below, rewriting is not worth it
_MOST_WAITING = 4 * 2**20  # bytes that wait for a disk that is full
# A disk in this state is to be mended while the service runs; other reasons are of its operator.
_FULL_OR_BROKEN = (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EIO, errno.EFBIG)


class Kind(enum.IntEnum):
    """What a record says, and what its fields are then: number, message ID, first, second."""

    VERSION = 0  # number: of the format
    SUBJECT = 1  # number: its own; digest of its answer, the request
    STATE = 2  # number: of the subject; digest of its new answer, which is to be told to all
    OBSERVER = 3  # number: of the subject; ID of the registration; endpoint, token
    TOLD = 4  # ID of the notification of the newest answer; endpoint, token
    ENDED = 5  # endpoint, token
    NUMBER = 6  # number: below which all Observe numbers are
    STREAM = 7  # number: the sequence; digest of the essence, package/stream
    GAP = 8  # records are missing here


# By how many times its length a record makes others void, and itself.
_VOID = {Kind.STATE: 1, Kind.TOLD: 1, Kind.ENDED: 3, Kind.NUMBER: 1, Kind.STREAM: 1}


@attrs.frozen
class Record:
    """One line of the journal.

    Attributes:
        kind: Says what the others are.
        number: Below 2^32.
        message_id: Below 2^16.
        first: At most 255 bytes.
        second: With the others at most 65,535 bytes.
    """

    kind: Kind
    number: int = 0
    message_id: int = 0
    first: bytes = b""
    second: bytes = b""

    def encode(self) -> bytes:
        """Return the bytes of the record."""
        return _encode(self.kind, self.number, self.message_id, self.first, self.second)


def _encode(kind: Kind, number: int, message_id: int, first: bytes, second: bytes) -> bytes:
    body = _BODY.pack(kind, number, message_id, len(first)) + first + second
    return _HEAD.pack(_MAGIC, len(body), zlib.crc32(body)) + body


# ----------------------------------------------------------------------------------------------
# Reading


@attrs.define
class KeptSubject:
    """A request that observers made.

    Attributes:
        request: As it came.
        digest: Of the newest answer that may have been sent.
        version: Counts the answers.
    """

    request: bytes
    digest: bytes
    version: int = 0


@attrs.define
class KeptObserver:
    """An observer.

    Attributes:
        subject: Number of its subject.
        registration_id: Message ID of its request.
        message_id: Of its last acknowledged notification, or 0.
        version: Of the subject's answer that it is known to have.
    """

    subject: int
    registration_id: int
    message_id: int
    version: int


@attrs.define
class Kept:
    """What a journal says.

    Attributes:
        number: Below which all Observe numbers are that were used.
        subjects: By their numbers.
        observers: By endpoint and token.
        sequences: The highest of each stream, and the digest of what it stood for.
        damaged: Bytes that could not be read, or 1 where records are missing.
    """

    number: int = 0
    subjects: dict[int, KeptSubject] = attrs.field(factory=dict)
    observers: dict[tuple[bytes, bytes], KeptObserver] = attrs.field(factory=dict)
    sequences: dict[StreamName, tuple[int, bytes]] = attrs.field(factory=dict)
    damaged: int = 0

    def has_newest(self, observer: KeptObserver) -> bool:
        """Tell whether an observer is known to have the subject's newest answer."""
        return not self.damaged and observer.version == self.subjects[observer.subject].version

    def take(self, record: Record) -> None:
        """Take in what a record says."""
        key = (record.first, record.second)
        match record.kind:
            case Kind.VERSION if record.number != _VERSION:
                raise ConfigError(
                    f"the state is of format {record.number}, which this release does not know",
                    hint="Use the release that wrote it, or another --state.",
                )
            case Kind.SUBJECT:
                self.subjects[record.number] = KeptSubject(record.second, record.first)
            case Kind.STATE if record.number in self.subjects:
                subject = self.subjects[record.number]
                subject.digest = record.first
                subject.version += 1
            case Kind.OBSERVER if record.number in self.subjects:
                version = self.subjects[record.number].version
                self.observers[key] = KeptObserver(record.number, record.message_id, 0, version)
            case Kind.TOLD if key in self.observers:
                observer = self.observers[key]
                observer.message_id = record.message_id
                observer.version = self.subjects[observer.subject].version
            case Kind.ENDED:
                self.observers.pop(key, None)
            case Kind.NUMBER:
                self.number = record.number
            case Kind.STREAM:
                package, _, stream = record.second.decode(errors="replace").partition("/")
                self.sequences[package, stream] = (record.number, record.first)
            case Kind.GAP:
                self.damaged = self.damaged or 1

    def settle(self) -> None:
        """Drop the observers of what a later subject stands for: that they ended was lost."""
        newest = {subject.request: number for number, subject in self.subjects.items()}
        self.observers = {
            key: observer
            for key, observer in self.observers.items()
            if newest[self.subjects[observer.subject].request] == observer.subject
        }

    def records(self) -> Iterator[Record]:
        """Return the records that say the same in the fewest words."""
        yield Record(Kind.VERSION, _VERSION)
        yield Record(Kind.NUMBER, self.number)
        for (package, stream), (sequence, digest) in self.sequences.items():
            name = f"{package}/{stream}".encode()
            yield Record(Kind.STREAM, sequence, 0, digest, name)
        used = {observer.subject for observer in self.observers.values()}
        for number in used:
            subject = self.subjects[number]
            yield Record(Kind.SUBJECT, number, 0, b"", subject.request)
        # Those who are to be told stand before the newest state, the others after it.
        yield from self._observers(newest=False)
        for number in used:
            yield Record(Kind.STATE, number, 0, self.subjects[number].digest)
        yield from self._observers(newest=True)

    def _observers(self, *, newest: bool) -> Iterator[Record]:
        for (endpoint, token), observer in self.observers.items():
            if self.has_newest(observer) == newest:
                registration_id = observer.registration_id
                yield Record(Kind.OBSERVER, observer.subject, registration_id, endpoint, token)
                if newest and observer.message_id:
                    yield Record(Kind.TOLD, 0, observer.message_id, endpoint, token)


def replay(data: bytes) -> tuple[Kept, int]:
    """Read a journal.

    What cannot be read is left out: at its end it was torn by a crash; before, nobody is believed
    to know the newest state.

    Returns:
        What it says, and how many of its bytes end with a whole record.

    Raises:
        ConfigError: It is of another release's format.
    """
    kept = Kept()
    at = end = 0
    while (at := data.find(_MAGIC, at)) >= 0:
        record, after = _read(data, at)
        if record is None:
            at += 1
            continue
        kept.damaged += at - end
        kept.take(record)
        at = end = after
    kept.settle()
    return kept, end


def _read(data: bytes, at: int) -> tuple[Record | None, int]:
    body_at = at + _HEAD.size
    if body_at > len(data):
        return None, at
    _, length, checksum = _HEAD.unpack_from(data, at)
    body = data[body_at : body_at + length]
    if len(body) != length or length < _BODY.size or zlib.crc32(body) != checksum:
        return None, at
    kind, number, message_id, split = _BODY.unpack_from(body)
    if kind > max(Kind):
        return None, at
    rest = body[_BODY.size :]
    record = Record(Kind(kind), number, message_id, rest[:split], rest[split:])
    return record, body_at + length


def compacted(data: bytes) -> bytes:
    """Return a journal that says the same without what is void."""
    kept, _ = replay(data)
    small = bytearray()
    for record in kept.records():
        small += record.encode()
    return bytes(small)


# ----------------------------------------------------------------------------------------------
# Writing


@attrs.define(eq=False)
class Journal:
    """Records on their way to the file; where nothing is kept they go nowhere.

    Attributes:
        wake: Called when there is something to write, since `take`; None: nothing is kept.
        void: Bytes that what was said made void, about.
    """

    wake: Callable[[], object] | None = None
    void: int = attrs.field(init=False, default=0)
    _waiting: list[bytes] = attrs.field(init=False, factory=list)
    _bytes: int = attrs.field(init=False, default=0)

    def append(
        self,
        kind: Kind,
        number: int = 0,
        message_id: int = 0,
        first: bytes = b"",
        second: bytes = b"",
    ) -> None:
        """Say something; the arguments are those of `Record`."""
        if self.wake is None:
            return
        if not self._waiting:
            self.wake()
        data = _encode(kind, number, message_id, first, second)
        self.void += _VOID.get(kind, 0) * len(data)
        self.put(data)

    def put(self, data: bytes, at: int | None = None) -> None:
        """Add whole records, at the end or where they come before others.

        Of too much, only that there was something is left.
        """
        self._waiting.insert(len(self._waiting) if at is None else at, data)
        self._bytes += len(data)
        if self._bytes > _MOST_WAITING:
            gap = Record(Kind.GAP).encode()
            self._waiting[:] = [gap]
            self._bytes = len(gap)

    def take(self) -> bytes:
        """Return all that was said since the last time."""
        taken = b"".join(self._waiting)
        self._waiting.clear()
        self._bytes = 0
        return taken


@attrs.define(eq=False)
class Keeper:
    """The file of a journal, written in the background.

    Attributes:
        journal: What is said to it will be written.
        kept: What it said at the start.
        running: The task that writes.
        trouble: Why nothing can be written now, or "".
    """

    journal: Journal
    kept: Kept
    running: asyncio.Task[None] = attrs.field(init=False)
    trouble: str = attrs.field(init=False, default="")
    _directory: int = -1
    _path: Path = Path()
    _unwritten: bytes = attrs.field(init=False, default=b"")
    _size: int = attrs.field(init=False, default=0)
    _descriptor: int = attrs.field(init=False, default=-1)
    _said: asyncio.Event = attrs.field(init=False, factory=asyncio.Event)
    _closing: asyncio.Event = attrs.field(init=False, factory=asyncio.Event)
    _reviewed: dict[StreamName, Stream] = attrs.field(init=False, factory=dict)

    @classmethod
    def open(cls, directory: Path | None) -> Keeper:
        """Read what was kept, and go on from there.

        Args:
            directory: Made if need be; None: nothing is kept.

        Raises:
            ConfigError: It cannot be used, or another server uses it.
        """
        if directory is None:
            _log.info("no --state: observers are forgotten when the server stops")
            return cls(Journal(), Kept())
        path = directory.absolute() / FILE
        try:
            make_directory(path.parent)
            descriptor = _locked(path.parent)
            try:
                keeper = cls._read(path, descriptor)
            except BaseException:
                os.close(descriptor)
                raise
        except BlockingIOError as error:
            raise ConfigError(
                f"{directory}: another server keeps its state there",
                hint="Give each server a --state of its own.",
            ) from error
        except OSError as error:
            detail = f"{directory}: no state can be kept there: {error.strerror}"
            raise ConfigError(detail, hint="Choose another --state.") from error
        return keeper

    @classmethod
    def _read(cls, path: Path, directory: int) -> Keeper:
        data = path.read_bytes() if path.exists() else b""
        kept, _ = replay(data)
        if kept.damaged:
            _log.warning(
                "%s: damaged, %d bytes are left out; its observers are told anew",
                path,
                kept.damaged,
            )
        keeper = cls(Journal(), kept, directory, path)
        keeper.journal.wake = keeper._said.set
        try:
            keeper._rewrite(data)
        except OSError as error:
            if error.errno not in _FULL_OR_BROKEN:
                raise
            keeper._unwritten = data
            keeper._said.set()  # to be tried again
        return keeper

    def review(self, repository: Repository) -> list[Record]:
        """Compare the sequences of a repository with the highest of before, restarts included.

        Returns:
            What is to be remembered, for `learn`.

        Raises:
            InvalidDataError: A sequence stands for another state than it did.

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
                sequence, seen = self.kept.sequences.get(name, (0, b""))
                if stream.sequence <= sequence and digest != seen:
                    file = f"packages/{package_name}/streams/{own}.toml"
                    issues.append(sequence_issue(sequence, "which stood for another state", file))
                elif digest != seen:
                    second = "/".join(name).encode()
                    records.append(Record(Kind.STREAM, stream.sequence, 0, digest, second))
                self._reviewed[name] = stream
        if issues:
            self._reviewed.clear()
            raise InvalidDataError(issues, hint=sequence_hint(issues))
        return records

    def learn(self, records: Iterable[Record]) -> None:
        """Remember what `review` found new."""
        for record in records:
            self.kept.take(record)
            self.journal.append(*attrs.astuple(record))

    async def run(self) -> None:
        """Write what is said, until `close`."""
        closing = False
        while not closing:
            await self._said.wait()
            self._said.clear()
            closing = self._closing.is_set()
            await asyncio.sleep(0 if closing else _WRITE_S)
            data = self.journal.take()
            failed = await asyncio.to_thread(self._try, data)
            if failed:
                self.journal.put(data, 0)
                if not self.trouble:
                    _log.error("%s: cannot be written, is tried again: %s", self._path, failed)
                self.trouble = f"{self._path}: cannot be written: {failed}"
                await asyncio.sleep(0 if closing else _RETRY_S)
                self._said.set()
            elif self.trouble:
                self.trouble = ""
                _log.info("%s: is written again", self._path)

    async def close(self) -> None:
        """Write the rest."""
        self._closing.set()
        self._said.set()
        await self.running
        for descriptor in (self._descriptor, self._directory):
            if descriptor >= 0:
                os.close(descriptor)

    def _try(self, data: bytes) -> str:
        """Write; the reason if it failed, and then none of it was written."""
        if self._directory < 0 or (self._descriptor >= 0 and not data):
            return ""
        try:
            self._stay_in_place()
            os.lseek(self._descriptor, self._size, os.SEEK_SET)
            os.truncate(self._descriptor, self._size)
            view = memoryview(data)
            while view:
                view = view[os.write(self._descriptor, view) :]
            os.fsync(self._descriptor)
        except OSError as error:
            return error.strerror or str(error)
        self._size += len(data)
        if self._size > _SMALLEST and self.journal.void > self._size / 2:
            # Where there is no room for both, the long one says the same.
            with contextlib.suppress(OSError):
                self._rewrite(self._path.read_bytes())
        return ""

    def _stay_in_place(self) -> None:
        """Make the file anew if it was removed, or could not be made yet."""
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
        _log.warning("%s: was removed, and is made anew", self._path)

    def _rewrite(self, data: bytes) -> None:
        """Write the file anew, without what is void."""
        small = compacted(data)
        write(self._path, small)
        fresh = os.open(self._path, os.O_RDWR | os.O_CLOEXEC)
        if self._descriptor >= 0:
            os.close(self._descriptor)
        self._descriptor = fresh
        self._size = len(small)
        self.journal.void = 0


def _locked(directory: Path) -> int:
    """Open a directory that no other server uses."""
    descriptor = os.open(directory, os.O_RDONLY | os.O_DIRECTORY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BaseException:
        os.close(descriptor)
        raise
    return descriptor


@contextlib.asynccontextmanager
async def keeping(directory: Path | None) -> AsyncIterator[Keeper]:
    """Remember in a directory; the arguments and errors are those of `Keeper.open`."""
    keeper = await asyncio.to_thread(Keeper.open, directory)
    keeper.running = asyncio.create_task(keeper.run())
    try:
        yield keeper
    finally:
        await keeper.close()
