"""The command `netota-coap`: one function per command, no logic.

Answers go to standard output, all else to standard error. Modules that take long to import are
imported by the commands that need them, so that `--help` is there at once.
"""

from __future__ import annotations

import asyncio
import contextlib
import importlib.resources
import io
import json
import logging
import sys
import traceback
from collections.abc import Callable, Iterator, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

import attrs
import click

from netota_coap import __version__, publish, repository
from netota_coap.catalog import ContentFormat, advice
from netota_coap.errors import (
    AddressError,
    ConfigError,
    InvalidDataError,
    NetotaError,
    NotFoundError,
    RepositoryError,
    TransferError,
    printable,
)
from netota_coap.formats import Format
from netota_coap.model import Package, Stream, StreamName, stream_name
from netota_coap.selection import Selection, text_form
from netota_coap.wire import encode, selection_from_query

if TYPE_CHECKING:
    from rich.console import Console
    from rich.table import Table

EXIT_CODES: dict[type[BaseException], int] = {
    ConfigError: 2,
    InvalidDataError: 3,
    NotFoundError: 3,
    RepositoryError: 3,
    AddressError: 4,
    TransferError: 4,
    NetotaError: 3,
}
"""Exit codes of errors, looked up along the class hierarchy; 1: problems found, 70: a bug."""

_LARGE = 16 * 2**20  # files over which a progress bar is worth it, bytes


# ----------------------------------------------------------------------------------------------
# The frame


def main() -> NoReturn:
    """Run the command line."""
    for stream in (sys.stdout, sys.stderr):
        # What the terminal cannot show must not stop the rest from being shown.
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")
    _quiet()
    try:
        code = cli.main(prog_name="netota-coap", standalone_mode=False)
    except click.ClickException as error:
        error.show()
        sys.exit(2)
    except (click.Abort, KeyboardInterrupt):
        sys.exit(130)
    except BrokenPipeError:
        sys.exit(1)
    except NetotaError as error:
        _complain(error)
        sys.exit(next(EXIT_CODES[cls] for cls in type(error).__mro__ if cls in EXIT_CODES))
    except UnicodeError as error:
        _say(f"error: text that cannot be encoded: {error}")
        sys.exit(2)
    except OSError as error:
        _say(f"error: {': '.join(str(part) for part in (error.filename, error.strerror) if part)}")
        sys.exit(3)
    except Exception as error:  # noqa: BLE001 - a user gets a line, whatever happens
        frame = traceback.extract_tb(error.__traceback__)[-1]
        place = f"{Path(frame.filename).name}:{frame.lineno}"
        _say(f"bug: {type(error).__name__} at {place}: {error}")
        _say("hint: please report it, with the command and this line")
        sys.exit(70)
    sys.exit(code if isinstance(code, int) else 0)


def _complain(error: NetotaError) -> None:
    issues = error.issues if isinstance(error, InvalidDataError) else (error.detail,)
    for issue in issues:
        _say(f"error: {issue}")
    if error.hint:
        _say(f"hint: {error.hint}")


def _quiet() -> None:
    """Keep what libraries say of hostile answers from the terminal: our own errors say it."""
    for name in ("netota_coap.aiocoap", "asyncio"):
        logging.getLogger(name).setLevel(logging.CRITICAL + 1)


def _say(line: str) -> None:
    # Much of it comes from others, as names and errors of servers.
    click.echo(printable(line), err=True)


def _print_json(plain: object) -> None:
    text = json.dumps(plain, ensure_ascii=False, indent=2)
    click.echo("\n".join(printable(line) for line in text.split("\n")))


def _console() -> Console:
    from rich.console import Console

    on_terminal = sys.stdout is not None and sys.stdout.isatty()
    return Console(highlight=False, soft_wrap=not on_terminal)


def _table(*columns: str) -> Table:
    from rich.table import Table

    table = Table(box=None, pad_edge=False, header_style="bold")
    for column in columns:
        table.add_column(column, overflow="fold")
    return table


def _text(value: object) -> str:
    """Keep what a publisher wrote from being read as markup, or by the terminal."""
    from rich.markup import escape

    return escape("\n".join(map(printable, str(value).split("\n"))))


class _StreamType(click.ParamType[StreamName]):
    name = "PKG/STREAM"

    def convert(self, value: Any, _param: object, _context: object) -> StreamName:
        try:
            return value if isinstance(value, tuple) else stream_name(value)
        except InvalidDataError as error:
            self.fail(error.detail)


