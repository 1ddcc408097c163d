"""Commands that change a repository."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from netota_coap.cli.common import (
    FILE,
    STREAM,
    command,
    directory_argument,
    json_option,
    print_json,
    progress,
    say,
    store_of,
    stream_argument,
    total_size,
)

if TYPE_CHECKING:
    from netota_coap.model.values import StreamName
    from netota_coap.publishing.publish import Edit
    from netota_coap.repository.store import Change


@command("init fleet --sample")
@directory_argument
@click.option("--sample", is_flag=True, help="Put a package with two streams into it.")
@click.option("--title", help="Of the repository, for people.")
@json_option
def init(directory: Path, sample: bool, title: str | None, as_json: bool) -> None:
    """Make a repository."""
    from netota_coap.cli import json_output
    from netota_coap.publishing import publish as publishing
    from netota_coap.repository import scaffold

    scaffold.init(directory, title)
    if sample:
        publishing.sample(store_of(directory), _now())
    if as_json:
        print_json(json_output.made(directory))
    else:
        click.echo(f"{directory}: a repository, to be served by: netota-coap serve {directory}")


# ----------------------------------------------------------------------------------------------
# Changes of a stream

Function = Callable[..., "Change"]


def _changing(*, builds: bool) -> Callable[[Function], Callable[..., int]]:
    """Give a command the options of all changes, and print what it did.

    Args:
        builds: Whether it can take a build from devices.
    """
    options = [
        click.option("-m", "--message", help="Why, for the log."),
        click.option("-n", "--dry-run", is_flag=True, help="Only say what would change for whom."),
        json_option,
    ]
    if builds:
        text = "Let an architecture or machine lose its build."
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
            from netota_coap.publishing.publish import Edit
            from netota_coap.repository import git

            edit = Edit(
                now=_now(),
                author=git.author(directory),
                message=message,
                allow_missing=allow_missing,
                dry_run=dry_run,
            )
            change = function(directory, edit=edit, **given)
            stored = bool(given.get("store"))
            return _tell(directory, change, edit, as_json=as_json, builds=builds, stored=stored)

        for option in reversed(options):
            run = option(run)
        return run

    return decorate


def _tell(
    directory: Path, change: Change, edit: Edit, *, as_json: bool, builds: bool, stored: bool
) -> int:
    """Print what a change did or would do; 1: it would be refused."""
    from netota_coap.cli import json_output, text_output
    from netota_coap.publishing.diff import Difference, held_after

    if not (as_json or edit.dry_run):
        click.echo(text_output.summary(change))  # what is done is done, whatever comes after it
    if stored:
        held = frozenset(archive.envelope.sha256 for archive in change.after.archives or ())
    else:
        held = held_after(store_of(directory), change)
    found = Difference.of(change, held=held)
    if as_json:
        print_json(json_output.difference(found, dry_run=edit.dry_run))
    elif edit.dry_run:
        text_output.difference(found)
    else:
        for warning in found.warnings if builds else ():
            say(f"warning: {warning}")
    refused = edit.dry_run and builds and found.lost and not edit.allow_missing
    return 1 if refused else 0


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
    help="A file, and what is to be said about it: name, media-type, type, arch, machine, debug, "
    "filesystem, compression, or any attribute. What it tells itself need not be said. Again for "
    "each archive.",
)
@click.option(
    "--offer",
    "offers",
    metavar="URL[,METRIC]",
    multiple=True,
    help="Where devices download it; lowest metric preferred. {package}, {stream}, {version}, "
    "{name}, {file}, {stem}, {sha256} and the attributes are filled in. Again for each place.",
)
@click.option(
    "--release",
    "release_file",
    metavar="FILE",
    type=FILE,
    help="A file that describes all archives, instead of --archive and --offer.",
)
@click.option(
    "--store",
    is_flag=True,
    help="Put the files into the repository: servers of it offer them by themselves.",
)
@click.option(
    "--force",
    is_flag=True,
    help="Let what is said contradict what the files state; publish the same again.",
)
@_changing(builds=True)
def publish(
    directory: Path,
    name: StreamName,
    version: str | None,
    archives: Sequence[str],
    offers: Sequence[str],
    release_file: Path | None,
    store: bool,
    force: bool,
    edit: Edit,
) -> Change:
    """Replace the archives, and so the version, of a stream in one step.

    VERSION can be left out where the files tell it, as MCUboot images and RAUC bundles do.
    """
    import attrs

    from netota_coap.publishing import publish as publishing
    from netota_coap.publishing import release_file as release
    from netota_coap.publishing.archives import ArchiveSource, parse_offer

    if bool(archives) == bool(release_file):
        raise click.UsageError("give either --archive, once or more, or --release")
    if release_file:
        if offers:
            raise click.UsageError("the offers stand in the release file: no --offer with it")
        described = release.read(release_file)
        version = release.version_of(described, version, force=force)
        edit = attrs.evolve(edit, message=edit.message or described.message)
        sources = release.sources(described, release_file)
        templates = list(described.offers)
    else:
        sources = [ArchiveSource.parse(text) for text in archives]
        templates = [parse_offer(text) for text in offers]
    total = total_size(source.path for source in sources)
    with progress("reading", total * (2 if store else 1)) as advance:
        return publishing.publish(
            store_of(directory),
            name,
            version,
            sources,
            templates,
            edit=edit,
            store_files=store,
            force=force,
            progress=advance,
        )


@command("release build-nrf52840dk build-nrf9160dk -o release.toml", name="release")
@click.argument("builds", metavar="BUILD_DIR…", type=FILE, nargs=-1, required=True)
@click.option("-o", "--output", type=FILE, help="Write it there, unless it exists.")
def release_(builds: Sequence[Path], output: Path | None) -> None:
    """Draft the release file for what builds have made: each file with what it tells."""
    from netota_coap import files
    from netota_coap.errors import ConfigError
    from netota_coap.publishing import release_file as release

    if output and output.exists():
        raise ConfigError(f"{output} exists", hint="Remove it first, or write to another file.")
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
def promote(directory: Path, source: StreamName, target: StreamName, edit: Edit) -> Change:
    """Publish to a stream what another one holds."""
    from netota_coap.publishing import publish as publishing

    return publishing.promote(store_of(directory), source, target, edit=edit)


@command("rollback fleet sensor-node/stable -m 'reboots every hour'")
@directory_argument
@stream_argument
@click.option(
    "--to",
    metavar="SEQUENCE",
    type=int,
    help="Of the state that is wanted. [default: the last one that was another]",
)
@_changing(builds=True)
def rollback(directory: Path, name: StreamName, to: int | None, edit: Edit) -> Change:
    """Publish an old state of a stream again: with a new sequence, so that devices take it."""
    from netota_coap.publishing import publish as publishing

    return publishing.rollback(store_of(directory), name, to, edit=edit)


@command("close fleet sensor-node/v1 --replacement sensor-node/stable")
@directory_argument
@stream_argument
@click.option("--replacement", metavar="PKG/STREAM", type=STREAM, help="Where devices should go.")
@_changing(builds=False)
def close(directory: Path, name: StreamName, replacement: StreamName | None, edit: Edit) -> Change:
    """Close a stream: nothing new will come."""
    from netota_coap.publishing import publish as publishing

    return publishing.close(store_of(directory), name, replacement, edit=edit)


@command("reopen fleet sensor-node/v1")
@directory_argument
@stream_argument
@_changing(builds=False)
def reopen(directory: Path, name: StreamName, edit: Edit) -> Change:
    """Open a closed stream again."""
    from netota_coap.publishing import publish as publishing

    return publishing.reopen(store_of(directory), name, edit=edit)


@command("remove fleet sensor-node/edge -m 'never used'")
@directory_argument
@stream_argument
@_changing(builds=False)
def remove(directory: Path, name: StreamName, edit: Edit) -> Change:
    """Remove a stream: devices are told that it is gone. Its history and sequence stay."""
    from netota_coap.publishing import publish as publishing

    return publishing.remove(store_of(directory), name, edit=edit)


COMMANDS = (init, publish, release_, promote, rollback, close, reopen, remove)
