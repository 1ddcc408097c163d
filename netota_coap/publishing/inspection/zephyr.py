"""Reads Zephyr build directories: board, CPU, debugging and version of the files in them.

Source: Zephyr's `.config` of Kconfig, and `scripts/schemas/build-schema.yml` for `build_info.yml`.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import attrs

from netota_coap.errors import InvalidDataError, Issue
from netota_coap.files import opened
from netota_coap.model.values import Content, Stream
from netota_coap.publishing.inspection import mcuboot
from netota_coap.publishing.inspection.artefact import Artefact, if_valid

_LONGEST = 1 << 20  # real files have about 100 kB

_ESCAPED = re.compile(r"\\(.)")
_SETTING = re.compile(r'^(CONFIG_\w+)=(?:"((?:[^"\\\n]|\\.)*)"|(\S+))[ \t\r]*$', re.MULTILINE)

# From CONFIG_ARCH to the 32-bit name, the option for 64 bits, and the name with that option.
_ARCHS: Mapping[str, tuple[str, str, str]] = {
    "arm": ("arm", "", ""),
    "arm64": ("aarch64", "", ""),
    "riscv": ("riscv32", "CONFIG_64BIT", "riscv64"),
    "x86": ("i386", "CONFIG_X86_64", "x86_64"),
    "xtensa": ("xtensa", "", ""),
    "arc": ("arc", "", ""),
    "mips": ("mips", "", ""),
    "sparc": ("sparc", "", ""),
    "nios2": ("nios2", "", ""),
    "microblaze": ("microblaze", "", ""),
}
_DEBUG = ("CONFIG_DEBUG", "CONFIG_DEBUG_OPTIMIZATIONS", "CONFIG_NO_OPTIMIZATIONS")
_NO_VERSION = "0.0.0"  # Zephyr's default, which says nothing
_FACTS = ("board", "revision", "qualifiers", "soc", "zephyr_version")


@attrs.frozen(kw_only=True)
class Build:
    """What a build directory says; None where it says nothing.

    Attributes:
        board: The name without revision and qualifiers.
        version: The version that images are signed with.
    """

    board: str | None
    arch: str | None
    debug: bool | None
    version: str | None
    facts: Mapping[str, str] = attrs.field(hash=False)

    def complete(self, artefact: Artefact) -> Artefact:
        """Add the build's values where the file itself has none."""
        content = artefact.content
        return attrs.evolve(
            artefact,
            content=attrs.evolve(
                content,
                type="zephyr-image",
                arch=content.arch or self.arch,
                machine=content.machine or self.board,
                debug=self.debug,
            ),
            version=artefact.version or self.version,
            facts={**artefact.facts, "zephyr": dict(self.facts)},
        )


def build_of(path: Path) -> Build | None:
    """Read the Zephyr build directory around a file; None if there is none.

    Raises:
        InvalidDataError: `.config` or `build_info.yml` is malformed, or they name two boards.
    """
    directory = path.resolve().parent
    config_path, info_path = directory / ".config", _info_path(directory)
    config = _config(config_path) if config_path.is_file() else {}
    info = _info(info_path) if info_path else {}
    boards = {said["board"] for said in (config, info) if said}
    if len(boards) == 2:
        reason = f"is {info['board']}, but that of {config_path} is {config['board']}"
        hint = "Two builds are mixed: build again into an empty directory."
        raise InvalidDataError([Issue("cmake.board.name", reason, str(info_path))], hint=hint)
    if not boards:
        return None
    said = config | info
    return Build(
        board=if_valid(Content.rules()["machine"], said["board"]),
        arch=said.get("arch"),
        debug=said.get("debug"),
        version=if_valid(Stream.rules()["version"], said.get("version")),
        facts={name: said[name] for name in _FACTS if said.get(name)},
    )


def _info_path(directory: Path) -> Path | None:
    """Find CMake's description: it may be in the directory above that of the images."""
    places = [directory.parent] if directory.name == "zephyr" else []
    paths = [place / "build_info.yml" for place in (*places, directory)]
    return next((path for path in paths if path.is_file()), None)


def _config(path: Path) -> dict[str, Any]:
    """Read Kconfig's settings; empty if they are not Zephyr's."""
    found = {
        name: _ESCAPED.sub(r"\1", quoted) or bare
        for name, quoted, bare in _SETTING.findall(_text(path))
    }
    if not (found.get("CONFIG_BOARD") and found.get("CONFIG_ARCH")):
        return {}
    arch, option, wide = _ARCHS.get(found["CONFIG_ARCH"], (None, "", None))
    version = mcuboot.plain(found.get("CONFIG_MCUBOOT_IMGTOOL_SIGN_VERSION", _NO_VERSION))
    return {
        "board": found["CONFIG_BOARD"],
        "arch": wide if found.get(option) == "y" else arch,
        "debug": any(found.get(name) == "y" for name in _DEBUG),
        "version": None if version == _NO_VERSION else version,
        "qualifiers": found.get("CONFIG_BOARD_QUALIFIERS"),
        "revision": found.get("CONFIG_BOARD_REVISION"),
        "soc": found.get("CONFIG_SOC"),
    }


def _info(path: Path) -> dict[str, Any]:
    """Read CMake's description of the build; empty if it is not Zephyr's."""
    import yaml  # takes 20 ms, and few need it

    # This loader keeps all scalars as text, so that revision 1.10 does not become 1.1, and follows
    # no merge keys, whose nesting can blow up a small file.
    loader = getattr(yaml, "CBaseLoader", yaml.BaseLoader)
    try:
        document = yaml.load(_text(path), Loader=loader)  # noqa: S506, as safe as the safe one
    except yaml.MarkedYAMLError as error:
        line = f"line {error.problem_mark.line + 1}" if error.problem_mark else ""
        raise _malformed(path, line, str(error.problem)) from error
    except (yaml.YAMLError, RecursionError) as error:
        raise _malformed(path, "", "is nested too deeply, or holds what YAML forbids") from error
    board = _member(_member(document, "cmake"), "board")
    name = _member(board, "name")
    if not (isinstance(name, str) and name):
        return {}
    found = {
        "board": name,
        "qualifiers": _member(board, "qualifiers"),
        "revision": _member(board, "revision"),
        "zephyr_version": _member(_member(_member(document, "cmake"), "zephyr"), "version"),
    }
    return {key: value for key, value in found.items() if isinstance(value, str) and value}


def _member(value: Any, name: str) -> Any:
    return value.get(name) if isinstance(value, dict) else None


def _text(path: Path) -> str:
    with opened(path) as file:
        if file.size > _LONGEST:
            raise file.wrong(f"has {file.size} bytes, more than {_LONGEST}")
        return file.at(0, _LONGEST).decode(errors="replace")


def _malformed(path: Path, place: str, reason: str) -> InvalidDataError:
    return InvalidDataError([Issue(place, reason, str(path))])
