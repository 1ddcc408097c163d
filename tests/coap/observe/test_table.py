"""coap/observe/table.py: the table by itself, with a clock and a network of the test's own."""

from __future__ import annotations

import itertools
import logging

import attrs
import pytest

from netota_coap.coap import options as coap
from netota_coap.coap.observe.entries import FIRST_NOTIFICATION_ID, pack, unpack
from netota_coap.coap.observe.table import Caps
from netota_coap.coap.protocol import Timing
from tests.support.device import ACK, CON, NON
from tests.support.observing import Table, endpoint

ONE, OTHER = endpoint(1), endpoint(2)
LOCAL = bytes(range(20))


@pytest.mark.parametrize(
    ("index", "address", "local"),
    [
        (0, ("::1", 5683, 0, 0), b""),
        (3, ("::ffff:192.0.2.1", 1, 0, 0), LOCAL),
        (255, ("fe80::1", 65_535, 0, 7), LOCAL),
    ],
)
def test_endpoints(index: int, address: tuple[str, int, int, int], local: bytes) -> None:
    """An endpoint is packed without loss, but for the name of a scope that has a number."""
    assert unpack(pack(index, address, local)) == (index, address, local)
    scoped = (f"{address[0]}%eth0", *address[1:])
    assert pack(index, scoped, local) == pack(index, address, local)


def test_repeated_until_it_is_given_up() -> None:
    """Who is silent is told five times, in times that double, and ended with all it observes."""
    table = Table()
    for token in (b"1", b"2", b"3"):
        table.register(ONE, token)
    table.register(OTHER)
    table.hold("a", 2)
    first = [each for each in table.run() if each[1] == ONE or table.acknowledge(*each[1:])]
    log = [*first, *table.run(200)]
    times = [when for when, _, _ in log]
    gaps = [b - a for a, b in itertools.pairwise(times)]

    assert len(times) == 5
    assert {(to, answer) for _, to, answer in log} == {first[0][1:]}
    for gap, shortest in zip(gaps, (2, 4, 8, 16), strict=True):
        assert shortest <= gap <= shortest * 1.5 + 0.25
    assert len(table.observers) == 1


def test_times_can_be_shortened() -> None:
    """All times follow from one value."""
    table = Table(timing=Timing(0.01, 1.0, 1))
    table.register(ONE)
    table.hold("a", 2)

    assert len(table.run(0.05)) == 2
    assert len(table.observers) == 0


def test_newer_state_at_the_next_repetition() -> None:
    """A newer state takes the place of one that is not acknowledged, but buys no time."""
    table = Table()
    table.register(ONE)
    log = []
    for state in range(2, 200):
        table.hold("a", state)
        log += table.run(0.5)

    assert len(log) == 5
    assert len({answer.message_id for _, _, answer in log}) == 5
    assert log[-1][0] - log[0][0] >= 30
    assert len(table.observers) == 0


def test_acknowledgement_of_what_was_replaced() -> None:
    """Only the ACK of the newest message counts."""
    table = Table()
    table.register(ONE)
    table.hold("a", 2)
    ((_, _, old),) = table.run()
    table.hold("a", 3)
    ((_, _, new),) = table.run(3.2)
    table.acknowledge(ONE, old)
    assert table.run(7) != []
    table.acknowledge(ONE, new)
    assert table.run(100) == []
    assert len(table.observers) == 1


def test_back_to_what_was_told() -> None:
    """A state that comes back is sent again only to those who may have seen the one between."""
    table = Table()
    for to in (ONE, OTHER):
        table.register(to)
    table.hold("a", 2)
    table.hold("a", 1)
    assert table.tell() == []
    table.hold("a", 2)
    log = table.run()
    table.acknowledge(*log[0][1:])
    table.hold("a", 1)
    assert [answer.payload for answer in table.tell()] == [b"1"]
    again = table.run(3.2)
    assert [(to, answer.payload) for _, to, answer in again] == [(log[1][1], b"1")]


