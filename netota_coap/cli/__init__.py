"""The command `netota-coap`: one function per command, no logic.

Answers go to standard output, everything else to standard error. What a command needs is imported
by its module, and `LazyGroup` imports that module only when the command is used: so `--help` and
completion are quick, and a command does not wait for the imports of others.
"""

from __future__ import annotations

import io
import logging
import sys
from typing import NoReturn

import click

from netota_coap import __version__
from netota_coap.cli.lazy import LazyGroup, Table

COMMANDS: Table = {
    "Repository": {
        "init": ("publish:init", "Create a repository."),
        "check": ("inspect:check", "Find what is wrong with a repository."),
        "blob": ("blobs:blob", "Manage the files that a repository stores itself."),
    },
    "Publish": {
        "release": ("publish:release_command", "Draft a release file from builds."),
        "publish": ("publish:publish", "Publish a new version to a stream."),
        "promote": ("publish:promote", "Publish the version of another stream."),
        "rollback": ("publish:rollback", "Publish an earlier version again."),
        "close": ("publish:close", "Close a stream: no new version will follow."),
        "reopen": ("publish:reopen", "Open a closed stream again."),
        "remove": ("publish:remove", "Remove a stream."),
    },
    "Look": {
        "list": ("inspect:list_", "List the streams of a repository or server."),
        "show": ("inspect:show", "Show the version and files of a stream."),
        "log": ("inspect:log", "Show who changed a stream, when and why."),
        "diff": ("inspect:diff", "Show what a change means for devices."),
        "inspect": ("inspect:inspect", "Show what a file says about itself."),
    },
    "Serve": {
        "serve": ("serve:serve", "Serve a repository to devices."),
        "mirror": ("mirror:mirror", "Copy the streams of another server."),
        "dev": ("dev:dev", "Serve each new build while you develop."),
        "status": ("remote:status", "Show how a server is doing."),
        "config": ("admin:config", "Check, show and write the configuration."),
        "systemd": ("admin:systemd", "Run the server as a systemd service."),
    },
    "Device side": {
        "discover": ("remote:discover", "Find servers on the local network."),
        "get": ("remote:get", "Print a resource of a server as JSON."),
        "watch": ("remote:watch", "Follow a stream of a server as a device does."),
        "download": ("download:download", "Download the file that suits a device."),
    },
    "Help": {
        "spec": ("help:spec", "Print a document of the specification."),
        "completion": ("help:completion", "Print a script for shell completion."),
    },
}


@click.group(
    cls=LazyGroup,
    package=__name__,
    table=COMMANDS,
    context_settings={
        "help_option_names": ["-h", "--help"],
        "max_content_width": 100,
        "show_default": True,
    },
    epilog="Try it: netota-coap init fleet --sample && netota-coap serve fleet",
)
@click.version_option(__version__, prog_name="netota-coap")
def cli() -> None:
    """Publish files for IoT devices: tell each which version to run and where to download it."""


def main() -> NoReturn:
    """Run the command line."""
    for stream in (sys.stdout, sys.stderr):
        # A character that the terminal cannot show must not end the command.
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")
    # Our own errors report malformed answers; these libraries would log them a second time.
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
    except Exception as error:  # noqa: BLE001 - a user never sees a traceback
        # `--help` does without the modules that this one imports.
        from netota_coap.cli.common import report

        sys.exit(report(error))
    sys.exit(code if isinstance(code, int) else 0)