STREAM = _StreamType()
DIRECTORY = click.Path(path_type=Path)

_json_option = click.option("--json", "as_json", is_flag=True, help="Print JSON, for scripts.")


@click.group(context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100})
@click.version_option(__version__, prog_name="netota-coap")
def cli() -> None:
    """Meta-data service for IoT packages, CoAP first.

    A repository is a directory of plain files: packages have streams, a stream holds one version,
    and publishing swaps its archives. `serve` tells devices, in milliseconds.
    """


# ----------------------------------------------------------------------------------------------
# Looking at a repository


@cli.command()
@click.argument("directory", metavar="DIR", type=DIRECTORY)
@click.option("--sample", is_flag=True, help="Put a package with two streams into it.")
@click.option("--title", help="Of the repository, for people.")
def init(directory: Path, sample: bool, title: str | None) -> None:
    """Make a repository."""
    repository.init(directory, title)
    if sample:
        publish.sample(directory, _now())
    click.echo(f"{directory}: a repository, to be served by: netota-coap serve {directory}")


@cli.command()
@click.argument("directory", metavar="DIR", type=DIRECTORY)
@_json_option
def check(directory: Path, as_json: bool) -> int:
    """Check a repository, its history, and what devices would get of it.

    Exit code 1: it has errors, and would not be served.
    """
    findings = repository.check(directory)
    warnings = list(findings.warnings)
    if findings.repository:
        warnings += advice(findings.repository)
    if as_json:
        kinds = {"errors": findings.errors, "warnings": warnings}
        _print_json(
            {
                kind: [
                    {name: printable(text) for name, text in attrs.asdict(issue).items()}
                    for issue in issues
                ]
                for kind, issues in kinds.items()
            }
        )
        return 1 if findings.errors else 0
    for issue in findings.errors:
        click.echo(f"error: {issue}")
    for issue in warnings:
        click.echo(f"warning: {issue}")
    if findings.hint:
        click.echo(f"hint: {findings.hint}")
    click.echo(f"{len(findings.errors)} errors, {len(warnings)} warnings")
    return 1 if findings.errors else 0


@cli.command(name="list")
@click.argument("source", metavar="DIR|URI")
@_json_option
def list_(source: str, as_json: bool) -> None:
    """List the streams of a repository, or of a server (`coap://HOST`)."""
    if "://" in source:
        rows = asyncio.run(_remote_rows(source))
    else:
        loaded = repository.Loader(Path(source)).load()
        rows = [
            _row(package_name, package.title or "", name, stream)
            for package_name, package in sorted(loaded.packages.items())
            for name, stream in sorted(package.streams.items())
        ]
    if as_json:
        _print_json(rows)
        return
    table = _table("PACKAGE", "TITLE", "STREAM", "VERSION", "SEQUENCE", "")
    for row in rows:
        state = "closed" if row["closed"] else ""
        cells = [row["package"], row["title"], row["stream"], row["version"], row["sequence"]]
        table.add_row(*map(_text, cells), state)
    _console().print(table)


def _row(package: str, title: str, name: str, stream: Any) -> dict[str, Any]:
    return {
        "package": package,
        "title": title,
        "stream": name,
        "version": stream.version,
        "sequence": stream.sequence,
        "closed": stream.closed,
    }


async def _remote_rows(uri: str) -> list[dict[str, Any]]:
    from netota_coap.client import Client

    async with Client() as client:
        return [
            _row(package, entry.title, name, stream)
            for package, entry in (await client.packages(uri)).items()
            for name, stream in (await client.streams(uri, package)).items()
        ]


@cli.command()
@click.argument("source", metavar="DIR|URI")
@click.argument("name", metavar="[PKG/STREAM]", type=STREAM, required=False)
@_json_option
def show(source: str, name: StreamName | None, as_json: bool) -> None:
    """Show a stream: of a repository, or of a server (`coap://HOST/p/PKG/s/STREAM`)."""
    if "://" in source:
        stream = asyncio.run(_remote_stream(source))
    elif name is None:
        raise click.UsageError("a repository has many streams: name one as PKG/STREAM")
    else:
        stream = _existing(Path(source), name)
    if as_json:
        _print_json(json.loads(encode(stream, Format.JSON)))
    else:
        _print_stream(stream)


async def _remote_stream(uri: str) -> Stream:
    from netota_coap.client import Client

    async with Client() as client:
        return await client.stream(uri)


