"""Changes of streams as most tests make them: at one time, by nobody, builds may be lost."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import attrs

from netota_coap.model.values import Offer, Stream, StreamName
from netota_coap.publishing import publish as publishing
from netota_coap.publishing.archives import ArchiveSource
from netota_coap.publishing.publish import Edit
from netota_coap.repository.check import check
from netota_coap.repository.store import Change, DirectoryStore, update

NOW = datetime(2026, 11, 20, 9, 30, tzinfo=UTC)
STABLE = ("sensor-node", "stable")
EDIT = Edit(now=NOW, allow_missing=True)


def publish(
    root: Path,
    name: StreamName,
    version: str | None,
    sources: Sequence[ArchiveSource],
    offers: Sequence[Offer] = (),
    now: datetime = NOW,
    **options: Any,
) -> Stream:
    """Publish, and return the new state."""
    edit = attrs.evolve(EDIT, now=now)
    return publishing.publish(
        DirectoryStore(root), name, version, sources, offers, edit=edit, **options
    ).after


def close(root: Path, name: StreamName, replacement: StreamName | None = None) -> Stream:
    """Close, and return the new state."""
    return publishing.close(DirectoryStore(root), name, replacement, edit=EDIT).after


def reopen(root: Path, name: StreamName) -> Stream:
    """Reopen, and return the new state."""
    return publishing.reopen(DirectoryStore(root), name, edit=EDIT).after


def remove(root: Path, name: StreamName) -> Stream:
    """Remove, and return the state that says so."""
    return publishing.remove(DirectoryStore(root), name, edit=EDIT).after


def promote(root: Path, source: StreamName, target: StreamName) -> Stream:
    """Promote, and return the new state of the target."""
    return publishing.promote(DirectoryStore(root), source, target, edit=EDIT).after


def rollback(root: Path, name: StreamName, to: int | None = None) -> Stream:
    """Roll back, and return the new state."""
    return publishing.rollback(DirectoryStore(root), name, to, edit=EDIT).after


def change(root: Path, name: StreamName, make: Callable[[Stream | None], Stream]) -> Change:
    """Change a stream in any way, whatever publishers may do."""
    return update(DirectoryStore(root), name, lambda read: read.next(make(read.present)))


def served(root: Path, name: StreamName = STABLE) -> Stream:
    """Return what a server would offer, after a check without errors."""
    findings = check(root)
    assert findings.errors == ()
    assert findings.repository is not None
    return findings.repository.packages[name[0]].streams[name[1]]
