"""Hostile datagrams for tests and soaks: valid requests, mutated ones and noise."""

from __future__ import annotations

import random
from collections.abc import Iterator

from netota_coap.coap import options as coap
from netota_coap.encoding.documents import selection_to_cbor
from netota_coap.model.selection import Selection

_PATHS = ("p", "p/sensor-node", "p/sensor-node/s/stable?full", ".well-known/core", "nix", "")
_CON, _NON, _ACK, _RST = range(4)
_GET, _POST, _FETCH = 1, 2, 5


def datagrams(seed: int) -> Iterator[bytes]:
    """Generate datagrams without end; a seed always gives the same."""
    chance = random.Random(seed)
    selection = selection_to_cbor(Selection.of({"machine": ["a", "b"], "scheme": "coap"}))
    while True:
        options = [
            (chance.choice([*coap.KNOWN, 1, 5, 35, 65, 252, 258, 2053]), chance.randbytes(size))
            for size in (chance.choices(range(6), k=chance.randrange(4)))
        ]
        path = [(coap.URI_PATH, part.encode()) for part in chance.choice(_PATHS).split("/")]
        token = chance.randbytes(chance.choice((0, 1, 8)))
        method = chance.choice((_GET, _GET, _FETCH, _POST, chance.randrange(256)))
        kind = chance.choice((_CON, _CON, _NON, _ACK, _RST))
        head = bytes((0x40 | kind << 4 | len(token), method)) + chance.randbytes(2) + token
        data = bytearray(head + coap.encode([*path, *options], chance.choice((b"", selection))))
        for _ in range(chance.choice((0, 0, 1, 3))):
            _mutate(data, chance)
        yield bytes(data) if chance.random() < 0.9 else chance.randbytes(chance.randrange(99))


def _mutate(data: bytearray, chance: random.Random) -> None:
    """Flip a bit, delete bytes or insert some."""
    action = chance.randrange(3)
    at = chance.randrange(len(data) + 1)
    if action == 0 and at < len(data):
        data[at] ^= 1 << chance.randrange(8)
    elif action == 1:
        del data[at : at + chance.randrange(1, 9)]
    else:
        data[at:at] = chance.randbytes(chance.randrange(1, 9))