def _existing(root: Path, name: StreamName) -> Stream:
    loaded = repository.Loader(root).load()
    stream = loaded.packages.get(name[0], Package()).streams.get(name[1])
    if stream is None:
        raise NotFoundError(
            f"{root}: there is no stream {'/'.join(name)}",
            hint=f"See what there is: netota-coap list {root}",
        )
    return stream


def _print_stream(stream: Stream) -> None:
    console = _console()
    facts = {
        "title": stream.title,
        "version": stream.version,
        "sequence": stream.sequence,
        "published": stream.published.astimezone(UTC).isoformat().replace("+00:00", "Z"),
        "closed": "yes" if stream.closed else None,
        "replacement": "/".join(stream.replacement) if stream.replacement else None,
        "poll": f"{stream.poll_s} s" if stream.poll_s else None,
        "author": stream.author,
        "message": stream.message,
    }
    for name, value in facts.items():
        if value is not None:
            console.print(f"{name:<12} {_text(value)}")
    table = _table("ARCHIVE", "BYTES", "SHA-256", "CONTENT", "OFFERS")
    for archive in stream.archives or ():
        content = [f"{name}={text_form(value)}" for name, value in archive.content.all().items()]
        offers = [f"{offer.url} ({offer.metric})" for offer in archive.offers]
        table.add_row(
            *map(_text, (archive.name, archive.envelope.size)),
            archive.envelope.sha256.hex()[:16] + "…",
            *map(_text, ("\n".join(content), "\n".join(offers))),
        )
    console.print()
    console.print(table)


# ----------------------------------------------------------------------------------------------
# Changing a repository


@cli.command(name="publish")
@click.argument("directory", metavar="DIR", type=DIRECTORY)
@click.argument("name", metavar="PKG/STREAM", type=STREAM)
@click.argument("version")
@click.option(
    "--archive",
    "archives",
    metavar="FILE[,KEY=VALUE]…",
    multiple=True,
    required=True,
    help="A file, and what it is: name, media-type, type, arch, machine, debug, filesystem, "
    "compression, or any attribute. Again for each archive.",
)
@click.option(
    "--offer",
    "offers",
    metavar="URL[,METRIC]",
    multiple=True,
    help="Where devices download it; lowest metric preferred. {name}, {version}, {file} and "
    "{sha256} are filled in. Again for each place.",
)
def publish_(
    directory: Path,
    name: StreamName,
    version: str,
    archives: Sequence[str],
    offers: Sequence[str],
) -> None:
    """Replace the archives, and so the version, of a stream in one step."""
    sources = [publish.ArchiveSource.parse(text) for text in archives]
    templates = [publish.parse_offer(text) for text in offers]
    with _progress(sources) as progress:
        stream = publish.publish(
            directory, name, version, sources, templates, now=_now(), progress=progress
        )
    _confirm(name, stream)


