"""Simulated devices that observe a stream and download a version block by block."""

from __future__ import annotations

import asyncio
import hashlib
import math
import random
import socket
import time
from collections.abc import Sequence

import attrs

from netota_coap.coap import options as coap
from netota_coap.encoding.codecs import Format
from netota_coap.encoding.documents import decode
from netota_coap.errors import NetotaError
from netota_coap.model.values import Stream, StreamName
from netota_coap.repository.blobs import blob_name
from tools.bench.crowd import ACK, CON, LONGEST, connected, path_of, send

BLOCK = 1_024
_SZX = 6
_GET = 1
_CONTENT, _NOT_FOUND, _UNAVAILABLE = 0x45, 0x84, 0xA3  # 2.05, 4.04, 5.03
_MAX_AGE_S = 60  # of a response without Max-Age
RETRY_S = 0.5  # while the stream does not exist
TIMEOUT_S = 2.0
_ATTEMPTS = 5
TICK_S = 0.05
_TOKEN = b"\x0b\x10"
_AT_A_TIME = 50  # devices that start before the server gets to run


def _header(kind: int, code: int, number: int, token: bytes = _TOKEN) -> bytes:
    return bytes((0x40 | kind << 4 | len(token), code)) + number.to_bytes(2, "big") + token


@attrs.frozen
class Image:
    """The version that devices wait for.

    Attributes:
        stream: Options of the request that observes the stream.
        url: Of the file, on the same server.
        blocks: Options of the requests for all blocks, in order.
        size: Of the file, bytes.
    """

    version: str
    stream: bytes
    url: str
    blocks: Sequence[bytes]
    size: int
    sha256: bytes

    @classmethod
    def of(cls, version: str, name: StreamName, data: bytes) -> Image:
        """Encode the requests for a file."""
        sha256 = hashlib.sha256(data).digest()
        url = f"/b/{blob_name(sha256)}"
        path = [(coap.URI_PATH, part.encode()) for part in path_of(name)]
        file = [(coap.URI_PATH, part.encode()) for part in url.strip("/").split("/")]
        blocks = [
            coap.encode([*file, (coap.BLOCK2, coap.Block(number, False, _SZX).encode())])
            for number in range(math.ceil(len(data) / BLOCK))
        ]
        stream = coap.encode([*path, (coap.OBSERVE, b"")])
        return cls(version, stream, url, blocks, len(data), sha256)


