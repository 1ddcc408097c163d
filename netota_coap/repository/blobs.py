"""The files that a repository stores itself, each named by its SHA-256.

A stored file never changes, so a reader needs no lock; `verify` quarantines damaged ones. No
symbolic link at `blobs/` or below is followed.
Source: rules R-40 to R-48.
"""

from __future__ import annotations

import base64
import contextlib
import errno
import os
import re
import stat
import time
from collections.abc import Collection, Iterable, Iterator
from pathlib import Path

import attrs

from netota_coap.errors import InvalidDataError, Issue, NotFoundError, RepositoryError
from netota_coap.files import Progress, opened, writing
from netota_coap.model.values import Archive, Envelope, Repository, name_rule
from netota_coap.repository import history, loading
from netota_coap.repository.blob_files import (
    ANY_TYPE,
    envelope_of,
    exists,
    open_regular,
    renewed,
    require_unlocked,
    write_blob,
)
from netota_coap.repository.lock import locked, require_repository

DEFAULT_GRACE_S = 3600.0
INCOMING = "blobs/.incoming"
"""Where downloads are written; garbage collection spares the blobs that are named here."""

Key = tuple[bytes, int]
"""SHA-256 and size in bytes of an envelope."""

_PLACE = "blobs"
_SHARDS = f"{_PLACE}/sha256"
_QUARANTINE = f"{_PLACE}/quarantine"
_SHARD = re.compile(r"[0-9a-f]{2}")
_DIGEST = re.compile(r"[0-9a-f]{64}")
_TEMPORARY = re.compile(r"\.[0-9a-f]{64}\.[0-9a-f]{8}\.tmp")
_DIRECTORY = os.O_RDONLY | os.O_NOFOLLOW | os.O_DIRECTORY | os.O_CLOEXEC
_NOT_THERE = (errno.ENOENT, errno.ENOTDIR, errno.ELOOP)  # the last two: a link in its place
STALE_S = 60.0


def blob_name(sha256: bytes) -> str:
    """Return the name of a blob in URLs: base64url without padding, 43 characters."""
    return base64.urlsafe_b64encode(sha256).rstrip(b"=").decode()


def digest_of(name: str) -> bytes:
    """Return the SHA-256 that a name in a URL stands for.

    Raises:
        NotFoundError: It is no such name; each blob has one spelling.
    """
    with contextlib.suppress(ValueError):
        sha256 = base64.urlsafe_b64decode(f"{name}=") if len(name) == 43 else b""
        # The decoder skips invalid characters and ignores unused bits.
        if sha256 and blob_name(sha256) == name:
            return sha256
    raise NotFoundError("invalid name of a blob: it is a SHA-256 in base64url")


def path_of(sha256: bytes) -> str:
    """Return the path of a blob in its repository."""
    return f"{_shard_of(sha256)}/{sha256.hex()}"


def _shard_of(sha256: bytes) -> str:
    return f"{_SHARDS}/{sha256.hex()[:2]}"


def envelopes_of(state: Repository) -> Iterator[Envelope]:
    """Yield the envelopes of all archives in a repository."""
    for package in state.packages.values():
        for stream in package.streams.values():
            yield from (archive.envelope for archive in stream.archives or ())


# ----------------------------------------------------------------------------------------------
# Blobs


@attrs.frozen
class Blob:
    """A file that a repository stores.

    Attributes:
        size: Bytes.
        since: When it was last added, in seconds of Unix time.
        damaged: Whether it is in quarantine, because its content does not match its name.
    """

    sha256: bytes
    size: int
    since: float
    damaged: bool = False


