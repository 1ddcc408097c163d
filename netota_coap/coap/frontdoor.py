"""Opens and closes the UDP sockets of the server, and connects them to aiocoap and observers.

aiocoap does not open them: it would share ports with other processes and listen on TCP as well.
This module and `udp` are the only ones that use private names of aiocoap. aiocoap is pinned in
`pyproject.toml`; `tests/coap/test_frontdoor.py` fails when a release moves these names.
"""

from __future__ import annotations

import asyncio
import socket
from collections.abc import Sequence
from typing import Any

import attrs
from aiocoap.messagemanager import MessageManager
from aiocoap.protocol import Context

from netota_coap.coap.multicast import Leisure, join
from netota_coap.coap.observe.entries import FIRST_NOTIFICATION_ID, Endpoint, unpack
from netota_coap.coap.observe.table import Scheduler
from netota_coap.coap.protocol import LEISURE_S
from netota_coap.coap.response_cache import ResponseCache
from netota_coap.coap.site import CoapSite
from netota_coap.coap.sockets import log_small_buffers, open_sockets, uri_of
from netota_coap.coap.udp import Interface
from netota_coap.coap.vetting import RequestLimiter

_ACK_BYTES = 832  # that an ACK takes of the receive buffer, as Linux counts


def _separate_message_ids(manager: Any) -> None:
    """Let aiocoap choose message IDs below those of notifications."""
    choose = manager._next_message_id
    manager._next_message_id = lambda: choose() % FIRST_NOTIFICATION_ID


@attrs.define
class FrontDoor:
    """The open sockets of a server, which listen on `uris`."""

    uris: tuple[str, ...]
    _context: Context
    _interfaces: Sequence[Interface]
    _scheduler: Scheduler
    _leisure: Leisure

    @classmethod
    async def open(
        cls,
        site: CoapSite,
        binds: Sequence[str],
        *,
        multicast: Sequence[str] = (),
        leisure_s: float = LEISURE_S,
    ) -> FrontDoor:
        """Open the sockets, and answer requests from now on.

        Args:
            site: Answers the requests.
            binds: `HOST:PORT` each.
            multicast: Names of interfaces on which multicast discovery is answered.
            leisure_s: Longest delay of a response to multicast, seconds.

        Raises:
            AddressError: The server cannot listen on an address; all sockets are closed again.
            ConfigError: An address or an interface is malformed or unknown.
        """
        sockets: list[socket.socket] = []
        try:
            for bind in binds:
                sockets += open_sockets(bind)
            join(sockets, multicast)
        except BaseException:
            for opened in sockets:
                opened.close()
            raise
        log_small_buffers(sockets[0])
        loop = asyncio.get_running_loop()
        context = Context(loop=loop, serversite=site, loggername="netota_coap.aiocoap")
        cache, limiter, leisure = ResponseCache(), RequestLimiter(), Leisure(leisure_s)
        interfaces: list[Interface] = []
        for index, opened in enumerate(sockets):

            async def attach(
                manager: MessageManager, index: int = index, opened: socket.socket = opened
            ) -> Any:
                _separate_message_ids(manager)
                interface = await Interface._create_transport_endpoint(
                    opened, manager, context.log, loop, []
                )
                interface.listen(opened, index, site, cache, limiter, leisure)
                interfaces.append(interface)
                return interface

            await context._append_tokenmanaged_messagemanaged_transport(attach)

        def send(endpoint: Endpoint, datagram: bytes) -> bool:
            index, address, local = unpack(endpoint)
            if index >= len(interfaces):
                return True  # stored before a restart with more sockets: silence will end it
            return interfaces[index].notify(address, local, datagram)

        buffer = min(opened.getsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF) for opened in sockets)
        site.observers.window.most = buffer // 2 // _ACK_BYTES
        site.observers.send = send
        scheduler = Scheduler(site.observers)
        scheduler.start()
        uris = tuple(dict.fromkeys(map(uri_of, sockets)))
        return cls(uris, context, interfaces, scheduler, leisure)

    async def close(self) -> None:
        """Close the sockets; observers are not notified, so that they survive a restart."""
        self._scheduler.stop()
        self._leisure.close()
        for interface in self._interfaces:
            interface.stop_reading()
        # aiocoap must begin with the last request before it can cancel it.
        await asyncio.sleep(0)
        await self._context.shutdown()
