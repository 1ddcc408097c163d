"""What `--json` prints: one function per shape, shown by example in `spec/cli.md`.

Sizes are in bytes, times RFC 3339, digests hexadecimal; what is not said is left out or null.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any

from netota_coap.encoding.codecs import Format
from netota_coap.encoding.documents import encode
from netota_coap.errors import Issue

if TYPE_CHECKING:
    from pathlib import Path

    from netota_coap.client.downloads import Report
    from netota_coap.model.values import Archive, Offer, Stream
    from netota_coap.publishing.diff import Difference, Got
    from netota_coap.publishing.inspection.artefact import Artefact
    from netota_coap.repository.blobs import Blob
    from netota_coap.repository.check import Findings
    from netota_coap.service.config import Effective


def time_text(time: datetime) -> str:
    """Write a time as RFC 3339 has it, in UTC."""
    return time.astimezone(UTC).isoformat().replace("+00:00", "Z")


def made(directory: Path) -> dict[str, Any]:
    """A repository that was made."""
    return {"repository": str(directory)}


def configuration(effective: Effective) -> dict[str, Any]:
    """The configuration of a service, and where each value comes from."""
    from netota_coap.service.config import SETTINGS

    return {
        setting.key: {
            "value": setting.plain(effective.config),
            "from": effective.origins[setting.key],
        }
        for setting in SETTINGS
    }


def findings(found: Findings) -> dict[str, Any]:
    """What a check found."""
    return {
        "errors": _issues(found.errors),
        "warnings": _issues(found.warnings),
        "hint": found.hint,
    }


def _issues(found: Iterable[Issue]) -> list[dict[str, str]]:
    return [{"place": i.place, "reason": i.reason, "file": i.file} for i in found]


def row(package: str, title: str, name: str, stream: Any) -> dict[str, Any]:
    """A stream in the list of all; `stream` is a `Stream` or a `StreamEntry`."""
    return {
        "package": package,
        "title": title,
        "stream": name,
        "version": stream.version,
        "sequence": stream.sequence,
        "closed": stream.closed,
    }


def stream(state: Stream) -> dict[str, Any]:
    """A stream as a server sends it, and what only the files have."""
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


def difference(found: Difference, *, dry_run: bool) -> dict[str, Any]:
    """What a change does, or would do, for archives and for each kind of device."""
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
    """What a file tells of itself."""
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
    """Blobs; `path` is that of their URLs, `damaged` ones were set aside."""
    from netota_coap.repository.blobs import blob_name

    return [
        {
            "sha256": each.sha256.hex(),
            "path": f"/b/{blob_name(each.sha256)}",
            "size": each.size,
            "since": time_text(datetime.fromtimestamp(int(each.since), UTC)),
            "damaged": each.damaged,
        }
        for each in found
    ]


def offers(reports: Iterable[tuple[str, Report]]) -> list[dict[str, Any]]:
    """Offers that were asked; `problem` is empty where all is well."""
    return [
        {
            "archive": place,
            "url": found.url,
            "problem": found.problem,
            "size": found.size,
        }
        for place, found in reports
    ]


def downloaded(file: Path, archive: Archive, offer: Offer | None) -> dict[str, Any]:
    """A file that was downloaded, and where from: null if it was there already."""
    return {
        "file": str(file),
        "archive": archive.name,
        "size": archive.envelope.size,
        "sha256": archive.envelope.sha256.hex(),
        "url": offer.url if offer else None,
    }