@attrs.frozen
class Blobs:
    """The blobs of a repository.

    Methods that write raise a `RepositoryError` if the repository is missing or cannot be written.
    """

    root: Path

    def open(self, sha256: bytes) -> int:
        """Open a blob and return its descriptor, which the caller closes.

        It remains readable after the blob was removed.

        Raises:
            NotFoundError: It is not stored here.
            RepositoryError: It cannot be read.
        """
        try:
            with self._directory(_shard_of(sha256)) as directory:
                return open_regular(directory, sha256.hex())[0]
        except OSError as error:
            if error.errno in _NOT_THERE:
                raise NotFoundError(f"there is no blob {sha256.hex()}") from error
            raise self._unreadable(path_of(sha256), error) from error

    def all(self) -> tuple[Blob, ...]:
        """List the blobs by digest, and after them those in quarantine."""
        places = [(shard, False) for shard in self._shards()] + [(_QUARANTINE, True)]
        return tuple(
            Blob(bytes.fromhex(name), status.st_size, status.st_ctime, damaged)
            for place, damaged in places
            for name, status in self._files(place, _DIGEST)
            if damaged or name.startswith(place[-2:])
        )

    def held(self, envelopes: Iterable[Envelope]) -> frozenset[bytes]:
        """Return the SHA-256 of those files that are stored in the promised size.

        A directory that cannot be read counts as empty.
        """
        return frozenset(sha256 for sha256, _ in self._held(envelopes))

    def present(self, state: Repository) -> frozenset[Key]:
        """Return those files of a repository's archives that are stored, in the promised size."""
        return self._held(envelopes_of(state))

    def _held(self, envelopes: Iterable[Envelope]) -> frozenset[Key]:
        promised = {(envelope.sha256, envelope.size) for envelope in envelopes}
        return frozenset(promised & self._sizes({each for each, _ in promised}).items())

    def _sizes(self, digests: Iterable[bytes]) -> dict[bytes, int]:
        """Return the sizes of those blobs that are stored, without listing directories."""
        found: dict[bytes, int] = {}
        shards: dict[str, list[bytes]] = {}
        for sha256 in digests:
            shards.setdefault(_shard_of(sha256), []).append(sha256)
        for shard, wanted in shards.items():
            with contextlib.suppress(OSError), self._directory(shard) as directory:
                for sha256 in wanted:
                    with contextlib.suppress(OSError):
                        status = os.lstat(sha256.hex(), dir_fd=directory)
                        if stat.S_ISREG(status.st_mode):
                            found[sha256] = status.st_size
        return found

    def issues(self, state: Repository) -> Iterator[Issue]:
        """Report what would not be served, as far as can be told without reading blobs."""
        shards = self._shards()
        for place in (_PLACE, _SHARDS, _QUARANTINE, *shards):
            with contextlib.suppress(OSError):
                if not stat.S_ISDIR((self.root / place).lstat().st_mode):
                    yield Issue("", "is not a directory: nothing below it is served", place)
        for shard in shards:
            regular = {name for name, _ in self._files(shard, _DIGEST)}
            for name in filter(_DIGEST.fullmatch, self._names(shard)):
                if name not in regular:
                    yield Issue("", "is not a regular file: it is not served", f"{shard}/{name}")
        promised = {envelope.sha256: envelope.size for envelope in envelopes_of(state)}
        for blob in self.all():
            if blob.damaged:
                reason = "was damaged and is not served: add it again, or let blob gc remove it"
                yield Issue("", reason, f"{_QUARANTINE}/{blob.sha256.hex()}")
            elif promised.get(blob.sha256, blob.size) != blob.size:
                reason = f"has {blob.size} bytes, not {promised[blob.sha256]}: it is not served"
                yield Issue("", reason, path_of(blob.sha256))

    # ------------------------------------------------------------------------------------------
    # Adding and removing

    def add(
        self,
        file: Path,
        promised: Envelope | None = None,
        *,
        link: bool = False,
        progress: Progress = lambda _: None,
    ) -> Blob:
        """Store a file whole or not at all; one that is stored already is not read again.

        The blob shares its blocks with the file where the file system can (reflink), and is a copy
        elsewhere.

        Args:
            file: It may be changed or removed afterwards.
            promised: None: any file is stored.
            link: Whether the blob may be the file itself (hard link): the file becomes read-only,
                and whoever writes to it all the same damages the blob.
            progress: Called with each number of bytes read.

        Raises:
            InvalidDataError: The file cannot be read, or is not the promised one.
        """
        require_repository(self.root)
        with opened(file, progress) as source:
            if promised is None:
                promised = source.envelope(ANY_TYPE)
                os.lseek(source.descriptor, 0, os.SEEK_SET)
            with (
                writing(self.root),
                self._directory(_shard_of(promised.sha256), make=True) as shard,
            ):
                if not renewed(shard, promised):
                    write_blob(shard, source, promised, link=link)
                    self._notify_watchers()
        return Blob(promised.sha256, promised.size, time.time())

    def verify(self, progress: Progress = lambda _: None) -> tuple[Blob, ...]:
        """Read all blobs, and quarantine and return those that do not match their names."""
        require_repository(self.root)
        damaged = [b for b in self.all() if not b.damaged and not self._is_sound(b, progress)]
        if damaged:
            with locked(self.root), self._directory(_QUARANTINE, make=True) as quarantine:
                for blob in damaged:
                    self._move_to_quarantine(blob, quarantine)
                os.fsync(quarantine)
                self._notify_watchers()
        return tuple(attrs.evolve(blob, damaged=True) for blob in damaged)

    def _is_sound(self, blob: Blob, progress: Progress) -> bool:
        try:
            descriptor = self.open(blob.sha256)
        except NotFoundError:
            return True  # removed meanwhile
        try:
            path = self.root / path_of(blob.sha256)
            return envelope_of(descriptor, path, progress).sha256 == blob.sha256
        except (InvalidDataError, OSError):
            return False  # the file grows, or the disk is broken
        finally:
            os.close(descriptor)

    def _move_to_quarantine(self, blob: Blob, quarantine: int) -> None:
        name = blob.sha256.hex()
        with (
            contextlib.suppress(FileNotFoundError),
            self._directory(_shard_of(blob.sha256)) as shard,
        ):
            os.replace(name, name, src_dir_fd=shard, dst_dir_fd=quarantine)
            os.fsync(shard)

    def gc(
        self, keep: int, *, grace_s: float = DEFAULT_GRACE_S, dry_run: bool = False
    ) -> tuple[Blob, ...]:
        """Remove unused blobs, the quarantine, and temporary files of dead processes.

        Args:
            keep: How many states before the present one keep their blobs, in each stream; a
                removal is a state, too.
            grace_s: Blobs added in these last seconds stay, since they may be published yet.
            dry_run: Whether nothing is removed, and no lock taken.

        Returns:
            The removed blobs. Whoever has one open can still read it.

        Raises:
            InvalidDataError: The repository or its history is malformed; nothing is removed.
        """
        require_repository(self.root)
        with contextlib.nullcontext() if dry_run else locked(self.root):
            kept = _named(self.root, keep)
            found = self.all()
            kept |= self._awaited()
            old = time.time() - grace_s
            removed = tuple(
                blob
                for blob in found
                if blob.since <= old and (blob.damaged or blob.sha256 not in kept)
            )
            if not dry_run:
                for blob in removed:
                    place = _QUARANTINE if blob.damaged else _shard_of(blob.sha256)
                    self._remove(place, blob.sha256.hex())
                self._tidy()
        return removed

    def renew(self, envelopes: Iterable[Envelope]) -> None:
        """Count stored blobs as newly added."""
        for envelope in envelopes:
            with (
                contextlib.suppress(OSError),
                self._directory(_shard_of(envelope.sha256)) as shard,
            ):
                renewed(shard, envelope)

    def shrink(self, size: int, also_kept: Collection[bytes] = ()) -> tuple[Blob, ...]:
        """Remove and return unused blobs, oldest first, until all blobs have at most `size` bytes.

        Blobs of present states and those in `also_kept` (SHA-256) stay, even if they are larger.

        Raises:
            InvalidDataError: The repository is malformed; nothing is removed.
        """
        with locked(self.root):
            state = loading.Loader(self.root).load()
            kept = {envelope.sha256 for envelope in envelopes_of(state)} | {*also_kept}
            found = sorted(self.all(), key=lambda blob: blob.since)
            kept |= self._awaited()
            excess, removed = sum(blob.size for blob in found) - size, []
            for blob in found:
                if excess > 0 and not blob.damaged and blob.sha256 not in kept:
                    self._remove(_shard_of(blob.sha256), blob.sha256.hex())
                    excess -= blob.size
                    removed.append(blob)
        return tuple(removed)

    def _awaited(self) -> frozenset[bytes]:
        """Return the blobs of states that are still to be written. Source: rule R-47.

        Call it under the lock and after listing the blobs: a name is in `INCOMING` before its blob
        exists, and until the state is written.
        """
        return frozenset(map(bytes.fromhex, filter(_DIGEST.fullmatch, self._names(INCOMING))))

    def _tidy(self) -> None:
        """Remove the temporary files of killed writers."""
        for shard in self._shards():
            for name, status in self._files(shard, _TEMPORARY):
                if status.st_ctime <= time.time() - STALE_S:
                    self._remove(shard, name, unless_locked=True)

    def _remove(self, place: str, name: str, *, unless_locked: bool = False) -> None:
        skipped = (FileNotFoundError, BlockingIOError)  # the latter: its writer is alive
        with contextlib.suppress(*skipped), self._directory(place) as directory:
            if unless_locked:
                require_unlocked(directory, name)
            os.unlink(name, dir_fd=directory)

    # ------------------------------------------------------------------------------------------
    # Directories

    @contextlib.contextmanager
    def _directory(self, place: str, *, make: bool = False) -> Iterator[int]:
        """Open a directory below the root without following links; errors name the whole path."""
        path = self.root
        descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            for name in place.split("/"):
                if make and not exists(descriptor, name):
                    with contextlib.suppress(FileExistsError):  # somebody else was faster
                        os.mkdir(name, dir_fd=descriptor)
                    os.fsync(descriptor)
                inner = os.open(name, _DIRECTORY, dir_fd=descriptor)
                os.close(descriptor)
                descriptor, path = inner, path / name
            yield descriptor
        except OSError as error:
            if "/" not in str(error.filename):
                error.filename = str(path / (error.filename or ""))
            raise
        finally:
            os.close(descriptor)

    def _notify_watchers(self) -> None:
        """Wake servers that watch the root. Source: rule R-48."""
        with self._directory(_PLACE) as directory:
            os.utime(directory)

    def _names(self, place: str) -> list[str]:
        """List a directory; a missing one, or a link, counts as empty."""
        try:
            with self._directory(place) as directory, os.scandir(directory) as entries:
                return sorted(entry.name for entry in entries)
        except OSError as error:
            if error.errno in _NOT_THERE:
                return []
            raise self._unreadable(place, error) from error

    def _shards(self) -> list[str]:
        return [f"{_SHARDS}/{name}" for name in self._names(_SHARDS) if _SHARD.fullmatch(name)]

    def _files(self, place: str, pattern: re.Pattern[str]) -> Iterator[tuple[str, os.stat_result]]:
        """Yield the regular files in a directory whose names match."""
        names = [name for name in self._names(place) if pattern.fullmatch(name)]
        if not names:
            return
        with contextlib.suppress(FileNotFoundError), self._directory(place) as directory:
            for name in names:
                with contextlib.suppress(FileNotFoundError):
                    status = os.lstat(name, dir_fd=directory)
                    if stat.S_ISREG(status.st_mode):
                        yield name, status

    def _unreadable(self, place: str, error: OSError) -> RepositoryError:
        return RepositoryError(f"{self.root / place}: cannot be read: {error.strerror}")


# ----------------------------------------------------------------------------------------------
# What garbage collection keeps


def _named(root: Path, keep: int) -> frozenset[bytes]:
    """Return the SHA-256 of the files of each stream's present state and `keep` before it."""
    state = loading.Loader(root).load()
    names = {(name, own) for name, package in state.packages.items() for own in package.streams}
    # Removed streams can be rolled back.
    recorded = ((d.parent.parent.name, d.name) for d in root.glob("packages/*/history/*/"))
    names |= {name for name in recorded if not any(map(name_rule, name))}
    named: set[bytes] = set()
    for name in names:
        with contextlib.suppress(NotFoundError):  # no history file has a valid name
            for held in history.history(root, name, 1 + keep):
                named.update(archive.envelope.sha256 for archive in held.archives or ())
    return frozenset(named)


def key_of(archive: Archive) -> Key:
    """Return the key of an archive's file."""
    return archive.envelope.sha256, archive.envelope.size
