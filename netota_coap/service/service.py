"""The life of the service process: start, signals, reloads, notifications of systemd, stop."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import signal
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractAsyncContextManager
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING

import attrs

from netota_coap import __version__
from netota_coap.catalog.catalog import Catalog
from netota_coap.catalog.local_blobs import LocalBlobs, OpenBlobs
from netota_coap.catalog.resources import ResourcePath
from netota_coap.coap.frontdoor import FrontDoor
from netota_coap.coap.observe.journal import JournalFile, Record, open_journal
from netota_coap.coap.observe.table import Caps
from netota_coap.coap.responder import Responder
from netota_coap.coap.site import CoapSite
from netota_coap.encoding.documents import selection_from_query
from netota_coap.errors import ConfigError, InvalidDataError, NetotaError
from netota_coap.monitoring import Metrics, Status
from netota_coap.repository.blobs import Blobs, Key, envelopes_of
from netota_coap.repository.loading import Loader
from netota_coap.repository.scaffold import init
from netota_coap.repository.watch import Watcher
from netota_coap.service import logs
from netota_coap.service.config import Config
from netota_coap.service.systemd import Manager

if TYPE_CHECKING:
    from netota_coap.gateway.gateway import Gateway
    from netota_coap.gateway.on_demand import RemoteFile
    from netota_coap.http.server import HttpSite

_log = logging.getLogger(__name__)

_MOST_ISSUES = 100  # logged for one reload
_MOST_SHOWN = 5  # issues in the status
_PINNED_S = 300.0  # for which transfers may continue from the representation before a swap
# How often a service with nothing to serve tries again, besides at changes of files:
_RETRY_S = 30.0  # inotify does not see a file system that is mounted later
_UPSTREAM_RETRY_S = 1.0  # adopting an upstream without streams changes no file


@attrs.define
class Service:
    """Serves one repository until it is stopped."""

    config: Config  # a reload replaces it
    on_ready: Callable[[str], object] = lambda _: None  # called with each URI it listens on
    reread: Callable[[], Config] | None = None  # reads the configuration at SIGHUP; None keeps it
    manager: Manager = attrs.field(factory=Manager)
    metrics: Metrics = attrs.field(factory=Metrics)
    _started_s: float = attrs.field(init=False, factory=time.monotonic)
    _stopping: asyncio.Event = attrs.field(init=False, factory=asyncio.Event)
    _site: CoapSite | None = attrs.field(init=False, default=None)
    _http: HttpSite | None = attrs.field(init=False, default=None)
    _keeper: JournalFile | None = attrs.field(init=False, default=None)
    _loaded: datetime = attrs.field(init=False, factory=lambda: datetime.now(UTC))
    _refused: tuple[str, ...] = attrs.field(init=False, default=())
    _is_reloading: bool = attrs.field(init=False, default=False)
    _unpin_timer: asyncio.TimerHandle | None = attrs.field(init=False, default=None)
    _files: OpenBlobs = attrs.field(
        init=False,
        default=attrs.Factory(lambda self: OpenBlobs(Blobs(self.root)), takes_self=True),
    )
    _gateway: Gateway | None = attrs.field(init=False, default=None)

    async def run(self) -> None:
        """Serve until `stop`, SIGTERM or SIGINT; SIGHUP reloads at once.

        Raises:
            InvalidDataError: The repository is malformed, and `keep_trying` is not set.
            AddressError: One of the addresses cannot be listened on.
            ConfigError: There is no repository, the state directory cannot be used, or an
                upstream is invalid.
            RepositoryError: The repository of a gateway cannot be created.
        """
        if self._is_gateway:
            self._gateway = await asyncio.to_thread(_gateway_of, self.config, self.root)
            if self._gateway.on_demand:
                self._files.fetch = self._gateway.on_demand.fetch
        async with Watcher(self.root) as watcher:
            handlers = {
                signal.SIGTERM: self.stop,
                signal.SIGINT: self.stop,
                signal.SIGHUP: lambda: self._reload_all(watcher),
            }
            with _signals(handlers):
                async with open_journal(self.config.state) as self._keeper:
                    await self._until_stopped(watcher, self._keeper)

    @property
    def root(self) -> Path:
        """The repository's directory.

        Raises:
            ConfigError: None is configured.
        """
        if self.config.repository is None:
            hint = "Name it: netota-coap serve DIR, or set `repository` in the configuration"
            raise ConfigError("no repository is configured", hint=hint)
        return self.config.repository

    @property
    def _is_gateway(self) -> bool:
        return bool(self.config.mirror_upstreams) or self.config.blobs_cache == "on-demand"

    def stop(self) -> None:
        """Make `run` stop gracefully."""
        self._stopping.set()

    def status(self) -> Status:
        """Return the status; it exists once the service serves something."""
        assert self._site
        resources = self._site.responder.catalog.resources
        return Status(
            version=__version__,
            uptime_s=time.monotonic() - self._started_s,
            packages=sum(1 for path in resources if path[0] == "p" and len(path) == 2),
            streams=sum(1 for path in resources if path[0] == "p" and len(path) == 4),
            observers=len(self._site.observers),
            reloaded=self._loaded,
            issues=self._refused[:_MOST_SHOWN],
            fan_out=self._site.observers.fan_out,
            troubles=(self._keeper.trouble,) if self._keeper and self._keeper.trouble else (),
            upstreams=self._gateway.upstreams if self._gateway else (),
            fetched_bytes=self._gateway.fetcher.received if self._gateway else None,
        )

    def observers(self) -> dict[str, int]:
        """Return the number of observers of each stream, by `package/stream`."""
        resources = self._site.responder.catalog.resources if self._site else ()
        return {f"{p[1]}/{p[3]}": self.observers_of(p) for p in resources if len(p) == 4}

    def observers_of(self, path: ResourcePath) -> int:
        """Return the number of observers of a resource."""
        return self._site.observers.of(path) if self._site else 0

    def status_line(self) -> str:
        """Return what the service does now, in one line for a service manager."""
        if self._site:
            return str(self.status())
        if self._refused:
            return f"waiting for a repository: {self._refused[0]}"
        troubles = [str(each) for each in self._gateway.upstreams] if self._gateway else []
        return f"waiting for upstreams: {'; '.join(troubles)}" if troubles else "starting"

    async def _until_stopped(self, watcher: Watcher, keeper: JournalFile) -> None:
        tasks = [
            asyncio.create_task(self._stopping.wait()),
            asyncio.create_task(self._serve(watcher, keeper)),
            asyncio.create_task(self.manager.beat(self.status_line)),
        ]
        if self._gateway:
            tasks.append(asyncio.create_task(self._gateway.run()))
        try:
            # A bug that ends reloading must end the service: systemd restarts it.
            done, _ = await asyncio.wait((*tasks, keeper.running), return_when="FIRST_COMPLETED")
            for task in done:
                task.result()
        finally:
            self.manager.stopping()
            for task in tasks:
                task.cancel()
            await asyncio.wait(tasks)

    async def _serve(self, watcher: Watcher, keeper: JournalFile) -> None:
        loader = Loader(self.root)
        catalog = await self._load_first(watcher, loader, keeper)
        site = CoapSite(Responder(catalog), keeper.journal, self.metrics, self.status)
        self._site = site
        self._configure(site)
        site.observers.restore(keeper.stored)
        async with contextlib.AsyncExitStack() as stack:
            bind, multicast = self.config.coap_bind, self.config.coap_multicast
            door = await FrontDoor.open(site, bind, multicast=multicast)
            stack.push_async_callback(door.close)
            uris = door.uris
            if self.config.http_bind:
                # Importing takes long, and CoAP requests are answered meanwhile.
                await asyncio.to_thread(_import_http)
                self._http, opening = _http_site(self, catalog)
                uris += await stack.enter_async_context(opening)
            for uri in uris:
                self.on_ready(uri)
            self._notify(done=True)
            await self._reload(watcher, loader, keeper, site)

    async def _load_first(self, watcher: Watcher, loader: Loader, keeper: JournalFile) -> Catalog:
        """Load the first catalog; wait for it with `keep_trying`, or while upstreams have none."""
        while True:
            retry_s = _RETRY_S
            try:
                catalog = await self._load(loader, keeper)
            except InvalidDataError as error:
                if not self.config.keep_trying:
                    raise
                self._refuse(error, "nothing is served until this is fixed:")
                # With keep_trying, waiting counts as started: systemd must not block.
                self._notify(done=True)
            else:
                self._accept()
                if not self._waits_for_upstreams(catalog):
                    return catalog
                self._notify(done=True)
                retry_s = _UPSTREAM_RETRY_S
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(watcher.settled(), retry_s)
            watcher.refresh()

    def _waits_for_upstreams(self, catalog: Catalog) -> bool:
        """Tell whether there is nothing to serve because no upstream was adopted yet."""
        is_empty = not any(len(path) == 4 for path in catalog.resources)
        upstreams = self._gateway.upstreams if self._gateway else ()
        is_adopted = any(each.last_contact and not each.behind for each in upstreams)
        return is_empty and bool(upstreams) and not is_adopted

    async def _reload(
        self, watcher: Watcher, loader: Loader, keeper: JournalFile, site: CoapSite
    ) -> None:
        while True:
            await watcher.settled()
            watcher.refresh()
            done, self._is_reloading = self._is_reloading, False
            start = time.perf_counter()
            try:
                catalog = await self._load(loader, keeper, site.responder.catalog)
            except InvalidDataError as error:
                self.metrics.reloads["refused"] += 1
                self._refuse(error, "not reloaded, the old state is still served:")
            else:
                self.metrics.reloads["taken"] += 1
                self._swap(site, catalog)
                self._accept()
                took_ms = (time.perf_counter() - start) * 1e3
                extra = {"files": loader.parsed, "ms": round(took_ms, 1)}
                _log.info("reloaded %d files in %.1f ms", loader.parsed, took_ms, extra=extra)
            self._notify(done=done)

    async def _load(
        self, loader: Loader, keeper: JournalFile, previous: Catalog | None = None
    ) -> Catalog:
        """Load a catalog in another thread, and record the new sequences."""
        files, gateway, metric = self._files, self._gateway, self.config.blobs_metric

        def load() -> tuple[Catalog, list[Record], Mapping[Key, RemoteFile]]:
            repository = loader.load()
            files.refresh((each.sha256, each.size) for each in envelopes_of(repository))
            remote = gateway.remote_files(repository) if gateway else {}
            offered = files.blobs.present(repository) | remote.keys()
            catalog = Catalog.of(repository, previous, LocalBlobs(offered, files, metric))
            return catalog, keeper.review(repository), remote

        catalog, learned, remote = await asyncio.to_thread(load)
        keeper.learn(learned)
        if gateway and gateway.on_demand:
            gateway.on_demand.set_files(remote)
        return catalog

    def _swap(self, site: CoapSite, catalog: Catalog) -> None:
        site.swap(catalog)
        if self._http:
            self._http.swap(catalog)
        if self._unpin_timer is None:
            self._unpin(site)

    def _unpin(self, site: CoapSite) -> None:
        """End transfers that outlived `_PINNED_S` after a swap, and schedule the next check."""
        now_s = time.monotonic()
        some, oldest_s = site.responder.catalog.forget_previous(now_s - _PINNED_S)
        if some:
            site.responder = attrs.evolve(site.responder)  # also empties the response cache
        self._unpin_timer = None
        if oldest_s is not None:
            wait_s = oldest_s + _PINNED_S - now_s
            self._unpin_timer = asyncio.get_running_loop().call_later(wait_s, self._unpin, site)

    def _notify(self, *, done: bool) -> None:
        """Send systemd the status; `done` ends a start or reload."""
        (self.manager.ready if done else self.manager.status)(self.status_line())

    def _accept(self) -> None:
        self._loaded = datetime.now(UTC)
        self._refused = ()

    def _refuse(self, error: InvalidDataError, consequence: str) -> None:
        """Log why the repository is refused, but not the same reasons twice in a row."""
        reasons = tuple(map(str, error.issues))
        if reasons == self._refused:
            return
        self._refused = reasons
        _log.error("%s", consequence)
        for reason in reasons[:_MOST_ISSUES]:
            _log.error("  %s", reason)
        if len(reasons) > _MOST_ISSUES:
            _log.error("  and more, %d in all: netota-coap check lists them", len(reasons))
        if error.hint:
            _log.error("  %s", error.hint)

    def _reload_all(self, watcher: Watcher) -> None:
        """Reload the configuration, then the repository."""
        self.manager.reloading()
        self._is_reloading = True
        if self.reread:
            try:
                self.config, waiting = self.config.reloaded(self.reread())
            except NetotaError as error:
                refused = "the configuration is refused, the old one stays in effect: %s"
                _log.error(refused, error.detail)
            else:
                for key in waiting:
                    _log.warning("%s: takes effect after a restart", key)
                logs.set_level(self.config.log_level)
                if self._site:
                    self._configure(self._site)
        watcher.poke()

    def _configure(self, site: CoapSite) -> None:
        """Apply the settings that do not need a restart."""
        config = self.config
        site.observers.caps = Caps(
            total=config.coap_observers_total,
            path=config.coap_observers_per_stream,
            address=config.coap_observers_per_address,
        )
        site.status_readers = config.status_readers
        age_s = config.coap_max_age_s
        site.responder = attrs.evolve(site.responder, max_age_s=age_s)
        if self._http:
            self._http.max_age_s = age_s


def _import_http() -> None:
    try:
        import netota_coap.http.server  # noqa: F401
    except ImportError as error:
        hint = "pip install 'netota-coap[http]'"
        detail = f"HTTP needs a package that is not installed: {error.name}"
        raise ConfigError(detail, hint=hint) from error


def _http_site(
    service: Service, catalog: Catalog
) -> tuple[HttpSite, AbstractAsyncContextManager[tuple[str, ...]]]:
    """Return the HTTP site, and the context in which it is served."""
    from netota_coap.http.server import HttpSite, serving

    site = HttpSite(
        catalog,
        status=service.status,
        metrics=service.metrics,
        root=service.root,
        prefix=service.config.http_prefix,
        observers_of=service.observers_of,
        max_age_s=service.config.coap_max_age_s,
    )
    return site, serving(site, service.config.http_bind)


def _gateway_of(config: Config, root: Path) -> Gateway:
    """Return the configured gateway; creates its repository if there is none."""
    # Imported here: other services save the time and the memory.
    from netota_coap.gateway.gateway import Gateway
    from netota_coap.service.mirroring import parts_of

    if config.mirror_upstreams and not (root / "repository.toml").exists():
        init(root)
    fetcher, choice, terms = parts_of(config, root, selection_from_query(config.mirror_devices))
    return Gateway.of(fetcher, config.mirror_upstreams, choice, terms)


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
