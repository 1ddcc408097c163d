"""What pages show: pure functions from the catalog to the templates' variables."""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterable, Iterator, Sequence
from datetime import datetime
from itertools import islice
from urllib.parse import quote

import attrs

from netota_coap.catalog.resources import StreamResource
from netota_coap.catalog.stream_query import StreamQuery
from netota_coap.encoding.codecs import Format, diagnostic, load
from netota_coap.encoding.content_formats import ContentFormat
from netota_coap.encoding.documents import decode, selection_to_query
from netota_coap.errors import printable
from netota_coap.model.selection import Selection
from netota_coap.model.values import CONTENT_ATTRIBUTES, Archive, Package, Stream, StreamName
from netota_coap.publishing.diff import ArchiveChange, archive_changes, archives_of, describe, lost
from netota_coap.repository.store import Change

MOST_KINDS = 50  # a stream can have 1,000 archives, each for another kind of device
MOST_STATES = 20  # a history can have millions

_HOST = re.compile(r"(\[[0-9A-Fa-f:.]+\]|[A-Za-z0-9][A-Za-z0-9.-]{0,252})(?::\d{1,5})?")
_AGES = {"year": 31_557_600, "month": 2_629_800, "day": 86_400, "hour": 3_600, "minute": 60}
_UNITS = ((86_400, "d"), (3_600, "h"), (60, "min"))
_SIZES = ("bytes", "kB", "MB", "GB", "TB", "PB", "EB")


def shown(value: object) -> object:
    """Escape characters that would rewrite a line, such as direction marks."""
    if not isinstance(value, str) or hasattr(value, "__html__"):
        return value
    return "\n".join(map(printable, value.split("\n")))


def age(then: datetime, now: datetime) -> str:
    """Return how long ago a time was; a time in the future (a wrong clock) is `just now`."""
    seconds = (now - then).total_seconds()
    for unit, size in _AGES.items():
        count = int(seconds // size)
        if count >= 1:
            return f"{count} {unit}{'s' if count > 1 else ''} ago"
    return "just now"


def duration(seconds: int) -> str:
    """Return a duration in the largest unit that divides it."""
    size, unit = next((each for each in _UNITS if seconds % each[0] == 0), (1, "s"))
    return f"{seconds // size:,} {unit}"


def readable_size(size: int) -> str:
    """Return a size in three digits and a unit, as `201 kB`; below 1,000 bytes it is exact."""
    scaled, place = float(size), 0
    while float(f"{scaled:.3g}") >= 1_000 and place < len(_SIZES) - 1:
        scaled, place = scaled / 1_000, place + 1
    return f"{scaled:.3g} {_SIZES[place]}"


def is_web(url: str) -> bool:
    """Tell whether a URL may become a link: other schemes, as `javascript:`, could run code."""
    return url.lower().startswith(("http://", "https://"))


def name_of(author: str | None) -> str:
    """Return an author without the mail address: pages are public."""
    name = (author or "").partition("<")[0].strip()
    return "" if "@" in name else name


def host_of(header: str) -> str:
    """Return the host in a Host header, without the port; `HOST` if it is invalid."""
    match = _HOST.fullmatch(header)
    return match[1] if match else "HOST"


@attrs.frozen
class DeviceKind:
    """What devices with the same attributes get."""

    label: str  # their attributes, as `arch=arm machine=nrf9160dk`
    archives: tuple[str, ...]  # names of the archives that suit them, the preferred first
    size: int  # of the payload, bytes
    more: bool  # whether the payload leaves something out to fit one datagram
    notation: str  # the payload in diagnostic notation (RFC 8949, section 8)
    commands: tuple[str, ...]  # for a shell; they get and observe the stream


def columns(archives: Iterable[Archive]) -> tuple[str, ...]:
    """Return the attributes that some archive has, in the order of the columns."""
    said = {name for archive in archives for name in archive.content.all()}
    free = sorted(said.difference(CONTENT_ATTRIBUTES))
    return (*(name for name in CONTENT_ATTRIBUTES if name in said), *free)


def kinds(resource: StreamResource, host: str) -> list[DeviceKind]:
    """Return one kind for each distinct content, at most `MOST_KINDS`; commands name `host`."""
    said = {Selection.of(a.content.all()): a.content.all() for a in archives_of(resource.stream)}
    return [
        _kind(resource, selection, describe(content), f"coap://{host}/{'/'.join(resource.path)}")
        for selection, content in islice((said or {Selection(): {}}).items(), MOST_KINDS)
    ]


def _kind(resource: StreamResource, selection: Selection, label: str, uri: str) -> DeviceKind:
    payload = resource.answer(StreamQuery(selection), ContentFormat.CBOR, "coap").payload
    got = decode(Stream, payload, Format.CBOR)
    query = selection_to_query(selection)
    encoded = "&".join(quote(parameter, safe="=") for parameter in query)
    options = "".join(f" --query {shlex.quote(parameter)}" for parameter in query)
    return DeviceKind(
        label,
        tuple(archive.name for archive in got.archives or ()),
        len(payload),
        got.more,
        diagnostic(load(payload, Format.CBOR)),
        (
            f"aiocoap-client '{uri}{'?' if query else ''}{encoded}'",
            f"netota-coap watch {uri}{options}",
        ),
    )


@attrs.frozen
class Past:
    """A state in the history of a stream."""

    state: Stream
    version: str  # after the previous one, if that differs: `1.0 → 1.1`
    archives: tuple[ArchiveChange, ...]  # those that changed
    lost: tuple[str, ...]  # architectures and machines for which no build was left

    @property
    def summary(self) -> str:
        """Counts of the changes, as `2 rebuilt, 1 removed`."""
        whats = [change.what for change in self.archives]
        words = [f"{whats.count(what)} {what}" for what in dict.fromkeys(whats)]
        words += ["closed"] * self.state.closed + ["removed"] * self.state.removed
        return ", ".join(words)


def history(name: StreamName, states: Sequence[Stream]) -> Iterator[Past]:
    """Compare each state, the newest first, with the one before it; at most `MOST_STATES`."""
    for state, before in zip(states[:MOST_STATES], [*states[1:], None], strict=False):
        changes = archive_changes(archives_of(before), archives_of(state))
        versions = dict.fromkeys((before.version if before else state.version, state.version))
        yield Past(
            state,
            " → ".join(versions),
            tuple(change for change in changes if change.what != "kept"),
            lost(Change(name, Package(), before, state)),
        )
