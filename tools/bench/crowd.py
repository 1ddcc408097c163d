"""A seeded mixed load for `bench_soak.py`: clients that send requests, and observers."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import random
import socket
from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence

import attrs

from netota_coap.coap import options as coap
from netota_coap.encoding.documents import selection_to_cbor
from netota_coap.model.selection import Selection
from netota_coap.model.values import StreamName
from tools.bench.mutated import datagrams

STABLE, EDGE, LARGE = ("sensor-node", "stable"), ("sensor-node", "edge"), ("gateway", "stable")
BOARDS = {STABLE: 20, EDGE: 2, LARGE: 60}
"""The streams of the load, with their numbers of archives."""

BLOCKS = 60  # of 256 bytes; some are past the end of the largest stream
LONGEST = 2_048  # bytes of a response

_TICK_S = 0.01
_SOCKETS = 8
_RENEWALS = 20  # one of so many observers registers again each second
_MOST_SILENT = 200
CON, NON, ACK, RST = range(4)
_GET, _FETCH = 1, 5
_REGISTER, _DEREGISTER = b"", b"\x01"


# ----------------------------------------------------------------------------------------------
# Requests

Asked = tuple[int, bytes]
"""Method of a request, and the bytes after its token."""


def request(
    path: Iterable[str],
    query: Iterable[str] = (),
    options: Iterable[coap.Option] = (),
    method: int = _GET,
    payload: bytes = b"",
) -> Asked:
    """Build a request."""
    found = [(coap.URI_PATH, part.encode()) for part in path]
    found += [(coap.URI_QUERY, part.encode()) for part in query]
    return method, coap.encode([*found, *options], payload)


def _narrowed(chance: random.Random) -> Asked:
    query = (_machine(chance), f"scheme={chance.choice(('coap', 'http'))}")
    formats = chance.choice(((), (60,), (50,)))
    accept = [(coap.ACCEPT, coap.encode_uint(number)) for number in formats]
    return request(path_of(chance.choice((STABLE, STABLE, EDGE, LARGE))), query, accept)


def _distinct(chance: random.Random) -> Asked:
    query = (_machine(chance), f"unit={chance.getrandbits(40)}")
    return request(path_of(chance.choice((STABLE, LARGE))), query)


def _full(chance: random.Random) -> Asked:
    sequence = chance.choice(((), (f"sequence={chance.randrange(1, 200)}",)))
    block = coap.Block(chance.randrange(BLOCKS), False, 4)
    return request(path_of(LARGE), ("full", *sequence), [(coap.BLOCK2, block.encode())])


def _discovery(chance: random.Random) -> Asked:
    path = chance.choice(((".well-known", "core"), ("p",), ("p", STABLE[0]), ("p", LARGE[0])))
    return request(path, chance.choice(((), ("rt=netota.stream",), (f"href=/{chance.random()}",))))


def _fetch(chance: random.Random) -> Asked:
    said = {"machine": [board(chance.randrange(30))], "unit": [f"{chance.randrange(1_000)}"]}
    cbor = [(coap.CONTENT_FORMAT, coap.encode_uint(60))]
    payload = selection_to_cbor(Selection.of(said))
    return request(path_of(chance.choice((STABLE, LARGE))), (), cbor, _FETCH, payload)


def _missing(chance: random.Random) -> Asked:
    name = f"none-{chance.getrandbits(40)}"
    paths = ((name,), ("p", name), ("p", name, "s", name), ("b", name))
    return request(chance.choice(paths))


def path_of(name: StreamName) -> Sequence[str]:
    return ("p", name[0], "s", name[1])


def board(number: int) -> str:
    """Return the name and machine of an archive."""
    return f"board-{number:03}"


def _machine(chance: random.Random) -> str:
    return f"machine={board(chance.randrange(30))}"


_MAKERS: Mapping[str, Callable[[random.Random], Asked]] = {
    "narrowed": _narrowed,
    "distinct": _distinct,
    "full": _full,
    "discovery": _discovery,
    "fetch": _fetch,
    "missing": _missing,
}
KINDS = {**dict.fromkeys(_MAKERS, 5), "narrowed": 40, "distinct": 20, "full": 20, "mutated": 5}
"""Kinds of datagrams, with their weights."""


def traffic(seed: int) -> Iterator[tuple[str, bytes]]:
    """Generate datagrams with their kinds, without end; a seed always gives the same."""
    chance = random.Random(seed)
    mutated = datagrams(seed)
    kinds, weights = list(KINDS), list(KINDS.values())
    for number in itertools.count():
        (kind,) = chance.choices(kinds, weights)
        if kind == "mutated":
            yield kind, next(mutated)
            continue
        token = chance.randbytes(chance.choice((0, 2, 4, 8)))
        asked = _MAKERS[kind](chance)
        yield kind, message(number, chance.choice((CON, CON, NON)), token, asked)


def message(number: int, kind: int, token: bytes, asked: Asked) -> bytes:
    """Build a datagram; `number` is the message ID modulo 2^16, `kind` CON or NON."""
    head = bytes((0x40 | kind << 4 | len(token), asked[0]))
    return head + (number & 0xFFFF).to_bytes(2, "big") + token + asked[1]


def connected(port: int) -> socket.socket:
    """Open a socket of its own to a server on loopback."""
    opened = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
    opened.setblocking(False)
    opened.connect(("127.0.0.1", port))
    return opened


def send(opened: socket.socket, data: bytes) -> None:
    """Send a datagram; one that the system refuses counts as lost."""
    with contextlib.suppress(OSError):
        opened.send(data)


def _received(opened: socket.socket) -> Iterator[bytes]:
    with contextlib.suppress(OSError):
        while True:
            yield opened.recv(LONGEST)


@attrs.define(eq=False)
class Crowd:
    """Clients that send requests and count the responses.

    Attributes:
        sent: Datagrams, by kind.
        answers: Responses, by the class of their code.
    """

    port: int
    sent: Counter[str] = attrs.field(init=False, factory=Counter)
    answers: Counter[int] = attrs.field(init=False, factory=Counter)
    _sockets: Sequence[socket.socket] = attrs.field(init=False)

    @_sockets.default
    def _some(self) -> Sequence[socket.socket]:
        return [connected(self.port) for _ in range(_SOCKETS)]

    async def ask(self, asked: Iterator[tuple[str, bytes]], rate: int) -> None:
        """Send `rate` datagrams per second; those that a busy machine misses are skipped."""
        loop = asyncio.get_running_loop()
        for opened in self._sockets:
            loop.add_reader(opened, self._read, opened)
        sockets = itertools.cycle(self._sockets)
        before_s = loop.time()
        owed = 0.0
        while True:
            await asyncio.sleep(_TICK_S)
            now_s = loop.time()
            owed = min(owed + (now_s - before_s) * rate, 10 * _TICK_S * rate)
            before_s = now_s
            while owed >= 1:
                kind, data = next(asked)
                send(next(sockets), data)
                self.sent[kind] += 1
                owed -= 1

    def leave(self) -> None:
        """Close all sockets."""
        for opened in self._sockets:
            asyncio.get_running_loop().remove_reader(opened)
            opened.close()

    def _read(self, opened: socket.socket) -> None:
        for data in _received(opened):
            if data[1]:
                self.answers[data[1] >> 5] += 1


# ----------------------------------------------------------------------------------------------
# Observers

FATES = {"acknowledges": 92, "resets": 2, "deregisters": 2, "falls silent": 2, "is gone": 2}
"""What an observer does with a notification, with weights."""


@attrs.define(eq=False)
class Observer:
    """An observer; `asked` is the request that it observes."""

    opened: socket.socket
    token: bytes
    asked: Asked

    def ask(self, number: int, observe: bytes) -> None:
        """Register or deregister."""
        method, tail = self.asked
        options, payload = coap.decode(tail)
        observing = coap.encode([*options, (coap.OBSERVE, observe)], payload)
        send(self.opened, message(number, CON, self.token, (method, observing)))


@attrs.define(eq=False)
class Fleet:
    """A constant number of observers: one that leaves is replaced, or returns on another port.

    Attributes:
        fates: Numbers of notifications, by what the observer did.
    """

    port: int
    chance: random.Random
    fates: Counter[str] = attrs.field(init=False, factory=Counter)
    _here: list[Observer] = attrs.field(init=False, factory=list)
    _silent: deque[socket.socket] = attrs.field(init=False, factory=deque)
    _numbers: Iterator[int] = attrs.field(init=False, factory=itertools.count)

    def come(self, asked: Asked | None = None) -> None:
        """Add an observer, with a new request if `asked` is None."""
        kinds = (_narrowed, _narrowed, _distinct, _fetch)
        asked = asked or self.chance.choice(kinds)(self.chance)
        observer = Observer(connected(self.port), self.chance.randbytes(4), asked)
        self._here.append(observer)
        asyncio.get_running_loop().add_reader(observer.opened, self._read, observer)
        observer.ask(next(self._numbers), _REGISTER)

    async def live(self) -> None:
        """Let observers register again from time to time, as devices do."""
        while True:
            await asyncio.sleep(_RENEWALS / len(self._here))
            self.chance.choice(self._here).ask(next(self._numbers), _REGISTER)

    def leave(self) -> None:
        """Close everything."""
        for observer in self._here:
            asyncio.get_running_loop().remove_reader(observer.opened)
            observer.opened.close()
        for opened in self._silent:
            opened.close()

    def _read(self, observer: Observer) -> None:
        for data in _received(observer.opened):
            if data[0] >> 4 & 3 == CON and self._meet(observer, data[2:4]):
                return

    def _meet(self, observer: Observer, message_id: bytes) -> bool:
        """React to a notification; returns whether the observer left."""
        (fate,) = self.chance.choices(list(FATES), list(FATES.values()))
        self.fates[fate] += 1
        if fate in ("acknowledges", "deregisters", "resets"):
            kind = RST if fate == "resets" else ACK
            send(observer.opened, bytes((0x40 | kind << 4, 0)) + message_id)
        if fate == "acknowledges":
            return False
        if fate == "deregisters":
            observer.ask(next(self._numbers), _DEREGISTER)
        asyncio.get_running_loop().remove_reader(observer.opened)
        self._here.remove(observer)
        # The system reports a closed port to the server by ICMP, a silent open one it does not.
        if fate == "falls silent":
            self._silent.append(observer.opened)
        else:
            observer.opened.close()
        if len(self._silent) > _MOST_SILENT:
            self._silent.popleft().close()
        self.come(observer.asked if fate in ("falls silent", "is gone") else None)
        return True
