"""coap/observe/congestion.py: how many notifications are on their way."""

from __future__ import annotations

import pytest

from netota_coap.coap.observe.congestion import CongestionWindow
from netota_coap.coap.observe.entries import (
    NotificationExchange,
    Observation,
    Peer,
    ResponseTemplate,
    Subject,
)
from netota_coap.coap.protocol import Timing

RESPONSE = ResponseTemplate.of(True, 0x45, b"")
OBSERVATION = Observation(Peer(b"", 0), b"", Subject(1, b"", (), b"", RESPONSE), b"")


def opened(window: CongestionWindow, now: float) -> NotificationExchange:
    exchange = NotificationExchange(OBSERVATION, 2.0, now)
    window.add(exchange)
    return exchange


def test_grows_and_shrinks() -> None:
    """It doubles in a round trip up to where it was too large, and then grows by one."""
    window = CongestionWindow(1_000, Timing())
    for _ in range(64):
        window.acknowledged(1.0, busy=True)
    assert window.size == 128
    window.lost(10.0)
    window.lost(10.5)
    assert window.size == 64
    for _ in range(64):
        window.acknowledged(1.0, busy=True)
    assert 64.9 < window.size < 65.1
    for later in range(20, 100, 10):
        window.lost(later)
    assert window.size == 16


@pytest.mark.parametrize(
    ("took_s", "busy", "size"), [(1.0, False, 64), (1.9, True, 65), (2.1, True, 64)]
)
def test_what_it_does_not_grow_with(took_s: float, busy: bool, size: int) -> None:
    """It stays when there is no more to send, and when ACKs wait in a queue somewhere."""
    window = CongestionWindow(1_000, Timing())
    window.acknowledged(1.0, busy=False)
    window.acknowledged(took_s, busy=busy)

    assert window.size == size


def test_bounded_by_what_the_buffer_holds() -> None:
    """It never is larger than what the receive buffer holds, however well all goes."""
    window = CongestionWindow(70, Timing())
    for _ in range(1_000):
        window.acknowledged(0.001, busy=True)
    assert window.size == 70
    window.most = 3
    for _ in range(3):
        assert window.has_room(0.0)
        opened(window, 0.0)
    assert not window.has_room(0.0)


def test_the_silent_leave() -> None:
    """What is not acknowledged for longer than round trips take makes room."""
    window = CongestionWindow(2, Timing())
    opened(window, 0.0)
    second = opened(window, 0.0)
    assert (window.has_room(1.9), window.room_at()) == (False, 2.0)
    for _ in range(50):
        window.acknowledged(0.02, busy=False)
    assert window.round_trip.timeout_s == 0.05
    assert window.has_room(0.051)
    window.remove(second)
    assert window.in_flight == 0
    window.acknowledged(60.0, busy=False)
    assert window.round_trip.timeout_s == 2.0
