"""Commands that look at a repository, a file or a document."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import click
from click.shell_completion import get_completion_class

from netota_coap.cli.common import (
    FILE,
    STREAM,
    command,
    directory_argument,
    json_option,
    print_json,
    progress,
    store_of,
    stream_argument,
    total_size,
)

if TYPE_CHECKING:
    from collections.abc import Sequence

    from netota_coap.client.download import Report
    from netota_coap.model.values import Envelope, Repository, Stream, StreamName


@command("check fleet --online --server coap://gateway.local")
@directory_argument
@click.option("--online", is_flag=True, help="Ask each offer whether it is there, of that size.")
@click.option("--digest", is_flag=True, help="Download from each offer, and compare.")
@click.option("--server", metavar="URI", help="That relative offers are meant for.")
@json_option
def check(directory: Path, online: bool, digest: bool, server: str | None, as_json: bool) -> int:
    """Check a repository, its history, and what devices would get of it.

    Exit code 1: it has errors, and would not be served; or an offer is bad.
    """
    from netota_coap.cli import json_output, text_output
    from netota_coap.repository import check as checks

    findings = checks.check(directory)
    reports = []
    if findings.repository and (online or digest):
        reports = _ask_offers(findings.repository, server, digest=digest)
    if as_json:
        print_json(json_output.findings(findings) | {"offers": json_output.offers(reports)})
    else:
        text_output.findings(findings)
        text_output.offers(reports)
    return 1 if findings.errors or any(report.problem for _, report in reports) else 0


def _ask_offers(
    repository: Repository, server: str | None, *, digest: bool
) -> list[tuple[str, Report]]:
    """Ask each offer; return which archive it is of, and what came of it."""
    import asyncio

    from netota_coap.client.download import Report, check_offers, resolve
    from netota_coap.errors import ConfigError

    offers = [
        (f"{package_name}/{name}: {archive.name}", offer.url, archive.envelope)
        for package_name, package in sorted(repository.packages.items())
        for name, stream in sorted(package.streams.items())
        for archive in stream.archives or ()
        for offer in archive.offers
    ]
    found: dict[tuple[str, Envelope], Report] = {}
    wanted: dict[tuple[str, Envelope], tuple[str, Envelope]] = {}
    for _, url, envelope in offers:
        try:
            wanted[url, envelope] = (resolve(url, server), envelope)
        except ConfigError as error:
            found[url, envelope] = Report(url, envelope, problem=f"relative: {error.hint}")
    total = sum(envelope.size for _, envelope in wanted) if digest else len(wanted)
    with progress("asking", total, unit="bytes" if digest else "offers") as advance:
        reports = asyncio.run(
            check_offers(
                wanted.values(),
                digest=digest,
                on_report=lambda _: None if digest else advance(1),
                progress=advance if digest else lambda _: None,
            )
        )
    by_url = {(report.url, report.envelope): report for report in reports}
    found |= {offer: by_url[asked] for offer, asked in wanted.items()}
    return [(place, found[url, envelope]) for place, url, envelope in offers]


@command("list fleet", name="list")
@click.argument("source", metavar="DIR|URI")
@json_option
def list_(source: str, as_json: bool) -> None:
    """List the streams of a repository, or of a server (`coap://HOST`)."""
    from netota_coap.cli import json_output, text_output
    from netota_coap.repository import loading

    if "://" in source:
        import asyncio

        rows = asyncio.run(_remote_rows(source))
    else:
        loaded = loading.Loader(Path(source)).load()
        rows = [
            json_output.row(package_name, package.title or "", name, stream)
            for package_name, package in sorted(loaded.packages.items())
            for name, stream in sorted(package.streams.items())
        ]
    if as_json:
        print_json(rows)
    else:
        text_output.rows(rows)


async def _remote_rows(uri: str) -> list[dict[str, Any]]:
    from netota_coap.cli import json_output
    from netota_coap.client.coap_client import Client

    async with Client() as client:
        return [
            json_output.row(package, entry.title, name, stream)
            for package, entry in (await client.packages(uri)).items()
            for name, stream in (await client.streams(uri, package)).items()
        ]


@command("show fleet sensor-node/stable --at 1")
@click.argument("source", metavar="DIR|URI")
@click.argument("name", metavar="[PKG/STREAM]", type=STREAM, required=False)
@click.option("--at", metavar="SEQUENCE", type=int, help="Of an old state. [default: the present]")
@json_option
def show(source: str, name: StreamName | None, at: int | None, as_json: bool) -> None:
    """Show a stream: of a repository, or of a server (`coap://HOST`, or the whole URI)."""
    from netota_coap.cli import json_output, text_output
    from netota_coap.publishing import publish
    from netota_coap.repository import history

    if "://" in source:
        if at is not None:
            raise click.UsageError("a server has no history: --at goes with a repository")
        import asyncio

        uri = f"{source.rstrip('/')}/p/{name[0]}/s/{name[1]}" if name else source
        stream = asyncio.run(_remote_stream(uri))
    elif name is None:
        raise click.UsageError("a repository has many streams: name one as PKG/STREAM")
    elif at is not None:
        stream = history.state_at(Path(source), name, at)
    else:
        stream = publish.existing(store_of(Path(source)), name)
    if as_json:
        print_json(json_output.stream(stream))
    else:
        text_output.stream(stream)


async def _remote_stream(uri: str) -> Stream:
    from netota_coap.client.coap_client import Client

    async with Client() as client:
        return await client.stream(uri)


@command("log fleet sensor-node/stable")
@directory_argument
@stream_argument
@json_option
def log(directory: Path, name: StreamName, as_json: bool) -> None:
    """Tell who changed a stream, when, to which version, and why; the last change first."""
    from netota_coap.cli import json_output, text_output
    from netota_coap.repository import history

    states = history.history(directory, name)
    if as_json:
        print_json([json_output.entry(state) for state in states])
    else:
        text_output.log(states)


@command("diff fleet sensor-node/stable sensor-node/edge")
@directory_argument
@stream_argument
@click.argument("other", metavar="[PKG/OTHER]", type=STREAM, required=False)
@click.option("--from", "start", metavar="SEQUENCE", type=int, help="Of the state before.")
@click.option("--to", "end", metavar="SEQUENCE", type=int, help="Of the state after.")
@json_option
def diff(
    directory: Path,
    name: StreamName,
    other: StreamName | None,
    start: int | None,
    end: int | None,
    as_json: bool,
) -> None:
    """Tell what changed for whom: by the last change of a stream, or from it to another one."""
    from netota_coap.cli import json_output, text_output
    from netota_coap.publishing.diff import compare

    found = compare(store_of(directory), name, other, start=start, end=end)
    if as_json:
        print_json(json_output.difference(found, dry_run=True))
    else:
        text_output.difference(found)


@command("inspect build/zephyr/zephyr.signed.bin")
@click.argument("files", metavar="FILE…", type=FILE, nargs=-1, required=True)
@json_option
def inspect(files: Sequence[Path], as_json: bool) -> None:
    """Tell what files are, as a publish would read them."""
    from netota_coap.cli import json_output, text_output
    from netota_coap.publishing import inspection

    with progress("reading", total_size(files)) as advance:
        found = [(str(file), inspection.read(file, advance)) for file in files]
    if as_json:
        print_json([json_output.artefact(file, each) for file, each in found])
        return
    for number, (file, each) in enumerate(found):
        if number:
            click.echo()
        text_output.artefact(file, each)


@command("spec wire")
@click.argument("name", required=False)
def spec(name: str | None) -> None:
    """Print a document of the specification; without NAME, the list of them."""
    import importlib.resources

    documents = {
        path.relative_to(root).as_posix(): path
        for root in [Path(str(importlib.resources.files("netota_coap") / "spec"))]
        for path in sorted(root.rglob("*"))
        if path.suffix in (".md", ".cddl")
    }
    if name is None:
        for document in documents:
            click.echo(document)
        return
    found = documents.get(name) or documents.get(f"{name}.md") or documents.get(f"{name}.cddl")
    if found is None:
        raise click.UsageError(f"there is no document {name!r}: {', '.join(documents)}")
    click.echo(found.read_text(encoding="utf-8").rstrip("\n"))


@command("completion bash > ~/.local/share/bash-completion/completions/netota-coap")
@click.argument("shell", type=click.Choice(["bash", "zsh", "fish"]))
@click.pass_context
def completion(context: click.Context, shell: str) -> None:
    """Print what makes a shell complete commands, options and streams."""
    made = get_completion_class(shell)
    assert made is not None
    root = context.find_root().command
    click.echo(made(root, {}, "netota-coap", "_NETOTA_COAP_COMPLETE").source())


COMMANDS = (check, list_, show, log, diff, inspect, spec, completion)
