"""Writes the tables and examples of the documents in `netota_coap/spec` from the code.

It replaces the text between `<!-- table:NAME -->` or `<!-- example:NAME -->` and `<!-- end -->`.
Rules for editors: each part of a document is a row of `PARTS`; no fact is written here that the
code can tell.
"""

from __future__ import annotations

import argparse
import hashlib
import inspect
import json
import re
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path

import attrs
import cbor2

from netota_coap.catalog.catalog import Catalog
from netota_coap.catalog.resources import StreamResource
from netota_coap.catalog.stream_query import StreamQuery
from netota_coap.coap import options as coap
from netota_coap.coap.responder import CODES, Responder, problem
from netota_coap.encoding.codecs import Format, diagnostic
from netota_coap.encoding.content_formats import ContentFormat
from netota_coap.encoding.documents import MEDIA_TYPES, TABLES, encode, selection_to_cbor
from netota_coap.encoding.schema import SAME, Field
from netota_coap.errors import NotFoundError
from netota_coap.model.selection import Selection
from netota_coap.model.values import (
    CONTENT_ATTRIBUTES,
    LIMITS,
    RESERVED_ATTRIBUTES,
    Archive,
    Content,
    Envelope,
    Offer,
    Package,
    PackageEntry,
    Repository,
    Stream,
    StreamEntry,
    Value,
)
from tools.generate import spec_cli, spec_http, spec_operation

SPEC = Path(__file__).parents[2] / "netota_coap" / "spec"

PART = re.compile(r"(<!-- ((?:table|example):[a-z-]+) -->\n).*?(<!-- end -->)", re.DOTALL)

# ----------------------------------------------------------------------------------------------
# The repository of the examples


def _archive(machine: str, size: int) -> Archive:
    return Archive(
        name=machine,
        envelope=Envelope(
            type="application/vnd.mcuboot.image",
            size=size,
            sha256=hashlib.sha256(machine.encode()).digest(),
        ),
        content=Content(type="zephyr-image", arch="arm", machine=machine, debug=False),
        offers=(
            Offer(url=f"https://cdn.example.com/sensor-node/2.4.1/{machine}.bin", metric=100),
            Offer(url=f"coap://mirror.example.com/sensor-node/2.4.1/{machine}.bin", metric=20),
        ),
    )


STABLE = Stream(
    version="2.4.1",
    sequence=17,
    published=datetime(2026, 11, 20, 9, 30, tzinfo=UTC),
    archives=(_archive("nrf52840dk", 214_016), _archive("nrf5340dk", 220_160)),
)
OLD = Stream(
    version="1.9.0",
    sequence=42,
    published=datetime(2025, 3, 1, 12, tzinfo=UTC),
    closed=True,
    replacement=("sensor-node", "stable"),
    archives=(),
)
REPOSITORY = Repository(
    format=1,
    packages={"sensor-node": Package(title="Sensor node", streams={"old": OLD, "stable": STABLE})},
)
RESPONDER = Responder(Catalog.of(REPOSITORY))
SELECTION = Selection.of({"machine": ["nrf52840dk"], "scheme": ["coap", "https"]})

_STREAM = ("p", "sensor-node", "s", "stable")
_OLD = ("p", "sensor-node", "s", "old")


def _payload(
    path: Sequence[str], query: str = "", fmt: ContentFormat = ContentFormat.CBOR
) -> bytes:
    parameters = query.split("&") if query else []
    resource = RESPONDER.catalog.find(tuple(path))
    return resource.represent(parameters, fmt, "coap").payload


# ----------------------------------------------------------------------------------------------
# Tables


