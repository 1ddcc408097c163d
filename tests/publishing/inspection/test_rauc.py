"""RAUC bundles, made by rauc."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

import pytest

from netota_coap.errors import InvalidDataError
from netota_coap.model.values import Content
from netota_coap.publishing import inspection
from netota_coap.publishing.inspection import rauc
from tests.support import artefact_files as files

IMAGES = [
    {"class": "rootfs", "filename": "root.ext4", "size": 2 << 20, "filesystem": "ext4"},
    {"class": "appfs", "filename": "app.squashfs", "size": 4096, "filesystem": "squashfs"},
]


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return files.certificate(tmp_path_factory.mktemp("rauc"))


@pytest.fixture(scope="module")
def bundle(directory: Path) -> Path:
    return files.bundle(directory / "bundle.raucb", directory)


def with_rauc(monkeypatch: pytest.MonkeyPatch, directory: Path, script: str = "") -> None:
    """Put another rauc into the path, or none."""
    if script:
        (directory / "rauc").write_text(script)
        (directory / "rauc").chmod(0o755)
    monkeypatch.setenv("PATH", str(directory))


@pytest.mark.parametrize("bundle_format", ["plain", "verity", "crypt"])
def test_bundles(bundle_format: str, directory: Path) -> None:
    """A bundle of each format tells version, compatible, and what is in it."""
    path = files.bundle(directory / f"{bundle_format}.raucb", directory, bundle_format)
    found = inspection.read(path)
    # What is encrypted does not tell how it is compressed.
    compression = None if bundle_format == "crypt" else "gzip"

    assert found.envelope.type == "application/vnd.rauc.bundle"
    assert found.version == "2026.11-1"
    assert frozenset({"version", "filesystem"}) == found.stated
    expected = Content(
        type="rauc-bundle", machine="edgebox-imx8", filesystem="ext4", compression=compression
    )
    assert expected == found.content
    assert {
        "format": "rauc",
        "bundle_format": bundle_format,
        "compatible": "edgebox-imx8",
        "version": "2026.11-1",
        "description": "The first of all",
        "build": "20261120",
        "images": IMAGES,
    } == found.facts


def test_encrypted_manifest(directory: Path) -> None:
    """A bundle that only its recipients can read asks for what it hides."""
    path = files.bundle(directory / "open.raucb", directory, "crypt")
    key = ("--keyring", directory / "cert.pem", "--to", directory / "recipient.pem")
    files.run(
        "openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-keyout", "recipient.key",
        "-out", "recipient.pem", "-subj", "/CN=recipient", cwd=directory,
    )  # fmt: skip
    files.run("rauc", "encrypt", *key, path, directory / "encrypted.raucb")
    found = inspection.read(directory / "encrypted.raucb")

    assert (Content(type="rauc-bundle"), None) == (found.content, found.version)
    assert frozenset() == found.stated
    assert {"format", "bundle_format", "hint"} == found.facts.keys()
    assert "the manifest is encrypted" in found.facts["hint"]


@pytest.mark.parametrize(
    ("section", "filesystem"),
    [
        ("[image.rootfs]\nfilename=root.ext4", "ext4"),
        ("[image.appfs]\nfilename=app.squashfs", "squashfs"),
        ("[image.kernel]\nfilename=root.ext4\n[image.appfs]\nfilename=app.squashfs", None),
        ("[image.kernel]\nfilename=padding", None),
        ("", None),
    ],
)
def test_file_system_is_that_of_the_root(
    section: str, filesystem: str | None, directory: Path, tmp_path: Path
) -> None:
    """That of the image of class rootfs, or of the only one, by the suffix of its name."""
    head = files.MANIFEST.partition("[image")[0]
    path = files.bundle(tmp_path / "bundle.raucb", directory, manifest=head + section + "\n")
    found = inspection.read(path)
    assert filesystem == found.content.filesystem
    assert ("filesystem" in found.stated) is (filesystem is not None)


def test_names_that_no_stream_can_hold(directory: Path, tmp_path: Path) -> None:
    """A compatible or version that is too long is left to the facts."""
    compatible, version = "b" * 65, "v" * 65
    path = files.bundle(
        tmp_path / "bundle.raucb", directory, compatible=compatible, version=version
    )
    found = inspection.read(path)
    assert (found.content.machine, found.version) == (None, None)
    assert "version" not in found.stated
    assert (compatible, version) == (found.facts["compatible"], found.facts["version"])


def test_text_beyond_ascii(directory: Path, tmp_path: Path) -> None:
    """What a manifest says arrives as it is, in whatever language."""
    path = files.bundle(tmp_path / "bundle.raucb", directory, compatible="Börd", version="2.0 ü")
    found = inspection.read(path)
    assert (found.facts["compatible"], found.facts["version"]) == ("Börd", "2.0 ü")
    assert (found.content.machine, found.version) == ("Börd", "2.0 ü")


def test_without_rauc(bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A bundle is recognized without rauc, and a hint says what it takes to read it."""
    with_rauc(monkeypatch, tmp_path)
    found = inspection.read(bundle)
    assert (None, frozenset()) == (found.version, found.stated)
    assert Content(type="rauc-bundle", compression="gzip") == found.content
    assert found.facts["bundle_format"] == "verity"
    assert "apt-get install rauc" in found.facts["hint"]


