"""Real artefacts, made by the tools that people make them with, and what is done to them.

Under `CI=true` a missing tool is a failure; elsewhere its tests are skipped.
"""

from __future__ import annotations

import os
import shutil
import struct
import subprocess
from collections.abc import Iterable, Iterator
from pathlib import Path

import pytest
from imgtool.main import imgtool

from netota_coap.errors import InvalidDataError
from netota_coap.publishing import inspection
from netota_coap.publishing.inspection.artefact import Artefact
from tests.support import environment

BODY = bytes(range(256)) * 40
CODE = "void _start(void) { for (;;) {} }\n"
KEYS = ("rsa-2048", "rsa-3072", "ecdsa-p256", "ecdsa-p384", "ed25519", "x25519")

MANIFEST = """\
[update]
compatible={compatible}
version={version}
description=The first of all
build=20261120

[bundle]
format={format}

[image.rootfs]
filename=root.ext4

[image.appfs]
filename=app.squashfs
"""


def run(program: str, *arguments: object, cwd: Path | None = None) -> str:
    """Run a tool to its good end; what it says."""
    found = shutil.which(program, path=environment.PATH)
    if found is None and os.environ.get("CI") != "true":
        pytest.skip(f"{program} is missing: run tools/setup dev as root")
    assert found is not None, f"{program} is missing"
    command = [found, *map(str, arguments)]
    done = subprocess.run(
        command, cwd=cwd, check=False, capture_output=True, text=True, timeout=60
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def refused(tool: str, paths: Iterable[Path]) -> set[Path]:
    """Return those of compressed files that their tool does not find sound."""
    # One after the other: gzip stops at the first one that is truncated.
    script = 'for each; do "$0" -t -q "$each" || echo "$each"; done'
    return set(map(Path, run("sh", "-c", script, tool, *paths).splitlines()))


def run_imgtool(*arguments: object) -> None:
    """Run imgtool: in this process, for starting Python takes longer than what it does."""
    imgtool.main([str(argument) for argument in arguments], standalone_mode=False)


def keys(directory: Path) -> Path:
    """Make a key of each kind, and the public keys to encrypt for."""
    for kind in KEYS:
        run_imgtool("keygen", "-k", directory / f"{kind}.pem", "-t", kind)
    for kind in ("rsa-2048", "ecdsa-p256", "x25519"):
        public = directory / f"{kind}.pub"
        run_imgtool("getpub", "-k", directory / f"{kind}.pem", "-e", "pem", "-o", public)
    return directory


def image(path: Path, *options: object, version: str = "1.2.3+4", body: bytes = BODY) -> Path:
    """Make an MCUboot image."""
    source = path.with_name("body.bin")
    source.write_bytes(body)
    layout = ("-H", 512, "--pad-header", "-S", 0x10000, "--align", 4, "-M", 16)
    run_imgtool("sign", "-v", version, *layout, *options, source, path)
    return path


def ext(path: Path, kind: str = "ext4", *options: object, size: int = 2 << 20) -> Path:
    """Make an ext2, ext3 or ext4 file system."""
    with path.open("wb") as file:
        file.truncate(size)
    run(f"mkfs.{kind}", "-q", "-F", *options, path)
    return path


def squashfs(path: Path, compression: str = "zstd") -> Path:
    """Make a SquashFS of one file."""
    directory = path.with_name("contents")
    directory.mkdir(exist_ok=True)
    (directory / "file").write_bytes(BODY)
    run("mksquashfs", directory, path, "-noappend", "-quiet", "-no-progress", "-comp", compression)
    return path


def packed(path: Path, data: bytes, tool: str, *options: object) -> Path:
    """Make a compressed file, whose name has the suffix of its tool."""
    source = path.with_suffix("")
    source.write_bytes(data)
    run(tool, "-k", "-f", "-q", *options, source)
    return path


def elf(path: Path, *options: object) -> Path:
    """Make an ELF file that needs no library."""
    source = path.with_name("code.c")
    source.write_text(CODE)
    run("gcc", "-nostdlib", "-static", *options, "-o", path, source)
    return path


def certificate(directory: Path) -> Path:
    """Make a key and a certificate for it, key.pem and cert.pem."""
    run(
        "openssl", "req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:P-256",
        "-nodes", "-keyout", "key.pem", "-out", "cert.pem", "-subj", "/CN=test",
        cwd=directory,
    )  # fmt: skip
    return directory


def bundle(
    path: Path,
    certificate: Path,
    bundle_format: str = "verity",
    manifest: str = MANIFEST,
    compatible: str = "edgebox-imx8",
    version: str = "2026.11-1",
) -> Path:
    """Make a RAUC bundle of two images."""
    directory = path.with_name(f"{path.stem}.d")
    directory.mkdir()
    ext(directory / "root.ext4")
    squashfs(path.with_name("app.squashfs")).rename(directory / "app.squashfs")
    # RAUC refuses payloads of one block.
    (directory / "padding").write_bytes(os.urandom(20_000))
    (directory / "manifest.raucm").write_text(
        manifest.format(format=bundle_format, compatible=compatible, version=version),
        encoding="utf-8",
    )
    with_keys = ("--cert", certificate / "cert.pem", "--key", certificate / "key.pem")
    run("rauc", "bundle", *with_keys, directory, path)
    return path


def patched(data: bytes, offset: int, layout: str, *values: int) -> bytes:
    """Write numbers over what stands at an offset."""
    patch = struct.pack(layout, *values)
    return data[:offset] + patch + data[offset + len(patch) :]


def mutilated(data: bytes) -> Iterator[tuple[str, bytes]]:
    """Cut and damage a file, here and there; what was done, and the result."""
    size = len(data)
    ends = {0, 1, 3, 4, 8, 20, 31, 32, 33, 64, 100, 511, 512, 1023, 1100, 1400, 2048}
    ends |= {size * n // 8 for n in range(1, 8)} | {size - n for n in (1, 2, 7, 8, 9, 100, 600)}
    for end in sorted(end for end in ends if 0 <= end < size):
        yield f"cut at {end}", data[:end]
    places = {*range(64), *range(1024, 1130), *range(size - 64, size), size // 2, size // 3}
    for place in sorted(place for place in places if 0 <= place < size):
        yield f"flipped at {place}", data[:place] + bytes([data[place] ^ 0xFF]) + data[place + 1 :]
    yield "with more after it", data + b"\x55" * 1000


def outcome(path: Path) -> Artefact | InvalidDataError:
    """Read a file; nothing but these two may come of it."""
    try:
        return inspection.read(path)
    except InvalidDataError as error:
        assert error.detail.startswith(str(path))
        return error
