"""The entries of the table of observers: small, since there are many.

Source: RFC 7641; RFC 7252, section 4.
"""

from __future__ import annotations

import hashlib
import socket
import struct
from collections import deque
from collections.abc import Iterator

import attrs

from netota_coap.catalog.resources import ResourcePath
from netota_coap.coap import options as coap

Endpoint = bytes
"""Packed, by `pack`: where a request came from and where it came to."""

Request = bytes
"""The code of a request, then its options and its payload as they came."""

OUR_IDS = 0x8000
"""Message IDs from here on are those of notifications."""

_PACKED = struct.Struct("!16sHIB")


def pack(index: int, address: tuple[str, int, int, int], local: bytes = b"") -> Endpoint:
    """Pack an endpoint.

    Args:
        index: Of the socket.
        address: Of the peer, as the socket says it.
        local: Address and interface that it came to (IPV6_PKTINFO), or b"" where there is one.
    """
    host, port, _, scope = address
    packed = socket.inet_pton(socket.AF_INET6, host.partition("%")[0])
    return _PACKED.pack(packed, port, scope, index) + local


def unpack(endpoint: Endpoint) -> tuple[int, tuple[str, int, int, int], bytes]:
    """Return what `pack` was given."""
    packed, port, scope, index = _PACKED.unpack_from(endpoint)
    address = (socket.inet_ntop(socket.AF_INET6, packed), port, 0, scope)
    return index, address, endpoint[_PACKED.size :]


def address_of(endpoint: Endpoint) -> bytes:
    """Return the address of the peer."""
    return endpoint[:16]


@attrs.frozen(weakref_slot=False)
class Answer:
    """An answer, ready but for what differs between observers.

    Attributes:
        lives: Whether it can be observed on; if not, it has no Observe option.
        code: Of the answer.
        before: Options that come before Observe.
        observe: First byte of the Observe option, without its length.
        after: Options after it, and the payload.
        digest: Of code, options and payload.
    """

    lives: bool
    code: int
    before: bytes
    observe: int
    after: bytes
    digest: bytes

    @classmethod
    def of(cls, observable: bool, code: int, tail: bytes) -> Answer:
        """Take an answer apart; what is no success, or not observable, has no Observe."""
        digest = hashlib.blake2b(bytes((code,)) + tail, digest_size=8).digest()
        if not observable or code >> 5 != 2:
            return cls(False, code, b"", 0, tail, digest)
        options, payload = coap.decode(tail)
        before = coap.encode(option for option in options if option[0] < coap.OBSERVE)
        whole = coap.encode([*options, (coap.OBSERVE, b"")], payload)
        at = len(before)
        return cls(True, code, before, whole[at], whole[at + 1 :], digest)

    def message(self, kind: int, message_id: int, token: bytes, number: int) -> bytes:
        """Return the whole message; `number` is the Observe number."""
        head = bytes((0x40 | kind << 4 | len(token), self.code))
        parts = (head, message_id.to_bytes(2, "big"), token)
        if not self.lives:
            return b"".join((*parts, self.after))
        value = coap.encode_uint(number)
        observe = bytes((self.observe | len(value),)) + value
        return b"".join((*parts, self.before, observe, self.after))


@attrs.define(eq=False, weakref_slot=False)
class Subject:
    """A request, and all who made exactly this one: they get the same answer.

    Attributes:
        number: In the journal.
        request: As it came.
        path: Of the resource.
        digest: Of the newest answer that was made.
        answer: The newest; None: to be made.
        observations: Of it.
    """

    number: int
    request: Request
    path: ResourcePath
    digest: bytes
    answer: Answer | None
    observations: dict[Observation, None] = attrs.field(init=False, factory=dict)


