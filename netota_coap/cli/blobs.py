"""Commands for the files that a repository holds itself."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import click

from netota_coap.cli.common import (
    FILE,
    command,
    directory_argument,
    json_option,
    print_json,
    progress,
    total_size,
)


@click.group()
def blob() -> None:
    """List, add, verify and remove the files that a repository holds itself."""


@command("blob list fleet", "list")
@directory_argument
@json_option
def list_(directory: Path, as_json: bool) -> None:
    """List the files that a repository holds, and those that were set aside."""
    from netota_coap.cli import json_output, text_output
    from netota_coap.repository.blobs import Blobs
    from netota_coap.repository.lock import require_repository

    require_repository(directory)
    found = Blobs(directory).all()
    if as_json:
        print_json(json_output.blobs(found))
    else:
        text_output.blobs(found)


@command("blob add fleet build/zephyr/zephyr.signed.bin", "add")
@directory_argument
@click.argument("files", metavar="FILE…", type=FILE, nargs=-1, required=True)
@click.option(
    "--link",
    is_flag=True,
    help="Let a blob be the file itself (hard link), where the file system can. The file becomes "
    "read-only; whoever changes it all the same damages the blob.",
)
@json_option
def add(directory: Path, files: Sequence[Path], link: bool, as_json: bool) -> None:
    """Put files into a repository, for archives that were published without them."""
    from netota_coap.cli import json_output, text_output
    from netota_coap.repository.blobs import Blobs

    with progress("reading", 2 * total_size(files)) as advance:
        added = [Blobs(directory).add(file, link=link, progress=advance) for file in files]
    if as_json:
        print_json(json_output.blobs(added))
    else:
        text_output.blobs(added)


@command("blob verify fleet", "verify")
@directory_argument
@json_option
def verify(directory: Path, as_json: bool) -> int:
    """Read all blobs, and set aside those that are damaged: they are served no longer.

    Exit code 1: some are.
    """
    from netota_coap.cli import json_output, text_output
    from netota_coap.repository.blobs import Blobs

    total = sum(each.size for each in Blobs(directory).all())
    with progress("reading", total) as advance:
        damaged = Blobs(directory).verify(advance)
    if as_json:
        print_json(json_output.blobs(damaged))
    else:
        text_output.blobs(damaged)
    return 1 if damaged else 0


@command("blob gc fleet --keep 3 --dry-run", "gc")
@directory_argument
@click.option(
    "--keep",
    metavar="N",
    type=click.IntRange(min=0),
    default=1,
    show_default=True,
    help="How many states before the present one keep their blobs, in each stream.",
)
@click.option(
    "--grace-s",
    type=click.IntRange(min=0),
    default=3600,
    show_default=True,
    help="Keep what was put there since, for it may be published yet; seconds.",
)
@click.option("-n", "--dry-run", is_flag=True, help="Only say what would be removed.")
@json_option
def gc(directory: Path, keep: int, grace_s: int, dry_run: bool, as_json: bool) -> None:
    """Remove the blobs that no stream needs any more, and those that were set aside."""
    from netota_coap.cli import json_output, text_output
    from netota_coap.repository.blobs import Blobs

    removed = Blobs(directory).gc(keep, grace_s=grace_s, dry_run=dry_run)
    if as_json:
        print_json(json_output.blobs(removed))
    else:
        text_output.blobs(removed)


for _command in (list_, add, verify, gc):
    blob.add_command(_command)

COMMANDS = (blob,)
