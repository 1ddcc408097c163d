"""What the commands print for people."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import click

from netota_coap.cli import json_output
from netota_coap.cli.common import print_table, printable_lines
from netota_coap.cli.json_output import time_text
from netota_coap.errors import Issue, printable
from netota_coap.model.selection import text_form
from netota_coap.model.values import Stream
from netota_coap.publishing.diff import Difference, Got, describe
from netota_coap.publishing.inspection.artefact import Artefact
from netota_coap.repository.blobs import Blob
from netota_coap.repository.check import Findings
from netota_coap.repository.store import Change

if TYPE_CHECKING:  # importing these takes 0.2 s
    from netota_coap.client.downloads import Report


def findings(found: Findings) -> None:
    """Print the findings of a check, a line each."""
    _issues("error", found.errors)
    _issues("warning", found.warnings)
    if found.hint:
        click.echo(f"hint: {found.hint}")
    click.echo(f"{len(found.errors)} errors, {len(found.warnings)} warnings")


def _issues(kind: str, found: Iterable[Issue]) -> None:
    for issue in found:
        click.echo(f"{kind}: {issue}")


def offers(reports: Sequence[tuple[str, Report]]) -> None:
    """Print a line for each offer that was asked."""
    for place, report in reports:
        click.echo(printable(f"{report.problem or 'ok'}: {place}: {report.url}"))
    if reports:
        bad = sum(bool(report.problem) for _, report in reports)
        click.echo(f"{len(reports)} offers, {bad} bad")


def blobs(found: Sequence[Blob]) -> None:
    """Print stored files and their total size."""
    cells = (
        (row["sha256"], row["size"], row["since"], "damaged" if row["damaged"] else "")
        for row in json_output.blobs(found)
    )
    if found:
        print_table(("SHA-256", "BYTES", "SINCE", ""), cells)
    click.echo(f"{len(found)} blobs, {sum(each.size for each in found)} bytes")


def rows(found: Iterable[Mapping[str, Any]]) -> None:
    """Print the streams of a repository or of a server."""
    keys = ("package", "title", "stream", "version", "sequence")
    cells = ((*map(row.get, keys), "closed" if row["closed"] else "") for row in found)
    print_table(("PACKAGE", "TITLE", "STREAM", "VERSION", "SEQUENCE", ""), cells)


def summary(change: Change) -> str:
    """Describe a change in one line."""
    after = change.after
    return f"{'/'.join(change.name)}: {after.version}, sequence {after.sequence}, {_state(after)}"


def _state(stream: Stream) -> str:
    if stream.removed:
        return "removed"
    if not stream.closed:
        return f"{len(stream.archives or ())} archives"
    where = f", replacement {'/'.join(stream.replacement)}" if stream.replacement else ""
    return f"closed{where}"


def stream(state: Stream) -> None:
    """Print a stream with its archives."""
    facts = {
        "title": state.title,
        "version": state.version,
        "sequence": state.sequence,
        "published": time_text(state.published),
        "changed": time_text(state.changed) if state.changed else None,
        "closed": "yes" if state.closed else None,
        "replacement": "/".join(state.replacement) if state.replacement else None,
        "removed": "yes" if state.removed else None,
        "poll": f"{state.poll_s} s" if state.poll_s else None,
        "author": state.author,
        "message": state.message,
    }
    _facts(facts)
    cells = (
        (
            archive.name,
            archive.envelope.size,
            archive.envelope.sha256.hex()[:16] + "…",
            "\n".join(f"{n}={text_form(value)}" for n, value in archive.content.all().items()),
            "\n".join(f"{offer.url} ({offer.metric})" for offer in archive.offers),
        )
        for archive in state.archives or ()
    )
    click.echo()
    print_table(("ARCHIVE", "BYTES", "SHA-256", "CONTENT", "OFFERS"), cells)


def _facts(facts: Mapping[str, Any]) -> None:
    lines = [(name, line) for name, value in facts.items() for line in _lines(value)]
    width = max(12, *(len(name) for name, _ in lines))
    for name, line in lines:
        click.echo(f"{name:<{width}} {printable_lines(line)}")


def log(states: Iterable[Stream]) -> None:
    """Print the states of a stream."""
    cells = (
        (
            state.sequence,
            time_text(state.changed or state.published),
            state.version,
            _state(state) if state.closed or state.removed else "",
            state.author or "",
            state.message or "",
        )
        for state in states
    )
    print_table(("SEQUENCE", "WHEN", "VERSION", "", "AUTHOR", "MESSAGE"), cells)


def difference(found: Difference) -> None:
    """Print the effect of a change on archives and devices."""
    change = found.change
    before = _known_as(change.before) if change.before else "nothing"
    other = f"{'/'.join(found.other)}: " if found.other else ""
    click.echo(f"{'/'.join(change.name)}: {before} → {other}{_known_as(change.after)}\n")
    archives = (
        (each.name, each.what, _arrow(a.envelope.size for a in (each.before, each.after) if a))
        for each in found.archives
    )
    print_table(("ARCHIVE", "CHANGE", "BYTES"), archives)
    devices = (
        (
            describe(each.kind),
            _arrow(map(_version, (each.before, each.after))),
            *_sizes(each.after),
        )
        for each in found.kinds
    )
    click.echo()
    print_table(("DEVICE", "VERSION", "DOWNLOAD", "NOTIFICATION"), devices)
    _issues("warning", found.warnings)
    for target in found.lost:
        click.echo(f"lost: no archive is left for {target}")


def _arrow(values: Iterable[object]) -> str:
    return " → ".join(dict.fromkeys(map(str, values)))


def _known_as(state: Stream) -> str:
    closed = ", removed" if state.removed else ", closed" if state.closed else ""
    return f"{state.version}, sequence {state.sequence}{closed}"


def _version(got: Got | None) -> str:
    if got is None:
        return "no stream"
    return got.version if got.archive else "nothing suits"


def _sizes(got: Got | None) -> tuple[str, str]:
    if got is None:
        return "", ""
    download = f"{got.archive.envelope.size} bytes" if got.archive else ""
    return download, f"{got.notification} bytes{', truncated' if got.more else ''}"


def artefact(file: str, found: Artefact) -> None:
    """Print what a file says about itself."""
    facts = {name.replace("_", " "): value for name, value in found.facts.items()}
    _facts(
        {
            "file": file,
            "version": found.version,
            "media type": found.envelope.type,
            "size": f"{found.envelope.size} bytes",
            "SHA-256": found.envelope.sha256.hex(),
            "content": {n: text_form(value) for n, value in found.content.all().items()} or None,
        }
        | {name: value for name, value in facts.items() if value != found.version}
    )


def _lines(value: Any) -> list[str]:
    if isinstance(value, Mapping):
        return [" ".join(f"{name}={_one(item)}" for name, item in value.items())]
    if isinstance(value, list):
        return [line for item in value for line in _lines(item)]
    return [] if value is None else [_one(value)]


def _one(value: Any) -> str:
    return {True: "yes", False: "no"}[value] if isinstance(value, bool) else str(value)
