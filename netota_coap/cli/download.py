"""Commands that download files, or ask whether they can be downloaded."""

from __future__ import annotations

import asyncio
from pathlib import Path

import click

from netota_coap.cli import json_output
from netota_coap.cli.common import (
    FILE,
    STREAM,
    command,
    json_option,
    print_json,
    progress,
    say_waiting,
    selecting,
)
from netota_coap.cli.remote import get_stream
from netota_coap.client.downloads import Report, check_offers, resolve
from netota_coap.client.downloads import download as fetch
from netota_coap.encoding.documents import selection_to_query
from netota_coap.errors import ConfigError, NotFoundError
from netota_coap.model.selection import Selection
from netota_coap.model.values import Archive, Envelope, Repository, StreamName
from netota_coap.publishing import publish
from netota_coap.repository.store import DirectoryStore


@command("download coap://gateway.local sensor-node/stable --machine nrf9160dk -o app.bin")
@click.argument("source", metavar="DIR|URI")
@click.argument("name", metavar="PKG/STREAM", type=STREAM)
@click.option("-o", "--output", metavar="FILE", type=FILE, required=True)
@selecting
@click.option("--server", metavar="URI", help="Server that relative offers of DIR refer to.")
@click.option(
    "--in-flight",
    type=click.IntRange(1, 64),
    default=1,
    help="Blocks to request at the same time over CoAP; more are faster where the round-trip time "
    "is long.",
)
@json_option
def download(
    source: str,
    name: StreamName,
    output: Path,
    selection: Selection,
    server: str | None,
    in_flight: int,
    as_json: bool,
) -> None:
    """Give the directory of a repository, or the URI of a server, as coap://HOST.

    An interrupted download is resumed, and the file is verified. If the server says when it will
    have the file, the command waits: 10 minutes in all, or a day if each wait is a minute or less.
    """
    archive = _best(source, name, selection)
    with progress("downloading", archive.envelope.size) as advance:
        fetching = fetch(
            archive,
            output,
            server=source if "://" in source else server,
            progress=advance,
            in_flight=in_flight,
            on_trouble=say_waiting,
        )
        offer = asyncio.run(fetching)
    if as_json:
        print_json(json_output.downloaded(output, archive, offer))
    else:
        origin = f"from {offer.url}" if offer else "already complete"
        click.echo(f"{output}: {archive.name}, {archive.envelope.size} bytes, {origin}")


def _best(source: str, name: StreamName, selection: Selection) -> Archive:
    if "://" in source:
        archives = get_stream(source, name, selection).archives or ()
    else:
        archives = publish.existing(DirectoryStore(Path(source)), name).archives or ()
        archives = selection.narrow(archives, "coap")
    if not archives:
        device = " ".join(selection_to_query(selection))
        raise NotFoundError(
            f"no archive of {'/'.join(name)} suits {device or 'any device'}",
            hint=f"List its archives: netota-coap show {source} {'/'.join(name)}",
        )
    return archives[0]


def ask_offers(
    repository: Repository, server: str | None, *, digest: bool
) -> list[tuple[str, Report]]:
    """Ask the server of each offer; return the archive's name and a report for each."""
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