@pytest.mark.parametrize("tokens", [[b"only"], [b"first", b"second", b"third"]])
def test_reset_of_the_last_two(tokens: list[bytes]) -> None:
    """A reset of either of the last two notifications ends an observation, of others none."""
    for age in range(3):
        table = Table()
        for token in tokens:
            table.register(ONE, token)
        ids = []
        for state in range(2, 5):
            table.hold("a", state)
            ids += [a.message_id for a in table.tell() if a.token == tokens[-1]]
        table.observers.reset(ONE, ids[2 - age])
        table.observers.reset(OTHER, ids[2])
        table.observers.reset(ONE, 0)
        ended = age < 2

        assert len(table.observers) == len(tokens) - ended
        table.hold("a", 9)
        assert len(table.tell()) == len(tokens) - ended


def test_one_exchange_for_each_endpoint() -> None:
    """A second observation of an endpoint waits for the first one's ACK, and is not forgotten."""
    table = Table()
    tokens = [bytes((number,)) for number in range(20)]
    for token in tokens:
        table.register(ONE, token)
    table.observers.deregister(ONE, tokens[5])
    table.observers.deregister(ONE, b"none")
    table.hold("a", 2)
    told = []
    while log := table.run():
        ((_, _, answer),) = log
        told.append(answer.token)
        table.acknowledge(ONE, answer)

    assert sorted(told) == tokens[:5] + tokens[6:]


def test_an_open_exchange_of_one_that_ends() -> None:
    """When an observation ends, others of its endpoint have their turn."""
    table = Table()
    for token in (b"1", b"2"):
        table.register(ONE, token)
    table.hold("a", 2)
    ((_, _, first),) = table.run()
    table.observers.deregister(ONE, first.token)
    ((_, _, second),) = table.run()

    assert {first.token, second.token} == {b"1", b"2"}


def test_one_rendering_for_each_distinct_request() -> None:
    """A swap costs one answer for each request that differs, however many made it."""
    table = Table(most=10_000)
    for number in range(1, 301):
        table.register(endpoint(number), query=("", "parity", "x")[number % 3])
    assert table.rendered == 3
    table.hold("a", 2)

    assert len(table.tell()) == 300
    assert table.rendered == 6


def test_what_changes_no_byte_tells_nobody() -> None:
    """Observers of an answer that stays the same are left alone."""
    table = Table()
    table.register(ONE, query="parity")
    table.hold("a", 3)
    assert table.tell() == []
    table.hold("a", 4)
    assert [answer.payload for answer in table.tell()] == [b"0"]


def test_registering_again_replaces() -> None:
    """The same token again is answered with the newest state, and ends what was open before."""
    table = Table()
    table.register(ONE)
    table.hold("a", 2)
    ((_, _, old),) = table.run()
    table.hold("a", 3)
    again = table.register(ONE)
    table.acknowledge(ONE, old)
    table.observers.reset(ONE, old.message_id)

    assert again is not None
    assert (again.kind, again.payload) == (ACK, b"3")
    assert table.run(100) == []
    assert len(table.observers) == 1


def test_registered_without_confirmation() -> None:
    """A NON request is answered by a NON message, with an ID that no notification has."""
    table = Table()
    answer = table.register(ONE, confirmable=False)
    table.hold("a", 2)
    (told,) = table.tell()

    assert answer is not None
    assert (answer.kind, told.kind) == (NON, CON)
    assert FIRST_NOTIFICATION_ID <= answer.message_id != told.message_id


def test_message_ids() -> None:
    """IDs are counted, stay among ours, and never are that of the registration."""
    table = Table(states={"a": 0})
    table.message_id = FIRST_NOTIFICATION_ID - 2
    table.register(ONE)
    table.observers._peers[ONE].last_id = 0xFFFE
    table.observers._peers[ONE].registration_id = FIRST_NOTIFICATION_ID + 1
    ids = []
    for state in range(1, 5):
        table.hold("a", state)
        ids += [answer.message_id for answer in table.tell()]

    assert ids == [
        0xFFFF,
        FIRST_NOTIFICATION_ID,
        FIRST_NOTIFICATION_ID + 2,
        FIRST_NOTIFICATION_ID + 3,
    ]


