"""service/gc_pauses.py: full collections look at new objects only, as long as those are few."""

from __future__ import annotations

import gc
import sys

import pytest

from netota_coap.service import gc_pauses
from netota_coap.service.gc_pauses import short_pauses


def test_survivors_are_set_aside() -> None:
    """From the beginning, and after each full collection; at the end all is as it was."""
    before_s, callbacks = sys.getswitchinterval(), list(gc.callbacks)
    with short_pauses():
        first = gc.get_freeze_count()
        kept = [[number] for number in range(5_000)]
        gc.collect()
        assert gc.get_freeze_count() >= first + len(kept)
        assert sys.getswitchinterval() < before_s
    assert gc.get_freeze_count() == 0
    assert (sys.getswitchinterval(), gc.callbacks) == (before_s, callbacks)


def test_all_is_looked_at_now_and_then(monkeypatch: pytest.MonkeyPatch) -> None:
    """When enough was set aside, so that what died there is found."""
    monkeypatch.setattr(gc_pauses, "FEWEST", 0)
    with short_pauses():
        look = gc.callbacks[-1]
        look.most = 1  # type: ignore[attr-defined]
        gc.collect()
        assert gc.get_freeze_count() == 0  # the next one looks at all
        gc.collect()
        assert gc.get_freeze_count() > 0
