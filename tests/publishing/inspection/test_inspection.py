"""Reading the files that are published: what is the same for all, and those known by their magic.

MCUboot images, RAUC bundles and Zephyr build directories have modules of their own.
"""

from __future__ import annotations

import hashlib
import json
import lzma
import os
import struct
import tarfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from netota_coap import files as source_files
from netota_coap.errors import InvalidDataError
from netota_coap.model.values import Content, Envelope
from netota_coap.publishing import inspection
from netota_coap.publishing.inspection.artefact import Artefact
from tests.support import artefact_files as files

CHUNK = source_files.CHUNK

# ----------------------------------------------------------------------------------------------
# Any file


@pytest.mark.parametrize("size", [0, 1, CHUNK - 1, CHUNK, CHUNK + 1, 3 * CHUNK])
def test_envelope_describes_the_file(tmp_path: Path, size: int) -> None:
    """Size and digest are those of all bytes, and the progress adds up to them."""
    data = (b"firmware" * (size // 8 + 1))[:size]
    path = tmp_path / "image.bin"
    path.write_bytes(data)
    seen: list[int] = []
    envelope = Envelope(
        type="application/octet-stream", size=size, sha256=hashlib.sha256(data).digest()
    )
    expected = Artefact(envelope=envelope, facts={"format": "bytes"})
    assert expected == inspection.read(path, seen.append)
    assert (size, -(-size // CHUNK)) == (sum(seen), len(seen))


def test_a_symbolic_link_is_followed(tmp_path: Path) -> None:
    """A link to a file is as good as the file."""
    (tmp_path / "image.bin").write_bytes(b"firmware")
    (tmp_path / "latest.bin").symlink_to("image.bin")
    expected = inspection.read(tmp_path / "image.bin")
    assert expected == inspection.read(tmp_path / "latest.bin")


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("missing", "cannot be read: No such file or directory"),
        ("directory", "is not a regular file"),
        ("pipe", "is not a regular file"),
        ("file/below", "cannot be read: Not a directory"),
        ("loop", "cannot be read: Too many levels of symbolic links"),
    ],
)
def test_what_cannot_be_read_is_named(tmp_path: Path, name: str, reason: str) -> None:
    """The error says which file and why, and nobody waits for a pipe."""
    (tmp_path / "directory").mkdir()
    (tmp_path / "file").write_bytes(b"")
    (tmp_path / "loop").symlink_to("loop")
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(InvalidDataError) as raised:
        inspection.read(tmp_path / name)
    assert f"{tmp_path / name}: {reason}" == raised.value.detail


def _append(path: Path) -> None:
    with path.open("ab") as file:
        file.write(b"more")


def _overwrite(path: Path) -> None:
    with path.open("r+b") as file:
        file.write(b"other")
    os.utime(path, ns=(1, 1))


@pytest.mark.parametrize("change", [_append, _overwrite, lambda path: os.truncate(path, CHUNK)])
def test_file_that_changes_is_refused(change: Callable[[Path], None], tmp_path: Path) -> None:
    """A file that grows, shrinks or is written to while it is read has no digest."""
    path = tmp_path / "image.bin"
    path.write_bytes(bytes(2 * CHUNK))
    with pytest.raises(InvalidDataError, match="changed while it was read") as raised:
        inspection.read(path, lambda _: change(path))
    assert raised.value.hint == "Try again when it is complete."


def test_file_that_shrinks_before_it_is_looked_at(tmp_path: Path) -> None:
    """A file that lost its end is not taken for one of another format."""
    path = tmp_path / "image.bin"
    path.write_bytes(bytes(2000))
    with (
        pytest.raises(InvalidDataError, match="changed while it was read"),
        source_files.opened(path) as file,
    ):
        os.truncate(path, 100)
        file.at(0, 2000)


# ----------------------------------------------------------------------------------------------
# ELF


@pytest.mark.parametrize(
    ("options", "facts"),
    [
        ("", {"arch": "x86_64", "class": 64, "kind": "executable", "debug_info": False}),
        ("-g", {"arch": "x86_64", "class": 64, "kind": "executable", "debug_info": True}),
        ("-g -gz", {"arch": "x86_64", "class": 64, "kind": "executable", "debug_info": True}),
        ("-m32", {"arch": "i386", "class": 32, "kind": "executable", "debug_info": False}),
        ("-m32 -g", {"arch": "i386", "class": 32, "kind": "executable", "debug_info": True}),
        ("-g -s", {"arch": "x86_64", "class": 64, "kind": "executable", "debug_info": False}),
        ("-c -g", {"arch": "x86_64", "class": 64, "kind": "relocatable", "debug_info": True}),
        ("-shared -fPIC", {"arch": "x86_64", "class": 64, "kind": "shared", "debug_info": False}),
    ],
)
@pytest.mark.skipif(os.uname().machine != "x86_64", reason="gcc makes files for this machine")
def test_elf(options: str, facts: dict[str, Any], tmp_path: Path) -> None:
    """An ELF file tells its architecture, and whether it has debug information."""
    path = files.elf(tmp_path / "app", *options.split())
    found = inspection.read(path)
    assert found.envelope.type == "application/x-executable"
    assert Content(arch=facts["arch"]) == found.content
    assert frozenset({"arch"}) == found.stated
    machine = {"x86_64": 62, "i386": 3}[facts["arch"]]
    assert {"format": "elf", "byte_order": "little", "machine": machine} | facts == found.facts


@pytest.fixture(scope="module")
def program(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    """An ELF file with debug information, of 64 bits and for a little-endian machine."""
    return files.elf(tmp_path_factory.mktemp("elf") / "app", "-g").read_bytes()


@pytest.mark.parametrize(
    ("machine", "arch"),
    [(183, "aarch64"), (243, "riscv64"), (21, "ppc64le"), (40, "arm"), (0xFFFF, None)],
)
def test_architectures(machine: int, arch: str | None, program: bytes, tmp_path: Path) -> None:
    """The architecture is that of the machine, for its class and byte order; or not known."""
    path = tmp_path / "app"
    path.write_bytes(files.patched(program, 18, "<H", machine))
    found = inspection.read(path)
    assert Content(arch=arch) == found.content
    assert (found.stated == {"arch"}) is (arch is not None)


def test_elf_of_many_sections(tmp_path: Path) -> None:
    """More sections than their number has bits for are no obstacle."""
    source = tmp_path / "many.s"
    source.write_text(
        ".altmacro\n.macro s n\n.section .s\\n\n.byte 0\n.endm\n.set i,0\n"
        ".rept 65300\ns %i\n.set i,i+1\n.endr\n.section .debug_info\n.byte 0\n"
    )
    path = tmp_path / "many.o"
    files.run("gcc", "-c", "-o", path, source)
    assert inspection.read(path).facts["debug_info"] is True


def test_elf_without_sections(program: bytes, tmp_path: Path) -> None:
    """A file whose sections were cut away has no debug information."""
    path = tmp_path / "app"
    path.write_bytes(files.patched(program, 40, "<Q", 0))
    assert inspection.read(path).facts["debug_info"] is False


def test_elf_of_debug_information_only(program: bytes, tmp_path: Path) -> None:
    """Sections without names have none of debug information."""
    sections, names = struct.unpack_from("<Q", program, 40)[0], program[62]
    path = tmp_path / "app"
    path.write_bytes(files.patched(program, sections + 64 * names + 4, "<I", 8))
    assert inspection.read(path).facts["debug_info"] is False


@pytest.mark.parametrize(
    ("offset", "layout", "value", "reason"),
    [
        (4, "B", 3, "is an ELF file of unknown class 3 or byte order 1"),
        (5, "B", 0, "is an ELF file of unknown class 2 or byte order 0"),
        (5, "B", 2, "its section headers are of 16384 bytes: the file is damaged"),
        (40, "<Q", 2**64 - 1, "is truncated: its section headers end at byte 1844674407370955"),
        (58, "<H", 40, "its section headers are of 40 bytes: the file is damaged"),
        (60, "<H", 0xFFFF, "is truncated: its section headers end"),
        (62, "<H", 0xFFFE, "is truncated: its section headers end"),
    ],
)
def test_elf_that_lies(
    offset: int, layout: str, value: int, reason: str, program: bytes, tmp_path: Path
) -> None:
    """A header that does not go with the file is refused, and the error says what."""
    path = tmp_path / "app"
    path.write_bytes(files.patched(program, offset, layout, value))
    with pytest.raises(InvalidDataError) as raised:
        inspection.read(path)
    assert reason in raised.value.detail


# ----------------------------------------------------------------------------------------------
# File systems


@pytest.mark.parametrize("compression", ["gzip", "xz", "lzo", "lz4", "zstd"])
def test_squashfs(compression: str, tmp_path: Path) -> None:
    """A SquashFS tells how it is compressed; mksquashfs pads it to 4 KiB."""
    path = files.squashfs(tmp_path / "app.squashfs", compression)
    found = inspection.read(path)
    size = found.facts["filesystem_size"]
    assert found.envelope.type == "application/vnd.squashfs"
    assert Content(filesystem="squashfs", compression=compression) == found.content
    assert frozenset({"filesystem", "compression"}) == found.stated
    assert {
        "format": "squashfs",
        "filesystem": "squashfs",
        "filesystem_size": size,
        "block_size": 1 << 17,
        "compression": compression,
        "trailing_bytes": path.stat().st_size - size,
    } == found.facts


@pytest.mark.parametrize(
    "follower",
    [
        bytes(1 << 20),
        b"\xff" * (2 << 20),
        bytes(4096) + b"\xff" * 70_000,
        bytes(60_000) + b"verity\0\0\1\0\0\0",
        b"\xde\xad\xc0\xde",
    ],
    ids=["zeros", "erased flash", "both", "veritysetup", "OpenWrt"],
)
def test_what_may_follow_a_squashfs(
    follower: bytes, real: dict[str, bytes], tmp_path: Path
) -> None:
    """Padding of any length, the superblock of dm-verity, and OpenWrt's mark are known."""
    path = tmp_path / "rootfs"
    path.write_bytes(real["squashfs"] + follower)
    assert inspection.read(path).facts["trailing_bytes"] > len(follower)


@pytest.mark.parametrize("padding", [0, 1, CHUNK - 4096, CHUNK, 3 * CHUNK + 1])
def test_what_may_not_follow_a_squashfs(
    padding: int, real: dict[str, bytes], tmp_path: Path
) -> None:
    """Other bytes are named by their offset, wherever the padding before them ends."""
    path = tmp_path / "rootfs"
    data = real["squashfs"] + b"\xff" * padding
    path.write_bytes(data + b"\x55\0")
    with pytest.raises(InvalidDataError) as raised:
        inspection.read(path)
    expected = f"{path}: bytes at {len(data)} follow the end of its SquashFS: a RAUC bundle"
    assert raised.value.detail.startswith(expected)


@pytest.mark.parametrize(
    ("kind", "options", "facts"),
    [
        ("ext2", "-b 2048", {"block_size": 2048}),
        ("ext3", "-b 1024", {"block_size": 1024}),
        ("ext4", "-b 4096 -L rootfs", {"block_size": 4096, "label": "rootfs"}),
        ("ext4", "-b 1024 -O 64bit", {"block_size": 1024}),
    ],
)
def test_ext(kind: str, options: str, facts: dict[str, Any], tmp_path: Path) -> None:
    """The three generations of the ext file system are told apart by what they need."""
    found = inspection.read(files.ext(tmp_path / "rootfs", kind, *options.split()))
    assert found.envelope.type == "application/octet-stream"
    assert Content(filesystem=kind) == found.content
    assert frozenset({"filesystem"}) == found.stated
    expected = {"format": "ext4", "filesystem": kind, "filesystem_size": 2 << 20} | facts
    assert expected == found.facts


@pytest.mark.parametrize(
    ("name", "end", "reason"),
    [
        ("squashfs", 500, "is truncated: its squashfs ends at byte"),
        ("squashfs", 47, "is truncated: its superblock ends at byte 48, the file at 47"),
        ("ext4", 262_143, "is truncated: its ext4 ends at byte 262144, the file at 262143"),
    ],
)
def test_truncated_file_system(
    name: str, end: int, reason: str, real: dict[str, bytes], tmp_path: Path
) -> None:
    """A file system that its file does not hold all of is refused."""
    path = tmp_path / "rootfs"
    path.write_bytes(real[name][:end])
    with pytest.raises(InvalidDataError) as raised:
        inspection.read(path)
    assert reason in raised.value.detail


# ----------------------------------------------------------------------------------------------
# Archives and compressed files


@pytest.fixture(scope="module")
def real(tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    """One file of each format, by the suffix of its name."""
    directory = tmp_path_factory.mktemp("real")
    files.ext(directory / "a.ext4", size=256 << 10)
    files.squashfs(directory / "a.squashfs", "xz")
    files.elf(directory / "a.elf", "-g")
    (directory / "plain").write_bytes(files.BODY)
    files.run("tar", "-cf", "a.tar", "plain", cwd=directory)
    made: list[tuple[str, str, str]] = [
        (tool, inside, suffix)
        for tool, suffix in (("gzip", "gz"), ("xz", "xz"), ("zstd", "zst"))
        for inside in ("plain", "a.tar", "a.ext4")
    ]
    for tool, inside, suffix in made:
        files.run(tool, "-k", "-q", inside, cwd=directory)
        if inside == "plain":
            (directory / f"plain.{suffix}").rename(directory / f"a.{suffix}")
    return {path.name.partition(".")[2]: path.read_bytes() for path in directory.glob("a.*")}


@pytest.mark.parametrize(
    ("name", "media_type", "content", "facts"),
    [
        ("tar", "application/x-tar", {}, {"format": "tar"}),
        ("gz", "application/gzip", {"compression": "gzip"}, {"format": "gzip"}),
        ("xz", "application/x-xz", {"compression": "xz"}, {"format": "xz"}),
        ("zst", "application/zstd", {"compression": "zstd"}, {"format": "zstd"}),
        (
            "tar.gz", "application/gzip", {"compression": "gzip"},
            {"format": "gzip", "inside": "tar"},
        ),
        ("tar.xz", "application/x-xz", {"compression": "xz"}, {"format": "xz", "inside": "tar"}),
        ("tar.zst", "application/zstd", {"compression": "zstd"}, {"format": "zstd"}),
        (
            "ext4.gz", "application/gzip", {"compression": "gzip", "filesystem": "ext4"},
            {"format": "gzip", "inside": "ext4"},
        ),
        (
            "ext4.xz", "application/x-xz", {"compression": "xz", "filesystem": "ext4"},
            {"format": "xz", "inside": "ext4"},
        ),
    ],
)  # fmt: skip
def test_archives(
    name: str,
    media_type: str,
    content: dict[str, Any],
    facts: dict[str, Any],
    real: dict[str, bytes],
    tmp_path: Path,
) -> None:
    """A compressed file tells how it is compressed, and what is inside if its start tells."""
    path = tmp_path / "update"
    path.write_bytes(real[name])
    found = inspection.read(path)
    assert media_type == found.envelope.type
    assert Content(**content) == found.content
    assert frozenset(content) == found.stated
    assert facts == found.facts


def test_dictionary_that_takes_too_much_memory(tmp_path: Path) -> None:
    """What takes hundreds of megabytes to unpack is not unpacked."""
    path = tmp_path / "update.xz"
    # The size of the dictionary is stated, whatever is in it.
    filters = [{"id": lzma.FILTER_LZMA2, "dict_size": 1 << 28, "mf": lzma.MF_HC3}]
    path.write_bytes(lzma.compress(bytes(100), filters=filters))
    assert inspection.read(path).facts == {"format": "xz"}


@pytest.mark.parametrize("format_", [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_tar_of_each_format(format_: int, tmp_path: Path) -> None:
    """Old and new formats of tar are recognized."""
    (tmp_path / "file").write_bytes(files.BODY)
    with tarfile.open(tmp_path / "a.tar", "w", format=format_) as tar:
        tar.add(tmp_path / "file", "ä" * 40)
    assert inspection.read(tmp_path / "a.tar").facts == {"format": "tar"}


@pytest.mark.parametrize(
    ("name", "change", "reason"),
    [
        (
            "tar",
            lambda data: data[: 512 + len(files.BODY) + 512],
            "is truncated: a tar archive ends with two blocks",
        ),
        ("tar", lambda data: data[:-1], "is truncated: a tar archive ends with two blocks"),
        ("tar", lambda data: data[:512], "is truncated: a tar archive ends with two blocks"),
        ("gz", lambda data: data[:17], "is truncated: its last gzip member does not end"),
        ("gz", lambda data: data[:16] + b"\xff" * 50, "is not sound gzip: Error"),
        ("xz", lambda data: data[:-1], "is truncated: an xz file ends with a footer"),
        ("xz", lambda data: data[:13] + b"\xff" + data[14:], "is not sound xz: "),
        ("zst", lambda data: data[:8], "is truncated: its last zstd frame does not end"),
    ],
)
def test_archives_that_are_damaged(
    name: str,
    change: Callable[[bytes], bytes],
    reason: str,
    real: dict[str, bytes],
    tmp_path: Path,
) -> None:
    """What ends too early, or cannot be unpacked, is refused."""
    path = tmp_path / "update"
    path.write_bytes(change(real[name]))
    with pytest.raises(InvalidDataError) as raised:
        inspection.read(path)
    assert reason in raised.value.detail


@pytest.mark.parametrize(
    "checksum", [b"        ", b"zzzzzz\0 ", b"\xff" * 8, b"000000\0 "], ids=ascii
)
def test_what_looks_like_tar_only(checksum: bytes, real: dict[str, bytes], tmp_path: Path) -> None:
    """The magic of tar in another file makes no archive of it: the checksum decides."""
    path = tmp_path / "update"
    path.write_bytes(real["tar"][:148] + checksum + real["tar"][156:])
    assert inspection.read(path).facts == {"format": "bytes"}


# ----------------------------------------------------------------------------------------------
# Hostile files

KINDS = ("elf", "squashfs", "ext4", "tar", "gz", "xz", "zst", "tar.gz", "ext4.xz")


@pytest.mark.parametrize("name", KINDS)
def test_mutilated_files(name: str, real: dict[str, bytes], tmp_path: Path) -> None:
    """Whatever is cut or damaged, a file is read or refused, and what is told is JSON."""
    path = tmp_path / "update"
    for _, data in files.mutilated(real[name]):
        path.write_bytes(data)
        found = files.outcome(path)
        if isinstance(found, Artefact):
            assert (len(data), hashlib.sha256(data).digest()) == (
                found.envelope.size,
                found.envelope.sha256,
            )
            assert found.stated <= {"arch", "filesystem", "compression"}
            json.dumps(found.facts)


@given(data=st.data())
def test_any_start(data: st.DataObject, real: dict[str, bytes], tmp_path: Path) -> None:
    """Whatever stands at the start of a file, it is read or refused."""
    start = bytearray(real[data.draw(st.sampled_from(KINDS))][:4096])
    places = st.integers(0, 127) | st.integers(1024, 1400) | st.integers(0, len(start) - 1)
    for place in data.draw(st.lists(places, max_size=8)):
        start[place % len(start)] = data.draw(st.integers(0, 255))
    path = tmp_path / "update"
    path.write_bytes(start)
    files.outcome(path)
