"""Commands that look at a repository or a file."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import click

from netota_coap.cli import json_output, text_output
from netota_coap.cli.common import (
    FILE,
    STREAM,
    answer,
    command,
    directory_argument,
    json_option,
    print_json,
    progress,
    stream_argument,
    total_size,
)
from netota_coap.model.values import StreamName
from netota_coap.publishing import inspection, publish
from netota_coap.publishing.diff import compare
from netota_coap.repository import check as checks
from netota_coap.repository import history, loading
from netota_coap.repository.store import DirectoryStore


@command("check fleet --online --server coap://gateway.local")
@directory_argument
@click.option("--online", is_flag=True, help="Ask for the size of each offered file.")
@click.option("--digest", is_flag=True, help="Download each offer and compare its SHA-256.")
@click.option("--server", metavar="URI", help="Server that relative offers refer to.")
@json_option
def check(directory: Path, online: bool, digest: bool, server: str | None, as_json: bool) -> int:
    """The check covers the files, the history, and what devices would get.

    Exit code 1: a server would refuse the repository because of errors, or an offer is bad.
    """
    findings = checks.check(directory)
    reports = []
    if findings.repository and (online or digest):
        # Importing HTTP, CoAP and asyncio takes 0.2 s; a repository on disk does not need them.
        from netota_coap.cli.download import ask_offers

        reports = ask_offers(findings.repository, server, digest=digest)
    if as_json:
        print_json(json_output.findings(findings) | {"offers": json_output.offers(reports)})
    else:
        text_output.findings(findings)
        text_output.offers(reports)
    return 1 if findings.errors or any(report.problem for _, report in reports) else 0


@command("list fleet", name="list")
@click.argument("source", metavar="DIR|URI")
@json_option
def list_(source: str, as_json: bool) -> None:
    """Give the directory of a repository, or the URI of a server, as coap://HOST."""
    if "://" in source:
        from netota_coap.cli.remote import list_rows  # takes 0.1 s, for CoAP

        rows = list_rows(source)
    else:
        loaded = loading.Loader(Path(source)).load()
        rows = [
            json_output.row(package_name, package.title or "", name, stream)
            for package_name, package in sorted(loaded.packages.items())
            for name, stream in sorted(package.streams.items())
        ]
    answer(rows, list, text_output.rows, as_json=as_json)


@command("show fleet sensor-node/stable --at 1")
@click.argument("source", metavar="DIR|URI")
@click.argument("name", metavar="[PKG/STREAM]", type=STREAM, required=False)
@click.option("--at", metavar="SEQUENCE", type=int, help="Show the state of this sequence number.")
@json_option
def show(source: str, name: StreamName | None, at: int | None, as_json: bool) -> None:
    """Give the directory of a repository, or the URI of a server, as coap://HOST.

    A URI of the stream itself, as coap://HOST/p/PKG/s/STREAM, needs no PKG/STREAM.
    """
    if "://" in source:
        if at is not None:
            raise click.UsageError("--at needs a repository: a server has no history")
        from netota_coap.cli.remote import get_stream  # takes 0.1 s, for CoAP

        stream = get_stream(source, name)
    elif name is None:
        raise click.UsageError("a repository has many streams: name one as PKG/STREAM")
    elif at is not None:
        stream = history.state_at(Path(source), name, at)
    else:
        stream = publish.existing(DirectoryStore(Path(source)), name)
    answer(stream, json_output.stream, text_output.stream, as_json=as_json)


@command("log fleet sensor-node/stable")
@directory_argument
@stream_argument
@json_option
def log(directory: Path, name: StreamName, as_json: bool) -> None:
    """The last change comes first."""
    states = history.history(directory, name)
    if as_json:
        print_json([json_output.entry(state) for state in states])
    else:
        text_output.log(states)


@command("diff fleet sensor-node/stable sensor-node/edge")
@directory_argument
@stream_argument
@click.argument("other", metavar="[PKG/OTHER]", type=STREAM, required=False)
@click.option("--from", "start", metavar="SEQUENCE", type=int, help="Sequence number before.")
@click.option("--to", "end", metavar="SEQUENCE", type=int, help="Sequence number after.")
@json_option
def diff(
    directory: Path,
    name: StreamName,
    other: StreamName | None,
    start: int | None,
    end: int | None,
    as_json: bool,
) -> None:
    """The last two states of the stream are compared, or those given, or it and PKG/OTHER."""
    found = compare(DirectoryStore(directory), name, other, start=start, end=end)
    answer(found, json_output.difference, text_output.difference, as_json=as_json)


@command("inspect build/zephyr/zephyr.signed.bin")
@click.argument("files", metavar="FILE…", type=FILE, nargs=-1, required=True)
@json_option
def inspect(files: Sequence[Path], as_json: bool) -> None:
    """`publish` records the same: version, content, size and SHA-256."""
    with progress("reading", total_size(files)) as advance:
        found = [(str(file), inspection.read(file, advance)) for file in files]
    if as_json:
        print_json([json_output.artefact(file, each) for file, each in found])
        return
    for number, (file, each) in enumerate(found):
        if number:
            click.echo()
        text_output.artefact(file, each)
