"""coap/multicast.py, client/discovery.py: two hosts on a network of their own find each other."""

from __future__ import annotations

import asyncio
import json
import shutil
import socket
import sys
from pathlib import Path

import pytest

from netota_coap.catalog.catalog import Catalog
from netota_coap.client.discovery import discover
from netota_coap.coap import multicast
from netota_coap.coap.frontdoor import FrontDoor
from netota_coap.coap.multicast import Leisure, is_group, unspecified
from netota_coap.coap.responder import Responder
from netota_coap.coap.site import CoapSite
from netota_coap.errors import ConfigError
from netota_coap.model.values import Repository
from tests.support.serving import run, until

LAN = Path(__file__).parents[1] / "support" / "lan.py"


@pytest.mark.slow
async def test_a_server_is_found_and_answers_nothing_else() -> None:
    """By each group; what is no discovery, or would be an error, is met with silence."""
    code, _, _ = await run("unshare", "--net", "true")
    if code or not shutil.which("ip"):
        pytest.skip("a network of its own takes root, and Debian's iproute2")
    code, out, err = await run("unshare", "--net", sys.executable, LAN)
    assert (code, err) == (0, "")
    seen = json.loads(out)
    assert seen["answered"] == {group: ["found"] for group in multicast.GROUPS}
    port = seen["port"]
    assert seen["found"] == [f"coap://192.0.2.1:{port}", f"coap://[fe80::1%v1]:{port}"]


def door(binds: list[str], interface: str) -> asyncio.Task[FrontDoor]:
    site = CoapSite(Responder(Catalog.of(Repository(format=1))))
    return asyncio.ensure_future(FrontDoor.open(site, binds, multicast=[interface]))


@pytest.mark.parametrize(
    ("binds", "interface", "reason"),
    [
        (["[::]:0"], "nowhere0", "nowhere0: no such interface; there is .*lo.*"),
        (["127.0.0.1:0"], "lo", "multicast needs a socket on all addresses"),
    ],
)
async def test_what_cannot_be_joined(binds: list[str], interface: str, reason: str) -> None:
    """An interface that is not there, or a socket that would not hear, is said at the start."""
    with pytest.raises(ConfigError, match=reason):
        await door(binds, interface)


async def test_asking_on_an_unknown_interface() -> None:
    """The same is said to who looks for servers."""
    with pytest.raises(ConfigError, match="no such interface"):
        await anext(discover(["nowhere0"]))


async def test_leisure_is_bounded() -> None:
    """At most 64 answers wait; when the front door closes, none is sent."""
    sent = []
    leisure = Leisure(0.01)
    for number in range(70):
        leisure.later(lambda number=number: sent.append(number))
    await until(lambda: len(sent) == 64)
    leisure.later(lambda: sent.append(70))
    leisure.close()
    assert not await asyncio.sleep(0.02)
    assert sorted(sent) == list(range(64))


@pytest.mark.parametrize(
    ("group", "address"),
    [("ff02::fd", "::"), ("::ffff:224.0.1.187", "::ffff:0.0.0.0"), ("::ffff:127.0.0.1", None)],
)
def test_groups(group: str, address: str | None) -> None:
    """An answer to a group leaves from an address of the interface."""
    packed = socket.inet_pton(socket.AF_INET6, group)
    assert is_group(packed) is (address is not None)
    if address is not None:
        assert socket.inet_pton(socket.AF_INET6, address) + b"1234" == unspecified(
            packed + b"1234"
        )
