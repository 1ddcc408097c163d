"""The shapes that `--json` prints: one function each, shown by example in `spec/cli.md`.

Sizes are in bytes, times are RFC 3339, digests hexadecimal; a missing value is left out or null.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

from netota_coap.encoding.codecs import Format
from netota_coap.encoding.documents import encode
from netota_coap.errors import Issue
from netota_coap.model.values import BLOBS_PATH, Archive, Offer, Stream
from netota_coap.publishing.diff import Difference, Got
from netota_coap.publishing.inspection.artefact import Artefact
from netota_coap.repository.blobs import Blob, blob_name
from netota_coap.repository.check import Findings

if TYPE_CHECKING:  # importing these takes 0.2 s
    from netota_coap.client.downloads import Report
    from netota_coap.service.config import Effective


def time_text(time: datetime) -> str:
    """Write a time in RFC 3339's form, in UTC."""
    return time.astimezone(UTC).isoformat().replace("+00:00", "Z")


def made(directory: Path) -> dict[str, Any]:
    """A new repository."""
    return {"repository": str(directory)}


def configuration(effective: Effective) -> dict[str, Any]:
    """The value of each setting, and where it comes from."""
    return {
        key: {"value": value, "from": origin} for key, (value, origin) in effective.shown().items()
    }


def findings(found: Findings) -> dict[str, Any]:
    """The findings of a check."""
    errors, warnings = _issues(found.errors), _issues(found.warnings)
    return {"errors": errors, "warnings": warnings, "hint": found.hint}


def _issues(found: Iterable[Issue]) -> list[dict[str, str]]:
    return [{"place": i.place, "reason": i.reason, "file": i.file} for i in found]


def row(package: str, title: str, name: str, stream: Any) -> dict[str, Any]:
    """A stream in a list; `stream` is a `Stream` or a `StreamEntry`."""
    return {
        "package": package,
        "title": title,
        "stream": name,
        "version": stream.version,
        "sequence": stream.sequence,
        "closed": stream.closed,
    }


def stream(state: Stream) -> dict[str, Any]:
    """A stream as a server sends it, with the fields that only files have."""
    plain: dict[str, Any] = json.loads(encode(state, Format.JSON))
    for name in ("title", "author", "message"):
        if getattr(state, name) is not None:
            plain[name] = getattr(state, name)
    if state.changed:
        plain["changed"] = time_text(state.changed)
    if state.removed:
        plain["removed"] = True
    return plain


def entry(state: Stream) -> dict[str, Any]:
    """A state in the log."""
    return {
        "sequence": state.sequence,
        "time": time_text(state.changed or state.published),
        "version": state.version,
        "closed": state.closed,
        "removed": state.removed,
        "replacement": "/".join(state.replacement) if state.replacement else None,
        "author": state.author,
        "message": state.message,
    }


def difference(found: Difference, *, dry_run: bool = True) -> dict[str, Any]:
    """The effect of a change on archives and on each kind of device."""
    change = found.change
    return {
        "package": change.name[0],
        "stream": change.name[1],
        "other": "/".join(found.other) if found.other else None,
        "dry_run": dry_run,
        "before": entry(change.before) if change.before else None,
        "after": entry(change.after),
        "archives": [
            {
                "name": each.name,
                "change": each.what,
                "before_size": each.before.envelope.size if each.before else None,
                "after_size": each.after.envelope.size if each.after else None,
            }
            for each in found.archives
        ],
        "devices": [
            {"kind": dict(each.kind), "before": _got(each.before), "after": _got(each.after)}
            for each in found.kinds
        ],
        "lost": list(found.lost),
        "warnings": _issues(found.warnings),
    }


def _got(got: Got | None) -> dict[str, Any] | None:
    if got is None:
        return None
    return {
        "version": got.version,
        "archive": got.archive.name if got.archive else None,
        "size": got.archive.envelope.size if got.archive else None,
        "notification": got.notification,
        "more": got.more,
    }


def artefact(file: str, found: Artefact) -> dict[str, Any]:
    """What a file says about itself."""
    return {
        "file": file,
        "version": found.version,
        "media_type": found.envelope.type,
        "size": found.envelope.size,
        "sha256": found.envelope.sha256.hex(),
        "content": found.content.all(),
        "facts": dict(found.facts),
    }


def blobs(found: Iterable[Blob]) -> list[dict[str, Any]]:
    """Stored files; `path` is the path of the URL, `damaged` ones are set aside."""
    return [
        {
            "sha256": each.sha256.hex(),
            "path": BLOBS_PATH + blob_name(each.sha256),
            "size": each.size,
            "since": time_text(datetime.fromtimestamp(int(each.since), UTC)),
            "damaged": each.damaged,
        }
        for each in found
    ]


def offers(reports: Iterable[tuple[str, Report]]) -> list[dict[str, Any]]:
    """The results of asking offers; `problem` is empty if there is none."""
    return [
        {"archive": place, "url": found.url, "problem": found.problem, "size": found.size}
        for place, found in reports
    ]


def downloaded(file: Path, archive: Archive, offer: Offer | None) -> dict[str, Any]:
    """A downloaded file; `url` is null if it was already complete."""
    return {
        "file": str(file),
        "archive": archive.name,
        "size": archive.envelope.size,
        "sha256": archive.envelope.sha256.hex(),
        "url": offer.url if offer else None,
    }
