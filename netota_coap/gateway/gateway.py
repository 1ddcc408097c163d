"""The part of a service that follows upstreams and fetches files."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping

import attrs

from netota_coap.gateway.adoption import Choice
from netota_coap.gateway.blob_fetcher import BlobFetcher
from netota_coap.gateway.mirror import Mirror, Terms, task_group
from netota_coap.gateway.on_demand import OnDemand, RemoteFile, remote_files
from netota_coap.model.values import Repository
from netota_coap.monitoring import UpstreamStatus
from netota_coap.repository.blobs import Key

REMOVE_STALE_S = 6 * 3_600.0


@attrs.define(eq=False)
class Gateway:
    """All mirrors of one repository, and the fetching of files when devices ask for them."""

    fetcher: BlobFetcher
    mirrors: tuple[Mirror, ...] = ()
    on_demand: OnDemand | None = None  # None: files are fetched ahead

    @classmethod
    def of(
        cls, fetcher: BlobFetcher, upstreams: tuple[str, ...], choice: Choice, terms: Terms
    ) -> Gateway:
        """Make a gateway; raise `ConfigError` if a URI cannot be that of an upstream."""
        mirrors = (Mirror(fetcher, uri, choice, terms) for uri in upstreams)
        return cls(fetcher, tuple(mirrors), None if terms.ahead else OnDemand(fetcher))

    def remote_files(self, state: Repository) -> Mapping[Key, RemoteFile]:
        """Return the files of a repository that will be fetched when devices ask for them."""
        return remote_files(state) if self.on_demand else {}

    @property
    def upstreams(self) -> tuple[UpstreamStatus, ...]:
        """The status of each upstream."""
        return tuple(mirror.status for mirror in self.mirrors)

    async def run(self) -> None:
        """Follow the upstreams until cancelled; raises as `Mirror.run` does."""
        try:
            async with task_group() as group:
                for mirror in self.mirrors:
                    group.create_task(mirror.run())
                while True:
                    await asyncio.to_thread(self.fetcher.remove_stale)
                    await asyncio.sleep(REMOVE_STALE_S)
        finally:
            if self.on_demand:
                await self.on_demand.close()