def test_numbers() -> None:
    """Observe numbers rise, wrap to 2, and do not rise by 2^23 in 256 s however many are used."""
    table = Table()
    table.observers._number = 2**24 - 3
    numbers = [table.observers._next_number(0.0) for _ in range(4)]
    assert numbers == [2**24 - 2, 2**24 - 1, 2, 3]
    table.observers._number = 2
    table.observers._numbers_left = 3
    assert [table.observers._next_number(127.0) for _ in range(5)] == [3, 4, 5, 5, 5]
    assert table.observers._next_number(128.0) == 6


def test_numbers_never_go_back() -> None:
    """After a restart they go on above all that were used."""
    table = Table()
    before = [table.observers._next_number(table.now) for _ in range(70_000)][-1]
    table.store()
    table.start()
    answer = table.register(ONE)

    assert answer is not None
    assert before < (answer.uint(coap.OBSERVE) or 0) < before + 2**18


@pytest.mark.parametrize(
    ("caps", "registered"),
    [
        (Caps(total=2), 2),
        (Caps(path=2), 4),
        (Caps(address=2), 4),
        (Caps(request=3), 0),
        (Caps(), 6),
    ],
)
def test_caps(caps: Caps, registered: int) -> None:
    """Over a cap nobody is registered; who is in it can register again, who leaves makes room."""
    table = Table(caps=caps)
    places = [(endpoint(n, host), path) for n, host, path in (
        (1, "::1", "a"), (2, "::1", "a"), (3, "::1", "a"),
        (1, "::2", "b"), (2, "::2", "b"), (3, "::2", "b"),
    )]  # fmt: skip
    answers = [table.register(to, path=path) for to, path in places]
    assert len([answer for answer in answers if answer]) == registered == len(table.observers)
    if registered:
        assert table.register(*places[0][:1], path="a") is not None
        table.observers.deregister(places[0][0], b"t")
        assert table.register(endpoint(9), path="a") is not None


def test_what_is_not_there_is_not_observed() -> None:
    """A request that is answered with an error registers nothing."""
    table = Table()
    table.register(ONE)
    assert table.register(OTHER, path="none") is None
    table.hold("a", None)
    assert table.register(OTHER) is None
    assert len(table.observers) == 1


def test_vanished_and_back() -> None:
    """A 4.04 without Observe ends an observation, once it is acknowledged."""
    table = Table()
    table.register(ONE)
    table.register(OTHER)
    table.hold("a", None)
    log = table.run()
    table.acknowledge(*log[0][1:])
    table.hold("a", 1)
    after = table.run(5)

    assert {(a.kind, a.code, a.uint(coap.OBSERVE)) for _, _, a in log} == {(CON, "4.04", None)}
    assert [(to, answer.code) for _, to, answer in after] == [(log[1][1], "2.05")]
    assert len(table.observers) == 1


def test_a_failed_send_ends_nothing() -> None:
    """What the system refuses to send is sent later, and was no repetition."""
    table = Table(refuses=True)
    table.register(ONE)
    table.hold("a", 2)
    assert table.run(300) == []
    table.refuses = False
    log = table.run(200)

    assert len(log) == 5
    assert len({answer.message_id for _, _, answer in log}) == 1
    assert len(table.observers) == 0


def test_back_before_anything_could_be_sent() -> None:
    """Of a state that comes and goes while the system refuses to send, nobody is told."""
    table = Table(refuses=True)
    table.register(ONE)
    table.hold("a", 2)
    table.run()
    table.hold("a", 1)
    table.refuses = False

    assert table.run(100) == []
    assert len(table.observers) == 1


def test_a_short_refusal_costs_little_time() -> None:
    """After a short shortage of buffers, all are told within a tenth of a second."""
    table = Table(refuses=True)
    for number in range(1, 51):
        table.register(endpoint(number))
    table.hold("a", 2)
    table.run()
    table.refuses = False

    assert len(table.run(0.3)) == 50


@pytest.mark.parametrize("dead_in_ten", [0, 1, 5])
def test_the_dead_do_not_delay_the_living(dead_in_ten: int) -> None:
    """The living are told as soon as without the dead, who are ended in the end."""
    table = Table(most=1_000)
    count = 2_000
    for number in range(count):
        table.register(endpoint(number))
    dead = {endpoint(number) for number in range(count) if number % 10 < dead_in_ten}
    table.hold("a", 2)
    begin, pending, told, last = table.now, [], 0, table.now
    while table.now < begin + 100:
        for _, to, answer in table.run(0.005):
            if to not in dead:
                pending.append((to, answer))
        for to, answer in pending:
            table.acknowledge(to, answer)
            told, last = told + 1, table.now
        pending = []

    assert told == count - len(dead) == len(table.observers)
    assert last - begin < 1.5


