"""Waits that spread out the requests of many: back-off before a retry, and jitter."""

from __future__ import annotations

import random

import attrs


def jittered(seconds: float, share: float = 0.5) -> float:
    """Lengthen a wait by a random share of it, so that many clients do not return at one time."""
    return seconds * random.uniform(1.0, 1.0 + share)  # noqa: S311


@attrs.define
class BackOff:
    """The wait before a retry: `first_s` seconds, then doubled each time up to `longest_s`."""

    first_s: float
    longest_s: float
    wait_s: float = attrs.field(init=False)  # the next wait without its jitter

    def __attrs_post_init__(self) -> None:
        self.reset()

    def reset(self) -> None:
        """Begin again with the first wait."""
        self.wait_s = self.first_s

    def next_s(self) -> float:
        """Return how long to wait now, seconds, with jitter, and double the wait after it."""
        now_s, self.wait_s = self.wait_s, min(self.wait_s * 2, self.longest_s)
        return jittered(now_s)
