"""Decides what becomes of a state that an upstream offers: pure, no files, no network.

Source: `spec/mirror.md`, rules M-10 to M-16.
"""

from __future__ import annotations

from collections.abc import Iterator
from fnmatch import fnmatchcase

import attrs

from netota_coap.client.downloads import resolve
from netota_coap.errors import (
    IntegrityError,
    InvalidDataError,
    RepositoryConflictError,
    RollbackError,
)
from netota_coap.gateway.upstream_uri import author_of
from netota_coap.model.selection import Selection
from netota_coap.model.values import LIMITS, Archive, Offer, Stream, StreamName

EVERYTHING = ("*",)


@attrs.frozen
class Choice:
    """What of an upstream is mirrored.

    Attributes:
        packages: Patterns of names, as of a shell.
        streams: The same of streams.
        devices: What the devices here say about themselves: which blobs they need.
    """

    packages: tuple[str, ...] = EVERYTHING
    streams: tuple[str, ...] = EVERYTHING
    devices: Selection = Selection()

    def has_package(self, package: str) -> bool:
        """Tell whether anything of a package may be mirrored."""
        return _fits(package, self.packages)

    def has(self, name: StreamName) -> bool:
        """Tell whether a stream is mirrored."""
        return self.has_package(name[0]) and _fits(name[1], self.streams)

    def archives(self, state: Stream) -> tuple[Archive, ...]:
        """Return the archives of a state whose blobs are needed here."""
        return self.devices.narrow(state.archives or (), "")


def _fits(name: str, patterns: tuple[str, ...]) -> bool:
    return any(fnmatchcase(name, pattern) for pattern in patterns)


def adopt(local: Stream | None, offered: Stream, origin: str) -> Stream | None:
    """Return the state to be written here; None: nothing changes.

    Args:
        local: The state that the stream holds here, or held last; None: there never was one.
        offered: The state that the upstream has.
        origin: URI of the upstream.

    Raises:
        RollbackError: The upstream went back behind what was here.
        RepositoryConflictError: It is another's stream, or is another state under the same
            sequence.
        IntegrityError: It is not whole.
    """
    if offered.archives is None or offered.more:
        raise IntegrityError("sends a state that is not whole", uri=origin)
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
    # Who removed a stream has let go of it.
    if local.author != state.author and not local.removed:
        raise RepositoryConflictError(
            f"is not a stream of this upstream here, but of {local.author or 'nobody'}",
            hint=f"To let it follow: author = {state.author!r} in its stream file here.",
        )
    if state.sequence < local.sequence:
        detail = f"went back from sequence {local.sequence} to {state.sequence}"
        hint = f"There, publish it again under a sequence above {local.sequence}."
        raise RollbackError(detail, uri=origin, hint=hint)
    if state.sequence == local.sequence and state.essence() != local.essence():
        raise RepositoryConflictError(
            f"is another state under the same sequence {state.sequence}",
            hint="There, publish it again: each state has a sequence of its own.",
        )
    return None if state == local else state


def _offers(archive: Archive, origin: str) -> tuple[Offer, ...]:
    """Return the offers as others can use them, the best first, as many as there may be."""
    found: dict[str, Offer] = {}
    for offer in sorted(_resolved(archive, origin), key=lambda offer: offer.metric):
        found.setdefault(offer.url, offer)
    return tuple(found.values())[: LIMITS["offers"].value]


def _resolved(archive: Archive, origin: str) -> Iterator[Offer]:
    for offer in archive.offers:
        try:
            yield attrs.evolve(offer, url=resolve(offer.url, origin))
        except InvalidDataError:
            continue  # too long with the upstream's name before it
