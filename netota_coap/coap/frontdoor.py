"""The sockets, and what comes in through them. The only user of private names of aiocoap.

It opens the UDP sockets itself (aiocoap would share ports and open TCP beside), and reads them
itself. A plain GET that was asked before is answered from its bytes: no message object is built,
and nothing is kept of it. Any other datagram is vetted (`vetting`), so that nothing malformed
reaches aiocoap.
A plain request is answered by the same pure function that aiocoap's resource calls, one that
registers an observer by the table of observers. The rest is handed on, as long as aiocoap has not
too much to remember.
aiocoap is pinned in `pyproject.toml`; `tests/coap/test_frontdoor.py` fails when a release moves
the names that are used here.
"""

from __future__ import annotations

import asyncio
import socket
from collections.abc import Sequence
from typing import Any

import attrs
from aiocoap.messagemanager import MessageManager
from aiocoap.protocol import Context

from netota_coap.coap.multicast import LEISURE_S, Leisure, join
from netota_coap.coap.observe.entries import OUR_IDS, Endpoint, unpack
from netota_coap.coap.observe.table import Alarm
from netota_coap.coap.response_cache import ReadyAnswers
from netota_coap.coap.sockets import open_sockets, tell_buffers, uri_of
from netota_coap.coap.udp import Interface, Site
from netota_coap.coap.vetting import Doorkeeper

_ACK_BYTES = 832  # that an ACK takes of a receive buffer, as Linux counts


# ----------------------------------------------------------------------------------------------
# The door


def _keep_below_ours(manager: Any) -> None:
    """Let aiocoap choose message IDs below those of notifications."""
    choose = manager._next_message_id
    manager._next_message_id = lambda: choose() % OUR_IDS


@attrs.define
class FrontDoor:
    """The open sockets of a server.

    Attributes:
        uris: Where it listens.
    """

    uris: tuple[str, ...]
    _context: Context
    _interfaces: Sequence[Interface]
    _alarm: Alarm
    _leisure: Leisure

    @classmethod
    async def open(
        cls,
        site: Site,
        binds: Sequence[str],
        *,
        multicast: Sequence[str] = (),
        leisure_s: float = LEISURE_S,
    ) -> FrontDoor:
        """Listen.

        Args:
            site: Answers the requests, of aiocoap by its `render_to_pipe`.
            binds: `HOST:PORT` each.
            multicast: Names of interfaces on which it can be found.
            leisure_s: How long an answer to many may wait.

        Raises:
            AddressError: One of them cannot be listened on; none is then.
            ConfigError: One of them cannot be read.
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
        tell_buffers(sockets[0])
        loop = asyncio.get_running_loop()
        context = Context(loop=loop, serversite=site, loggername="netota_coap.aiocoap")
        ready, doorkeeper, leisure = ReadyAnswers(), Doorkeeper(), Leisure(leisure_s)
        interfaces: list[Interface] = []
        for index, opened in enumerate(sockets):

            async def attach(
                manager: MessageManager, index: int = index, opened: socket.socket = opened
            ) -> Any:
                _keep_below_ours(manager)
                interface = await Interface._create_transport_endpoint(
                    opened, manager, context.log, loop, []
                )
                interface.listen(opened, index, site, ready, doorkeeper, leisure)
                interfaces.append(interface)
                return interface

            await context._append_tokenmanaged_messagemanaged_transport(attach)

        def send(endpoint: Endpoint, datagram: bytes) -> bool:
            index, address, local = unpack(endpoint)
            if index >= len(interfaces):
                return True  # of before a restart, by a socket that is no more: silence ends it
            return interfaces[index].notify(address, local, datagram)

        held = min(opened.getsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF) for opened in sockets)
        site.observers.window.most = held // 2 // _ACK_BYTES
        site.observers.send = send
        alarm = Alarm(site.observers)
        alarm.start()
        uris = tuple(dict.fromkeys(map(uri_of, sockets)))
        return cls(uris, context, interfaces, alarm, leisure)

    async def close(self) -> None:
        """Stop listening; observers are told nothing, so that they stay."""
        self._alarm.stop()
        self._leisure.close()
        for interface in self._interfaces:
            interface.deafen()
        # What was read last has to begin before it can be ended.
        await asyncio.sleep(0)
        await self._context.shutdown()
