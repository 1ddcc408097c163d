"""Views of streams that were rendered, ready to be had again."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Collection
from typing import Generic, Protocol, TypeVar

import attrs

_BYTES = 16 * 2**20
_ENTRY_BYTES = 1_024  # what an entry takes besides its payload


class Rendered(Protocol):
    """What has a payload."""

    @property
    def payload(self) -> bytes:
        """The bytes."""


R = TypeVar("R", bound=Rendered)

Key = tuple[tuple[str, ...], bytes, object, object]
"""Path and fingerprint of a stream, the format, and what else tells its views apart."""


@attrs.define(eq=False)
class Shelf(Generic[R]):
    """Views of all streams; the least recently used leave.

    Bounded in bytes, over all streams together: whoever asks for ever new views can push out those
    of others, which costs them time, but the server no memory.
    """

    _ready: OrderedDict[Key, R] = attrs.field(init=False, factory=OrderedDict)
    _bytes: int = attrs.field(init=False, default=0)

    def get(self, key: Key, render: Callable[[], R]) -> R:
        """Return what stands under a key, rendered now or before."""
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

    def keep(self, fingerprints: Collection[bytes]) -> None:
        """Let go of views of what has none of these fingerprints (any more)."""
        for key in list(self._ready):
            if key[1] not in fingerprints:
                dropped = self._ready.pop(key)
                self._bytes -= len(dropped.payload) + _ENTRY_BYTES
