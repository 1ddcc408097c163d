"""A client made of aiocoap alone, run beside the tests: `get URI SZX` or `observe URI`.

`aiocoap-client --observe` prints no notification in the pinned release (aiocoap's issue 395).
"""

from __future__ import annotations

import asyncio
import sys

from aiocoap import GET, Context, Message


async def main(what: str, uri: str, szx: str = "4") -> None:
    context = await Context.create_client_context(transports=["udp6"])
    out = sys.stdout.buffer
    if what == "get":
        message = Message(code=GET, uri=uri, block2=(0, False, int(szx)))
        out.write((await context.request(message).response).payload)
    else:
        request = context.request(Message(code=GET, uri=uri, observe=0, accept=50))
        out.write((await request.response).payload + b"\n")
        out.flush()
        async for notification in request.observation:
            out.write(notification.payload + b"\n")
            out.flush()
    await context.shutdown()


if __name__ == "__main__":
    asyncio.run(main(*sys.argv[1:]))