def test_rauc_has_the_last_word(directory: Path, tmp_path: Path) -> None:
    """What rauc refuses is refused in its words."""
    whole = files.bundle(tmp_path / "plain.raucb", directory, "plain").read_bytes()
    path = tmp_path / "bundle.raucb"
    # The superblock: where the table of identifiers is.
    path.write_bytes(whole[:48] + b"\xff" * 8 + whole[56:])
    with pytest.raises(InvalidDataError, match=r"rauc refuses it: .*unsquashfs") as raised:
        inspection.read(path)
    assert "\n" not in raised.value.detail


@pytest.mark.parametrize(
    ("script", "reason"),
    [
        ("#!/bin/sh\nexit 1\n", "rauc refuses it: it gives no reason"),
        ("#!/bin/sh\necho one >&2; echo two >&2; exit 3\n", "rauc refuses it: two"),
        ("#!/bin/sh\necho no\n", "rauc's output is not valid JSON"),
        ("#!/bin/sh\nprintf '%0100000d' 0 | /usr/bin/tr 0 '['\n", "rauc's output is not"),
        ("#!/bin/sh\n/usr/bin/head -c 2000000 /dev/zero\n", "rauc's output is not valid JSON"),
        ("#!/bin/sh\nexec /bin/sleep 60\n", "rauc did not answer in 0.2 s"),
        ("#!/nowhere\n", "rauc cannot be run: No such file"),
    ],
)
def test_rauc_that_fails(
    script: str, reason: str, bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whatever rauc does, an error comes of it, in bounded time and memory."""
    with_rauc(monkeypatch, tmp_path, script)
    monkeypatch.setattr(rauc, "TIMEOUT_S", 0.2 if "sleep" in script else 30)
    with pytest.raises(InvalidDataError, match=reason):
        inspection.read(bundle)


@pytest.mark.parametrize(
    ("answer", "facts"),
    [
        ([], {"images": []}),
        ({"version": 1, "compatible": None, "images": {}}, {"images": []}),
        ({"version": "", "images": [1, {"a": 2}]}, {"images": [{"class": "a"}]}),
        (
            {"images": [{"a": {"filename": "a.b.ext4.zst", "size": True, "variant": "v"}}]},
            {
                "images": [
                    {
                        "class": "a",
                        "variant": "v",
                        "filename": "a.b.ext4.zst",
                        "filesystem": "ext4",
                    }
                ]
            },
        ),
    ],
)
def test_rauc_that_answers_otherwise(
    answer: object,
    facts: dict[str, object],
    bundle: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Of an answer in another form as much is taken as is understood."""
    with_rauc(monkeypatch, tmp_path, f"#!/bin/sh\necho '{json.dumps(answer)}'\n")
    found = inspection.read(bundle).facts
    assert {"format": "rauc", "bundle_format": "verity"} | facts == found


def test_rauc_is_asked_for_the_open_file(
    bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A file that begins with a dash, or is moved away, is still the one that rauc reads."""
    monkeypatch.chdir(tmp_path)
    shutil.copy(bundle, "-bundle.raucb")
    assert inspection.read(Path("-bundle.raucb")).version == "2026.11-1"


def test_bundle_without_its_end(bundle: Path, tmp_path: Path) -> None:
    """A truncated bundle is noticed by its name."""
    path = tmp_path / "bundle.raucb"
    path.write_bytes(bundle.read_bytes()[:-1])
    with pytest.raises(InvalidDataError, match="is no RAUC bundle, or is truncated"):
        inspection.read(path)


@pytest.mark.parametrize("bundle_format", ["plain", "verity"])
def test_bundle_without_its_end_and_name(
    bundle_format: str, directory: Path, tmp_path: Path
) -> None:
    """A truncated bundle of another name is noticed by what is left after its SquashFS."""
    whole = files.bundle(tmp_path / "whole.raucb", directory, bundle_format).read_bytes()
    size = int.from_bytes(whole[40:48], "little")
    end = -(-size // 4096) * 4096
    path = tmp_path / "update.img"
    for cut in {end + 8, end + 100, (end + len(whole)) // 2, *range(len(whole) - 9, len(whole))}:
        path.write_bytes(whole[:cut])
        with pytest.raises(InvalidDataError, match="a RAUC bundle without its end"):
            inspection.read(path)
    path.write_bytes(whole[: size - 1])
    with pytest.raises(InvalidDataError, match="is truncated: its squashfs ends"):
        inspection.read(path)


def test_mutilated_bundles(bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever is cut or damaged, a bundle is read or refused."""
    path = tmp_path / "bundle.raucb"
    data = bundle.read_bytes()
    # rauc is asked about every twentieth only: it takes its time.
    everywhere = os.environ["PATH"]
    for number, (what, changed) in enumerate(files.mutilated(data)):
        path.write_bytes(changed)
        monkeypatch.setenv("PATH", everywhere if number % 20 == 0 else str(tmp_path))
        found = files.outcome(path)
        assert len(changed) >= len(data) or isinstance(found, InvalidDataError), what
