"""MCUboot images, made by imgtool and compared with what imgtool says of them."""

from __future__ import annotations

import hashlib
import json
import os
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from netota_coap import files as source_files
from netota_coap.errors import InvalidDataError
from netota_coap.model.values import Content
from netota_coap.publishing import inspection
from netota_coap.publishing.inspection import artefact
from tests.support import artefact_files as files

CHUNK = source_files.CHUNK
HASHED = 512 + len(files.BODY)
"""Where the TLVs of an image without protected ones begin."""


@pytest.fixture(scope="module")
def keys(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return files.keys(tmp_path_factory.mktemp("keys"))


@pytest.fixture(scope="module")
def signed(keys: Path) -> bytes:
    """An image with protected TLVs, signed."""
    options = ("-k", keys / "ed25519.pem", "-s", "7", "-d", "(1, 2.0.1+0)")
    return files.image(keys / "signed.bin", *options).read_bytes()


# What is checked beside what imgtool says itself: options, facts, content.
IMAGES: dict[str, tuple[str, dict[str, Any], dict[str, Any]]] = {
    "unsigned": ("", {"signatures": [], "image_hash_algorithm": "sha256"}, {}),
    "rsa-2048": ("-k rsa-2048.pem", {"signatures": ["rsa-2048"], "load_address": 0}, {}),
    "rsa-3072": ("-k rsa-3072.pem", {"signatures": ["rsa-3072"]}, {}),
    "ecdsa-p256": ("-k ecdsa-p256.pem", {"signatures": ["ecdsa-p256"], "encrypted": False}, {}),
    "ecdsa-p384": (
        "-k ecdsa-p384.pem",
        {"signatures": ["ecdsa-p384"], "image_hash_algorithm": "sha384"},
        {},
    ),
    "ed25519": ("-k ed25519.pem", {"signatures": ["ed25519"]}, {}),
    "pure": (
        "-k ed25519.pem --pure",
        {"signatures": ["ed25519"], "image_hash_algorithm": "sha512"},
        {},
    ),
    "sha512": ("--sha 512", {"image_hash_algorithm": "sha512"}, {}),
    "whole key": ("-k ed25519.pem --public-key-format full", {"signatures": ["ed25519"]}, {}),
    "security counter": ("-s 7", {"security_counter": 7}, {}),
    "boot record": ("--boot-record NSPE", {}, {}),
    "dependencies": (
        "-d (0,1.2.3+4),(2,2.0.1)",
        {"dependencies": [{"image": 0, "version": "1.2.3+4"}, {"image": 2, "version": "2.0.1"}]},
        {},
    ),
    "for RAM": ("-L 0x20000000", {"load_address": 0x20000000, "flags": ["ram_load"]}, {}),
    "for ROM": ("-F 0x8000", {"load_address": 0x8000, "flags": ["rom_fixed"]}, {}),
    "encrypted for RSA": (
        "-k rsa-2048.pem -E rsa-2048.pub",
        {"encrypted": True, "encryption": "aes-128", "key_exchange": "rsa-2048"},
        {},
    ),
    "encrypted for P-256": (
        "-k ecdsa-p256.pem -E ecdsa-p256.pub --encrypt-keylen 256",
        {"encrypted": True, "encryption": "aes-256", "key_exchange": "ecies-p256"},
        {},
    ),
    "encrypted for X25519": (
        "-k ed25519.pem -E x25519.pub -s 1",
        {"encrypted": True, "image_hash_checked": False, "key_exchange": "ecies-x25519"},
        {},
    ),
    "to be encrypted": (
        "-k ecdsa-p256.pem -E ecdsa-p256.pub --clear",
        {"encrypted": False, "image_hash_checked": True, "encryption": "aes-128"},
        {},
    ),
    "compressed": (
        "-k ed25519.pem --compression lzma2",
        {"compression": "lzma2"},
        {"compression": "lzma2"},
    ),
    "padded": ("--pad", {"slot_trailer": True}, {}),
    "confirmed": ("-k ed25519.pem --confirm --max-align 16", {"slot_trailer": True}, {}),
}


@pytest.mark.parametrize("name", IMAGES)
def test_images(name: str, keys: Path) -> None:
    """An image is what imgtool says that it is, and its hash is checked unless it is encrypted."""
    options, facts, content = IMAGES[name]
    paths = [keys / word if word.endswith((".pem", ".pub")) else word for word in options.split()]
    path = files.image(keys / f"{name}.bin", *paths)
    files.run_imgtool("dumpinfo", "-s", "-f", "json", "-o", keys / "dump.json", path)
    dump = json.loads((keys / "dump.json").read_text())
    found = inspection.read(path)
    data = path.read_bytes()

    assert found.envelope.type == "application/vnd.mcuboot.image"
    assert (len(data), hashlib.sha256(data).digest()) == (
        found.envelope.size,
        found.envelope.sha256,
    )
    assert "1.2.3+4" == found.version == dump["header"]["version"]
    assert Content(type="mcuboot-image", **content) == found.content
    assert frozenset({"version", *content}) == found.stated
    header = {
        "format": "mcuboot",
        "version": "1.2.3+4",
        "load_address": dump["header"]["load_addr"],
        "header_size": dump["header"]["hdr_size"],
        "body_size": dump["header"]["img_size"],
        "image_hash_checked": not facts.get("encrypted", False),
    }
    assert header | facts == {key: found.facts[key] for key in header | facts}
    assert next(iter(found.facts)) == "format"
    json.dumps(found.facts)


@pytest.mark.parametrize(
    ("version", "expected"),
    [
        ("0.0.0", "0.0.0"),
        ("1.2.3+0", "1.2.3"),
        ("1.2", "1.2.0"),
        ("255.255.65535+4294967295", "255.255.65535+4294967295"),
    ],
)
def test_version_is_as_mcuboot_shows_it(version: str, expected: str, tmp_path: Path) -> None:
    """A build number of 0 is left out."""
    assert expected == inspection.read(files.image(tmp_path / "a.bin", version=version)).version


@pytest.mark.parametrize(
    ("a", "b", "differ"),
    [
        ("1.2.3", "1.2.3", False),
        ("1.2.3", "1.2.3+0", False),
        ("1.2.3+0", "1.2.3", False),
        ("1.2.3+4", "1.2.3", True),
        ("1.2.3+4", "1.2.3+0", True),
        ("1.2.3+00", "1.2.3", True),
        ("1.2.03", "1.2.3", True),
        ("1.2+0", "1.2", True),
        ("v1.2.3+0", "v1.2.3", True),
    ],
)
def test_versions_differ(a: str, b: str, differ: bool) -> None:
    """Only a build number of 0 makes no difference."""
    assert differ is inspection.versions_differ(a, b)


@pytest.mark.parametrize("algorithm", ["256", "512"])
@pytest.mark.parametrize("size", [0, 1, CHUNK - 512, CHUNK - 511, 2_500_000])
def test_hash_is_checked_across_buffers(algorithm: str, size: int, tmp_path: Path) -> None:
    """Whether an image ends before, at or after the end of a buffer, its hash is checked."""
    body = b"\x5a" * size
    options = ("--sha", algorithm, "-S", 0x400000)
    path = files.image(tmp_path / "image.bin", *options, body=body)
    seen: list[int] = []

    assert inspection.read(path, seen.append).facts["image_hash_checked"] is True
    assert path.stat().st_size == sum(seen)


def test_image_that_was_not_signed(keys: Path) -> None:
    """What imgtool makes for another signer is no image that a device takes."""
    path = files.image(
        keys / "payload.bin", "-k", keys / "ed25519.pem", "--vector-to-sign", "payload"
    )
    with pytest.raises(InvalidDataError, match="without a hash: imgtool did not") as raised:
        inspection.read(path)
    assert "imgtool sign" in raised.value.hint


@pytest.mark.parametrize(
    ("offset", "layout", "values", "reason"),
    [
        (8, "<H", [31], "has an MCUboot header of 31 bytes, fewer than 32"),
        (12, "<I", [2**32 - 1], "is truncated: its body ends at byte 4294967807"),
        (10, "<H", [27], "its protected TLVs end at byte"),
        (10, "<H", [0], "its TLVs are not at byte"),
        (20, "<B", [2], "the image hash does not match: the file is damaged"),
        (700, "<B", [0], "the image hash does not match: the file is damaged"),
        (HASHED, "<H", [0x6907], "its protected TLVs are not at byte"),
        (HASHED + 2, "<H", [0xFFFF], "is truncated: its protected TLVs end"),
        (HASHED + 2, "<H", [3], "its protected TLVs do not fill their 3 bytes"),
        (HASHED + 6, "<H", [0xFFFF], "its protected TLVs do not fill their 28 bytes"),
        (HASHED + 28 + 4, "<H", [0x99], "without a hash"),
        (HASHED + 28 + 8, "<B", [0], "the image hash does not match"),
        (HASHED + 28 + 40, "<H", [0x10], "the image hash does not match"),  # a second one
    ],
)
def test_lies(
    offset: int, layout: str, values: list[int], reason: str, signed: bytes, tmp_path: Path
) -> None:
    """An image that contradicts itself is refused, and the error says where."""
    path = tmp_path / "image.bin"
    changed = files.patched(signed, offset, layout, *values)
    assert changed != signed
    path.write_bytes(changed)
    found = files.outcome(path)
    assert isinstance(found, InvalidDataError)
    assert reason in found.detail


def test_pure_signature_needs_no_hash(keys: Path) -> None:
    """An image with a pure signature may have no hash; then none is checked."""
    path = files.image(keys / "pure.bin", "-k", keys / "ed25519.pem", "--pure")
    path.write_bytes(files.patched(path.read_bytes(), HASHED + 4, "<H", 0x99))
    facts = inspection.read(path).facts
    assert (facts["image_hash_checked"], facts.get("image_hash")) == (False, None)


def test_what_follows_an_image_is_a_fact(signed: bytes, tmp_path: Path) -> None:
    """Padding after the TLVs is no error."""
    path = tmp_path / "image.bin"
    path.write_bytes(signed + b"\xff" * 100)
    facts = inspection.read(path).facts
    assert (facts["trailing_bytes"], facts["slot_trailer"]) == (100, False)


@pytest.mark.parametrize(
    ("options", "cut"),
    [
        ("--pad", 1),
        ("--pad", 3),
        ("--pad", 15),
        ("--pad --max-align 16", 3),
        ("--confirm", 3),
        ("--confirm", 16),
        ("--confirm", 20),
    ],
)
def test_slot_without_its_end(options: str, cut: int, tmp_path: Path) -> None:
    """An image that was padded to its slot and lost the end of it is refused."""
    path = files.image(tmp_path / "image.bin", *options.split())
    os.truncate(path, path.stat().st_size - cut)
    with pytest.raises(InvalidDataError, match="neither padding nor a whole slot trailer: a pad"):
        inspection.read(path)


def test_intel_hex_is_taken_as_it_is(tmp_path: Path) -> None:
    """An image in Intel HEX is not looked into."""
    path = files.image(tmp_path / "image.hex", "-x", 0)
    assert inspection.read(path).facts == {"format": "bytes"}


def test_mutilated_images(signed: bytes, tmp_path: Path) -> None:
    """Each cut and almost each flipped byte is noticed, in words."""
    path = tmp_path / "image.bin"
    for what, data in files.mutilated(signed):
        path.write_bytes(data)
        found = files.outcome(path)
        harmless = isinstance(found, artefact.Artefact) and (
            found.facts["format"] == "bytes" or len(data) >= len(signed)
        )
        assert isinstance(found, InvalidDataError) or harmless, what


@given(data=st.data())
def test_any_header(data: st.DataObject, signed: bytes, tmp_path: Path) -> None:
    """Whatever stands in header and TLVs, an image is read or refused."""
    changed = bytearray(signed)
    for place in data.draw(
        st.lists(st.integers(4, 31) | st.integers(HASHED, len(signed) - 1), max_size=6)
    ):
        changed[place] = data.draw(st.integers(0, 255))
    path = tmp_path / "image.bin"
    path.write_bytes(changed)
    files.outcome(path)
