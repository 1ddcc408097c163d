"""Keeps Python itself from stopping a service for long, however much it holds.

A full collection of cyclic garbage looks at everything: with 50,000 observers that takes 50 ms, in
which nobody is answered, and one is due whenever a quarter has been added. Here what has survived
one is set aside ("frozen") until there is twice as much. And a thread that computes, as for a
reload, makes the loop wait after each call of the system: not for 5 ms, as is the default.
"""

from __future__ import annotations

import contextlib
import gc
import sys
from collections.abc import Iterator
from typing import Any

import attrs

_FEWEST = 200_000  # objects, which are looked at within some 20 ms
_SWITCH_S = 0.0005


@attrs.define
class _Shelf:
    """Decides after each full collection what the next one looks at."""

    most: int = _FEWEST

    def __call__(self, phase: str, info: dict[str, Any]) -> None:
        if phase != "stop" or info["generation"] != 2:
            return
        if gc.get_freeze_count() > self.most:
            gc.unfreeze()  # the next one looks at everything
            self.most *= 2
        else:
            gc.freeze()
            self.most = max(_FEWEST, min(self.most, 2 * gc.get_freeze_count()))


@contextlib.contextmanager
def collected_rarely() -> Iterator[None]:
    """Let full collections look at new objects only, mostly, until the block ends."""
    look, before_s = _Shelf(), sys.getswitchinterval()
    sys.setswitchinterval(_SWITCH_S)
    gc.collect()
    gc.freeze()
    look.most = max(_FEWEST, 2 * gc.get_freeze_count())
    gc.callbacks.append(look)
    try:
        yield
    finally:
        gc.callbacks.remove(look)
        gc.unfreeze()
        sys.setswitchinterval(before_s)
