"""Two hosts and a wire, in network namespaces of their own: a server, and who looks for it.

Run by `test_multicast.py` as `unshare --net python tests/support/lan.py`; prints one JSON object.
"""

from __future__ import annotations

import asyncio
import json
import socket
import subprocess
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[2]))

from netota_coap.catalog.catalog import Catalog
from netota_coap.client.discovery import discover
from netota_coap.coap import options as coap
from netota_coap.coap.frontdoor import FrontDoor
from netota_coap.coap.responder import Responder
from netota_coap.coap.site import CoapSite
from netota_coap.repository.loading import Loader

FIXTURE = Path(__file__).parents[2] / "fixtures" / "repositories" / "typical"
SERVER, CLIENT = "v0", "v1"
LEISURE_S = 0.2
CON, NON = 0x40, 0x50
CORE = [(coap.URI_PATH, b".well-known"), (coap.URI_PATH, b"core")]
QUESTIONS = {
    "found": (NON, 1, CORE),
    "known by an unknown type": (NON, 1, [*CORE, (coap.URI_QUERY, b"rt=nothing")]),
    "confirmable": (CON, 1, CORE),
    "not discovery": (NON, 1, [(coap.URI_PATH, b"p")]),
    "not there": (NON, 1, [(coap.URI_PATH, b"nothing")]),
    "not GET": (NON, 2, CORE),
    "malformed": (NON, 0xFF, CORE),
    "critical": (NON, 1, [*CORE, (2049, b"x")]),
}


def ip(*arguments: str) -> None:
    subprocess.run(["ip", *arguments], check=True)


def raise_link(name: str, number: int) -> None:
    """Give an interface its addresses; nobody else is on the wire who could have them."""
    Path(f"/proc/sys/net/ipv6/conf/{name}/accept_dad").write_text("0")
    ip("link", "set", name, "addrgenmode", "none")
    ip("link", "set", name, "up")
    ip("address", "add", f"192.0.2.{number}/24", "dev", name)
    ip("-6", "address", "add", f"fe80::{number}/64", "dev", name, "nodad")


async def serve() -> None:
    child = await asyncio.create_subprocess_exec(
        *("unshare", "--net", sys.executable, __file__, "ask"),
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
    )
    assert child.stdin and child.stdout
    try:
        await child.stdout.readline()
        ip("link", "add", SERVER, "type", "veth", "peer", "name", CLIENT, "netns", str(child.pid))
        raise_link(SERVER, 1)
        site = CoapSite(Responder(Catalog.of(Loader(FIXTURE).load())))
        door = await FrontDoor.open(site, ["[::]:0"], multicast=[SERVER], leisure_s=LEISURE_S)
        out, _ = await child.communicate(door.uris[0].rsplit(":", 1)[1].encode() + b"\n")
        await door.close()
        sys.stdout.write(out.decode())
    finally:
        if child.returncode is None:
            child.kill()


async def ask() -> None:
    print("ready", flush=True)
    port = int(sys.stdin.readline())
    raise_link(CLIENT, 2)
    answers = {}
    for group in ("224.0.1.187", "ff02::fd", "ff05::fd"):
        heard = await asyncio.gather(*(answered(group, port, what) for what in QUESTIONS))
        answers[group] = [
            what for what, is_heard in zip(QUESTIONS, heard, strict=True) if is_heard
        ]
    found = [uri async for uri in discover([CLIENT], port, wait_s=2 * LEISURE_S)]
    print(json.dumps({"answered": answers, "found": sorted(found), "port": port}))


async def answered(group: str, port: int, what: str) -> bool:
    """Ask a group; whether an answer comes while one may, from an address that is no group's."""
    head, method, options = QUESTIONS[what]
    family = socket.AF_INET6 if ":" in group else socket.AF_INET
    with socket.socket(family, socket.SOCK_DGRAM) as opened:
        opened.setblocking(False)
        index = socket.if_nametoindex(CLIENT)
        if family == socket.AF_INET6:
            target = (group, port, 0, index)
        else:
            target = (group, port)
            request = bytes(8) + index.to_bytes(4, sys.byteorder)
            opened.setsockopt(socket.IPPROTO_IP, socket.IP_MULTICAST_IF, request)
        opened.sendto(bytes((head, method, 0, 1)) + coap.encode(options), target)
        loop = asyncio.get_running_loop()
        try:
            async with asyncio.timeout(2 * LEISURE_S):
                data, address = await loop.sock_recvfrom(opened, 2_048)
        except TimeoutError:
            return False
        assert address[0].partition("%")[0] in ("192.0.2.1", "fe80::1"), address
        return data[0] >> 4 == 5 and data[1] == 0x45


asyncio.run(ask() if "ask" in sys.argv else serve())
