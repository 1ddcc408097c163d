"""`udp.Interface` and aiocoap answer alike, byte for byte.

Two servers of the same state get the same requests: one answers what it can by itself, the other
hands everything that was vetted, and has no Observe option, to aiocoap. Two differences are meant,
and left out here: a NON that comes again (aiocoap is silent, ours answers, which costs nobody
anything: RFC 7252, section 4.5), and a request that comes again after a swap (aiocoap repeats its
old answer, ours has the new one).
"""

from __future__ import annotations

import asyncio
import contextlib
import random
import socket
from collections.abc import AsyncIterator, Sequence
from pathlib import Path

import attrs
import pytest
from hypothesis import settings

from netota_coap.catalog.catalog import Catalog
from netota_coap.coap import options as coap
from netota_coap.coap import vetting
from netota_coap.coap.frontdoor import FrontDoor
from netota_coap.coap.responder import Responder
from netota_coap.coap.site import CoapSite
from netota_coap.coap.udp import Interface
from netota_coap.encoding.documents import selection_to_cbor
from netota_coap.model.selection import Selection
from netota_coap.repository.loading import Loader
from tests.conftest import FIXTURES
from tests.support.device import ACK, CON, FETCH, GET, NON, RST
from tests.support.serving import PATIENCE_S

REQUESTS = 50 * settings().max_examples
PATHS: Sequence[Sequence[bytes]] = (
    (b"p", b"sensor-node", b"s", b"stable"),
    (b"p", b"sensor-node", b"s", b"stable"),
    (b"p", b"sensor-node", b"s", b"v1"),
    (b"p", b"gateway-os", b"s", b"stable"),
    (b"p", b"gateway-os"),
    (b"p",),
    (b".well-known", b"core"),
    (b"p", b"sensor-node", b"s", b"none"),
    (b"p", b"", b"s"),
    (),
)
QUERIES = (
    b"head", b"full", b"sequence=17", b"sequence=1", b"sequence=x", b"machine=nrf52840dk",
    b"machine=nrf9160dk", b"arch=arm", b"debug=true", b"debug=false", b"scheme=coap", b"scheme=",
    b"rt=netota.stream", b"href=/p*", b"x", b"", b"=", b"type=zephyr-image", "ä=ö".encode(),
)  # fmt: skip
ACCEPTS = (b"", b"\x32", b"\x3c", b"\x28", b"\x00\x3c", b"\x29", b"\x00\x00\x3c")
LENGTHS = (0, 1, 2, 4, 9, 13, 30)
NUMBERS = (1, 2, 5, 8, 9, 14, 16, 18, 20, 27, 28, 35, 39, 60, 65, 258, 292, 2_048, 65_000, 65_001)


def a_request(rng: random.Random, message_id: int, etag: bytes) -> bytes:
    """Make a request with options of all kinds, mostly such as a device might send."""
    options: list[coap.Option] = [(coap.URI_PATH, part) for part in rng.choice(PATHS)]
    queries = rng.choices(QUERIES, k=rng.choice((0, 0, 1, 1, 2, 3)))
    options += [(coap.URI_QUERY, query) for query in queries]
    if rng.random() < 0.4:
        accept = rng.choice(
            (b"", b"\x32", b"\x3c", b"\x28", b"\x00\x3c", b"\x29", b"\x00\x00\x3c")
        )
        options.append((coap.ACCEPT, accept))
    if rng.random() < 0.2:
        options.append((coap.ETAG, rng.choice((etag, etag[:4], b"", b"123456789"))))
    if rng.random() < 0.3:
        block = rng.choice((0, 1, 5, 6, 7, 0x10, 0x16, 0x26, 0x1E, 0x80, 0xFFFFF6)) | 8 * (
            rng.random() < 0.1
        )
        options.append((coap.BLOCK2, coap.encode_uint(block)))
    odd = rng.choices(NUMBERS, k=rng.choice((0, 0, 0, 0, 1, 2)))
    options += [(number, rng.randbytes(rng.choice(LENGTHS))) for number in odd]
    for number, value in ((coap.URI_HOST, b"localhost"), (coap.URI_PORT, b"\x16\x33")):
        if rng.random() < 0.1:
            options.append((number, value))
    token = rng.randbytes(rng.choice((0, 1, 2, 4, 7)))
    if rng.random() < 0.05:
        options.append((coap.OBSERVE, rng.choice((b"", b"", b"\x01", b"\x02", b"1234"))))
    if rng.random() < 0.05:
        rng.shuffle(options)  # whoever encodes sorts them, but keeps the order of those repeated
    if rng.random() < 0.05:
        options += rng.choices(options or [(coap.URI_QUERY, b"head")], k=2)
    code = rng.choices((GET, FETCH, 2, 3, 4, 6, 7, 31), (60, 12, 1, 1, 1, 1, 1, 1))[0]
    payload = b""
    if code == FETCH:
        selection = selection_to_cbor(Selection.of({"machine": "nrf9160dk", "scheme": "coap"}))
        payload = rng.choice((selection, selection, b"\xa0", b"", b"\x80", b"\xff", bytes(300)))
        if rng.random() < 0.9:
            options.append((coap.CONTENT_FORMAT, b"\x3c"))
    elif rng.random() < 0.05:
        payload = rng.randbytes(5)
    kind = rng.choice((CON, CON, CON, NON))
    head = bytes((0x40 | kind << 4 | len(token), code)) + message_id.to_bytes(2, "big")
    return head + token + coap.encode(options, payload)


