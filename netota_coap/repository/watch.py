"""Waits until the files of a repository have changed and settled.

Loading finds out what changed. Without inotify only `poke` (SIGHUP) ends the wait.
Source: rules R-30 to R-33.
"""

from __future__ import annotations

import asyncio
import contextlib
import errno
import logging
import os
from collections.abc import Iterator
from pathlib import Path
from types import TracebackType

import attrs
from asyncinotify import Event, Inotify, Mask, Watch

from netota_coap.repository.lock import is_locked

_log = logging.getLogger(__name__)

_ENTRIES = Mask.CREATE | Mask.DELETE | Mask.MOVED_FROM | Mask.MOVED_TO
_ALL_CHANGES = _ENTRIES | Mask.CLOSE_WRITE | Mask.MODIFY | Mask.ATTRIB

_LOCK_POLL_S = 0.002
WARN_AFTER_S = 10.0
_LONGEST_CHAIN = 40  # symbolic links, the kernel's limit


def _absolute(path: Path) -> Path:
    return path.absolute()


@attrs.define
class Watcher:
    """Watches the directories of a repository, and those where its root may be exchanged.

    Attributes:
        root: It may be missing, or a symbolic link.
        settle_s: A change has settled when no other followed for so many seconds.
        longest_s: A change counts as settled after so many seconds at the latest.
    """

    root: Path = attrs.field(converter=_absolute)
    settle_s: float = 0.02
    longest_s: float = 2.0
    _inotify: Inotify | None = attrs.field(init=False, default=None)
    _watches: dict[int, Watch] = attrs.field(init=False, factory=dict)
    _relevant: dict[int, set[str]] = attrs.field(init=False, factory=dict)
    _reading: asyncio.Task[None] | None = attrs.field(init=False, default=None)
    _changed: asyncio.Event = attrs.field(init=False, factory=asyncio.Event)
    _poked: asyncio.Event = attrs.field(init=False, factory=asyncio.Event)
    _last: float = attrs.field(init=False, default=0.0)

    async def __aenter__(self) -> Watcher:
        try:
            self._inotify = Inotify(cache_size=100)
        except OSError as error:
            _log.warning("files are not watched (%s): reload by SIGHUP", error.strerror)
            return self
        self.refresh()
        self._reading = asyncio.create_task(self._read(self._inotify))
        # `settled` raises the error that ended it.
        self._reading.add_done_callback(lambda _: self._changed.set())
        return self

    async def __aexit__(
        self,
        _type: type[BaseException] | None,
        _value: BaseException | None,
        _traceback: TracebackType | None,
    ) -> None:
        if self._reading:
            self._reading.cancel()
            await asyncio.wait([self._reading])
        if self._inotify:
            self._inotify.close()

    def refresh(self) -> None:
        """Watch the directories that exist now. Call it before each load."""
        if self._inotify is None:
            return
        before, self._watches, self._relevant = self._watches, {}, {}
        full = False
        for path, name in self._wanted():
            mask = _ENTRIES if name else _ALL_CHANGES
            try:
                # Always anew: a directory that was removed and made again can have the same inode.
                watch = self._inotify.add_watch(path, mask | Mask.ONLYDIR)
            except OSError as error:
                full = full or error.errno == errno.ENOSPC
                continue
            self._watches[watch.wd] = watch
            if name:
                self._relevant.setdefault(watch.wd, set()).add(name)
        if full:
            _log.warning("not all directories are watched: raise fs.inotify.max_user_watches")
        for descriptor in before.keys() - self._watches.keys():
            # The kernel drops the watch of a directory that is gone by itself.
            with contextlib.suppress(OSError):
                self._inotify.rm_watch(before[descriptor])

    def _wanted(self) -> Iterator[tuple[Path, str]]:
        """Yield each directory to watch, with the one relevant name in it; "" for all names."""
        for link in _exchangeable(self.root):
            yield link.parent, link.name
        packages = self.root / "packages"
        yield self.root, ""
        yield packages, ""
        with contextlib.suppress(OSError), os.scandir(packages) as entries:
            for entry in entries:
                if not entry.name.startswith(".") and entry.is_dir():
                    yield packages / entry.name, ""
                    yield packages / entry.name / "streams", ""

    def poke(self) -> None:
        """Make `settled` return at once."""
        self._poked.set()
        self._changed.set()

    async def settled(self) -> None:
        """Wait for a change, until it has settled and nobody is writing any more."""
        await self._changed.wait()
        if self._reading and self._reading.done():
            self._reading.result()
        loop = asyncio.get_running_loop()
        first = loop.time()
        patience = first + WARN_AFTER_S
        while not self._poked.is_set():
            left = min(self._last + self.settle_s, first + self.longest_s) - loop.time()
            if left <= 0:
                writer = self._writer()
                if writer is None:
                    break
                if loop.time() > patience:
                    _log.warning("still waiting for %s; SIGHUP reloads at once", writer)
                    patience = float("inf")
                left = _LOCK_POLL_S
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self._poked.wait(), left)
        self._poked.clear()
        self._changed.clear()

    def _writer(self) -> str | None:
        """Return who is writing: a publisher, or git in the work tree around the root."""
        if is_locked(self.root):
            return "a publisher to finish"
        real = Path(os.path.realpath(self.root))
        for directory in (real, *real.parents):
            git = directory / ".git"
            # os.path never raises, whoever owns the directories above.
            if os.path.exists(git):  # noqa: PTH110
                lock = _git_directory(git) / "index.lock"
                return f"{lock} to be removed" if os.path.exists(lock) else None  # noqa: PTH110
        return None

    async def _read(self, inotify: Inotify) -> None:
        while True:
            event = await inotify.get()
            if self._matters(event):
                self._last = asyncio.get_running_loop().time()
                self._changed.set()

    def _matters(self, event: Event) -> bool:
        if Mask.IGNORED in event.mask:
            return False
        if event.name is None:
            return True  # the directory itself changed, or the kernel's queue overflowed
        name = event.name.name
        relevant = self._relevant.get(event.watch.wd) if event.watch else None
        if relevant is not None:
            return name in relevant
        return not name.startswith(".") and (Mask.ISDIR in event.mask or name.endswith(".toml"))


def _exchangeable(root: Path) -> Iterator[Path]:
    """Yield the paths whose exchange changes the root: itself, and links on the way to it."""
    path = root
    for _ in range(_LONGEST_CHAIN):
        yield path
        link = next((part for part in (path, *path.parents) if os.path.islink(part)), None)  # noqa: PTH114
        if link is None:
            return
        if link != path:
            yield link
        try:
            path = link.parent / link.readlink() / path.relative_to(link)
        except OSError:
            return


def _git_directory(git: Path) -> Path:
    """Return the directory of the index; in a linked work tree, `.git` is a file."""
    if os.path.isfile(git):  # noqa: PTH113
        with contextlib.suppress(OSError, UnicodeDecodeError):
            return git.parent / git.read_text().removeprefix("gitdir:").strip()
    return git
