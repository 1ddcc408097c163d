"""Commands that change a repository."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import attrs
import click

from netota_coap import files
from netota_coap.cli import json_output, text_output
from netota_coap.cli.common import (
    FILE,
    STREAM,
    command,
    directory_argument,
    json_option,
    print_json,
    progress,
    say,
    stream_argument,
    total_size,
)
from netota_coap.errors import ConfigError
from netota_coap.model.values import StreamName
from netota_coap.publishing import publish as publishing
from netota_coap.publishing import release_file as release
from netota_coap.publishing.archives import ArchiveSource, parse_offer
from netota_coap.publishing.diff import Difference, held_after
from netota_coap.publishing.publish import Edit
from netota_coap.repository import git, scaffold
from netota_coap.repository.store import Change, DirectoryStore


@command("init fleet --sample")
@directory_argument
@click.option("--sample", is_flag=True, help="Add an example package with two streams.")
@click.option("--title", help="Title of the repository, for people.")
@json_option
def init(directory: Path, sample: bool, title: str | None, as_json: bool) -> None:
    """DIR is created if it does not exist."""
    scaffold.init(directory, title)
    if sample:
        publishing.sample(DirectoryStore(directory), _now())
    if as_json:
        print_json(json_output.made(directory))
    else:
        click.echo(f"{directory}: repository created; serve it: netota-coap serve {directory}")


Function = Callable[..., Change]


def _changing(*, builds: bool) -> Callable[[Function], Callable[..., int]]:
    """Add the options that all changes have, and print what a change did, or would do.

    Args:
        builds: Whether the change could leave devices without a build; then a dry run's exit
            code tells if the change would be refused.
    """
    options = [
        click.option("-m", "--message", help="Reason for the change, shown by `log`."),
        click.option(
            "-n", "--dry-run", is_flag=True, help="Only print what would change for devices."
        ),
        json_option,
    ]
    if builds:
        text = "Allow an architecture or machine to lose its build."
        options.insert(1, click.option("--allow-missing", is_flag=True, help=text))

    def decorate(function: Function) -> Callable[..., int]:
        @functools.wraps(function)
        def run(
            directory: Path,
            message: str | None,
            dry_run: bool,
            as_json: bool,
            allow_missing: bool = False,
            **given: Any,
        ) -> int:
            edit = Edit(
                now=_now(),
                author=git.author(directory),
                message=message,
                allow_missing=allow_missing,
                dry_run=dry_run,
            )
            store = DirectoryStore(directory)
            change = function(store, edit=edit, **given)
            if not (as_json or dry_run):
                # It is printed first, because the change is done even if the rest fails.
                click.echo(text_output.summary(change))
            held = held_after(store, change)
            if given.get("store_files"):  # a dry run has not stored them
                held |= {archive.envelope.sha256 for archive in change.after.archives or ()}
            found = Difference.of(change, held=held)
            if as_json:
                print_json(json_output.difference(found, dry_run=dry_run))
            elif dry_run:
                text_output.difference(found)
            elif builds:
                for warning in found.warnings:
                    say(f"warning: {warning}")
            return 1 if dry_run and builds and found.lost and not allow_missing else 0

        for option in reversed(options):
            run = option(run)
        return run

    return decorate


def _now() -> datetime:
    return datetime.now(UTC).replace(microsecond=0)


@command(
    "publish fleet sensor-node/stable --archive build/zephyr/zephyr.signed.bin "
    "--offer 'https://cdn.example.com/{version}/{name}'"
)
@directory_argument
@stream_argument
@click.argument("version", required=False)
@click.option(
    "--archive",
    "archives",
    metavar="FILE[,KEY=VALUE]…",
    multiple=True,
    help="File to publish, and its name, media-type, type, arch, machine, debug, filesystem, "
    "compression, or any other attribute. What the file says about itself need not be given. "
    "Repeatable.",
)
@click.option(
    "--offer",
    "offers",
    metavar="URL[,METRIC]",
    multiple=True,
    help="URL where devices download the files; lowest metric preferred. {package}, {stream}, "
    "{version}, {name}, {file}, {stem}, {sha256} and the attributes of each file are filled in. "
    "Repeatable.",
)
@click.option(
    "--release",
    "release_file",
    metavar="FILE",
    type=FILE,
    help="Release file that describes all archives, instead of --archive and --offer.",
)
@click.option(
    "--store",
    "store_files",
    is_flag=True,
    help="Store the files in the repository, so that its servers offer them.",
)
@click.option(
    "--force",
    is_flag=True,
    help="Allow values that contradict the files, and publish the same version again.",
)
@_changing(builds=True)
def publish(
    store: DirectoryStore,
    name: StreamName,
    version: str | None,
    archives: Sequence[str],
    offers: Sequence[str],
    release_file: Path | None,
    store_files: bool,
    force: bool,
    edit: Edit,
) -> Change:
    """All archives of the stream are replaced in one step.

    VERSION can be left out if the files contain it, as MCUboot images and RAUC bundles do.
    """
    if bool(archives) == bool(release_file):
        raise click.UsageError("give --archive, at least once, or --release")
    if release_file:
        if offers:
            detail = "--offer cannot be used with --release: the release file has the offers"
            raise click.UsageError(detail)
        described = release.read(release_file)
        version = release.version_of(described, version, force=force)
        edit = attrs.evolve(edit, message=edit.message or described.message)
        sources = release.sources(described, release_file)
        templates = list(described.offers)
    else:
        sources = [ArchiveSource.parse(text) for text in archives]
        templates = [parse_offer(text) for text in offers]
    total = total_size(source.path for source in sources)
    with progress("reading", total * (2 if store_files else 1)) as advance:
        return publishing.publish(
            store,
            name,
            version,
            sources,
            templates,
            edit=edit,
            store_files=store_files,
            force=force,
            progress=advance,
        )


@command("release build-nrf52840dk build-nrf9160dk -o release.toml", "release")
@click.argument("builds", metavar="BUILD_DIR…", type=FILE, nargs=-1, required=True)
@click.option("-o", "--output", type=FILE, help="Write to this file, which must not exist.")
def release_command(builds: Sequence[Path], output: Path | None) -> None:
    """The release file lists the files of each BUILD_DIR, with what they say about themselves.

    Edit it, then publish it: netota-coap publish DIR PKG/STREAM --release FILE
    """
    if output and output.exists():
        raise ConfigError(f"{output}: exists", hint="Remove it, or write to another file.")
    with progress("reading", total_size(release.found(builds))) as advance:
        drafted = release.draft(builds, output or Path("release.toml"), advance)
    if output:
        with files.writing(output.parent):
            files.write(output, drafted.encode())
    else:
        click.echo(drafted, nl=False)


@command("promote fleet sensor-node/beta sensor-node/stable --dry-run")
@directory_argument
@click.argument("source", metavar="PKG/FROM", type=STREAM)
@click.argument("target", metavar="PKG/TO", type=STREAM)
@_changing(builds=True)
def promote(store: DirectoryStore, source: StreamName, target: StreamName, edit: Edit) -> Change:
    """PKG/TO gets the version and archives of PKG/FROM, which stays as it is."""
    return publishing.promote(store, source, target, edit=edit)


@command("rollback fleet sensor-node/stable -m 'reboots every hour'")
@directory_argument
@stream_argument
@click.option(
    "--to",
    metavar="SEQUENCE",
    type=int,
    help="Sequence number to go back to. [default: that of the last other state]",
)
@_changing(builds=True)
def rollback(store: DirectoryStore, name: StreamName, to: int | None, edit: Edit) -> Change:
    """The version gets a new sequence number, so that devices accept it."""
    return publishing.rollback(store, name, to, edit=edit)


@command("close fleet sensor-node/v1 --replacement sensor-node/stable")
@directory_argument
@stream_argument
@click.option("--replacement", metavar="PKG/STREAM", type=STREAM, help="Stream to follow instead.")
@_changing(builds=False)
def close(
    store: DirectoryStore, name: StreamName, replacement: StreamName | None, edit: Edit
) -> Change:
    """Devices are told, and can still get the present version. `reopen` undoes this."""
    return publishing.close(store, name, replacement, edit=edit)


@command("reopen fleet sensor-node/v1")
@directory_argument
@stream_argument
@_changing(builds=False)
def reopen(store: DirectoryStore, name: StreamName, edit: Edit) -> Change:
    """Devices are told that new versions may follow again."""
    return publishing.reopen(store, name, edit=edit)


@command("remove fleet sensor-node/edge -m 'never used'")
@directory_argument
@stream_argument
@_changing(builds=False)
def remove(store: DirectoryStore, name: StreamName, edit: Edit) -> Change:
    """Devices are told that the stream is gone. Its history and sequence number are kept."""
    return publishing.remove(store, name, edit=edit)
