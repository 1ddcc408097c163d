"""Keeps Python's garbage collector and its interpreter lock from delaying responses.

A full collection looks at all objects: with 50,000 observers it stops the event loop for 50 ms,
each time a quarter was added. Here the survivors of each collection are frozen: the next one looks
at new objects only, until twice as many are frozen. And a thread that computes, as in a reload,
makes the loop wait after each system call: here for 0.5 ms, by Python's default for 5 ms.
"""

from __future__ import annotations

import contextlib
import gc
import sys
from collections.abc import Iterator
from typing import Any

import attrs

FEWEST = 200_000  # objects; a full collection of them takes about 20 ms
_SWITCH_S = 0.0005
_BEFORE_S = sys.getswitchinterval()


@attrs.define
class _Freezer:
    """Freezes the survivors of each full collection (a callback of `gc`)."""

    most: int = FEWEST  # frozen objects; with more, the next collection looks at all

    def __call__(self, phase: str, info: dict[str, Any]) -> None:
        if phase != "stop" or info["generation"] != 2:
            return
        if gc.get_freeze_count() > self.most:
            gc.unfreeze()
            self.most *= 2
        else:
            gc.freeze()
            self.most = max(FEWEST, min(self.most, 2 * gc.get_freeze_count()))


@contextlib.contextmanager
def short_pauses() -> Iterator[None]:
    """Make full collections short, and threads switch often, until the block ends."""
    freezer = _Freezer()
    sys.setswitchinterval(_SWITCH_S)
    gc.collect()
    gc.freeze()
    freezer.most = max(FEWEST, 2 * gc.get_freeze_count())
    gc.callbacks.append(freezer)
    try:
        yield
    finally:
        gc.callbacks.remove(freezer)
        gc.unfreeze()
        # Not what it was at the beginning: several services may end in any order.
        sys.setswitchinterval(_BEFORE_S)
