"""Process life: start, signals, reload, graceful stop."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import signal
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import attrs

from netota_coap.catalog import Catalog
from netota_coap.coap.frontdoor import FrontDoor
from netota_coap.coap.persistence import Keeper, Record, keeping
from netota_coap.coap.server import Responder, Site
from netota_coap.errors import InvalidDataError
from netota_coap.repository import Loader
from netota_coap.watch import Watcher

_log = logging.getLogger(__name__)

_MOST_ISSUES = 100  # that are logged of one reload


@attrs.define
class Service:
    """Serves one repository until it is told to stop.

    Attributes:
        root: Of the repository.
        binds: `HOST:PORT` each.
        on_ready: Called with each URI that is listened on, once.
        state: Directory for what is remembered over a restart; None: nothing is.
    """

    root: Path
    binds: Sequence[str]
    on_ready: Callable[[str], object] = lambda _: None
    state: Path | None = None
    _stopping: asyncio.Event = attrs.field(init=False, factory=asyncio.Event)
    _refused: str = attrs.field(init=False, default="")

    async def run(self) -> None:
        """Serve until `stop`, SIGTERM or SIGINT; SIGHUP reloads at once.

        Raises:
            InvalidDataError: The repository cannot be served at the start.
            AddressError: One of the addresses cannot be listened on.
            ConfigError: One of them cannot be read, or the directory for the state not be used.
        """
        async with Watcher(self.root) as watcher:
            handlers = {**dict.fromkeys(_STOP, self.stop), signal.SIGHUP: watcher.poke}
            with _signals(handlers):
                async with keeping(self.state) as keeper:
                    await self._serve(watcher, keeper)

    async def _serve(self, watcher: Watcher, keeper: Keeper) -> None:
        loader = Loader(self.root)
        site = Site(Responder(await _load(loader, keeper)), keeper.journal)
        site.observers.restore(keeper.kept)
        door = await FrontDoor.open(site, self.binds)
        tasks = (
            asyncio.create_task(self._stopping.wait()),
            asyncio.create_task(self._reload(watcher, loader, keeper, site)),
        )
        try:
            for uri in door.uris:
                self.on_ready(uri)
            # A bug that ends reloading must end the service, not leave it deaf.
            waited = (*tasks, keeper.running)
            done, _ = await asyncio.wait(waited, return_when="FIRST_COMPLETED")
            for task in done:
                task.result()
        finally:
            for task in tasks:
                task.cancel()
            await door.close()

    def stop(self) -> None:
        """End `run`, gracefully."""
        self._stopping.set()

    async def _reload(self, watcher: Watcher, loader: Loader, keeper: Keeper, site: Site) -> None:
        while True:
            await watcher.settled()
            watcher.refresh()
            start = time.perf_counter()
            try:
                catalog = await _load(loader, keeper, site.responder.catalog)
            except InvalidDataError as error:
                self._refuse(error)
                continue
            site.swap(catalog)
            self._refused = ""
            _log.info(
                "reloaded %d files in %.1f ms", loader.parsed, (time.perf_counter() - start) * 1e3
            )

    def _refuse(self, error: InvalidDataError) -> None:
        """Log why a repository is not taken, once for as long as the reasons stay the same."""
        if error.detail == self._refused:
            return
        self._refused = error.detail
        _log.error("not reloaded, the old state is served on:")
        for issue in error.issues[:_MOST_ISSUES]:
            _log.error("  %s", issue)
        if len(error.issues) > _MOST_ISSUES:
            _log.error("  and more, %d in all: netota-coap check lists them", len(error.issues))
        if error.hint:
            _log.error("  %s", error.hint)


async def _load(loader: Loader, keeper: Keeper, previous: Catalog | None = None) -> Catalog:
    """Load in another thread, and remember the sequences that are new."""

    def load() -> tuple[Catalog, list[Record]]:
        repository = loader.load()
        return Catalog.of(repository, previous), keeper.review(repository)

    catalog, learned = await asyncio.to_thread(load)
    keeper.learn(learned)
    return catalog


_STOP = (signal.SIGTERM, signal.SIGINT)


@contextlib.contextmanager
def _signals(handlers: dict[signal.Signals, Callable[[], None]]) -> Iterator[None]:
    loop = asyncio.get_running_loop()
    for number, handler in handlers.items():
        loop.add_signal_handler(number, handler)
    try:
        yield
    finally:
        for number in handlers:
            loop.remove_signal_handler(number)
