"""The vectors for other implementations: each says what this one does."""

from __future__ import annotations

import json
import runpy
from pathlib import Path
from typing import Any

import cbor2
import pytest

from netota_coap.encoding import documents
from netota_coap.encoding.codecs import Format, load
from netota_coap.errors import InvalidDataError
from netota_coap.model import values
from tests.support import cddl

ROOT = Path(__file__).parents[2]
VECTORS = ROOT / "fixtures" / "vectors"
TOOL = runpy.run_path(str(ROOT / "tools" / "generate" / "make_vectors.py"))


def vectors(kind: str) -> list[Any]:
    paths = sorted((VECTORS / kind).glob("*.json"))
    return [pytest.param(json.loads(path.read_text()), id=path.stem) for path in paths]


def decode(vector: dict[str, Any], data: bytes, fmt: Format) -> Any:
    if vector["class"] == "Selection":
        return documents.selection_from_cbor(data)
    if vector["class"] == "problem":
        return documents.decode_problem(data)
    cls = getattr(values, vector["class"])
    if vector.get("rule") in ("packages", "streams") or cls is values.PackageEntry:
        return documents.decode_list(cls, data, fmt)
    return documents.decode(cls, data, fmt)


def encode(value: Any, fmt: Format) -> bytes:
    if isinstance(value, dict):
        return documents.encode_list(value, fmt)
    return documents.encode(value, fmt)


@pytest.mark.parametrize("vector", vectors("valid"))
def test_valid(vector: dict[str, Any]) -> None:
    """All formats of a vector are read as one value, and written as they were."""
    payload = bytes.fromhex(vector["cbor"])
    cddl.validate(payload, vector["rule"])
    assert payload == cbor2.dumps(cbor2.loads(payload), canonical=True)
    value = decode(vector, payload, Format.CBOR)
    if vector["class"] == "Selection":
        assert value == documents.selection_from_query(vector["query"])
        assert payload == documents.selection_to_cbor(value)
        assert vector["query"] == documents.selection_to_query(value)
    elif vector["class"] == "problem":
        assert value == (vector["detail"] or vector["title"])
        assert payload == documents.encode_problem(vector["title"], vector["detail"])
    else:
        assert payload == encode(value, Format.CBOR)
        if "json" in vector:
            assert value == decode(vector, json.dumps(vector["json"]).encode(), Format.JSON)
            assert vector["json"] == load(encode(value, Format.JSON), Format.JSON)
        if "toml" in vector:
            on_disk = decode(vector, vector["toml"].encode(), Format.TOML)
            assert value == on_disk
            assert vector["toml"].encode() == encode(on_disk, Format.TOML)


@pytest.mark.parametrize("vector", vectors("invalid"))
def test_invalid(vector: dict[str, Any]) -> None:
    """All that is wrong with a vector is told; `…` stands for words of a library."""
    data = bytes.fromhex(vector["hex"]) if "hex" in vector else vector["text"].encode()
    with pytest.raises(InvalidDataError) as caught:
        decode(vector, data, Format[vector["format"]])
    actual = [str(issue) for issue in caught.value.issues]
    assert len(vector["issues"]) == len(actual)
    for expected, issue in zip(vector["issues"], actual, strict=True):
        if expected.endswith("…"):
            assert issue.startswith(expected[:-1])
        else:
            assert expected == issue


@pytest.mark.parametrize("kind", ["valid", "invalid"])
def test_named(kind: str) -> None:
    """A vector has the name of its file, and says what it shows."""
    for path in sorted((VECTORS / kind).iterdir()):
        vector = json.loads(path.read_text())
        assert path.name == f"{vector['name']}.json"
        assert vector["shows"]


def test_as_written_by_the_tool(capsys: pytest.CaptureFixture[str]) -> None:
    """The valid vectors are those that tools/generate/make_vectors.py writes."""
    assert TOOL["main"](["--check"]) == 0, capsys.readouterr().out


def test_tool(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The tool writes what is missing, removes what is not its own, and tells differences."""
    main = TOOL["main"]
    main.__globals__["VALID"] = directory = tmp_path / "valid"
    try:
        assert main([]) == 0
        assert main(["--check"]) == 0
        (directory / "stream-head.json").write_text("{}")
        (directory / "other.json").write_text("{}")
        assert main(["--check"]) == 1
        lines = capsys.readouterr().out.splitlines()
        names = [Path(line.split()[0]).name for line in lines]
        assert names == ["other.json", "stream-head.json"]
        assert main([]) == 0
        assert main(["--check"]) == 0
        assert main(["--help"]) == 2
    finally:
        main.__globals__["VALID"] = VECTORS / "valid"
