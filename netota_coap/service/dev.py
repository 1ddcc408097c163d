"""`netota-coap dev`: serves while you develop, publishes each new build, and shows requests."""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Protocol

import attrs
from rich.console import Console, Group
from rich.live import Live
from rich.table import Table
from rich.text import Text

from netota_coap.errors import InvalidDataError, NetotaError, NotFoundError, printable
from netota_coap.model.values import Stream, StreamName
from netota_coap.monitoring import Exchange
from netota_coap.publishing import inspection, publish, release_file
from netota_coap.publishing.archives import ArchiveSource
from netota_coap.publishing.inspection.artefact import Artefact
from netota_coap.publishing.publish import Edit
from netota_coap.repository.blobs import Blobs
from netota_coap.repository.store import DirectoryStore
from netota_coap.service.service import Service

POLL_S = 0.5
"""Seconds between two looks at a build; a build that did not change meanwhile is complete."""

_KEPT = 500  # lines, more than a screen shows
_NO_VERSION = "0.0.0"
_STATES = 5  # earlier states of a stream whose files are kept

_Files = tuple[tuple[Path, int, int], ...]  # with size and time of the last change, ns


@attrs.define
class Publisher:
    """Publishes a build whenever its files are new."""

    root: Path  # of the repository
    name: StreamName
    build: Path  # a directory with Zephyr builds or RAUC bundles, or a file
    _seen: _Files = attrs.field(init=False, default=())
    _done: _Files = attrs.field(init=False, default=())

    def look(self, now: datetime) -> Stream | None:
        """Publish the build if it is new and complete; return what was published.

        Raises:
            NetotaError: The build cannot be published; the next look does not try again.
        """
        before, self._seen = self._seen, self._files()
        if not self._seen or self._seen != before or self._seen == self._done:
            return None
        self._done = self._seen
        built = {path: inspection.read(path) for path, _, _ in self._seen}
        if self._holds(built.values()):
            return None
        sources = [ArchiveSource(path) for path in built]
        base = min((each.version for each in built.values() if each.version), default=_NO_VERSION)
        version = f"{base}+dev.{now:%Y%m%d%H%M%S}"
        edit, store = Edit(now=now, allow_missing=True), DirectoryStore(self.root)
        done = publish.publish(
            store, self.name, version, sources, edit=edit, force=True, store_files=True
        )
        Blobs(self.root).gc(_STATES, grace_s=0)
        return done.after

    def _files(self) -> _Files:
        try:
            found = [(path, path.stat()) for path in release_file.found([self.build])]
        except (InvalidDataError, OSError):
            return ()  # the build is running
        return tuple((path, status.st_size, status.st_mtime_ns) for path, status in found)

    def _holds(self, built: Iterable[Artefact]) -> bool:
        try:
            present = publish.existing(DirectoryStore(self.root), self.name)
        except NotFoundError:
            return False
        held = {archive.envelope.sha256 for archive in present.archives or ()}
        return held == {each.envelope.sha256 for each in built}


class Board(Protocol):
    """Shows a developer what happens."""

    def say(self, line: str, style: str = "") -> None:
        """Show an event in one line."""

    def observers(self, counts: Mapping[str, int]) -> None:
        """Show the number of observers of each stream."""


@attrs.define
class Lines:
    """A board for output that is no terminal: prints lines with `put`."""

    put: Callable[[str], object]
    _counts: Mapping[str, int] = attrs.field(init=False, factory=dict)

    def say(self, line: str, style: str = "") -> None:
        """Print the time and a line."""
        self.put(f"{datetime.now().astimezone():%H:%M:%S} {printable(line)}")

    def observers(self, counts: Mapping[str, int]) -> None:
        """Print a line for each stream whose number changed."""
        for name in sorted({*counts, *self._counts}):
            if counts.get(name, 0) != self._counts.get(name, 0):
                self.say(f"observers of {name}: {counts.get(name, 0)}")
        self._counts = dict(counts)


@attrs.define
class Screen:
    """A board that fills a terminal: streams with observers above, events below."""

    console: Console
    title: str
    _lines: deque[Text] = attrs.field(init=False, factory=lambda: deque(maxlen=_KEPT))
    _counts: Mapping[str, int] = attrs.field(init=False, factory=dict)

    def say(self, line: str, style: str = "") -> None:
        """Add a line at the end."""
        when = f"{datetime.now().astimezone():%H:%M:%S} "
        self._lines.append(Text.assemble((when, "dim"), (printable(line), style)))

    def observers(self, counts: Mapping[str, int]) -> None:
        """Replace the numbers."""
        self._counts = dict(counts)

    def __rich__(self) -> Group:
        streams = Table(box=None, pad_edge=False, header_style="bold")
        for column in ("STREAM", "OBSERVERS"):
            streams.add_column(column)
        for name, count in self._counts.items():
            streams.add_row(Text(name), Text(str(count), "green" if count else "dim"))
        room = max(self.console.height - streams.row_count - 5, 3)
        shown = list(self._lines)[-room:]
        for line in shown:
            line.no_wrap, line.overflow = True, "ellipsis"
        return Group(Text(self.title, "bold"), Text(), streams, Text(), *shown)

    @contextlib.contextmanager
    def live(self) -> Iterator[None]:
        """Show the screen until the block ends."""
        with Live(self, console=self.console, screen=True, refresh_per_second=8):
            yield


class BoardHandler(logging.Handler):
    """Shows log records on a board."""

    def __init__(self, board: Board) -> None:
        super().__init__()
        self._board = board

    def emit(self, record: logging.LogRecord) -> None:
        """Show a record in one line."""
        self._board.say(record.getMessage(), "red" if record.levelno >= logging.WARNING else "dim")


def heard(board: Board) -> Callable[[Exchange], None]:
    """Return a listener for `Metrics` that shows requests on a board."""

    def show(request: Exchange) -> None:
        query = "?" + "&".join(request.query) if request.query else ""
        asked = f"{request.transport} {request.method} /{'/'.join(request.path)}{query}"
        answered = f"{request.code} {request.size} bytes, {request.who}, {request.took_us:.0f} µs"
        board.say(f"{asked} → {answered}", "" if request.code[0] == "2" else "yellow")

    return show


async def run(service: Service, board: Board, publishers: Sequence[Publisher]) -> None:
    """Serve, and publish each new build, until the service is stopped.

    The board shows requests if the service's metrics have `heard(board)` as their listener.

    Raises:
        NetotaError: As `Service.run` does.
    """

    async def publish_builds() -> None:
        while True:
            for publisher in publishers:
                await _publish(publisher, board)
            board.observers(service.observers())
            await asyncio.sleep(POLL_S)

    publishing = asyncio.create_task(publish_builds())
    try:
        await service.run()
    finally:
        publishing.cancel()
        await asyncio.wait([publishing])


async def _publish(publisher: Publisher, board: Board) -> None:
    name = "/".join(publisher.name)
    try:
        stream = await asyncio.to_thread(publisher.look, datetime.now(UTC).replace(microsecond=0))
    except NetotaError as error:
        board.say(f"{name}: not published: {error.detail} {error.hint}".rstrip(), "red")
        return
    if stream:
        archives = ", ".join(f"{a.name} {a.envelope.size} bytes" for a in stream.archives or ())
        said = f"{name}: published {stream.version}, sequence {stream.sequence}: {archives}"
        board.say(said, "green")