def _table(head: Sequence[str], rows: Iterable[Sequence[object]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join(f"| {' | '.join(map(str, line))} |" for line in lines) + "\n"


def _first_line(thing: object) -> str:
    return (inspect.getdoc(thing) or "").partition("\n")[0].rstrip(".")


def _number(value: int) -> str:
    exponent = (value + 1).bit_length() - 1
    return f"2^{exponent} - 1" if value + 1 == 1 << exponent and exponent > 31 else f"{value:,}"


def _limits() -> str:
    rows = ((_number(row.value), row.unit, row.what) for row in LIMITS.values())
    return _table(("at most", "unit", "of what"), rows)


_TYPES = {
    "str": "text",
    "int": "integer",
    "bool": "boolean",
    "Mapping[str, AttributeValue]": "map",
}


def _looks(cls: type[Value], field: Field, fmt: Format) -> str:
    """Describe the form of a field: by its form's docstring, or by its type."""
    if fmt not in field.formats:
        return "-"
    table = getattr(field.form, "table", None)
    if table is not None:
        inner = table.cls
        many = "tuple" in str(getattr(attrs.fields(cls), field.name).type)
        return f"array of {inner.__name__}" if many else str(inner.__name__)
    if field.form is SAME:
        annotation = str(getattr(attrs.fields(cls), field.name).type)
        return _TYPES[annotation.removesuffix(" | None")]
    alternatives = _first_line(type(field.form)).split("; ")
    for alternative in alternatives:
        format_name, _, words = alternative.partition(": ")
        if format_name == fmt.value:
            return words
    return alternatives[-1].removeprefix("else ").removeprefix("An ")


def _fields_disk() -> str:
    rows = []
    for cls, table in TABLES.items():
        if cls in (PackageEntry, StreamEntry):
            continue  # only the wire has lists
        for field in table.fields:
            if Format.TOML in field.formats:
                required = "yes" if Format.TOML in field.required else ""
                looks = _looks(cls, field, Format.TOML)
                rows.append((cls.__name__, f"`{field.name}`", required, looks))
        if table.free:
            rows.append((cls.__name__, "any other", "", "free attribute"))
    return _table(("class", "key", "required", "looks like"), rows)


def _fields_wire() -> str:
    rows: list[Sequence[object]] = []
    for cls, table in TABLES.items():
        for key, field in sorted(table.by_key[Format.CBOR].items()):
            required = "yes" if Format.CBOR in field.required else ""
            looks = (_looks(cls, field, Format.CBOR), _looks(cls, field, Format.JSON))
            shown = f"[{key}]" if table.array else key
            rows.append((cls.__name__, shown, f"`{field.name}`", required, *looks))
        if table.free:
            rows.append((cls.__name__, "text", "any other", "", *["free attribute"] * 2))
    return _table(("class", "CBOR key", "name", "required", "in CBOR", "in JSON"), rows)


def _media_types() -> str:
    return _table(("media type", "number"), ((f"`{m}`", n) for m, n in MEDIA_TYPES.items()))


def _selection_keys() -> str:
    rows = []
    for name in (*CONTENT_ATTRIBUTES, "scheme"):
        (key,) = cbor2.loads(selection_to_cbor(Selection.of({name: "x"})))
        rows.append((key, f"`{name}`"))
    return _table(("CBOR key", "name in a query"), [*rows, ("text", "free attribute")])


def _reserved() -> str:
    return ", ".join(f"`{name}`" for name in sorted(RESERVED_ATTRIBUTES)) + "\n"


def _options() -> str:
    rows = [
        (
            number,
            known.name,
            "critical" if coap.is_critical(number) else "elective",
            f"{known.shortest} to {known.longest}",
            "yes" if known.repeatable else "",
        )
        for number, known in sorted(coap.KNOWN.items())
    ]
    return _table(("number", "option", "class", "bytes", "repeatable"), rows)


def _resources() -> str:
    templates = {"sensor-node": "<package>", "old": "<stream>", "stable": "<stream>"}
    rows = {}
    for path, resource in RESPONDER.catalog.resources.items():
        template = "/".join(("", *(templates.get(segment, segment) for segment in path)))
        methods = ["GET", *["FETCH"] * isinstance(resource, StreamResource)]
        formats = ", ".join(str(int(fmt)) for fmt in resource.formats)
        observable = "yes" if resource.observable else ""
        rows[template] = (
            f"`{template}`", ", ".join(methods), observable, f"`{resource.rt}`", formats,
        )  # fmt: skip
    head = ("path", "methods", "observable", "`rt`", "content formats, the default first")
    return _table(head, rows.values())


def _codes() -> str:
    rows = ((f"`{cls.__name__}`", _first_line(cls), str(code)) for cls, code in CODES.items())
    return _table(("error", "what it means", "response code"), rows)


def _decisions() -> str:
    """Link each decision by its title."""
    paths = sorted((SPEC / "decisions").glob("*.md"))
    titles = (path.read_text(encoding="utf-8").partition("\n")[0] for path in paths)
    return "".join(
        f"- [{title.removeprefix('# ')}](decisions/{path.name})\n"
        for path, title in zip(paths, titles, strict=True)
    )


_Request = tuple[str, Sequence[str], Sequence[coap.Option], "bytes | None"]

_REFUSED: Sequence[_Request] = (
    ("nothing exists at the path", ("p", "none"), (), None),
    ("`sequence` with `?full` differs from the stream's", _STREAM,
     ((coap.URI_QUERY, b"full"), (coap.URI_QUERY, b"sequence=16")), None),
    ("`sequence` with `?full` is no number of at most 10 digits", _STREAM,
     ((coap.URI_QUERY, b"full"), (coap.URI_QUERY, b"sequence=x")), None),
    ("Block2 is past the end", _STREAM, ((coap.BLOCK2, b"\x64"),), None),
    ("Block2 has size exponent 7", _STREAM, ((coap.BLOCK2, b"\x07"),), None),
    ("a FETCH is no map, or a value in it has a wrong type", _STREAM,
     ((coap.CONTENT_FORMAT, b"\x3c"),), b"\x80"),
    ("a critical option is not in the table", ("p",), ((1, b""),), None),
    ("a critical option has a bad length, is repeated wrongly, or is not UTF-8", ("p",),
     ((coap.ACCEPT, b"\x00\x00\x00"),), None),
    ("the resource does not support the method", ("p",), (), b"\xa0"),
    ("Accept is no format of the resource; with FETCH: is not 60", ("p",),
     ((coap.ACCEPT, b"\x29"),), None),
    ("a FETCH is longer than the limit of a selection", _STREAM,
     ((coap.CONTENT_FORMAT, b"\x3c"),), b"\xa0" * 257),
    ("a Block1 is not the only block", _STREAM, ((coap.BLOCK1, b"\x08"),), None),
    ("the Content-Format of a FETCH is not 60", _STREAM, (), b"\xa0"),
    ("the request has Proxy-Uri or Proxy-Scheme", (), ((coap.PROXY_SCHEME, b"coap"),), None),
)  # fmt: skip


def _answers() -> str:
    rows: list[tuple[str, str]] = []
    for when, path, options, payload in _REFUSED:
        segments = tuple((coap.URI_PATH, segment.encode()) for segment in path)
        request = tuple(coap.decode(coap.encode((*segments, *options)))[0])
        code, _ = RESPONDER.answer(request, payload)
        rows.append((str(code), when))
    return _table(("code", "when"), sorted(rows))


def _sizes() -> str:
    queries = (
        "head",
        "machine=nrf52840dk&scheme=https",
        "machine=nrf52840dk&scheme=coap",
        "machine=nrf52840dk",
        "machine=other",
        "",
        "full",
    )
    rows = []
    for query in queries:
        payload = _payload(_STREAM, query)
        plain = cbor2.loads(payload)
        archives = len(plain[3]) if 3 in plain else "-"
        offers = sum(len(a[4]) for a in plain[3]) if 3 in plain else "-"
        rows.append((f"`?{query}`", len(payload), archives, offers, "yes" if 8 in plain else ""))
    return _table(("query", "bytes", "archives", "offers", "`more`"), rows)


# ----------------------------------------------------------------------------------------------
# Examples


def _cbor(payload: bytes, rule: str) -> str:
    """Show a payload; `rule` is the name of its rule in wire.cddl."""
    digits = payload.hex()
    lines = "\n".join(digits[at : at + 64] for at in range(0, len(digits), 64))
    notation = diagnostic(cbor2.loads(payload))
    return f"{len(payload)} bytes:\n\n```text\n{notation}\n```\n\n```hex {rule}\n{lines}\n```\n"


def _json(payload: bytes, info: str) -> str:
    text = json.dumps(json.loads(payload), ensure_ascii=False, indent=2)
    return f"```json {info}\n{text}\n```\n"


def _stream_toml() -> str:
    stream = attrs.evolve(STABLE, archives=(STABLE.archives or ())[:1])
    return f"```toml Stream\n{encode(stream, Format.TOML).decode()}```\n"


def _problem() -> str:
    _, tail = problem(NotFoundError("there is nothing at /p/none"))
    return _cbor(coap.decode(tail)[1], "problem")


def _fetched() -> bytes:
    resource = RESPONDER.catalog.find(_STREAM)
    assert isinstance(resource, StreamResource)
    view = StreamQuery.from_fetch(selection_to_cbor(SELECTION))
    return resource.answer(view, ContentFormat.CBOR, "coap").payload


PARTS: Mapping[str, Callable[[], str]] = {
    "table:limits": _limits,
    "table:fields-disk": _fields_disk,
    "table:fields-wire": _fields_wire,
    "table:media-types": _media_types,
    "table:selection-keys": _selection_keys,
    "table:reserved": _reserved,
    "table:options": _options,
    "table:resources": _resources,
    "table:codes": _codes,
    "table:answers": _answers,
    "table:decisions": _decisions,
    "table:sizes": _sizes,
    "example:stream-toml": _stream_toml,
    "example:narrowed": lambda: _cbor(
        _payload(_STREAM, "machine=nrf52840dk&scheme=https"), "stream"
    ),
    "example:fewer-offers": lambda: _cbor(_fetched(), "stream"),
    "example:head": lambda: _cbor(_payload(_STREAM, "head"), "head"),
    "example:whole": lambda: _cbor(_payload(_STREAM), "stream"),
    "example:nothing": lambda: _cbor(_payload(_STREAM, "machine=other"), "stream"),
    "example:closed": lambda: _cbor(_payload(_OLD, "head"), "head"),
    "example:selection": lambda: _cbor(selection_to_cbor(SELECTION), "selection"),
    "example:packages": lambda: _cbor(_payload(("p",)), "packages"),
    "example:streams": lambda: _cbor(_payload(("p", "sensor-node")), "streams"),
    "example:links": lambda: (
        "```text\n"
        + _payload(("p", "sensor-node"), fmt=ContentFormat.LINK).decode().replace(",<", ",\n<")
        + "\n```\n"
    ),
    "example:json": lambda: _json(
        _payload(_STREAM, "machine=nrf52840dk", ContentFormat.JSON), "Stream"
    ),
    "example:problem": _problem,
    **spec_cli.PARTS,
    **spec_http.PARTS,
    **spec_operation.PARTS,
}
"""Functions that write a part of a document, by the name in its marker."""

# ----------------------------------------------------------------------------------------------
# Documents


def render(document: str) -> tuple[str, list[str]]:
    """Write the parts of a document.

    Returns:
        The document, and the names of the parts that changed.

    Raises:
        KeyError: `PARTS` lacks a part that the document names.
    """
    stale = []

    def part(match: re.Match[str]) -> str:
        fresh = f"{match[1]}\n{PARTS[match[2]]()}\n{match[3]}"
        if fresh != match[0]:
            stale.append(match[2])
        return fresh

    return PART.sub(part, document), stale


def main(arguments: Sequence[str] | None = None, spec: Path = SPEC) -> int:
    """Update the documents; with `--check`, name stale parts and return 1 if there are any."""
    parser = argparse.ArgumentParser(description=inspect.getdoc(sys.modules[__name__]))
    parser.add_argument(
        "--check", action="store_true", help="only compare, and end with 1 if something is stale"
    )
    check = parser.parse_args(arguments).check
    found = 0
    for path in sorted(spec.rglob("*.md")):
        fresh, stale = render(path.read_text(encoding="utf-8"))
        found += len(stale)
        for name in stale:
            print(f"{path.relative_to(spec)}: {name} {'is stale' if check else 'written'}")
        if stale and not check:
            path.write_text(fresh, encoding="utf-8")
    return 1 if check and found else 0


if __name__ == "__main__":
    sys.exit(main())
