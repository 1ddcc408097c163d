"""Bad input at a live server: it answers the next good request, and ends cleanly."""

from __future__ import annotations

import random
from pathlib import Path

from netota_coap.coap import options as coap
from netota_coap.selection import Selection
from netota_coap.wire import selection_to_cbor
from tests.device import CON, FETCH, GET, NON, POST, device
from tests.serving import served

COUNT = 10_000
PATHS = ("p", "p/sensor-node", "p/sensor-node/s/stable?full", ".well-known/core", "nix", "")


def datagrams(seed: int) -> list[bytes]:
    """Make good requests, mutated ones and noise; the same for the same seed."""
    chance = random.Random(seed)
    selection = selection_to_cbor(Selection.of({"machine": ["a", "b"], "scheme": "coap"}))
    made = []
    for _ in range(COUNT):
        options = [
            (chance.choice([*coap.KNOWN, 1, 5, 35, 65, 252, 258, 2053]), chance.randbytes(size))
            for size in (chance.choices(range(6), k=chance.randrange(4)))
        ]
        path = [(coap.URI_PATH, part.encode()) for part in chance.choice(PATHS).split("/")]
        token = chance.randbytes(chance.choice((0, 1, 8)))
        method = chance.choice((GET, GET, FETCH, POST, chance.randrange(256)))
        kind = chance.choice((CON, CON, NON, 2, 3))
        head = bytes((0x40 | kind << 4 | len(token), method)) + chance.randbytes(2) + token
        data = bytearray(head + coap.encode([*path, *options], chance.choice((b"", selection))))
        for _ in range(chance.choice((0, 0, 1, 3))):
            action = chance.randrange(3)
            at = chance.randrange(len(data) + 1)
            if action == 0 and at < len(data):
                data[at] ^= 1 << chance.randrange(8)
            elif action == 1:
                del data[at : at + chance.randrange(1, 9)]
            else:
                data[at:at] = chance.randbytes(chance.randrange(1, 9))
        made.append(
            bytes(data) if chance.random() < 0.9 else chance.randbytes(chance.randrange(99))
        )
    return made


async def test_mutated_datagrams(sample: Path) -> None:
    """10,000 generated and mutated datagrams leave no trace but answers."""
    async with served(sample) as server, device(server.uri) as fuzzer, device(server.uri) as good:
        for number, data in enumerate(datagrams(7252)):
            fuzzer.send(data)
            if number % 100 == 99:
                # Also keeps the socket's buffer from running over, so that all are looked at.
                answer = await good.ask(GET, "p")
                assert answer.code == "2.05"

    assert not any("Traceback" in line or line.startswith("ERROR") for line in server.log), (
        server.log[-40:]
    )
