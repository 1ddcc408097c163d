"""A table of observers with a clock and a network that the test holds in its hands."""

from __future__ import annotations

import attrs

from netota_coap.coap import options as coap
from netota_coap.coap.observe.congestion import CongestionWindow
from netota_coap.coap.observe.entries import pack
from netota_coap.coap.observe.journal import Journal, replay
from netota_coap.coap.observe.table import Caps, Observers
from netota_coap.coap.protocol import Timing
from tests.support.device import Answer

CONTENT, NOT_FOUND = 0x45, 0x84


def endpoint(number: int, host: str = "::1") -> bytes:
    return pack(0, (host, number, 0, 0))


def request(path: str, query: str = "") -> bytes:
    """Return a GET with Observe 0, as it stands after the token."""
    options = [(coap.OBSERVE, b""), (coap.URI_PATH, path.encode())]
    return b"\x01" + coap.encode(
        [*options, *([(coap.URI_QUERY, query.encode())] if query else [])]
    )


@attrs.define
class Table:
    """A table whose resources are numbers.

    Attributes:
        states: By path; what is missing is not found.
        now: Seconds.
        sent: Notifications: endpoint and datagram, read.
        refuses: Whether the system refuses to send.
        rendered: How many answers were made.
        kept: The journal's file.
    """

    states: dict[str, int] = attrs.field(factory=lambda: {"a": 1, "b": 1})
    timing: Timing = Timing()
    caps: Caps = Caps()
    most: int = 1_000
    now: float = 1_000.0
    sent: list[tuple[bytes, Answer]] = attrs.field(factory=list)
    refuses: bool = False
    rendered: int = 0
    kept: bytes = b""
    observers: Observers = attrs.field(init=False)
    message_id: int = 0

    def __attrs_post_init__(self) -> None:
        self.start()

    def start(self) -> None:
        """Begin, with what the journal says."""
        self.observers = Observers(
            self.answer,
            Journal(lambda: None),
            self.timing,
            self.caps,
            CongestionWindow(self.most, self.timing),
            self.send,
        )
        kept, end = replay(self.kept)
        assert end == len(self.kept)
        self.observers.restore(kept)

    def store(self) -> None:
        """Write the journal."""
        self.kept += self.observers.journal.take()

    def answer(self, asked: bytes) -> tuple[bool, int, bytes]:
        self.rendered += 1
        options, _ = coap.decode(asked[1:])
        path = next(value.decode() for number, value in options if number == coap.URI_PATH)
        if path not in self.states:
            return False, NOT_FOUND, b"\xffnothing"
        state = self.states[path]
        # One that asks for parity is not told of each change.
        shown = state % 2 if (coap.URI_QUERY, b"parity") in options else state
        etag = shown.to_bytes(8, "big")
        return (
            True,
            CONTENT,
            coap.encode([(coap.ETAG, etag), (coap.MAX_AGE, b"\x3c")], b"%d" % shown),
        )

    def send(self, to: bytes, datagram: bytes) -> bool:
        if not self.refuses:
            self.sent.append((to, Answer.parse(datagram)))
        return not self.refuses

    def hold(self, path: str, state: int | None) -> None:
        """Change a resource."""
        if state is None:
            self.states.pop(path, None)
        else:
            self.states[path] = state
        self.observers.notify([(path,)])

    def register(
        self, to: bytes, token: bytes = b"t", path: str = "a", query: str = "", **more: bool
    ) -> Answer | None:
        self.message_id = (self.message_id + 1) & 0x7FFF
        more.setdefault("confirmable", True)
        answer = self.observers.register(
            self.now, to, token, self.message_id, request(path, query), **more
        )
        return Answer.parse(answer) if answer else None

    def run(self, seconds: float = 0.0) -> list[tuple[float, bytes, Answer]]:
        """Let time pass, and the table act in it; what it sent, and when."""
        end, log = self.now + seconds, []
        while True:
            when = self.observers.advance(self.now)
            log += [(self.now, *each) for each in self.sent]
            self.sent.clear()
            if when is None or when > end:
                self.now = end
                return log
            self.now = max(when, self.now)

    def acknowledge(self, to: bytes, answer: Answer) -> None:
        self.observers.acknowledged(self.now, to, answer.message_id)

    def tell(self) -> list[Answer]:
        """Let it act, and acknowledge all that comes, until nothing does."""
        told = []
        while log := self.run():
            for _, to, answer in log:
                self.acknowledge(to, answer)
                told.append(answer)
        return told
