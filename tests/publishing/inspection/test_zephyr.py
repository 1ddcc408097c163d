"""Zephyr build directories: what they say of the files in them.

The texts have the form that Zephyr's build system gives them; the images are imgtool's.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import example, given
from hypothesis import strategies as st

from netota_coap.errors import InvalidDataError
from netota_coap.model.values import Content
from netota_coap.publishing import inspection
from netota_coap.publishing.inspection import zephyr
from tests.support import artefact_files as files

CONFIG = """\
CONFIG_INPUT_DT=y
# CONFIG_DEBUG is not set
CONFIG_BOARD="nrf5340dk"
CONFIG_BOARD_REVISION="1.10"
CONFIG_BOARD_TARGET="nrf5340dk@1.10/nrf5340/cpuapp"
CONFIG_BOARD_QUALIFIERS="nrf5340/cpuapp"
CONFIG_SOC="nrf5340"
CONFIG_ARCH="arm"
CONFIG_NUM_IRQS=69
CONFIG_FLASH_BASE_ADDRESS=0x0
CONFIG_MCUBOOT_IMGTOOL_SIGN_VERSION="3.2.1+0"
# end of MCUboot
"""

INFO = """\
cmake:
  application:
    source-dir: /work/app
  board:
    name: nrf5340dk
    qualifiers: nrf5340/cpuapp
    revision: 1.10
  sysbuild: false
  zephyr:
    version: 4.3.0
    zephyr-base: /work/zephyr
version: 0.1.0
west:
  command: west build -b nrf5340dk@1.10/nrf5340/cpuapp app
"""

CONFIG_FACTS = {
    "board": "nrf5340dk",
    "revision": "1.10",
    "qualifiers": "nrf5340/cpuapp",
    "soc": "nrf5340",
}
INFO_FACTS = {
    "board": "nrf5340dk",
    "revision": "1.10",
    "qualifiers": "nrf5340/cpuapp",
    "zephyr_version": "4.3.0",
}


def build(directory: Path, config: str | None = CONFIG, info: str | None = INFO) -> Path:
    """Make a build directory; the path of a file in it."""
    products = directory / "zephyr"
    products.mkdir(parents=True, exist_ok=True)
    if config is not None:
        (products / ".config").write_text(config)
    if info is not None:
        (directory / "build_info.yml").write_text(info)
    path = products / "zephyr.bin"
    path.write_bytes(files.BODY)
    return path


@pytest.mark.parametrize(
    ("config", "info", "content", "version", "facts"),
    [
        (CONFIG, INFO, {"arch": "arm", "debug": False}, "3.2.1", INFO_FACTS | CONFIG_FACTS),
        (CONFIG, None, {"arch": "arm", "debug": False}, "3.2.1", CONFIG_FACTS),
        (None, INFO, {}, None, INFO_FACTS),
    ],
)
def test_build(
    config: str | None,
    info: str | None,
    content: dict[str, Any],
    version: str | None,
    facts: dict[str, str],
    tmp_path: Path,
) -> None:
    """Kconfig's settings, CMake's description, or both tell what a build is; nothing is stated."""
    found = inspection.read(build(tmp_path, config, info))
    assert Content(type="zephyr-image", machine="nrf5340dk", **content) == found.content
    assert version == found.version
    assert frozenset() == found.stated
    assert {"format": "bytes", "zephyr": facts} == found.facts


def test_image_of_a_build(tmp_path: Path) -> None:
    """What a signed image states wins over the build, and stays a statement of the file."""
    image = files.image(tmp_path / "zephyr.signed.bin").rename(
        build(tmp_path / "build" / "app").with_name("zephyr.signed.bin")
    )
    found = inspection.read(image)
    expected = Content(type="zephyr-image", arch="arm", machine="nrf5340dk", debug=False)
    assert expected == found.content
    assert found.version == "1.2.3+4"
    assert frozenset({"version"}) == found.stated
    assert next(iter(found.facts)) == "format"


def test_link_to_a_build(tmp_path: Path) -> None:
    """A link to a file of a build, or from it, counts where the file is."""
    path = build(tmp_path / "build")
    (tmp_path / "latest.bin").symlink_to(path)
    (tmp_path / "other.bin").write_bytes(b"")
    path.with_name("link.bin").symlink_to(tmp_path / "other.bin")
    assert inspection.read(tmp_path / "latest.bin").content.machine == "nrf5340dk"
    assert inspection.read(path.with_name("link.bin")).content == Content()


def test_description_in_the_same_directory(tmp_path: Path) -> None:
    """Files that were collected from a build are known by the description beside them."""
    (tmp_path / "build_info.yml").write_text(INFO)
    (tmp_path / "zephyr.hex").write_bytes(b"")
    assert inspection.read(tmp_path / "zephyr.hex").content.machine == "nrf5340dk"


@pytest.mark.parametrize(
    ("config", "info"),
    [
        (None, None),
        ("CONFIG_ARM64=y\nCONFIG_ARCH=y\n", None),  # of Linux
        ('CONFIG_BOARD="a"\n', None),
        ('CONFIG_BOARD=""\nCONFIG_ARCH="arm"\n', None),
        ('# CONFIG_BOARD="a"\n CONFIG_ARCH="arm"\n', None),
        ("\0\xff", ""),
        (None, "- cmake"),
        (None, "cmake: {board: nrf5340dk}"),
        (None, "cmake: {board: {name: [a]}}"),
    ],
)
def test_what_is_no_build(config: str | None, info: str | None, tmp_path: Path) -> None:
    """Files of these names that are not Zephyr's say nothing."""
    found = inspection.read(build(tmp_path, config, info))
    assert (Content(), {"format": "bytes"}) == (found.content, found.facts)


