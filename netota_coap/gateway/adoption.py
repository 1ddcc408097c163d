"""Decides what becomes of a state that an upstream offers, and writes it through a store.

Source: `spec/mirror.md`, rules M-10 to M-16 and M-20 to M-22.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from fnmatch import fnmatchcase

import attrs

from netota_coap.client.downloads import resolve
from netota_coap.encoding.addresses import author_of
from netota_coap.errors import (
    IntegrityError,
    InvalidDataError,
    RepositoryConflictError,
    RollbackError,
)
from netota_coap.model.selection import Selection
from netota_coap.model.values import LIMITS, Archive, Offer, Stream, StreamName
from netota_coap.repository.store import Change, Snapshot, Store, update

Decide = Callable[[Stream | None], Stream | None]
"""Takes the last state of a stream here, and returns the one to write; None: nothing changes."""

EVERYTHING = ("*",)


@attrs.frozen
class Choice:
    """Selects what a gateway mirrors: names by shell patterns, blobs by the devices."""

    packages: tuple[str, ...] = EVERYTHING
    streams: tuple[str, ...] = EVERYTHING
    devices: Selection = Selection()

    def has_package(self, package: str) -> bool:
        """Tell whether any stream of a package may be mirrored."""
        return _matches(package, self.packages)

    def has(self, name: StreamName) -> bool:
        """Tell whether a stream is mirrored."""
        return self.has_package(name[0]) and _matches(name[1], self.streams)

    def archives(self, state: Stream) -> tuple[Archive, ...]:
        """Return the archives whose blobs the devices here need."""
        return self.devices.narrow(state.archives or (), "")


def _matches(name: str, patterns: tuple[str, ...]) -> bool:
    return any(fnmatchcase(name, pattern) for pattern in patterns)


def adopt(local: Stream | None, offered: Stream, origin: str) -> Stream | None:
    """Return the state to write here; None if nothing changes.

    `local` is the present state here, or the last one in the history; `origin` is the upstream.

    Raises:
        RollbackError: The sequence is lower than the local one.
        RepositoryConflictError: The stream has another author here, or another state under the
            same sequence.
        IntegrityError: Something was left out of the state.
    """
    if offered.archives is None or offered.more:
        raise IntegrityError("sends an incomplete state", uri=origin)
    state = attrs.evolve(
        offered,
        title=local.title if local else None,
        author=author_of(origin),
        archives=tuple(
            attrs.evolve(archive, offers=_offers(archive, origin)) for archive in offered.archives
        ),
    )
    if local is None:
        return state
    # A stream whose removal is in the history belongs to nobody (M-11).
    if local.author != state.author and not local.removed:
        raise RepositoryConflictError(
            f"is not a stream of this upstream here: its author is {local.author or 'nobody'}",
            hint=f"To mirror it, write author = {state.author!r} in its stream file here.",
        )
    if state.sequence < local.sequence:
        detail = f"went back from sequence {local.sequence} to {state.sequence}"
        hint = f"Publish it upstream under a sequence above {local.sequence}."
        raise RollbackError(detail, uri=origin, hint=hint)
    if state.sequence == local.sequence and state.essence() != local.essence():
        raise RepositoryConflictError(
            f"is another state under the same sequence {state.sequence}",
            hint="Publish it upstream again, which gives it a sequence of its own.",
        )
    return None if state == local else state


def _offers(archive: Archive, origin: str) -> tuple[Offer, ...]:
    """Return the offers with absolute URLs, the best first and no more than are allowed."""
    found: dict[str, Offer] = {}
    for offer in sorted(archive.offers, key=lambda offer: offer.metric):
        url = resolve(offer.url, origin)
        with contextlib.suppress(InvalidDataError):  # the absolute URL may be too long
            found.setdefault(url, attrs.evolve(offer, url=url))
    return tuple(found.values())[: LIMITS["offers"].value]


def take_over(store: Store, name: StreamName, decide: Decide) -> Stream | None:
    """Write a state of an upstream's stream, with its sequence; return it if anything changed.

    `decide` is called again if the stream is changed meanwhile. What it raises stops the change.

    Raises:
        RepositoryError: The state cannot be written; nothing changed.
    """

    def plan(here: Snapshot) -> Change | None:
        state = decide(here.last) or (None if here.present else here.last)
        return here.change(state) if state else None

    change = update(store, name, plan)
    return change.after if change else None
