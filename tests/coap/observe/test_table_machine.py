"""coap/observe/table.py: a network that loses, repeats and reorders, and devices on it.

Whatever happens, in the end everybody who still observes has the last state, and nobody was told
again what he was known to have.
"""

from __future__ import annotations

import attrs
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, precondition, rule

from netota_coap.coap import options as coap
from tests.support.device import ACK, Answer
from tests.support.observing import Table, endpoint

DEVICES = [endpoint(number) for number in (1, 2, 3)]
TOKENS = [b"s", b"t"]
QUERIES = ["", "parity"]
PATHS = ["a", "b"]
MOST_LOST = 3  # of an endpoint between two messages that arrive: less than it is repeated

Place = tuple[bytes, bytes]  # endpoint and token


@attrs.define
class Observing:
    """What a device knows of an observation of its own."""

    path: str
    query: str
    number: int
    payload: bytes


class Network(RuleBasedStateMachine):
    @initialize()
    def begin(self) -> None:
        self.table = Table()
        self.devices: dict[Place, Observing] = {}
        self.seen: set[tuple[bytes, int]] = set()  # message IDs, by which devices know repetitions
        self.known: dict[Place, bytes] = {}  # what the server knows that a device has
        self.sent: dict[tuple[bytes, int], tuple[bytes, bytes]] = {}
        self.down: list[tuple[bytes, Answer]] = []
        self.up: list[tuple[bytes, int, int]] = []
        self.lost: dict[bytes, int] = {}

    def act(self) -> None:
        """Let the server act; what it sends is new, or has the same ID as before."""
        for _, to, answer in self.table.run():
            content = (answer.token, answer.payload)
            if (to, answer.message_id) not in self.sent:
                self.sent[to, answer.message_id] = content
                assert self.known.get((to, answer.token)) != answer.payload
                self.known.pop((to, answer.token), None)
            assert content == self.sent[to, answer.message_id]
            self.down.append((to, answer))

    @rule(
        to=st.sampled_from(DEVICES),
        token=st.sampled_from(TOKENS),
        path=st.sampled_from(PATHS),
        query=st.sampled_from(QUERIES),
        confirmable=st.booleans(),
    )
    def register(self, to: bytes, token: bytes, path: str, query: str, confirmable: bool) -> None:
        answer = self.table.register(to, token, path, query, confirmable=confirmable)
        assert (answer is None) == (path not in self.table.states)
        if answer:
            number = answer.uint(coap.OBSERVE)
            assert number is not None
            self.devices[to, token] = Observing(path, query, number, answer.payload)
            self.known[to, token] = answer.payload
            # An end without a number that comes late cannot be told from one of the new
            # observation: a device must take another token then. Not here.
            self.down = [
                (each, late)
                for each, late in self.down
                if (each, late.token) != (to, token) or late.uint(coap.OBSERVE) is not None
            ]
        self.act()

    @rule(to=st.sampled_from(DEVICES), token=st.sampled_from(TOKENS))
    def deregister(self, to: bytes, token: bytes) -> None:
        self.table.observers.deregister(to, token)
        self.devices.pop((to, token), None)
        self.known.pop((to, token), None)
        self.act()

    @rule(path=st.sampled_from(PATHS), state=st.none() | st.integers(0, 5))
    def swap(self, path: str, state: int | None) -> None:
        self.table.hold(path, state)
        self.act()

    @precondition(lambda self: self.down)
    @rule(data=st.data(), again=st.booleans())
    def deliver(self, data: st.DataObject, again: bool) -> None:
        index = data.draw(st.integers(0, len(self.down) - 1))
        to, answer = self.down[index] if again else self.down.pop(index)
        self.arrive(to, answer)

    def arrive(self, to: bytes, answer: Answer) -> None:
        repeated = (to, answer.message_id) in self.seen
        observing = self.devices.get((to, answer.token))
        if observing is None and not repeated:
            self.up.append((to, answer.message_id, 3))
            return
        self.seen.add((to, answer.message_id))
        self.up.append((to, answer.message_id, ACK))
        if repeated or observing is None:
            return
        number = answer.uint(coap.OBSERVE)
        if number is None:
            assert answer.code == "4.04"
            del self.devices[to, answer.token]
        elif number > observing.number:  # too few are used here for them to wrap
            observing.number, observing.payload = number, answer.payload

    @precondition(lambda self: self.up)
    @rule(data=st.data(), again=st.booleans())
    def answer(self, data: st.DataObject, again: bool) -> None:
        index = data.draw(st.integers(0, len(self.up) - 1))
        self.hear(*(self.up[index] if again else self.up.pop(index)))
        self.act()

    def hear(self, to: bytes, message_id: int, kind: int) -> None:
        self.lost.pop(to, None)
        table = self.table.observers
        if kind != ACK:
            table.reset(to, message_id)
            return
        peer = table._peers.get(to)
        current = peer.exchange.observation if peer and peer.exchange else None
        table.acknowledged(self.table.now, to, message_id)
        if current and current.message_id == message_id:
            token, payload = self.sent[to, message_id]
            self.known[to, token] = payload

    @precondition(lambda self: self.down)
    @rule(data=st.data())
    def lose(self, data: st.DataObject) -> None:
        to, _ = self.down[data.draw(st.integers(0, len(self.down) - 1))]
        if self.lost.get(to, 0) < MOST_LOST:
            self.lost[to] = self.lost.get(to, 0) + 1
            self.down = [each for each in self.down if each[0] != to]
            self.up = [each for each in self.up if each[0] != to]
            self.step(3.2)

    @rule()
    def refuse(self) -> None:
        self.table.refuses = not self.table.refuses

    @rule(seconds=st.floats(0.0, 200.0))
    def wait(self, seconds: float) -> None:
        self.settle()
        self.step(seconds)

    def step(self, seconds: float) -> None:
        """Let time pass, in which what is not lost arrives."""
        end = self.table.now + seconds
        while self.table.now < end:
            self.table.now = min(self.table.now + 0.5, end)
            self.act()
            if self.table.now < end - 3.2:
                self.settle()

    def settle(self) -> None:
        """Let everything arrive."""
        while self.down or self.up:
            while self.down:
                self.arrive(*self.down.pop(0))
            while self.up:
                self.hear(*self.up.pop(0))
            self.act()

    @rule(between=st.none() | st.tuples(st.sampled_from(PATHS), st.integers(0, 5)))
    def restart(self, between: tuple[str, int] | None) -> None:
        self.table.store()
        if between:
            self.table.states[between[0]] = between[1]
        self.table.start()
        # An end that comes late to an observation that the restart revived: as in `register`.
        self.down = [each for each in self.down if each[1].uint(coap.OBSERVE) is not None]
        # What was under way may be sent again.
        self.known.clear()
        self.act()

    def teardown(self) -> None:
        if not hasattr(self, "table"):
            return
        self.table.refuses = False
        self.settle()
        self.step(500.0)
        self.settle()
        for (to, token), observing in self.devices.items():
            state = self.table.states.get(observing.path)
            assert state is not None
            shown = state % 2 if observing.query else state
            assert observing.payload == b"%d" % shown, (to, token)
        assert len(self.table.observers) == len(self.devices)
        observers = self.table.observers
        assert observers.advance(self.table.now) is None
        assert observers.window.in_flight == 0
        assert sum(observers._counts.values()) == 2 * len(self.devices)
        assert set(self.devices) == {
            (peer.endpoint, each.token) for peer in observers._peers.values() for each in peer
        }


TestNetwork = Network.TestCase
TestNetwork.settings = settings(stateful_step_count=40)
