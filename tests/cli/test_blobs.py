"""The commands for blobs, run as they are run."""

from __future__ import annotations

import hashlib
import json
import re
from pathlib import Path

from netota_coap.repository.blobs import Blobs
from tests.cli.test_commands import ok
from tests.cli.test_publish import SHAPES, keys
from tests.support.serving import netota
from tests.support.storing import FIRMWARE, PLACE, SHA256, damage

NAME = "sensor-node/stable"
NONE = "0 blobs, 0 bytes\n"


async def test_a_life_of_a_blob(sample: Path, image: Path) -> None:
    """Published, listed, verified, damaged, set aside, added again, removed."""
    publish = ("publish", sample, NAME, "2.0", "--archive", image, "--allow-missing", "--store")
    dry = await ok(*publish, "--dry-run")
    assert "has no offer:" not in dry
    assert await ok("blob", "list", sample) == NONE
    assert await ok(*publish) == f"{NAME}: 2.0, sequence 2, 1 archives\n"
    listed = await ok("blob", "list", sample)
    assert re.search(rf"^{SHA256.hex()}  8 +\d{{4}}-\d\d-\d\dT\S+Z *$", listed, re.MULTILINE)
    assert listed.endswith("\n1 blobs, 8 bytes\n")
    assert await ok("blob", "verify", sample) == NONE
    assert await ok("diff", sample, NAME) == dry

    damage(sample / PLACE, b"x")
    code, out, _ = await netota("blob", "verify", sample)
    assert code == 1
    assert f"{SHA256.hex()}  1" in out
    assert "damaged" in out
    assert "2 warnings" in await ok("check", sample)
    assert f"{image.stem}: has no offer: nobody" in await ok("diff", sample, NAME)
    assert "1 blobs, 8 bytes" in await ok("blob", "add", sample, image, "--link")
    assert (sample / PLACE).samefile(image)
    assert await ok("blob", "gc", sample) == NONE
    assert "1 blobs, 1 bytes" in await ok("blob", "gc", sample, "--grace-s", "0")

    await ok("rollback", sample, NAME, "--allow-missing")
    assert await ok("blob", "gc", sample, "--grace-s", "0", "--keep", "1") == NONE
    gc = ("blob", "gc", sample, "--grace-s", "0", "--keep", "0")
    assert "1 blobs, 8 bytes" in await ok(*gc, "--dry-run")
    assert "1 blobs, 8 bytes" in await ok(*gc)
    assert await ok("blob", "list", sample) == NONE
    assert image.read_bytes() == FIRMWARE


async def test_stored_by_a_release_file(sample: Path, image: Path) -> None:
    """All files of a release file are stored."""
    other = image.with_name("other.bin")
    other.write_bytes(b"other")
    file = image.with_name("release.toml")
    file.write_text('version = "2.0"\n[[archives]]\nfile = "*.bin"\n')
    await ok("publish", sample, NAME, "--release", file, "--store", "--allow-missing")
    expected = {SHA256, hashlib.sha256(b"other").digest()}
    assert {blob.sha256 for blob in Blobs(sample).all()} == expected


async def test_json(sample: Path, image: Path) -> None:
    """What is printed for scripts has the keys that cli.md shows."""
    expected = keys(json.loads(SHAPES["blobs"]))
    for words in (("add", sample, image), ("list", sample), ("gc", sample, "--grace-s", "0")):
        printed = json.loads(await ok("blob", *words, "--json"))
        assert expected == keys(printed)
        assert printed[0]["sha256"] == SHA256.hex()
    assert json.loads(await ok("blob", "verify", sample, "--json")) == []


async def test_errors(sample: Path, tmp_path: Path) -> None:
    """Usage, files and repositories that are wrong have their exit codes, and a hint."""
    code, _, err = await netota("blob", "gc", sample, "--keep", "-1")
    assert (code, "Invalid value for '--keep'" in err) == (2, True)
    code, _, err = await netota("blob", "add", sample, tmp_path / "none")
    assert (code, err) == (
        3,
        f"error: {tmp_path}/none: cannot be read: No such file or directory\n",
    )
    for words in (("list",), ("verify",), ("gc",), ("add", sample / "repository.toml")):
        code, _, err = await netota("blob", words[0], tmp_path, *words[1:])
        assert code == 3
        assert f"hint: Make one: netota-coap init {tmp_path}" in err