def test_a_link_that_loses_is_spared() -> None:
    """Where nothing is acknowledged, what is on the way at a time shrinks."""
    table = Table(most=1_000)
    for number in range(1_000):
        table.register(endpoint(number))
    table.hold("a", 2)
    first = len(table.run())
    table.run(30)

    assert first == 64
    assert table.observers.window.size == 16


def test_bursts_are_short() -> None:
    """However much there is to do, each call does a little of it."""
    table = Table(most=10_000)
    for number in range(1_000):
        table.register(endpoint(number))
    table.observers.window.size = 10_000
    table.hold("a", 2)
    sizes = []
    while (when := table.observers.advance(table.now)) is not None and when <= table.now:
        sizes.append(len(table.sent))
        table.sent.clear()
    table.sent.clear()
    table.now += 3.2
    repeated = []
    while (when := table.observers.advance(table.now)) is not None and when <= table.now:
        repeated.append(len(table.sent))
        table.sent.clear()

    assert max(sizes) <= 64
    assert max(repeated) <= 64
    assert sum(repeated) > 900


def test_a_bug_costs_the_others_nothing(caplog: pytest.LogCaptureFixture) -> None:
    """If the answer to one request fails, its observers get a 5.00, and the others are told."""
    table = Table()
    table.register(ONE)
    table.register(OTHER, query="parity")
    answering = table.observers.answer

    def failing(request: bytes) -> tuple[bool, int, bytes]:
        if b"parity" in request:
            raise ZeroDivisionError
        return answering(request)

    table.observers.answer = failing
    table.hold("a", 2)
    with caplog.at_level(logging.CRITICAL):
        told = table.tell()

    assert sorted(answer.code for answer in told) == ["2.05", "5.00"]
    assert len(table.observers) == 1


def test_told_after_a_restart() -> None:
    """Those who do not have the newest state are told it after a restart, the others are not."""
    table = Table()
    for number, path in ((1, "a"), (2, "a"), (3, "b"), (4, "b")):
        table.register(endpoint(number), path=path)
    table.observers.deregister(endpoint(4), b"t")
    table.hold("b", 2)
    table.tell()
    table.hold("a", 2)
    log = table.run()
    table.acknowledge(log[0][1], log[0][2])
    table.store()
    table.start()
    first = table.run()
    table.acknowledge(first[0][1], first[0][2])
    table.states["b"] = 3
    table.store()
    table.start()
    second = table.run()

    assert [(to, a.payload) for _, to, a in first] == [(log[1][1], b"2")]
    assert [(to, a.payload) for _, to, a in second] == [(endpoint(3), b"3")]
    assert first[0][2].message_id != log[1][2].message_id


def test_reset_after_a_restart() -> None:
    """A reset of a notification that was acknowledged before the restart counts."""
    table = Table()
    table.register(ONE)
    table.hold("a", 2)
    (told,) = table.tell()
    table.store()
    table.start()
    table.observers.reset(ONE, told.message_id)

    assert len(table.observers) == 0


def test_many_of_one_endpoint_after_a_restart() -> None:
    """An endpoint's observations all come back, each with its own IDs."""
    table = Table()
    for token in (b"1", b"2", b"3"):
        table.register(ONE, token)
    table.hold("a", 2)
    told = table.tell()
    table.store()
    table.start()
    table.observers.reset(ONE, told[1].message_id)
    table.hold("a", 3)

    assert sorted(a.token for a in table.tell()) == sorted(
        each.token for each in (told[0], told[2])
    )


def test_small() -> None:
    """Entries have no room for what nobody needs."""
    table = Table()
    table.register(ONE)
    (peer,) = table.observers._peers.values()
    (observation,) = peer
    for entry in (peer, observation, observation.subject):
        assert not hasattr(entry, "__dict__")
        assert not hasattr(entry, "__weakref__")
    assert attrs.fields_dict(type(peer)).keys() >= {"endpoint", "last_id"}