@attrs.define(eq=False, weakref_slot=False)
class Peer:
    """An endpoint that has observations; nearly all have one, and a table would cost them more.

    Attributes:
        endpoint: Packed.
        last_id: Message ID of its last notification.
        registration_id: Message ID of its last request, which a notification must not have.
        exchange: The one that is open (NSTART is 1).
        waiting: Observations for which there is something to send when it is closed.
    """

    endpoint: Endpoint
    last_id: int
    registration_id: int = 0
    exchange: Exchange | None = attrs.field(init=False, default=None)
    waiting: deque[Observation] | None = attrs.field(init=False, default=None)
    _only: Observation | None = attrs.field(init=False, default=None)
    # By their tokens, and by the message IDs of their last two notifications.
    _many: dict[bytes | int, Observation] | None = attrs.field(init=False, default=None)

    def __iter__(self) -> Iterator[Observation]:
        if self._many is None:
            return iter([self._only] if self._only else [])
        return iter([found for key, found in self._many.items() if key == found.token])

    @property
    def is_empty(self) -> bool:
        """Whether it observes nothing any more."""
        return not (self._only or self._many)

    def find(self, token: bytes) -> Observation | None:
        """Return the observation by a token."""
        if self._many is not None:
            return self._many.get(token)
        return self._only if self._only and self._only.token == token else None

    def notified(self, message_id: int) -> Observation | None:
        """Return the observation whose last notification, or last but one, has a message ID."""
        if self._many is not None:
            return self._many.get(message_id)
        only = self._only
        return only if only and message_id in (only.message_id, only.previous_id) else None

    def put(self, observation: Observation) -> None:
        """Add an observation, in place of one by the same token."""
        old = self.find(observation.token)
        if old:
            self.drop(old)
        if self._only and self._many is None:
            first = self._only
            ids = (first.message_id, first.previous_id)
            self._many = {first.token: first} | {each: first for each in ids if each}
            self._only = None
        if self._many is None:
            self._only = observation
        else:
            self._many[observation.token] = observation
            if observation.message_id:
                self._many[observation.message_id] = observation

    def drop(self, observation: Observation) -> None:
        """Remove an observation."""
        self._only = None
        if self._many is not None:
            for key in (observation.token, observation.message_id, observation.previous_id):
                self._many.pop(key, None)

    def number(self, observation: Observation) -> None:
        """Give an observation's next notification a message ID that the peer has not seen."""
        self.last_id = self.new_id()
        if self._many is not None:
            self._many.pop(observation.previous_id, None)
            self._many[self.last_id] = observation
        observation.previous_id = observation.message_id
        observation.message_id = self.last_id

    def new_id(self) -> int:
        """Return a message ID for a message to the peer, which takes it for no repetition."""
        chosen = _after(self.last_id)
        # Zephyr drops what has the ID of the answer before.
        return _after(chosen) if chosen == self.registration_id else chosen


def _after(message_id: int) -> int:
    return OUR_IDS | (message_id + 1) & 0x7FFF


@attrs.define(eq=False, weakref_slot=False)
class Observation:
    """An entry of the table.

    Attributes:
        peer: Who observes.
        token: Of its request.
        subject: What it observes.
        told: Digest of the state that it is known to have; b"" where that is not certain.
        message_id: Of its last notification, or 0.
        previous_id: Of the one before it, or 0.
        queued: Whether it is about to be looked at.
    """

    peer: Peer
    token: bytes
    subject: Subject
    told: bytes
    message_id: int = 0
    previous_id: int = 0
    queued: bool = False

    @property
    def is_alive(self) -> bool:
        """Whether it is still in the table."""
        return self.peer.find(self.token) is self


@attrs.define(eq=False, weakref_slot=False)
class Exchange:
    """A notification that is not acknowledged yet.

    Attributes:
        observation: That it is of.
        digest: Of the state that it carries.
        number: Its Observe number.
        timeout_s: From the next transmission to the one after it.
        attempts: Transmissions so far.
        failures: How often the system refused to send, since the last transmission.
        sent_s: When it was opened.
        flying: Whether its ACK may be on the way.
    """

    observation: Observation
    timeout_s: float
    sent_s: float
    digest: bytes = b""
    number: int = 0
    attempts: int = 0
    failures: int = 0
    flying: bool = True
