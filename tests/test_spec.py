"""The documents of the specification agree with the code, and with each other."""

from __future__ import annotations

import importlib.resources
import re
import shutil
from pathlib import Path

import cbor2
import pytest

import netota_coap
from netota_coap.encoding.codecs import Format, diagnostic, dump
from netota_coap.encoding.documents import decode
from netota_coap.model import values
from netota_coap.service.config import Config, assemble
from tests.support.cddl import validate
from tools.generate import make_spec

CODE = Path(netota_coap.__file__).parent
DOCUMENTS = sorted(make_spec.SPEC.rglob("*.md"))
RULE = re.compile(r"\b[RPWCHM]-[0-9]+\b")
STATED = re.compile(r"^- \*\*([RPWCHM]-[0-9]+)\*\* \S", re.MULTILINE)
LINK = re.compile(r"\]\(([^)\s]+)\)")
FENCE = re.compile(r"^```([^\n]*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)

PREFIXES = {
    "repository.md": "R",
    "publishing.md": "P",
    "wire.md": "W",
    "resources.md": "C",
    "http.md": "H",
    "mirror.md": "M",
}


def rules() -> dict[str, str]:
    """Return the document of each rule, by id."""
    return {id_: name for name in PREFIXES for id_ in STATED.findall(read(make_spec.SPEC / name))}


def read(path: Path) -> str:
    return path.read_text(encoding="utf-8")


def blocks(language: str) -> list[object]:
    """Return the fenced blocks of a language: what follows it in the fence, and the text."""
    return [
        pytest.param(info.removeprefix(language).strip(), text, id=f"{path.name}-{at}")
        for path in DOCUMENTS
        for at, (info, text) in enumerate(FENCE.findall(read(path)))
        if info.split()[:1] == [language]
    ]


# ----------------------------------------------------------------------------------------------
# Parts made from the code


def test_nothing_is_stale(capsys: pytest.CaptureFixture[str]) -> None:
    """Tables and examples are as the code makes them (else: run tools/generate/make_spec.py)."""
    assert (make_spec.main(["--check"]), capsys.readouterr().out) == (0, "")


def test_a_stale_part_is_named_and_rewritten(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """`--check` names what is stale and changes nothing; without it the part is made anew."""
    spec = tmp_path / "spec"
    shutil.copytree(make_spec.SPEC, spec)
    fresh = read(spec / "wire.md")
    stale = fresh.replace("| 32 | bytes |", "| 33 | bytes |")
    (spec / "wire.md").write_text(stale, encoding="utf-8")

    assert make_spec.main(["--check"], spec) == 1
    assert capsys.readouterr().out == "wire.md: table:limits is stale\n"
    assert read(spec / "wire.md") == stale
    assert make_spec.main([], spec) == 0
    assert read(spec / "wire.md") == fresh


def test_every_part_is_used() -> None:
    """No part is made for nothing, and no marker lacks its end."""
    markers = [m for path in DOCUMENTS for m in re.findall(r"<!-- (\w+:[a-z-]+) -->", read(path))]
    rendered = [m[1] for path in DOCUMENTS for m in make_spec.PART.findall(read(path))]
    assert sorted(markers) == sorted(make_spec.PARTS)
    assert markers == rendered


@pytest.mark.parametrize(
    ("item", "notation"),
    [
        ({1: "a", "b": [True, None, -1]}, '{1: "a", "b": [true, null, -1]}'),
        (b"\x00\xff", "h'00ff'"),
        ({}, "{}"),
        ([["x" * 90]], '[\n  [\n    "' + "x" * 90 + '"\n  ]\n]'),
    ],
)
def test_diagnostic_notation(item: object, notation: str) -> None:
    """Plain data is written as RFC 8949, section 8, has it."""
    assert diagnostic(item) == notation


# ----------------------------------------------------------------------------------------------
# Rules


def test_each_rule_has_one_place() -> None:
    """Every id is stated once, in the document of its letter, in ascending order."""
    for name, prefix in PREFIXES.items():
        stated = STATED.findall(read(make_spec.SPEC / name))
        numbers = [int(id_.removeprefix(f"{prefix}-")) for id_ in stated]
        assert numbers == sorted(set(numbers))


def test_rules_begin_an_item() -> None:
    """A bold id is a statement; nothing else is written like one."""
    for path in DOCUMENTS:
        text = read(path)
        assert re.findall(r"\*\*([RPWCHM]-[0-9]+)\*\*", text) == STATED.findall(text)


@pytest.mark.parametrize(
    "path",
    [*sorted(CODE.rglob("*.py")), *sorted(CODE.rglob("*.cddl")), *DOCUMENTS],
    ids=lambda path: path.relative_to(CODE).as_posix(),
)
def test_cited_rules_exist(path: Path) -> None:
    """Code and documents cite no rule that is not there."""
    assert set(RULE.findall(read(path))) - rules().keys() == set()


def test_the_code_cites_rules() -> None:
    """The search above finds what it is meant to find."""
    cited = {id_ for path in CODE.rglob("*.py") for id_ in RULE.findall(read(path))}
    assert {id_[0] for id_ in cited} == set(PREFIXES.values())


# ----------------------------------------------------------------------------------------------
# Examples


@pytest.mark.parametrize(("info", "text"), [*blocks("toml"), *blocks("json")])
def test_text_examples_can_be_read(info: str, text: str, tmp_path: Path) -> None:
    """Each example in TOML and JSON is of the class that its fence names, or a configuration."""
    if info == "config":
        file = tmp_path / "config.toml"
        file.write_text(text)
        assert assemble(file, {}).config != Config()
        return
    cls = getattr(values, info)
    assert issubclass(cls, values.Value)
    fmt = Format.JSON if text.startswith("{") else Format.TOML
    assert isinstance(decode(cls, text.encode(), fmt), cls)


@pytest.mark.parametrize(("rule", "text"), blocks("hex"))
def test_binary_examples_keep_to_the_schema(rule: str, text: str) -> None:
    """Each example in CBOR is as wire.cddl has the rule that its fence names; deterministic."""
    payload = bytes.fromhex(text)
    validate(payload, rule)
    assert dump(cbor2.loads(payload), Format.CBOR) == payload


# ----------------------------------------------------------------------------------------------
# The set of documents


@pytest.mark.parametrize(
    "path", DOCUMENTS, ids=lambda path: path.relative_to(make_spec.SPEC).as_posix()
)
def test_links_resolve(path: Path) -> None:
    """A link leads to a file of the specification, or out of it by https."""
    for target in LINK.findall(read(path)):
        if not target.startswith("https://"):
            linked = (path.parent / target).resolve()
            assert linked.is_file(), target
            assert linked.is_relative_to(make_spec.SPEC), target


def test_documents_are_package_data() -> None:
    """`importlib.resources` finds each document; the README links all."""
    root = importlib.resources.files("netota_coap") / "spec"
    linked = LINK.findall((root / "README.md").read_text(encoding="utf-8"))
    for path in (*DOCUMENTS, make_spec.SPEC / "wire.cddl"):
        name = path.relative_to(make_spec.SPEC).as_posix()
        assert (root / name).is_file()
        assert name in linked or name == "README.md"


def test_decisions_are_numbered() -> None:
    """No two decisions have the same number, and titles begin with it. Some were superseded."""
    paths = sorted((make_spec.SPEC / "decisions").iterdir())
    assert len({path.name[:4] for path in paths}) == len(paths)
    assert all(read(path).startswith(f"# {path.name[:4]} ") for path in paths)


def test_changes_know_the_version() -> None:
    """The first entry of the changes is of this version."""
    versions = re.findall(r"^## (\S+),", read(make_spec.SPEC / "CHANGES.md"), re.MULTILINE)
    assert versions[0] == netota_coap.__version__