@pytest.mark.parametrize(
    ("settings_", "arch"),
    [
        ('CONFIG_ARCH="arm64"\nCONFIG_64BIT=y\n', "aarch64"),
        ('CONFIG_ARCH="riscv"\n# CONFIG_64BIT is not set\n', "riscv32"),
        ('CONFIG_ARCH="riscv"\nCONFIG_64BIT=y\n', "riscv64"),
        ('CONFIG_ARCH="x86"\n', "i386"),
        ('CONFIG_ARCH="x86"\nCONFIG_X86_64=y\n', "x86_64"),
        ('CONFIG_ARCH="xtensa"\r\n', "xtensa"),
        ('CONFIG_ARCH="posix"\n', None),
    ],
)
def test_architectures(settings_: str, arch: str | None, tmp_path: Path) -> None:
    """Zephyr's names of architectures become ours; native_sim has none."""
    config = f'CONFIG_BOARD="b"\n{settings_}'
    assert arch == inspection.read(build(tmp_path, config, None)).content.arch


@pytest.mark.parametrize(
    ("option", "debug"),
    [
        ("CONFIG_DEBUG=y", True),
        ("CONFIG_DEBUG_OPTIMIZATIONS=y", True),
        ("CONFIG_NO_OPTIMIZATIONS=y", True),
        ("CONFIG_DEBUG=n", False),
        ("CONFIG_DEBUG_INFO=y", False),
    ],
)
def test_debug(option: str, debug: bool, tmp_path: Path) -> None:
    """A build for debugging is one that is optimized for it, or not at all."""
    path = build(tmp_path, f"{CONFIG}{option}\n", None)
    assert debug is inspection.read(path).content.debug


@pytest.mark.parametrize(
    ("version", "expected"),
    [
        ("0.0.0+0", None),
        ("0.0.0", None),
        ("", None),
        ("9" * 65, None),
        ("1.2.3+4", "1.2.3+4"),
        (r"say \"1\"", 'say "1"'),
    ],
)
def test_version(version: str, expected: str | None, tmp_path: Path) -> None:
    """A version that is Kconfig's default, or that no stream can hold, is none."""
    config = CONFIG.replace("3.2.1+0", version)
    assert expected == inspection.read(build(tmp_path, config, None)).version


