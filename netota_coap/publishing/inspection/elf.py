"""Inspects ELF files: their machine, and whether they have debug information.

Source: the System V ABI, "Object Files".
"""

from __future__ import annotations

import struct
from collections.abc import Mapping

from netota_coap.files import File
from netota_coap.model.values import Content
from netota_coap.publishing.inspection.artefact import Artefact

# IANA has no type for ELF; this is the one of libmagic and of freedesktop.org.
_MEDIA_TYPE = "application/x-executable"

_KINDS: Mapping[int, str] = {1: "relocatable", 2: "executable", 3: "shared", 4: "core"}
# Key: machine, class (1: 32 bits, 2: 64 bits) and byte order; or only the machine.
_ARCHS: Mapping[int | tuple[int, int, str], str] = {
    3: "i386",
    8: "mips",
    (8, 1, "<"): "mipsel",
    (8, 2, ">"): "mips64",
    (8, 2, "<"): "mips64el",
    20: "ppc",
    (21, 2, ">"): "ppc64",
    (21, 2, "<"): "ppc64le",
    22: "s390x",
    40: "arm",
    (40, 1, ">"): "armeb",
    43: "sparc64",
    62: "x86_64",
    93: "arc",
    94: "xtensa",
    113: "nios2",
    183: "aarch64",
    (183, 2, ">"): "aarch64_be",
    189: "microblaze",
    195: "arc",
    (243, 1, "<"): "riscv32",
    (243, 2, "<"): "riscv64",
    258: "loongarch64",
}

# From byte 24: entry, offsets of the tables of segments and sections, flags, size of this header,
# size and number of segments, size and number of sections, index of the section of names.
_HEADERS: Mapping[int, str] = {1: "IIIIHHHHHH", 2: "QQQIHHHHHH"}
# A section header: name, type, flags, address, offset, size, link.
_SECTIONS: Mapping[int, str] = {1: "IIIIIII", 2: "IIQQQQI"}
_SECTION_SIZES: Mapping[int, int] = {1: 40, 2: 64}
_NO_BITS = 8
_BY_LINK = 0xFFFF

_LONGEST_NAMES = 1 << 20  # bytes that are read of section names, enough for 50,000 of them


def describe(file: File) -> Artefact | None:
    """Inspect an ELF file; None if the file is none."""
    head = file.at(0, 64)
    if head[:4] != b"\x7fELF":
        return None
    file.require(52, "its header ends")
    bits, data = head[4], head[5]
    if bits not in _HEADERS or data not in (1, 2):
        raise file.wrong(f"is an ELF file of unknown class {bits} or byte order {data}")
    order = "<" if data == 1 else ">"
    header = struct.Struct(order + _HEADERS[bits])
    file.require(24 + header.size, "its header ends")
    kind, machine = struct.unpack_from(order + "HH", head, 16)
    _, _, sections, _, _, _, _, size, count, names = header.unpack_from(head, 24)
    arch = _ARCHS.get((machine, bits, order)) or _ARCHS.get(machine)
    debug_info = False
    if sections:
        if size != _SECTION_SIZES[bits]:
            raise file.wrong(f"its section headers are of {size} bytes: the file is damaged")
        file.require(sections + size * max(count, 1), "its section headers end")
        debug_info = _has_debug_info(file, order + _SECTIONS[bits], sections, size, names)
    return Artefact(
        envelope=file.envelope(_MEDIA_TYPE),
        content=Content(arch=arch),
        stated=frozenset({"arch"} if arch else ()),
        facts={
            "format": "elf",
            "class": 32 * bits,
            "byte_order": "little" if data == 1 else "big",
            "machine": machine,
            "kind": _KINDS.get(kind, "other"),
            "debug_info": debug_info,
        }
        | ({"arch": arch} if arch else {}),
    )


def _has_debug_info(file: File, layout: str, sections: int, size: int, names: int) -> bool:
    """Return whether a section has the name of DWARF's."""

    def section(index: int) -> tuple[int, ...]:
        offset = sections + index * size
        file.require(offset + size, "its section headers end")
        return struct.unpack_from(layout, file.at(offset, size))

    # If the index takes more than 16 bits, the link of the first section has it.
    *_, link = section(0)
    _, kind, _, _, offset, length, _ = section(link if names == _BY_LINK else names)
    if kind == _NO_BITS:
        return False
    file.require(offset + length, "the names of its sections end")
    found = file.at(offset, min(length, _LONGEST_NAMES))
    # Names may share their ends: `.rela.debug_info` contains `.debug_info` and implies it.
    return b".debug_info\0" in found or b".zdebug_info\0" in found