@contextlib.contextmanager
def _progress(sources: Sequence[publish.ArchiveSource]) -> Iterator[Callable[[int], object]]:
    total = sum(source.path.stat().st_size for source in sources if source.path.is_file())
    if total < _LARGE or not sys.stderr.isatty():
        yield lambda _: None
        return
    from rich.console import Console
    from rich.progress import BarColumn, DownloadColumn, Progress, TransferSpeedColumn

    columns = (BarColumn(), DownloadColumn(), TransferSpeedColumn())
    with Progress(*columns, console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task("reading", total=total)
        yield lambda count: bar.advance(task, count)


@cli.command()
@click.argument("directory", metavar="DIR", type=DIRECTORY)
@click.argument("name", metavar="PKG/STREAM", type=STREAM)
@click.option("--replacement", metavar="PKG/STREAM", type=STREAM, help="Where devices should go.")
def close(directory: Path, name: StreamName, replacement: StreamName | None) -> None:
    """Close a stream: nothing new will come."""
    _confirm(name, publish.close(directory, name, replacement))


@cli.command()
@click.argument("directory", metavar="DIR", type=DIRECTORY)
@click.argument("name", metavar="PKG/STREAM", type=STREAM)
def reopen(directory: Path, name: StreamName) -> None:
    """Open a closed stream again."""
    _confirm(name, publish.reopen(directory, name))


def _confirm(name: StreamName, stream: Stream) -> None:
    state = "closed" if stream.closed else f"{len(stream.archives or ())} archives"
    where = f", replacement {'/'.join(stream.replacement)}" if stream.replacement else ""
    click.echo(f"{'/'.join(name)}: {stream.version}, sequence {stream.sequence}, {state}{where}")


def _now() -> datetime:
    return datetime.now(UTC).replace(microsecond=0)


# ----------------------------------------------------------------------------------------------
# Serving, and being a device


@cli.command()
@click.argument("directory", metavar="DIR", type=DIRECTORY)
@click.option(
    "--bind",
    "binds",
    metavar="HOST:PORT",
    multiple=True,
    help="Where to listen; port 0 is any free one. Again for each address. [default: [::]:5683]",
)
def serve(directory: Path, binds: Sequence[str]) -> None:
    """Serve a repository over CoAP, and notify devices of what is published.

    SIGHUP reloads at once, SIGTERM and SIGINT end it. A repository that is malformed is refused at
    the start; later the old state is served on, and the log says why.
    """
    from netota_coap.coap.frontdoor import DEFAULT_BIND
    from netota_coap.service import Service

    logging.basicConfig(level=logging.INFO, format="%(levelname)s %(message)s", stream=sys.stderr)
    for name in ("netota_coap.aiocoap", "asyncio"):
        logging.getLogger(name).setLevel(logging.ERROR)
    service = Service(
        directory, binds or (DEFAULT_BIND,), lambda uri: click.echo(f"listening on {uri}")
    )
    asyncio.run(service.run())


@cli.command()
@click.argument("uri")
@click.option("--query", multiple=True, metavar="KEY=VALUE", help="Of the query. Again for each.")
@click.option(
    "--accept",
    type=click.Choice([fmt.name.lower() for fmt in ContentFormat]),
    help="Format to ask for: link prints text, cbor its diagnostic form in JSON. "
    "[default: json, link for /.well-known/core]",
)
def get(uri: str, query: Sequence[str], accept: str | None) -> None:
    """Get a resource of a server and print it as JSON."""
    from netota_coap.client import Client

    async def fetch(fmt: ContentFormat) -> Any:
        async with Client() as client:
            return await client.get_plain(uri, query, fmt)

    default = "link" if "/.well-known/" in uri else "json"
    plain = asyncio.run(fetch(ContentFormat[(accept or default).upper()]))
    if isinstance(plain, str):
        for link in plain.replace(",<", ",\n<").splitlines():
            click.echo(printable(link))
    else:
        _print_json(_readable(plain))


def _readable(plain: Any) -> Any:
    """Put CBOR's data into JSON's: keys become text, bytes hexadecimal digits."""
    if isinstance(plain, dict):
        return {str(key): _readable(value) for key, value in plain.items()}
    if isinstance(plain, list):
        return [_readable(value) for value in plain]
    if isinstance(plain, bytes):
        return plain.hex()
    return plain if isinstance(plain, str | int | float | None) else str(plain)


@cli.command()
@click.argument("uri")
@click.option(
    "--query", multiple=True, metavar="KEY=VALUE", help="Say what the device is. Again for each."
)
@click.option(
    "--poll-s", type=click.FloatRange(min=1), help="Ask again at least this often, seconds."
)
@_json_option
def watch(uri: str, query: Sequence[str], poll_s: float | None, as_json: bool) -> None:
    """Follow a stream of a server as a device does: one line for each state."""
    from netota_coap.client import Client

    async def follow(selection: Selection) -> None:
        def trouble(error: TransferError) -> None:
            _say(f"waiting: {error.detail}")

        async with Client(on_trouble=trouble) as client:
            async for stream in client.observe(uri, selection, poll_s=poll_s):
                if as_json:
                    click.echo(encode(stream, Format.JSON).decode())
                else:
                    click.echo(f"{datetime.now().astimezone():%H:%M:%S.%f} {_one_line(stream)}")

    asyncio.run(follow(selection_from_query(query)))


def _one_line(stream: Stream) -> str:
    parts = [f"{stream.version} sequence {stream.sequence}"]
    if stream.closed:
        parts.append("closed")
    if stream.replacement:
        parts.append(f"replacement {'/'.join(stream.replacement)}")
    best = next(iter(stream.archives or ()), None)
    parts.append(f"{best.name}" if best else "nothing suits")
    parts += [offer.url for offer in (best.offers[:1] if best else ())]
    return ", ".join(parts)


@cli.command()
@click.argument("name", required=False)
def spec(name: str | None) -> None:
    """Print a document of the specification; without NAME, the list of them."""
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
