"""Writes the parts of `spec/cli.md` for `make_spec.py`: commands, exit codes, JSON."""

from __future__ import annotations

import hashlib
import inspect
import json
from collections.abc import Callable, Iterator, Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import click

from netota_coap.cli import cli, json_output
from netota_coap.cli.common import BUG, EXIT_CODES
from netota_coap.client.downloads import Report
from netota_coap.errors import Issue
from netota_coap.model.values import Archive, Content, Envelope, Offer, Package, Stream
from netota_coap.publishing.diff import Difference
from netota_coap.publishing.inspection.artefact import Artefact
from netota_coap.repository.blobs import Blob
from netota_coap.repository.check import Findings
from netota_coap.repository.store import Change
from netota_coap.service.config import assemble

NAME = ("sensor-node", "stable")


def _archive(version: str, machine: str) -> Archive:
    sha256 = hashlib.sha256(f"{machine} {version}".encode()).digest()
    url = f"https://cdn.example.com/sensor-node/{version}/{machine}.bin"
    return Archive(
        name=machine,
        envelope=Envelope(type="application/octet-stream", size=214_016, sha256=sha256),
        content=Content(arch="arm", machine=machine),
        offers=(Offer(url=url, metric=100),),
    )


BEFORE = Stream(
    version="2.4.0",
    sequence=16,
    published=datetime(2026, 11, 2, 9, 30, tzinfo=UTC),
    archives=(_archive("2.4.0", "nrf52840dk"), _archive("2.4.0", "nrf9160dk")),
)
AFTER = Stream(
    version="2.4.1",
    sequence=17,
    published=datetime(2026, 11, 20, 9, 30, tzinfo=UTC),
    author="Ada <ada@example.com>",
    message="Fixes the clock",
    archives=(_archive("2.4.1", "nrf52840dk"),),
)

# ----------------------------------------------------------------------------------------------
# Commands


def commands() -> str:
    """Describe each command by its `--help`."""
    return "\n".join(_command(name, command) for name, command in each_command(cli))


def each_command(group: click.Group, prefix: str = "") -> Iterator[tuple[str, click.Command]]:
    """Yield each command with its name, after the name of its group if it has one."""
    context = click.Context(group)
    for name in sorted(group.list_commands(context)):
        command = group.get_command(context, name)
        assert command is not None
        if isinstance(command, click.Group):
            yield from each_command(command, f"{name} ")
        else:
            yield prefix + name, command


def _command(name: str, command: click.Command) -> str:
    context = click.Context(command, info_name=name, show_default=True)
    usage = " ".join(p for p in command.collect_usage_pieces(context) if p != "[OPTIONS]")
    records = [record for p in command.params if (record := p.get_help_record(context))]
    rows = "".join(f"| `{option}` | {_cell(meaning)} |\n" for option, meaning in records)
    table = f"| option | meaning |\n| --- | --- |\n{rows}\n" if rows else ""
    help_text = inspect.cleandoc(command.help or "")
    example = (command.epilog or "").removeprefix("Example: ")
    heading = f"### {name}\n\n`netota-coap {name}{f' {usage}' if usage else ''}`"
    return f"{heading}\n\n{help_text}\n\n{table}```sh\n{example}\n```\n"


def _cell(meaning: str) -> str:
    return meaning.replace("|", "\\|")


def codes() -> str:
    """List the exit codes with their causes."""
    found: dict[int, list[str]] = {0: ["done"], 1: ["problems were found"], 2: ["usage"]}
    for cls, code in EXIT_CODES.items():
        found.setdefault(code, []).append(f"`{cls.__name__}`")
    found[BUG] = ["a bug: please report it"]
    rows = "".join(f"| {code} | {', '.join(what)} |\n" for code, what in sorted(found.items()))
    return f"| exit code | stands for |\n| --- | --- |\n{rows}"


# ----------------------------------------------------------------------------------------------
# JSON


def _shapes() -> Iterator[tuple[Callable[..., Any], str, Any]]:
    """Yield the functions of `json_output.py` with the commands that use them and an example."""
    change = Change(NAME, Package(), BEFORE, AFTER)
    reason = "is ignored: it is no file of a repository"
    findings = Findings(None, (), (Issue("", reason, "notes.txt"),))
    changing = ", ".join(f"`{name}`" for name, command in each_command(cli) if _changes(command))
    yield json_output.made, "`init`", json_output.made(Path("fleet"))
    yield (
        json_output.findings,
        "`check`, with the offers that were asked",
        json_output.findings(findings),
    )
    yield (
        json_output.row,
        "`list`, an array",
        [json_output.row(NAME[0], "Sensor node", NAME[1], AFTER)],
    )
    yield json_output.stream, "`show`; `watch` and `get` as in wire.md", json_output.stream(AFTER)
    yield json_output.entry, "`log`, an array, the last first", [json_output.entry(AFTER)]
    found = json_output.difference(Difference.of(change), dry_run=True)
    yield json_output.difference, f"`diff`, {changing}", found
    effective = assemble(
        None, {"STATE_DIRECTORY": "/var/lib/netota-coap"}, {"http_bind": "[::]:80"}
    )
    yield json_output.configuration, "`config show`", json_output.configuration(effective)
    archive = (AFTER.archives or ())[0]
    offer = archive.offers[0]
    image = Artefact(
        envelope=archive.envelope,
        content=archive.content,
        version=AFTER.version,
        facts={"format": "mcuboot", "signatures": ["ecdsa-p256"], "encrypted": False},
    )
    held = Blob(archive.envelope.sha256, archive.envelope.size, AFTER.published.timestamp())
    yield (
        json_output.blobs,
        "`blob` with `list`, `add`, `verify` and `gc`, an array",
        json_output.blobs([held]),
    )
    yield (
        json_output.artefact,
        "`inspect`, an array",
        [json_output.artefact("zephyr.signed.bin", image)],
    )
    missing = Report(offer.url, archive.envelope, problem="404 Not Found")
    place = f"{'/'.join(NAME)}: {archive.name}"
    yield json_output.offers, "`check`, as `offers`", json_output.offers([(place, missing)])
    got = json_output.downloaded(Path("app.bin"), archive, offer)
    yield json_output.downloaded, "`download`", got


def _changes(command: click.Command) -> bool:
    return any("--message" in parameter.opts for parameter in command.params)


def shapes() -> str:
    """Show an example of each shape that `--json` prints."""
    return "\n".join(
        f"### {function.__name__}\n\n{_first(function)} Printed by {where}.\n\n"
        f"```json-shape {function.__name__}\n"
        f"{json.dumps(example, ensure_ascii=False, indent=2)}\n```\n"
        for function, where, example in _shapes()
    )


def _first(function: Callable[..., Any]) -> str:
    return (inspect.getdoc(function) or "").partition("\n")[0]


PARTS: Mapping[str, Callable[[], str]] = {
    "table:commands": commands,
    "table:exit-codes": codes,
    "example:shapes": shapes,
}
"""Functions that write a part of the document, by the name in its marker."""