def test_names_that_no_stream_can_hold(tmp_path: Path) -> None:
    """A board whose name is too long is left to the facts."""
    board = "b" * 65
    found = inspection.read(build(tmp_path, None, INFO.replace("nrf5340dk", board)))
    assert found.content.machine is None
    assert board == found.facts["zephyr"]["board"]


def test_two_builds_mixed(tmp_path: Path) -> None:
    """Where settings and description are of two boards, nobody knows which one the files fit."""
    path = build(tmp_path, info=INFO.replace("nrf5340dk", "nrf52840dk"))
    with pytest.raises(InvalidDataError) as raised:
        inspection.read(path)
    config = path.with_name(".config")
    expected = (
        f"{tmp_path / 'build_info.yml'}: cmake.board.name: "
        f"is nrf52840dk, but that of {config} is nrf5340dk"
    )
    assert expected == raised.value.detail
    assert "build again into an empty directory" in raised.value.hint


@pytest.mark.parametrize(
    ("info", "reason"),
    [
        ("cmake:\n  board: [\n", "line 3: "),
        ("cmake:\n\tboard: a\n", "line 2: found character that cannot start any token"),
        ("[" * 200_000, "line 1: exceeded maximum nesting depth"),
        ("a: &a [*a]\n", "line 1: found unconstructable recursive node"),
        ("? [a]\n: 1\n", "line 1: found unhashable key"),
        ("a: \0\n", "is nested too deeply, or holds what YAML forbids"),
        ("#" * (1 << 20) + "\n", "has 1048577 bytes, more than 1048576"),
    ],
    ids=range(7),
)
def test_malformed_description(info: str, reason: str, tmp_path: Path) -> None:
    """The error names the file, and the line where there is one."""
    path = build(tmp_path, info=info)
    with pytest.raises(InvalidDataError) as raised:
        inspection.read(path)
    assert raised.value.detail.startswith(f"{tmp_path / 'build_info.yml'}: {reason}")


def test_parser_in_python(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where YAML's parser in C is missing, the other one reads the same."""
    expected = inspection.read(build(tmp_path))
    monkeypatch.delattr(yaml, "CBaseLoader")
    assert expected == inspection.read(build(tmp_path))
    with pytest.raises(InvalidDataError, match="is nested too deeply"):
        inspection.read(build(tmp_path, info="[\n" * 5_000))


def test_aliases_do_not_multiply(tmp_path: Path) -> None:
    """A description that unfolds to more than there is memory for does not unfold."""
    lines = ["a0: &a0 [x, x]", *(f"a{n}: &a{n} [*a{n - 1}, *a{n - 1}]" for n in range(1, 100))]
    path = build(tmp_path, info="\n".join(lines) + "\n" + INFO)
    assert inspection.read(path).content.machine == "nrf5340dk"


def test_settings_that_cannot_be_read(tmp_path: Path) -> None:
    """Only regular files count: a pipe in the place of one makes nobody wait."""
    path = build(tmp_path, None, None)
    os.mkfifo(path.with_name(".config"))
    os.mkfifo(tmp_path / "build_info.yml")
    assert inspection.read(path).content == Content()


@given(
    config=st.lists(st.sampled_from(CONFIG.splitlines()) | st.text(max_size=20)),
    info=st.text(st.sampled_from(" \n-:{}[]&*!?|#'\"a\t\\"), max_size=40),
)
@example(config=['CONFIG_ARCH="' + "\\" * 100_000, "CONFIG_A=" + "a" * 100_000 + " b"], info="")
def test_any_text(config: list[str], info: str, tmp_path: Path) -> None:
    """Whatever stands in them, a build is read or refused."""
    text = "\n".join(config).encode("utf-8", "replace").decode()
    path = build(tmp_path, text, f"cmake:\n  board: {info}")
    try:
        found = zephyr.build_of(path)
    except InvalidDataError as error:
        assert error.detail.startswith(str(tmp_path))
    else:
        assert found is None or found.facts["board"]
