"""Inspects MCUboot images, which consist of header, body, protected TLVs and TLVs.

Source: MCUboot's design document, "Image format"; for newer TLVs, imgtool's source.
"""

from __future__ import annotations

import re
import struct
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

from netota_coap.errors import InvalidDataError
from netota_coap.files import File
from netota_coap.model.values import Content
from netota_coap.publishing.inspection.artefact import Artefact

_MAGIC = b"\x3d\xb8\xf3\x96"
# magic, load address, sizes of header, protected TLVs and body, flags, version, padding
_HEADER = struct.Struct("<4sIHHIIBBHI4x")
_TLV = struct.Struct("<HH")
_TLVS, _PROTECTED_TLVS = 0x6907, 0x6908
_VERSION = struct.Struct("<BBHI")

_FLAGS: Mapping[int, str] = {
    0x001: "pic",
    0x004: "encrypted_aes128",
    0x008: "encrypted_aes256",
    0x010: "non_bootable",
    0x020: "ram_load",
    0x100: "rom_fixed",
    0x200: "compressed_lzma1",
    0x400: "compressed_lzma2",
    0x800: "compressed_arm_thumb",
}
_ENCRYPTED = {"encrypted_aes128": "aes-128", "encrypted_aes256": "aes-256"}
_COMPRESSED = {"compressed_lzma1": "lzma1", "compressed_lzma2": "lzma2"}

_KEY_HASH, _SIG_PURE, _DEPENDENCY, _SECURITY_COUNTER = 0x01, 0x25, 0x40, 0x50
_SHA384 = 0x11
_HASHES: Mapping[int, str] = {0x10: "sha256", _SHA384: "sha384", 0x12: "sha512"}
_SIGNATURES: Mapping[int, str] = {
    0x20: "rsa-2048",
    0x21: "ecdsa-p224",
    0x22: "ecdsa-{}",
    0x23: "rsa-3072",
    0x24: "ed25519",
}
_KEY_EXCHANGES: Mapping[int, str] = {
    0x30: "rsa-2048",
    0x31: "aes-kw",
    0x32: "ecies-p256",
    0x33: "ecies-x25519",
    0x34: "ecies-x25519",
}
# `imgtool sign --pad` ends the slot with it; if the alignment exceeds 8 bytes, the first two bytes
# are the alignment.
_TRAILER_MAGIC = bytes.fromhex("77c295f360d2ef7f3552500f2cb67980")
_ALIGNED_TRAILER_MAGIC = bytes.fromhex("2de15d29410b8d77679c110f1f8a")


def describe(file: File) -> Artefact | None:
    """Inspect an MCUboot image; None if the file is none."""
    head = file.at(0, _HEADER.size)
    if head[:4] != _MAGIC:
        return None
    file.require(_HEADER.size, "its header ends")
    _, load_address, header_size, protected_size, body_size, bits, *numbers = _HEADER.unpack(head)
    if header_size < _HEADER.size:
        raise file.wrong(f"has an MCUboot header of {header_size} bytes, fewer than 32")
    body_end = header_size + body_size
    hashed_end = body_end + protected_size
    file.require(body_end, "its body ends")
    protected: list[tuple[int, bytes]] = []
    if protected_size:
        protected, end = _tlvs(file, body_end, _PROTECTED_TLVS)
        if end != hashed_end:
            reason = f"its protected TLVs end at byte {end}, not {hashed_end}: the file is damaged"
            raise file.wrong(reason)
    tlvs, end = _tlvs(file, hashed_end, _TLVS)
    slot_trailer = _ends_a_slot(file.at(max(end, file.size - 16), 16))
    if not slot_trailer and (stop := file.padding_end(end)) < file.size:
        reason = f"bytes at {stop} follow its end, neither padding nor a whole slot trailer"
        raise file.wrong(f"{reason}: a padded image that is truncated?")
    flags = [name for bit, name in _FLAGS.items() if bits & bit]
    hash_kind = next((kind for kind, _ in tlvs if kind in _HASHES), None)
    if hash_kind is None and not any(kind == _SIG_PURE for kind, _ in tlvs):
        raise _unsigned(file)
    algorithm = _HASHES[hash_kind] if hash_kind is not None else "sha256"
    envelope, digest = file.hashed("application/vnd.mcuboot.image", algorithm, hashed_end)
    # If there are several hashes, MCUboot requires each to match.
    checked = {value for kind, value in tlvs if kind == hash_kind} == {digest}
    encryption = _one_of(_ENCRYPTED, flags)
    if hash_kind is not None and not checked and not encryption:
        raise file.wrong("the image hash does not match: the file is damaged")

    version, compression = _version(numbers), _one_of(_COMPRESSED, flags)
    facts: dict[str, Any] = {
        "format": "mcuboot",
        "version": version,
        "flags": flags,
        "load_address": load_address,
        "header_size": header_size,
        "body_size": body_size,
        "image_hash_checked": checked,
        # The hash is over the plain text. If it matches (`imgtool sign --clear`), nothing is
        # encrypted, whatever the flags say.
        "encrypted": encryption is not None and not checked,
    }
    said = {"encryption": encryption, "compression": compression}
    facts |= {name: value for name, value in said.items() if value}
    facts |= dict(_tlv_facts([*protected, *tlvs]))
    if rest := file.size - end:
        facts |= {"trailing_bytes": rest, "slot_trailer": slot_trailer}
    return Artefact(
        envelope=envelope,
        content=Content(type="mcuboot-image", compression=compression),
        version=version,
        stated=frozenset({"version", "compression"} if compression else {"version"}),
        facts=facts,
    )