@attrs.frozen
class Peer:
    """A socket that talks to one of the servers."""

    socket: socket.socket

    async def answers(self, request: bytes, ping: int) -> list[bytes]:
        """Send a request; what comes until a ping that follows it is answered."""
        loop = asyncio.get_running_loop()
        await loop.sock_sendall(self.socket, request)
        number = (ping | 0x4000).to_bytes(2, "big")  # an ID that no request has
        await loop.sock_sendall(self.socket, bytes((0x40, 0)) + number)
        came = []
        async with asyncio.timeout(PATIENCE_S):
            while (data := await loop.sock_recv(self.socket, 4_096)) != bytes((0x70, 0)) + number:
                came.append(data)
        return came


def _hand_on(interface: Interface) -> None:
    """Let `udp.Interface` hand all requests without Observe to aiocoap."""
    decode = interface._decode

    def decode_observing(vetted: bytes) -> object:
        plain = decode(vetted)
        return plain if plain and plain.options != plain.unobserved else None

    interface._decode = decode_observing  # type: ignore[assignment,method-assign]


@contextlib.asynccontextmanager
async def peer(responder: Responder, *, alone: bool) -> AsyncIterator[Peer]:
    """Serve, and connect; `alone`: let aiocoap answer all."""
    door = await FrontDoor.open(CoapSite(responder), ["127.0.0.1:0"])
    if not alone:
        for manager in door._context.request_interfaces:
            _hand_on(manager.token_interface.message_interface)
    port = int(door.uris[0].rsplit(":", 1)[1])
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as opened:
        opened.setblocking(False)
        opened.connect(("127.0.0.1", port))
        yield Peer(opened)
    await door.close()


def comparable(answers: list[bytes]) -> list[bytes]:
    """Take out the message IDs that a server chooses: those that are not the request's."""
    return [
        answer if answer[0] >> 4 & 3 in (ACK, RST) else answer[:2] + b"??" + answer[4:]
        for answer in answers
    ]


@pytest.mark.fuzz
@pytest.mark.parametrize("seed", range(2))
async def test_door_and_resource_answer_alike(seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Thousands of requests, each answered by both; many twice, as when an answer is lost."""
    monkeypatch.setattr(vetting, "MOST_OF_SOURCE", 2 * REQUESTS)
    rng = random.Random(seed)
    repository = Loader(Path(FIXTURES) / "repositories" / "typical").load()
    responder = Responder(Catalog.of(repository))
    stable = responder.catalog.find(("p", "sensor-node", "s", "stable"))
    etag = stable.represent([], stable.formats[0], "coap").etag
    codes: dict[int, int] = {}
    async with peer(responder, alone=True) as door, peer(responder, alone=False) as resource:
        for number in range(REQUESTS // 2):
            request = a_request(rng, number, etag)
            again = request[0] >> 4 & 3 == CON and rng.random() < 0.3
            for _ in range(1 + again):
                by_door = await door.answers(request, number)
                by_resource = await resource.answers(request, number)
                assert comparable(by_resource) == comparable(by_door), request.hex()
            for answer in by_door:
                codes[answer[1]] = codes.get(answer[1], 0) + 1
    # The requests reach everything: content, 2.03, and each refusal.
    wanted = {0x45, 0x43, 0x80, 0x82, 0x84, 0x85, 0x86, 0x8D, 0x8F, 0xA5}
    assert wanted <= codes.keys()
