"""Inspects RAUC bundles: a SquashFS, encrypted or not, with a CMS signature at its end.

The manifest is read by `rauc info`, if rauc is installed. Source: RAUC's reference, "Bundle
Formats"; RFC 5652.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import PurePath
from typing import Any

from netota_coap.files import File
from netota_coap.model.values import Content, Stream
from netota_coap.publishing.inspection.artefact import Artefact, if_valid
from netota_coap.publishing.inspection.filesystems import HEAD, superblock

# IANA has no media type for bundles; this is the one in use.
_MEDIA_TYPE = "application/vnd.rauc.bundle"
TIMEOUT_S = 30
_LONGEST_ANSWER = 1 << 20
_LONGEST_SIGNATURE = 1 << 20

# Object identifiers of CMS, in DER: 1.2.840.113549.1.7.2 and .3
_SIGNED = bytes.fromhex("06092a864886f70d010702")
_ENVELOPED = bytes.fromhex("06092a864886f70d010703")

_FILESYSTEMS = ("ext4", "ext3", "ext2", "squashfs", "erofs", "btrfs", "f2fs", "ubifs", "vfat")

_INSTALL = (
    "install rauc (Debian: apt-get install rauc) to read version and compatible from the bundle,"
    " or state them"
)
_ENCRYPTED = "the manifest is encrypted: state version, machine and file system"


def describe(file: File) -> Artefact | None:
    """Inspect a RAUC bundle; None if the file is none."""
    signature = _signature(file)
    if signature is None:
        if file.path.suffix == ".raucb":
            raise file.wrong("is no RAUC bundle, or is truncated: it has no signature at its end")
        return None
    block = superblock(file.at(0, HEAD))
    bundle_format = _format(signature, encrypted=block is None)
    program = shutil.which("rauc")
    facts: dict[str, Any] = {"format": "rauc", "bundle_format": bundle_format}
    if signature.startswith(_ENVELOPED, _oid_at(signature)):
        facts["hint"] = _ENCRYPTED
    elif program is None:
        facts["hint"] = _INSTALL
    else:
        facts |= dict(_told(file, program))
    version = if_valid(Stream.rules()["version"], facts.get("version"))
    content = Content(
        type="rauc-bundle",
        machine=if_valid(Content.rules()["machine"], facts.get("compatible")),
        filesystem=_filesystem(facts.get("images", [])),
        compression=block.compression if block else None,
    )
    stated = {"version": version, "filesystem": content.filesystem}
    return Artefact(
        envelope=file.envelope(_MEDIA_TYPE),
        content=content,
        version=version,
        stated=frozenset(name for name, value in stated.items() if value is not None),
        facts=facts,
    )


def _signature(file: File) -> bytes | None:
    """Return the CMS signature, whose size is in the last 8 bytes of a bundle."""
    size = int.from_bytes(file.at(max(0, file.size - 8), 8), "big")
    if not 32 <= size <= min(_LONGEST_SIGNATURE, file.size - 8):
        return None
    signature = file.at(file.size - 8 - size, size)
    oid = _oid_at(signature)
    # In DER it is a sequence of exactly that length that begins with its object identifier.
    length = int.from_bytes(signature[2:oid], "big")
    sound = signature[0] == 0x30 and oid + length == size
    return signature if sound and signature.startswith((_SIGNED, _ENVELOPED), oid) else None


def _oid_at(signature: bytes) -> int:
    """Return the offset of the first element of a DER sequence of more than 127 bytes."""
    return 2 + (signature[1] & 0x7F)


def _format(signature: bytes, encrypted: bool) -> str:
    if encrypted:
        return "crypt"
    # The signature of the plain format is detached; the other formats put the manifest in it.
    return "verity" if b"\nformat=verity\n" in signature else "plain"


def _told(file: File, program: str) -> Iterator[tuple[str, Any]]:
    """Yield what the manifest says, as rauc reads it."""
    answer = _object(_ask(file, program))
    for key in ("compatible", "version", "description", "build"):
        if isinstance(value := answer.get(key), str) and value:
            yield key, value
    images = answer.get("images")
    yield "images", list(_images(images if isinstance(images, list) else []))


def _ask(file: File, program: str) -> Any:
    """Run `rauc info` on the open file, not on its path, which may name another one by now."""
    number = file.descriptor
    command = [program, "info", "--no-verify", "--output-format=json", f"/dev/fd/{number}"]
    # Output goes to files, so that only a bounded part of it is read into memory.
    with tempfile.TemporaryFile() as out, tempfile.TemporaryFile() as err:
        try:
            done = subprocess.run(
                command,
                check=False,
                stdin=subprocess.DEVNULL,
                stdout=out,
                stderr=err,
                pass_fds=(number,),
                env=os.environ | {"LC_ALL": "C.UTF-8"},
                timeout=TIMEOUT_S,
            )
        except subprocess.TimeoutExpired as error:
            raise file.wrong(f"rauc did not answer in {TIMEOUT_S} s") from error
        except OSError as error:
            raise file.wrong(f"{program} cannot be run: {error.strerror}") from error
        out.seek(0)
        err.seek(0)
        answer, complaint = out.read(_LONGEST_ANSWER), err.read(_LONGEST_ANSWER)
    if done.returncode:
        lines = complaint.decode(errors="replace").strip().splitlines()
        raise file.wrong(f"rauc refuses it: {lines[-1] if lines else 'it gives no reason'}")
    try:
        return json.loads(answer)
    except (ValueError, RecursionError) as error:
        raise file.wrong("rauc's output is not valid JSON") from error


def _images(entries: list[Any]) -> Iterator[dict[str, Any]]:
    for entry in entries:
        # Each entry is an object whose one key is the slot class.
        for slot_class, image in _object(entry).items():
            known = _object(image)
            told = {"class": slot_class} | {
                key: known[key]
                for key, kind in (("variant", str), ("filename", str), ("size", int))
                if type(known.get(key)) is kind
            }
            suffixes = PurePath(told.get("filename", "")).suffixes
            found = [suffix[1:] for suffix in suffixes if suffix[1:] in _FILESYSTEMS]
            yield told | ({"filesystem": found[-1]} if found else {})


def _object(value: Any) -> Mapping[str, Any]:
    return value if isinstance(value, dict) else {}


def _filesystem(images: list[Mapping[str, Any]]) -> str | None:
    """Return the file system of the image for the root, or that of the only image."""
    root = [image for image in images if image["class"] == "rootfs"] or images
    found = {image.get("filesystem") for image in root}
    return found.pop() if len(found) == 1 else None