@attrs.define(eq=False)
class Device:
    """A device with a socket of its own.

    Attributes:
        registered: Whether its registration was answered.
        begun: Whether it has requested the file.
        put_off: Number of responses 5.03.
        repeated: Number of retransmissions.
        ended_s: When it had the whole file, on the clock of `time.monotonic`.
        failure: Why it gave up.
    """

    opened: socket.socket
    image: Image
    registered: bool = False
    begun: bool = False
    put_off: int = 0
    repeated: int = 0
    ended_s: float | None = None
    failure: str = ""
    _number: int = attrs.field(factory=lambda: random.getrandbits(16))
    _block: int = -1
    _request: bytes = b""
    _expected: bytes = b""
    _attempts: int = 0
    _due_s: float = math.inf
    _hash: hashlib._Hash = attrs.field(factory=hashlib.sha256)

    @property
    def is_over(self) -> bool:
        """Whether the device has the file, or gave up."""
        return self.ended_s is not None or bool(self.failure)

    def ask(self) -> None:
        """Request the stream, or the next block."""
        self._number = self._number + 1 & 0xFFFF
        options = self.image.stream if self._block < 0 else self.image.blocks[self._block]
        self._request = _header(CON, _GET, self._number) + options
        self._expected = _header(ACK, _CONTENT, self._number)
        self._attempts = 0
        self._transmit()

    def _transmit(self) -> None:
        self._attempts += 1
        timeout_s = TIMEOUT_S * 2 ** (self._attempts - 1)
        self._due_s = time.monotonic() + timeout_s * random.uniform(1.0, 1.5)
        send(self.opened, self._request)

    def tick(self, now_s: float) -> None:
        """Retransmit, or request again, if the time has come."""
        if now_s < self._due_s or self.is_over:
            return
        if not self._request:
            self.ask()
        elif self._attempts == _ATTEMPTS:
            self.failure = "no answer"
        else:
            self.repeated += 1
            self._transmit()

    def read(self) -> None:
        """Read one datagram."""
        try:
            data = self.opened.recv(LONGEST)
        except OSError:
            return
        if self._block >= 0 and data.startswith(self._expected) and not self.is_over:
            self._take(data)
        elif len(data) > len(_TOKEN) + 3:
            try:
                self._take_other(data)
            except (NetotaError, ValueError) as error:
                self.failure = f"malformed: {error}"

    def _take(self, data: bytes) -> None:
        """Append a block; the hash of the whole file shows whether it was the right one."""
        left = self.image.size - self._block * BLOCK
        size = min(left, BLOCK)
        if data[-size - 1 : -size] != b"\xff":
            self.failure = f"{len(data)} bytes arrived instead of a block of {size}"
            return
        self._hash.update(data[-size:])
        self._block += 1
        if size < left:
            self.ask()
        elif self._hash.digest() == self.image.sha256:
            self.ended_s = time.monotonic()
        else:
            self.failure = "wrong bytes"

    def _take_other(self, data: bytes) -> None:
        kind, code, number = data[0] >> 4 & 3, data[1], data[2:4]
        answers = kind == ACK and data[2:6] == self._expected[2:6]
        if kind == CON and code and data[4:6] == _TOKEN:
            send(self.opened, _header(ACK, 0, int.from_bytes(number, "big"), b""))
            if self._block < 0:
                self._learn(data)
        elif self.is_over:
            return
        elif answers and self._block < 0 and code == _CONTENT:
            self.registered, self._due_s = True, math.inf
            self._learn(data)
        elif answers and code == _UNAVAILABLE:
            self.put_off += 1
            ages = [v for n, v in coap.decode(data[6:])[0] if n == coap.MAX_AGE]
            self._come_back(coap.decode_uint(ages[0]) if ages else _MAX_AGE_S)
        elif answers and code == _NOT_FOUND and not self.registered:
            self._come_back(RETRY_S)
        elif answers and code:
            self.failure = f"{code >> 5}.{code & 31:02}"

    def _come_back(self, wait_s: float) -> None:
        self._request = b""
        self._due_s = time.monotonic() + wait_s * random.uniform(1.0, 1.1)

    def _learn(self, data: bytes) -> None:
        """Read a state of the stream, and start the download if it has the version."""
        state = decode(Stream, coap.decode(data[6:])[1], Format.CBOR)
        if state.version != self.image.version:
            return
        offers = state.archives[0].offers if state.archives else ()
        if not offers or offers[0].url != self.image.url:
            self.failure = "the gateway does not offer the file itself"
            return
        self._block, self.begun = 0, True
        self.ask()


@attrs.define(eq=False)
class Devices:
    """All devices behind a gateway."""

    every: Sequence[Device]

    @classmethod
    def at(cls, port: int, count: int, image: Image) -> Devices:
        """Create `count` devices for a server on loopback."""
        return cls([Device(connected(port), image) for _ in range(count)])

    async def live(self) -> None:
        """Register all devices, and run them until cancelled."""
        loop = asyncio.get_running_loop()
        try:
            for number, device in enumerate(self.every):
                loop.add_reader(device.opened, device.read)
                device.ask()
                if number % _AT_A_TIME == 0:
                    await asyncio.sleep(TICK_S / 10)
            while True:
                await asyncio.sleep(TICK_S)
                now_s = time.monotonic()
                for device in self.every:
                    device.tick(now_s)
        finally:
            for device in self.every:
                loop.remove_reader(device.opened)
                device.opened.close()
