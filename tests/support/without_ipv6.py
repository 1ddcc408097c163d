"""Run in a network namespace of its own: serve where IPv6 is off by sysctl. Prints what it got."""

from __future__ import annotations

import asyncio
import fcntl
import socket
import struct
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[2]))

from netota_coap.errors import AddressError
from tests.support.device import GET, device
from tests.support.serving import serving

SIOCSIFFLAGS, IFF_UP_AND_RUNNING = 0x8914, 0x41


async def main(root: Path) -> None:
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as any_socket:
        loopback_up = struct.pack("16sH14s", b"lo", IFF_UP_AND_RUNNING, b"")
        fcntl.ioctl(any_socket, SIOCSIFFLAGS, loopback_up)
    Path("/proc/sys/net/ipv6/conf/all/disable_ipv6").write_text("1")
    for bind in ("[::]:0", "127.0.0.1:0", "localhost:0"):
        async with serving(root, bind) as uris:
            port = uris[0].rsplit(":", 1)[1]
            async with device(f"coap://127.0.0.1:{port}") as it:
                print(bind, (await it.ask(GET, "p")).code)
    try:
        async with serving(root, "[::1]:0"):
            pass
    except AddressError as error:
        print(error)


if __name__ == "__main__":
    asyncio.run(main(Path(sys.argv[1])))
