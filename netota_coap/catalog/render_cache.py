"""Byte-bounded LRU cache of rendered streams."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Collection
from typing import Generic, Protocol, TypeVar

import attrs

_BYTES = 16 * 2**20
_ENTRY_BYTES = 1_024  # what an entry takes besides its payload


class Rendered(Protocol):
    """Anything with a payload."""

    @property
    def payload(self) -> bytes: ...  # noqa: D102


R = TypeVar("R", bound=Rendered)

RenderKey = tuple[tuple[str, ...], bytes, object, object]
"""Path and fingerprint of a stream, the format, and what distinguishes queries."""


@attrs.define(eq=False)
class RenderCache(Generic[R]):
    """A cache with one bound for all streams together.

    A client that keeps making up new queries evicts the entries of others, which costs time but no
    memory.
    """

    _ready: OrderedDict[RenderKey, R] = attrs.field(init=False, factory=OrderedDict)
    _bytes: int = attrs.field(init=False, default=0)

    def get(self, key: RenderKey, render: Callable[[], R]) -> R:
        """Return the entry of a key; render it if the cache has none."""
        ready = self._ready.get(key)
        if ready is not None:
            self._ready.move_to_end(key)
            return ready
        ready = self._ready[key] = render()
        self._bytes += len(ready.payload) + _ENTRY_BYTES
        while self._bytes > _BYTES:
            _, dropped = self._ready.popitem(last=False)
            self._bytes -= len(dropped.payload) + _ENTRY_BYTES
        return ready

    def retain(self, fingerprints: Collection[bytes]) -> None:
        """Drop all entries but those of streams with these fingerprints."""
        for key in list(self._ready):
            if key[1] not in fingerprints:
                dropped = self._ready.pop(key)
                self._bytes -= len(dropped.payload) + _ENTRY_BYTES
