"""Commands for the files that a repository stores itself."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import click

from netota_coap.cli import json_output, text_output
from netota_coap.cli.common import (
    FILE,
    answer,
    command,
    directory_argument,
    json_option,
    progress,
    total_size,
)
from netota_coap.repository.blobs import Blob, Blobs
from netota_coap.repository.lock import require_repository


@click.group()
def blob() -> None:
    """Servers of the repository offer them under /b/, named by their SHA-256."""


def _print(found: Sequence[Blob], *, as_json: bool) -> None:
    answer(found, json_output.blobs, text_output.blobs, as_json=as_json)


@command("blob list fleet", "list", blob)
@directory_argument
@json_option
def list_(directory: Path, as_json: bool) -> None:
    """List the stored files; damaged ones have been set aside by `verify`."""
    require_repository(directory)
    _print(Blobs(directory).all(), as_json=as_json)


@command("blob add fleet build/zephyr/zephyr.signed.bin", group=blob)
@directory_argument
@click.argument("files", metavar="FILE…", type=FILE, nargs=-1, required=True)
@click.option(
    "--link",
    is_flag=True,
    help="Make a hard link instead of a copy, if the file system can. The file becomes read-only; "
    "changing it later damages the stored one.",
)
@json_option
def add(directory: Path, files: Sequence[Path], link: bool, as_json: bool) -> None:
    """Store files in a repository, for archives published without --store."""
    with progress("reading", 2 * total_size(files)) as advance:
        added = [Blobs(directory).add(file, link=link, progress=advance) for file in files]
    _print(added, as_json=as_json)


@command("blob verify fleet", group=blob)
@directory_argument
@json_option
def verify(directory: Path, as_json: bool) -> int:
    """Read all stored files, and set damaged ones aside, so that they are not served.

    Exit code 1: some are damaged.
    """
    total = sum(each.size for each in Blobs(directory).all())
    with progress("reading", total) as advance:
        damaged = Blobs(directory).verify(advance)
    _print(damaged, as_json=as_json)
    return 1 if damaged else 0


@command("blob gc fleet --keep 3 --dry-run", group=blob)
@directory_argument
@click.option(
    "--keep",
    metavar="N",
    type=click.IntRange(min=0),
    default=1,
    help="Number of earlier states of each stream whose files are kept.",
)
@click.option(
    "--grace-s",
    type=click.IntRange(min=0),
    default=3600,
    help="Keep files stored in the last so many seconds: they may be about to be published.",
)
@click.option("-n", "--dry-run", is_flag=True, help="Only print what would be removed.")
@json_option
def gc(directory: Path, keep: int, grace_s: int, dry_run: bool, as_json: bool) -> None:
    """Remove stored files that no stream needs, and those that `verify` has set aside."""
    removed = Blobs(directory).gc(keep, grace_s=grace_s, dry_run=dry_run)
    _print(removed, as_json=as_json)
