"""The command `netota-coap`: one function per command, no logic.

Answers go to standard output, all else to standard error. `--help` must be there at once, so the
modules of the commands import at their top what is light, and what does the work where it is done.
"""

from __future__ import annotations

import io
import logging
import sys
from typing import NoReturn

import click

from netota_coap import __version__
from netota_coap.cli import admin, blobs, inspect, mirror, publish, remote, serve
from netota_coap.cli.common import report


@click.group(context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100})
@click.version_option(__version__, prog_name="netota-coap")
def cli() -> None:
    """Meta-data service for IoT packages, CoAP first.

    A repository is a directory of plain files: packages have streams, a stream holds one version,
    and publishing swaps its archives. `serve` tells devices, in milliseconds.
    """


for _module in (inspect, publish, blobs, serve, mirror, remote, admin):
    for _command in _module.COMMANDS:
        cli.add_command(_command)


def main() -> NoReturn:
    """Run the command line."""
    for stream in (sys.stdout, sys.stderr):
        # What the terminal cannot show must not stop the rest from being shown.
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")
    # Our own errors say what libraries say of hostile answers.
    for name in ("netota_coap.aiocoap", "asyncio"):
        logging.getLogger(name).setLevel(logging.CRITICAL + 1)
    try:
        code = cli.main(prog_name="netota-coap", standalone_mode=False)
    except click.ClickException as error:
        error.show()
        sys.exit(2)
    except (click.Abort, KeyboardInterrupt):
        sys.exit(130)
    except BrokenPipeError:
        sys.exit(1)
    except Exception as error:  # noqa: BLE001 - a user gets a line, whatever happens
        sys.exit(report(error))
    sys.exit(code if isinstance(code, int) else 0)
