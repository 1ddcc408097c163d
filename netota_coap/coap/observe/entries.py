"""The entries of the table of observers, made for little memory: there may be 200,000.

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
"""A sender's address and the local one that it asked, packed by `pack`."""

Request = bytes
"""The code of a request, then its options and payload byte for byte."""

FIRST_NOTIFICATION_ID = 0x8000
"""Message IDs from this one on are notifications', lower ones are aiocoap's."""

_PACKED = struct.Struct("!16sHIB")


def pack(index: int, address: tuple[str, int, int, int], local: bytes = b"") -> Endpoint:
    """Pack the index of the receiving socket, the sender's address and IPV6_PKTINFO.

    IPV6_PKTINFO is left out for a socket that has only one address.
    """
    host, port, _, scope = address
    packed = socket.inet_pton(socket.AF_INET6, host.partition("%")[0])
    return _PACKED.pack(packed, port, scope, index) + local


def unpack(endpoint: Endpoint) -> tuple[int, tuple[str, int, int, int], bytes]:
    """Return the arguments of `pack`."""
    packed, port, scope, index = _PACKED.unpack_from(endpoint)
    address = (socket.inet_ntop(socket.AF_INET6, packed), port, 0, scope)
    return index, address, endpoint[_PACKED.size :]


def address_of(endpoint: Endpoint) -> bytes:
    """Return the sender's address."""
    return endpoint[:16]


@attrs.frozen(weakref_slot=False)
class ResponseTemplate:
    """A response without what differs between observers: message ID, token, Observe number.

    Attributes:
        observable: Whether the observation goes on; otherwise there is no Observe option.
        before: The encoded options before Observe.
        observe: The first byte of Observe, without its length.
        after: The encoded options after Observe, and the payload.
    """

    observable: bool
    code: int
    before: bytes
    observe: int
    after: bytes
    digest: bytes

    @classmethod
    def of(cls, observable: bool, code: int, tail: bytes) -> ResponseTemplate:
        """Make room for Observe, if the response is a success and observable."""
        digest = hashlib.blake2b(bytes((code,)) + tail, digest_size=8).digest()
        if not observable or code >> 5 != 2:
            return cls(False, code, b"", 0, tail, digest)
        options, payload = coap.decode(tail)
        before = coap.encode(option for option in options if option[0] < coap.OBSERVE)
        whole = coap.encode([*options, (coap.OBSERVE, b"")], payload)
        at = len(before)
        return cls(True, code, before, whole[at], whole[at + 1 :], digest)

    def message(self, kind: int, message_id: int, token: bytes, number: int) -> bytes:
        """Return the datagram; `number` is the Observe number."""
        head = bytes((0x40 | kind << 4 | len(token), self.code))
        parts = (head, message_id.to_bytes(2, "big"), token)
        if not self.observable:
            return b"".join((*parts, self.after))
        value = coap.encode_uint(number)
        observe = bytes((self.observe | len(value),)) + value
        return b"".join((*parts, self.before, observe, self.after))


@attrs.define(eq=False, weakref_slot=False)
class Subject:
    """All observations whose requests are the same, byte for byte, and so their responses.

    Attributes:
        number: Identifies the subject in the journal.
        digest: Identifies the newest response that was rendered.
        response: The newest response; None: it has to be rendered.
    """

    number: int
    request: Request
    path: ResourcePath
    digest: bytes
    response: ResponseTemplate | None
    observations: dict[Observation, None] = attrs.field(init=False, factory=dict)


@attrs.define(eq=False, weakref_slot=False)
class Peer:
    """An endpoint that has observations; nearly all have one, for which a dict would be too large.

    Attributes:
        last_id: Message ID of the last notification to the endpoint.
        registration_id: Message ID of its last registration; notifications must not have it.
        exchange: The unacknowledged notification, of which there is at most one (NSTART).
        waiting: Observations to be notified after that.
    """

    endpoint: Endpoint
    last_id: int
    registration_id: int = 0
    exchange: NotificationExchange | None = attrs.field(init=False, default=None)
    waiting: deque[Observation] | None = attrs.field(init=False, default=None)
    _only: Observation | None = attrs.field(init=False, default=None)
    # Keys are the tokens, and the message IDs of the last two notifications of each.
    _many: dict[bytes | int, Observation] | None = attrs.field(init=False, default=None)

    def __iter__(self) -> Iterator[Observation]:
        if self._many is None:
            return iter([self._only] if self._only else [])
        return iter([found for key, found in self._many.items() if key == found.token])

    @property
    def is_empty(self) -> bool:
        """Tell whether the endpoint has no observations."""
        return not (self._only or self._many)

    def find(self, token: bytes) -> Observation | None:
        """Return the observation that has a token."""
        if self._many is not None:
            return self._many.get(token)
        return self._only if self._only and self._only.token == token else None

    def notified(self, message_id: int) -> Observation | None:
        """Return the observation that has a message ID among its last two notifications."""
        if self._many is not None:
            return self._many.get(message_id)
        only = self._only
        return only if only and message_id in (only.message_id, only.previous_id) else None

    def put(self, observation: Observation) -> None:
        """Add an observation, in place of one with the same token."""
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
        """Give an observation's next notification a new message ID."""
        self.last_id = self.new_id()
        if self._many is not None:
            self._many.pop(observation.previous_id, None)
            self._many[self.last_id] = observation
        observation.previous_id = observation.message_id
        observation.message_id = self.last_id

    def new_id(self) -> int:
        """Return a message ID that the endpoint does not take for a duplicate."""
        chosen = _id_after(self.last_id)
        # Zephyr drops what has the ID of the response before.
        return _id_after(chosen) if chosen == self.registration_id else chosen


def _id_after(message_id: int) -> int:
    return FIRST_NOTIFICATION_ID | (message_id + 1) & 0x7FFF


@attrs.define(eq=False, weakref_slot=False)
class Observation:
    """An observer's interest in a subject, identified by endpoint and token.

    Attributes:
        known: Digest of the response that the observer has; b"" while that is uncertain.
        message_id: That of the last notification, or 0.
        previous_id: That of the notification before, or 0.
        queued: Whether it waits in the queue of the table or of the peer.
    """

    peer: Peer
    token: bytes
    subject: Subject
    known: bytes
    message_id: int = 0
    previous_id: int = 0
    queued: bool = False

    @property
    def is_alive(self) -> bool:
        """Tell whether the table still has this observation."""
        return self.peer.find(self.token) is self


@attrs.define(eq=False, weakref_slot=False)
class NotificationExchange:
    """A notification that is not acknowledged yet.

    Attributes:
        timeout_s: From the next transmission to the one after it.
        sent_s: When it was first sent.
        digest: Identifies the response that it carries.
        number: Its Observe number; 0: it has none and ends the observation.
        attempts: Transmissions so far.
        failures: How often the system refused to send since the last transmission.
        in_flight: Whether the congestion window counts it.
    """

    observation: Observation
    timeout_s: float
    sent_s: float
    digest: bytes = b""
    number: int = 0
    attempts: int = 0
    failures: int = 0
    in_flight: bool = True
