"""What the commands have in common: parameters, tables, progress, errors."""

from __future__ import annotations

import contextlib
import functools
import json
import sys
import traceback
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click
from click.shell_completion import CompletionItem

if TYPE_CHECKING:
    from rich.console import Console
    from rich.table import Table

    from netota_coap.model.values import StreamName
    from netota_coap.repository.store import Store

_LARGE = 16 * 2**20  # bytes, over which a progress bar is worth it

Command = click.Command


def command(example: str, name: str | None = None) -> Callable[[Callable[..., Any]], Command]:
    """Declare a command; the example stands at the end of its help."""
    return click.command(name, epilog=f"Example: netota-coap {example}")


def store_of(directory: Path) -> Store:
    """Return the store behind a command's directory."""
    from netota_coap.repository.store import DirectoryStore

    return DirectoryStore(directory)


# ----------------------------------------------------------------------------------------------
# Parameters


class _StreamType(click.ParamType["StreamName"]):
    name = "PKG/STREAM"

    def convert(self, value: Any, _param: object, _context: object) -> StreamName:
        from netota_coap.errors import InvalidDataError
        from netota_coap.model.values import stream_name

        try:
            return value if isinstance(value, tuple) else stream_name(value)
        except InvalidDataError as error:
            self.fail(error.detail)

    def shell_complete(
        self, context: click.Context, _param: object, incomplete: str
    ) -> list[CompletionItem]:
        root = Path(context.params.get("directory") or context.params.get("source") or ".")
        files = sorted(root.glob("packages/*/streams/*.toml"))
        names = (f"{file.parent.parent.name}/{file.stem}" for file in files)
        return [CompletionItem(name) for name in names if name.startswith(incomplete)]


STREAM = _StreamType()
FILE = click.Path(path_type=Path, readable=False)

directory_argument = click.argument("directory", metavar="DIR", type=FILE)
stream_argument = click.argument("name", metavar="PKG/STREAM", type=STREAM)
json_option = click.option("--json", "as_json", is_flag=True, help="Print JSON, for scripts.")


_ATTRIBUTES = ("type", "arch", "machine", "debug", "filesystem", "compression", "scheme")


def selecting(function: Callable[..., Any]) -> Callable[..., Any]:
    """Give a command the options by which a device says what it is, and the `selection`."""

    @functools.wraps(function)
    def run(query: Sequence[str], **given: Any) -> Any:
        from netota_coap.encoding.documents import selection_from_query

        said = [f"{name}={value}" for name in _ATTRIBUTES for value in given.pop(name)]
        return function(selection=selection_from_query([*said, *query]), **given)

    wrapped: Callable[..., Any] = click.option(
        "--query", metavar="KEY=VALUE", multiple=True, help="Any other attribute. Again for each."
    )(run)
    for name in reversed(_ATTRIBUTES):
        text = "Of offers." if name == "scheme" else "Of the device; the first is preferred."
        option = click.option(f"--{name}", metavar="VALUE", multiple=True, help=text)
        wrapped = option(wrapped)
    return wrapped


# ----------------------------------------------------------------------------------------------
# Output


def say(line: str) -> None:
    """Print a line to standard error; much of it comes from others, as names do."""
    from netota_coap.errors import printable

    click.echo(printable(line), err=True)


def print_json(plain: object) -> None:
    """Print plain data as JSON: in ASCII, which no terminal and no locale can spoil."""
    click.echo(json.dumps(plain, indent=2))


def text(value: object) -> str:
    """Keep what a publisher wrote from being read as markup, or by the terminal."""
    from rich.markup import escape

    from netota_coap.errors import printable

    return escape("\n".join(map(printable, str(value).split("\n"))))


def console() -> Console:
    """Return the console of tables; a row stays one line where it is no terminal."""
    from rich.console import Console

    on_terminal = sys.stdout is not None and sys.stdout.isatty()
    return Console(highlight=False, soft_wrap=not on_terminal, width=None if on_terminal else 999)


def table(*columns: str) -> Table:
    """Return an empty table."""
    from rich.table import Table

    made = Table(box=None, pad_edge=False, header_style="bold")
    for column in columns:
        made.add_column(column, overflow="fold")
    return made


def total_size(paths: Iterable[Path]) -> int:
    """Return how many bytes files have, as far as they are there."""
    return sum(path.stat().st_size for path in paths if path.is_file())


@contextlib.contextmanager
def progress(what: str, total: int, unit: str = "bytes") -> Iterator[Callable[[int], object]]:
    """Show how far it is, how fast and how long still, where there is a terminal for it.

    Args:
        what: Is done, one word.
        total: In the unit; few bytes are not worth it.
        unit: `bytes`, or the word for what is counted.

    Yields:
        A function to be called with each number of units that are done.
    """
    if (unit == "bytes" and total < _LARGE) or not sys.stderr.isatty():
        yield lambda _: None
        return
    from rich import progress as rich
    from rich.console import Console

    counted = (
        (rich.DownloadColumn(), rich.TransferSpeedColumn())
        if unit == "bytes"
        else (rich.MofNCompleteColumn(), rich.TextColumn(unit))
    )
    columns = (
        rich.TextColumn("{task.description}"),
        rich.BarColumn(),
        *counted,
        rich.TimeRemainingColumn(),
    )
    with rich.Progress(*columns, console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task(what, total=total)
        yield lambda count: bar.advance(task, count)


# ----------------------------------------------------------------------------------------------
# Errors

BUG = 70


def exit_codes() -> dict[type[BaseException], int]:
    """Return the exit codes of errors, looked up along the class hierarchy.

    Besides them: 1, problems were found; 2, usage; 70, a bug.
    """
    from netota_coap import errors

    return {
        errors.ConfigError: 2,
        errors.InvalidDataError: 3,
        errors.NotFoundError: 3,
        errors.RepositoryError: 3,
        errors.AddressError: 4,
        errors.TransferError: 4,
        errors.NetotaError: 3,
        UnicodeError: 2,
        OSError: 3,
    }


def report(error: Exception) -> int:
    """Print what went wrong, and what to do about it; return the exit code."""
    from netota_coap.errors import InvalidDataError, NetotaError

    codes = exit_codes()
    code = next((codes[cls] for cls in type(error).__mro__ if cls in codes), BUG)
    lines = [str(error)]
    hint = ""
    if isinstance(error, NetotaError):
        hint = error.hint
        lines = [error.detail]
        if isinstance(error, InvalidDataError):
            lines = [str(issue) for issue in error.issues]
    elif isinstance(error, UnicodeError):
        lines = [f"text that cannot be encoded: {error}"]
    elif isinstance(error, OSError):
        lines = [": ".join(str(part) for part in (error.filename, error.strerror) if part)]
    else:
        frame = traceback.extract_tb(error.__traceback__)[-1]
        place = f"{Path(frame.filename).name}:{frame.lineno}"
        say(f"bug: {type(error).__name__} at {place}: {error}")
        say("hint: please report it, with the command and this line")
        return code
    for line in lines:
        say(f"error: {line}")
    if hint:
        say(f"hint: {hint}")
    return code
