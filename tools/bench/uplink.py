"""A relay between a gateway and its upstream that limits and counts what comes back."""

from __future__ import annotations

import asyncio
import contextlib
import socket
from collections.abc import AsyncIterator

import attrs

_LONGEST = 4_096  # bytes of a datagram; over TCP, bytes that are relayed at a time
_WAITING = 64  # datagrams in the queue; more are dropped, as by any router


@attrs.define(eq=False)
class Uplink:
    """Relays to the upstream without delay, and back at a limited rate.

    Attributes:
        upstream: Port of the upstream, on loopback.
        bytes_s: Limit of the way back; counts payloads of UDP or TCP.
        port: Port for the gateway.
        carried: Bytes that were relayed back.
    """

    upstream: int
    bytes_s: float
    port: int = 0
    carried: int = 0
    _free_s: float = attrs.field(init=False, default=0.0)

    async def _carry(self, count: int) -> None:
        """Wait until the limit allows `count` more bytes."""
        now_s = asyncio.get_running_loop().time()
        self._free_s = max(self._free_s, now_s) + count / self.bytes_s
        await asyncio.sleep(self._free_s - now_s)
        self.carried += count

    @contextlib.asynccontextmanager
    async def of_datagrams(self) -> AsyncIterator[None]:
        """Relay UDP until the block ends."""
        loop = asyncio.get_running_loop()
        waiting: asyncio.Queue[tuple[bytes, tuple[str, int]]] = asyncio.Queue(_WAITING)
        flows: dict[tuple[str, int], socket.socket] = {}
        with contextlib.ExitStack() as stack:
            opened = stack.enter_context(socket.socket(type=socket.SOCK_DGRAM))
            opened.bind(("127.0.0.1", 0))
            opened.setblocking(False)
            self.port = opened.getsockname()[1]

            def go_up() -> None:
                with contextlib.suppress(OSError):
                    data, gateway = opened.recvfrom(_LONGEST)
                    if gateway not in flows:
                        flow = stack.enter_context(socket.socket(type=socket.SOCK_DGRAM))
                        flow.connect(("127.0.0.1", self.upstream))
                        flow.setblocking(False)
                        loop.add_reader(flow, come_down, flow, gateway)
                        stack.callback(loop.remove_reader, flow)
                        flows[gateway] = flow
                    flows[gateway].send(data)

            def come_down(flow: socket.socket, gateway: tuple[str, int]) -> None:
                with contextlib.suppress(OSError, asyncio.QueueFull):
                    waiting.put_nowait((flow.recv(_LONGEST), gateway))

            async def deliver() -> None:
                while True:
                    data, gateway = await waiting.get()
                    await self._carry(len(data))
                    with contextlib.suppress(OSError):
                        opened.sendto(data, gateway)

            loop.add_reader(opened, go_up)
            stack.callback(loop.remove_reader, opened)
            delivering = asyncio.create_task(deliver())
            stack.callback(delivering.cancel)
            yield

    @contextlib.asynccontextmanager
    async def of_streams(self) -> AsyncIterator[None]:
        """Relay TCP until the block ends."""
        carrying: set[asyncio.Task[None]] = set()

        async def pump(
            reader: asyncio.StreamReader, writer: asyncio.StreamWriter, *, down: bool
        ) -> None:
            while data := await reader.read(_LONGEST):
                if down:
                    await self._carry(len(data))
                writer.write(data)
                await writer.drain()
            writer.write_eof()

        async def connect(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            task = asyncio.current_task()
            assert task
            carrying.add(task)
            task.add_done_callback(carrying.discard)
            opened = [writer]
            try:
                with contextlib.suppress(OSError, asyncio.CancelledError):
                    back, forth = await asyncio.open_connection("127.0.0.1", self.upstream)
                    opened.append(forth)
                    await asyncio.gather(
                        pump(reader, forth, down=False), pump(back, writer, down=True)
                    )
            finally:
                for each in opened:
                    each.transport.abort()

        server = await asyncio.start_server(connect, "127.0.0.1", 0)
        self.port = server.sockets[0].getsockname()[1]
        try:
            yield
        finally:
            server.close()
            for task in carrying:
                task.cancel()
            await asyncio.gather(*carrying)
