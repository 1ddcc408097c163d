"""Parameters, output, progress and errors that several commands share."""

from __future__ import annotations

import contextlib
import functools
import json
import sys
import traceback
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, TypeVar

import click
from click.shell_completion import CompletionItem

from netota_coap import errors
from netota_coap.encoding.documents import selection_from_query
from netota_coap.errors import InvalidDataError, NetotaError, printable
from netota_coap.model.values import StreamName, stream_name

T = TypeVar("T")

_LARGE = 16 * 2**20  # bytes; fewer are read before a progress bar could be seen


def command(
    example: str, name: str | None = None, group: click.Group | None = None
) -> Callable[[Callable[..., Any]], click.Command]:
    """Declare a command, perhaps of a group, with an example at the end of its help."""
    declare = group.command if group else click.command
    return declare(name, epilog=f"Example: netota-coap {example}")


class _StreamType(click.ParamType[StreamName]):
    name = "PKG/STREAM"

    def convert(self, value: Any, _param: object, _context: object) -> StreamName:
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
_HELP = "Attribute of the device. Repeatable; the first is preferred."


def selecting(function: Callable[..., Any]) -> Callable[..., Any]:
    """Add the options that describe a device; the command gets them as `selection`."""

    @functools.wraps(function)
    def run(query: Sequence[str], **given: Any) -> Any:
        attributes = [f"{name}={value}" for name in _ATTRIBUTES for value in given.pop(name)]
        return function(selection=selection_from_query([*attributes, *query]), **given)

    help_texts = dict.fromkeys(_ATTRIBUTES, _HELP) | {
        "scheme": "URL scheme that the device supports. Repeatable.",
        "query": "Any other attribute of the device, as KEY=VALUE. Repeatable.",
    }
    wrapped: Callable[..., Any] = run
    for name, text in reversed(help_texts.items()):
        wrapped = click.option(f"--{name}", metavar="VALUE", multiple=True, help=text)(wrapped)
    return wrapped


def say(line: str) -> None:
    """Print a line to standard error, without control characters that others put into it."""
    click.echo(printable(line), err=True)


def say_waiting(error: NetotaError) -> None:
    """Print why a command waits before it tries again."""
    say(f"waiting: {error.detail}")


def print_json(plain: object) -> None:
    """Print plain data as JSON, in ASCII, so that no locale can spoil it."""
    click.echo(json.dumps(plain, indent=2))


def answer(
    found: T, shape: Callable[[T], object], show: Callable[[T], object], *, as_json: bool
) -> None:
    """Print an answer: its `shape` as JSON, or for people, which `show` does."""
    if as_json:
        print_json(shape(found))
    else:
        show(found)


def printable_lines(value: object) -> str:
    """Escape control characters, except for newlines."""
    return "\n".join(map(printable, str(value).split("\n")))


def print_table(columns: Sequence[str], rows: Iterable[Iterable[object]]) -> None:
    """Print a table, without headings if all are empty.

    Cells fold to the width of a terminal; elsewhere a row stays one line.
    """
    # These take 50 ms, which `--json` and `publish` do without.
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    table = Table(box=None, pad_edge=False, header_style="bold", show_header=any(columns))
    for column in columns:
        table.add_column(column, overflow="fold")
    for row in rows:
        table.add_row(*(Text(printable_lines(cell)) for cell in row))
    on_terminal = sys.stdout is not None and sys.stdout.isatty()
    console = Console(soft_wrap=not on_terminal, width=None if on_terminal else 999)
    console.print(table)


def total_size(paths: Iterable[Path]) -> int:
    """Return the bytes of files together; missing files count as 0."""
    return sum(path.stat().st_size for path in paths if path.is_file())


@contextlib.contextmanager
def progress(what: str, total: int, unit: str = "bytes") -> Iterator[Callable[[int], object]]:
    """Show progress, speed and remaining time on a terminal, if there is enough to do.

    Args:
        what: One word for the task.
        total: Number of units.
        unit: `bytes`, or a word for what is counted.

    Yields:
        A function to call with the number of units done since the last call.
    """
    if (unit == "bytes" and total < _LARGE) or not sys.stderr.isatty():
        yield lambda _: None
        return
    # These take 90 ms, and are needed on a terminal only.
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


BUG = 70

EXIT_CODES: dict[type[BaseException], int] = {
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
"""Exit codes of errors; the nearest base class counts."""


def report(error: Exception) -> int:
    """Print what went wrong and what to do about it; return the exit code."""
    code = next((EXIT_CODES[cls] for cls in type(error).__mro__ if cls in EXIT_CODES), BUG)
    if isinstance(error, InvalidDataError):
        lines = [str(issue) for issue in error.issues]
    elif isinstance(error, NetotaError):
        lines = [error.detail]
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
    if isinstance(error, NetotaError) and error.hint:
        say(f"hint: {error.hint}")
    return code
