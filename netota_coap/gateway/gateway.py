"""What a service does besides serving, as a gateway: it follows upstreams and fetches files."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping

import attrs

from netota_coap.gateway.adoption import Choice
from netota_coap.gateway.blob_fetcher import Incoming
from netota_coap.gateway.mirror import Mirror, Terms, tasks
from netota_coap.gateway.on_demand import Fetchable, OnDemand, fetchable
from netota_coap.model.values import Repository
from netota_coap.monitoring import UpstreamStatus
from netota_coap.repository.blobs import Key

_TIDY_S = 6 * 3_600.0


@attrs.define(eq=False)
class Gateway:
    """Upstreams that are followed into one repository, and files that are fetched for it.

    Attributes:
        incoming: Fetches them, for all together.
        mirrors: One of each upstream.
        on_demand: Where files are fetched when devices ask for them.
    """

    incoming: Incoming
    mirrors: tuple[Mirror, ...] = ()
    on_demand: OnDemand | None = None

    @classmethod
    def of(
        cls,
        incoming: Incoming,
        upstreams: tuple[str, ...],
        choice: Choice,
        terms: Terms,
    ) -> Gateway:
        """Make a gateway.

        Args:
            incoming: For all together.
            upstreams: URIs.
            choice: What of them is mirrored.
            terms: How.

        Raises:
            ConfigError: One of the URIs cannot be that of an upstream.
        """
        mirrors = (Mirror(incoming, uri, choice, terms) for uri in upstreams)
        return cls(incoming, tuple(mirrors), None if terms.ahead else OnDemand(incoming))

    def fetchable(self, state: Repository) -> Mapping[Key, Fetchable]:
        """Return what of a repository will be fetched when devices ask for it."""
        return fetchable(state) if self.on_demand else {}

    @property
    def upstreams(self) -> tuple[UpstreamStatus, ...]:
        """How it stands with each upstream."""
        return tuple(mirror.status for mirror in self.mirrors)

    async def run(self) -> None:
        """Follow the upstreams until cancelled; what goes wrong is logged and tried again.

        Raises:
            ConfigError: What the environment says of proxies cannot be used.
        """
        try:
            async with tasks() as group:
                for mirror in self.mirrors:
                    group.create_task(mirror.run())
                while True:
                    await asyncio.to_thread(self.incoming.tidy)
                    await asyncio.sleep(_TIDY_S)
        finally:
            if self.on_demand:
                await self.on_demand.close()