def plain(version: str) -> str:
    """Return a version without a build number of 0, as MCUboot shows it."""
    return version.removesuffix("+0") if _ZERO_BUILD.fullmatch(version) else version


_ZERO_BUILD = re.compile(r"\d+\.\d+\.\d+\+0", re.ASCII)


def _version(numbers: Iterable[int]) -> str:
    return plain("{}.{}.{}+{}".format(*numbers))


def _tlvs(file: File, offset: int, magic: int) -> tuple[list[tuple[int, bytes]], int]:
    """Return types and values of the TLVs of an area, and where the area ends."""
    what = "its protected TLVs" if magic == _PROTECTED_TLVS else "its TLVs"
    if offset == file.size:
        raise _unsigned(file)
    file.require(offset + _TLV.size, f"{what} begin")
    found, total = _TLV.unpack(file.at(offset, _TLV.size))
    if found != magic:
        raise file.wrong(f"{what} are not at byte {offset}: the file is damaged")
    file.require(offset + total, f"{what} end")
    area = file.at(offset, total)
    tlvs, at = [], _TLV.size
    while at + _TLV.size <= total:
        kind, length = _TLV.unpack_from(area, at)
        at += _TLV.size + length
        tlvs.append((kind, area[at - length : at]))
    if at != total:
        raise file.wrong(f"{what} do not fill their {total} bytes: the file is damaged")
    return tlvs, offset + total


def _unsigned(file: File) -> InvalidDataError:
    hint = "Make it an update by `imgtool sign`; without a key it gets a hash only."
    return file.wrong("is an MCUboot image without a hash: imgtool did not sign it", hint=hint)


def _one_of(names: Mapping[str, str], flags: Sequence[str]) -> str | None:
    return next((name for flag, name in names.items() if flag in flags), None)


def _tlv_facts(tlvs: Sequence[tuple[int, bytes]]) -> Iterator[tuple[str, Any]]:
    """Return facts from TLVs; those of a wrong length are ignored."""
    by_kind = dict(reversed(tlvs))  # the first of a kind counts, as for MCUboot
    for kind, algorithm in _HASHES.items():
        if kind in by_kind:
            yield "image_hash", by_kind[kind].hex()
            yield "image_hash_algorithm", algorithm
    # One TLV serves ECDSA on any curve; the curve of 384 bits goes only with SHA-384.
    curve = "p384" if _SHA384 in by_kind else "p256"
    signatures = [_SIGNATURES[kind].format(curve) for kind, _ in tlvs if kind in _SIGNATURES]
    yield "signatures", signatures
    for kind, name in _KEY_EXCHANGES.items():
        if kind in by_kind:
            yield "key_exchange", name
    if key_hash := by_kind.get(_KEY_HASH):
        yield "key_hash", key_hash.hex()
    if len(counter := by_kind.get(_SECURITY_COUNTER, b"")) == 4:
        yield "security_counter", int.from_bytes(counter, "little")
    # A dependency: number of the image, padding, lowest version.
    wanted = [value for kind, value in tlvs if kind == _DEPENDENCY and len(value) == 12]
    if wanted:
        yield (
            "dependencies",
            [{"image": v[0], "version": _version(_VERSION.unpack(v[4:]))} for v in wanted],
        )


def _ends_a_slot(last: bytes) -> bool:
    return last == _TRAILER_MAGIC or last[2:] == _ALIGNED_TRAILER_MAGIC
