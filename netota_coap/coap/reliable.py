"""CoAP over TCP (RFC 8323): aiocoap's, with bounds.

For gateways whose NAT forgets UDP sooner than they ask. Uses private names of aiocoap, as
`frontdoor` does, and none of its own ones is needed elsewhere.
"""

from __future__ import annotations

import asyncio
import itertools
import logging
import socket
from collections.abc import Callable, Iterable
from typing import Any

import attrs
from aiocoap.protocol import Context
from aiocoap.transports.tcp import TcpConnection, TCPServer, _extract_message_size

from netota_coap.catalog import Path

_log = logging.getLogger("netota_coap.coap")

_MOST_CONNECTIONS = 1_024  # of a socket
_MOST_FOLLOWERS = 4_096
_LONGEST = 4_096  # bytes of a request
_MOST_WAITING = 65_536  # bytes that a peer leaves unread


class _Connection(TcpConnection):
    """aiocoap's connection, which takes one message at a time, and ends what costs too much."""

    _my_max_message_size = _LONGEST

    def __init__(self, *args: Any, welcome: bool, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._welcome = welcome
        self._unread = b""
        self._waits = False
        self._choked = False

    def connection_made(self, transport: Any) -> None:
        """Begin, if there are not too many."""
        self._peer: asyncio.Transport = transport
        super().connection_made(transport)
        if not self._welcome:
            transport.abort()

    def data_received(self, data: bytes) -> None:
        """Take bytes."""
        self._unread += data
        if not self._waits:
            self._take()

    def pause_writing(self) -> None:
        """Take no more requests of a peer that does not read the answers."""
        self._choked = True
        self._peer.pause_reading()

    def resume_writing(self) -> None:
        """Take requests again."""
        self._choked = False
        self._take()

    def _take(self) -> None:
        """Take one message, and the next after that was begun: else its end might come before.

        What cannot be read as text or as a number ends the connection.
        """
        self._waits = False
        if self._peer.is_closing() or self._choked:
            return
        parts = _extract_message_size(self._unread)
        end = sum(parts) if parts else _LONGEST
        if len(self._unread) < end <= _LONGEST:
            self._peer.resume_reading()
            return
        message, self._unread = self._unread[:end], self._unread[end:]
        try:
            super().data_received(message)
        except Exception as error:  # noqa: BLE001 - aiocoap lets through whatever decoding raises
            _log.debug("refused a connection's message: %s", error)
            self._peer.abort()
        self._waits = True
        self._peer.pause_reading()
        self.loop.call_soon(self._take)

    def _send_message(self, msg: Any) -> None:
        if self._peer.is_closing():
            return
        super()._send_message(msg)
        if self._peer.get_write_buffer_size() > _MOST_WAITING:
            self._peer.abort()


async def listen(context: Context, opened: socket.socket) -> None:
    """Let aiocoap serve a listening socket, too, and close it with the rest."""
    loop = asyncio.get_running_loop()

    async def attach(manager: Any) -> Any:
        server: Any = TCPServer()
        server._tokenmanager, server.log = manager, context.log

        def connect() -> _Connection:
            welcome = len(server._pool) < _MOST_CONNECTIONS
            connection = _Connection(server, context.log, loop, is_server=True, welcome=welcome)
            server._pool.add(connection)
            return connection

        server.server = await loop.create_server(connect, sock=opened)
        return server

    await context._append_tokenmanaged_transport(attach)


@attrs.define(eq=False)
class Followers:
    """Who observes over TCP, where nothing has to be repeated and order is kept."""

    _changed: dict[Path, dict[asyncio.Event, None]] = attrs.field(init=False, factory=dict)
    _count: int = attrs.field(init=False, default=0)

    def __len__(self) -> int:
        return self._count

    @property
    def is_full(self) -> bool:
        """Whether no more are taken."""
        return self._count >= _MOST_FOLLOWERS

    def notify(self, paths: Iterable[Path]) -> None:
        """Learn which resources changed, appeared or vanished."""
        for path in paths:
            for changed in self._changed.get(path, ()):
                changed.set()

    async def follow(self, path: Path, send: Callable[[int], bool]) -> None:
        """Let one be told now, and after each change of a resource.

        Args:
            path: Of the resource.
            send: Called with the Observe number; tells whether there can be more.
        """
        changed = asyncio.Event()
        self._changed.setdefault(path, {})[changed] = None
        self._count += 1
        try:
            for number in itertools.count(2):
                if not send(number):
                    return
                await changed.wait()
                changed.clear()
        finally:
            self._count -= 1
            del self._changed[path][changed]
            if not self._changed[path]:
                del self._changed[path]
