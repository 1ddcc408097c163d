"""From files, and what is said about them, to archives."""

from __future__ import annotations

import hashlib
from pathlib import Path

import pytest

from netota_coap.errors import InvalidDataError
from netota_coap.model.values import Archive, Content, Offer
from netota_coap.publishing.archives import ArchiveSource, describe, parse_offer
from tests.support import artefact_files as files

NAME = ("sensor-node", "stable")


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("a.bin", ArchiveSource(Path("a.bin"))),
        ("out/app.signed.bin", ArchiveSource(Path("out/app.signed.bin"))),
        ("a.bin,name=b", ArchiveSource(Path("a.bin"), "b")),
        (
            "a b.raucb,name=os,media-type=application/x-rauc",
            ArchiveSource(Path("a b.raucb"), "os", "application/x-rauc"),
        ),
        (
            "a,type=zephyr-image,arch=arm,machine=m,debug=true,filesystem=ext4,compression=xz",
            ArchiveSource(
                Path("a"),
                content=Content(
                    type="zephyr-image",
                    arch="arm",
                    machine="m",
                    debug=True,
                    filesystem="ext4",
                    compression="xz",
                ),
            ),
        ),
        (
            "a,ram=512,secure=true,old=false,soc=nrf,neg=-1,eq=a=b,machine=528,arch=true",
            ArchiveSource(
                Path("a"),
                content=Content(
                    machine="528",
                    arch="true",
                    attributes={
                        "ram": 512,
                        "secure": True,
                        "old": False,
                        "soc": "nrf",
                        "neg": "-1",
                        "eq": "a=b",
                    },
                ),
            ),
        ),
        ("a,debug=false", ArchiveSource(Path("a"), content=Content(debug=False))),
    ],
)
def test_source_is_read(text: str, expected: ArchiveSource) -> None:
    """Settings become name, media type, content's own attributes and free ones."""
    assert expected == ArchiveSource.parse(text)


@pytest.mark.parametrize(
    ("text", "issues"),
    [
        ("a,debug", ["a: debug: must be KEY=VALUE"]),
        ("a,", ["a: must be KEY=VALUE"]),
        ("a,x=1,x=2", ["a: x=2: appears twice"]),
        ("a,debug=1", ["a: debug: must be a boolean, not text"]),
        ("a,head=1", ["a: head: is reserved"]),
        ("a,scheme=coap", ["a: scheme: is reserved"]),
        ("a,machine=", ["a: machine: must not be empty"]),
        ("a,n=9223372036854775808", ["a: n: must be from -9223372036854775807"]),
        ("a,n=" + "9" * 5_000, ["a: n: must be at most 64 bytes long, not 5000"]),
        ("a,name=", ["a: name: must not be empty"]),
        (
            "a,name=b/c,media-type=,head=1",
            [
                "a: name: must consist of letters",
                "a: media-type: must not be empty",
                "a: head: is reserved",
            ],
        ),
    ],
)
def test_source_is_refused(text: str, issues: list[str]) -> None:
    """All that is wrong is told, with the file."""
    with pytest.raises(InvalidDataError) as raised:
        ArchiveSource.parse(text)
    found = [str(issue) for issue in raised.value.issues]
    assert len(issues) == len(found)
    assert [True] * len(issues) == [f.startswith(i) for f, i in zip(found, issues, strict=True)]


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("https://example.com/{name}", ("https://example.com/{name}", 100)),
        ("coap://example.com/a,5", ("coap://example.com/a", 5)),
        ("/b/{sha256},0", ("/b/{sha256}", 0)),
        ("https://example.com/a,b", ("https://example.com/a,b", 100)),
        ("https://example.com/a,b,7", ("https://example.com/a,b", 7)),
        ("https://example.com/a,-7", ("https://example.com/a,-7", 100)),
    ],
)
def test_offer_is_read(text: str, expected: tuple[str, int]) -> None:
    """What follows the last comma is the metric if it is a number."""
    assert Offer(url=expected[0], metric=expected[1]) == parse_offer(text)


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("", "url: must not be empty"),
        ("example.com/a", "url: must be a URL with a scheme"),
        ("https://example.com/a b", "url: must be a URL with a scheme"),
        ("https://example.com/,65536", "metric: must be from 0 to 65535, not 65536"),
        ("https://example.com/," + "9" * 5_000, "url: must be at most 255 bytes long"),
    ],
)
def test_offer_is_refused(text: str, reason: str) -> None:
    """What breaks a rule of offers is told."""
    with pytest.raises(InvalidDataError, match=reason):
        parse_offer(text)


# ----------------------------------------------------------------------------------------------
# What comes of it

SHA256 = hashlib.sha256(b"firmware").hexdigest()
KNOWN = "{file}, {name}, {package}, {sha256}, {stem}, {stream}, {version}"


@pytest.fixture
def image(tmp_path: Path) -> Path:
    """A file to be published."""
    path = tmp_path / "nrf52840dk.bin"
    path.write_bytes(b"firmware")
    return path


def described(
    source: ArchiveSource, template: str = "", version: str | None = "2.5.0"
) -> tuple[str, Archive]:
    """Describe one file, with one offer or none."""
    templates = [Offer(url=template, metric=3)] if template else []
    told, (archive,) = describe([source], NAME, version, templates)
    return told, archive


@pytest.mark.parametrize(
    ("template", "expected"),
    [
        ("https://example.com/fixed.bin", "https://example.com/fixed.bin"),
        (
            "coap://example.com/{name}/{version}",
            "coap://example.com/nrf52840dk/1%2F2%2B3%20%C3%A4",
        ),
        ("/{package}/{stream}/{file}", "/sensor-node/stable/nrf52840dk.bin"),
        ("/{stem}?v={version}", "/nrf52840dk?v=1%2F2%2B3%20%C3%A4"),
        ("/b/{sha256}", f"/b/{SHA256}"),
        ("/{name}{name}", "/nrf52840dknrf52840dk"),
        ("/{arch}/{debug}/{ram}", "/a%2Fb/true/512"),
    ],
)
def test_template_is_filled_in(image: Path, template: str, expected: str) -> None:
    """Each name in braces is replaced, quoted as part of a URL."""
    content = Content(arch="a/b", debug=True, attributes={"ram": 512})
    _, archive = described(ArchiveSource(image, content=content), template, "1/2+3 ä")
    assert (Offer(url=expected, metric=3),) == archive.offers


@pytest.mark.parametrize("template", ["/{arch}", "/{", "/}", "/{{name}}", "/{}", "/{NAME}"])
def test_unknown_template_is_refused(image: Path, template: str) -> None:
    """Braces that stand for nothing are an error that names those that do."""
    with pytest.raises(InvalidDataError) as raised:
        described(ArchiveSource(image), template)
    assert raised.value.detail == f"{image}: url: {template!r}: the templates are {KNOWN}"


def test_an_attribute_takes_no_name_of_ours(image: Path) -> None:
    """A free attribute that is called as a template of ours does not change what that means."""
    content = Content(attributes={"file": "x", "version": "y"})
    _, archive = described(ArchiveSource(image, content=content), "/{file}/{version}")
    assert archive.offers[0].url == "/nrf52840dk.bin/2.5.0"


def test_filled_in_text_is_not_filled_in_again(tmp_path: Path) -> None:
    """Braces in a file's name do not act as a template."""
    path = tmp_path / "{sha256}.bin"
    path.write_bytes(b"firmware")
    with pytest.raises(InvalidDataError, match="name: must consist of letters"):
        described(ArchiveSource(path))
    _, archive = described(ArchiveSource(path, "a"), "/{file}")
    assert archive.offers[0].url == "/%7Bsha256%7D.bin"


def test_too_long_url_is_refused(image: Path) -> None:
    """A template that grows too long when filled in is told with its file."""
    template = "https://example.com/" + "{sha256}" * 4
    reason = f"{image}: url: must be at most 255 bytes long, not 276"
    with pytest.raises(InvalidDataError) as raised:
        described(ArchiveSource(image), template)
    assert reason == raised.value.detail


def test_a_source_has_its_own_offers(image: Path) -> None:
    """Offers of a source stand instead of those for all."""
    own = Offer(url="/own/{name}", metric=1)
    _, archive = described(ArchiveSource(image, offers=(own,)), "/all")
    assert (Offer(url="/own/nrf52840dk", metric=1),) == archive.offers


@pytest.mark.parametrize(
    ("name", "expected"), [(None, "nrf52840dk"), ("a", "a"), ("{machine}-{version}", "m-2.5.0")]
)
def test_name(image: Path, name: str | None, expected: str) -> None:
    """A name is given, filled in, or that of the file."""
    _, archive = described(ArchiveSource(image, name, content=Content(machine="m")))
    assert expected == archive.name


def test_name_that_breaks_its_rule(tmp_path: Path) -> None:
    """The file is named, and what to do."""
    path = tmp_path / "a b.bin"
    path.write_bytes(b"firmware")
    with pytest.raises(InvalidDataError) as raised:
        described(ArchiveSource(path))
    assert raised.value.detail.startswith(f"{path}: name: must consist of letters")
    assert (
        raised.value.hint == "Give it a name: --archive FILE,name=NAME, or name in a release file."
    )


def test_media_type_that_is_given_wins(image: Path) -> None:
    """What is said of the envelope stands."""
    _, archive = described(ArchiveSource(image, media_type="a/b"))
    assert archive.envelope.type == "a/b"


def test_version_must_come_from_somewhere(image: Path) -> None:
    """Where no file tells it, it must be given."""
    with pytest.raises(InvalidDataError, match="version: must be given: no file tells it"):
        described(ArchiveSource(image), version=None)


def test_two_files_at_one_place(tmp_path: Path) -> None:
    """One URL cannot lead to two files; to the same bytes under two names it can."""
    files = [tmp_path / f"{n}.bin" for n in range(3)]
    for path, data in zip(files, (b"a", b"a", b"b"), strict=True):
        path.write_bytes(data)
    template = [Offer(url="/{version}", metric=1)]
    describe(
        [ArchiveSource(path) for path in files[:2]],
        NAME,
        "1",
        template,
    )
    with pytest.raises(InvalidDataError) as raised:
        describe([ArchiveSource(path, f"a{path.stem}") for path in files], NAME, "1", template)
    assert raised.value.detail == "a2: offers /1, as a0 does, but is another file"


@pytest.mark.parametrize("given", [("a", "A"), (None, "NRF52840dk"), ("{stem}", None)])
def test_two_archives_of_one_name(image: Path, given: tuple[str | None, str | None]) -> None:
    """Names that do not go together are refused, given ones before anything is read."""
    sources = [ArchiveSource(image, name) for name in given]
    with pytest.raises(InvalidDataError, match=r"--archive \w+: '\w+' (differs|appears)"):
        describe(sources, NAME, "1", [])
    missing = [ArchiveSource(image.with_name("none"), name) for name in ("a", "A")]
    with pytest.raises(InvalidDataError, match="--archive A: 'A' differs from 'a' only in case"):
        describe(missing, NAME, "1", [])


# ----------------------------------------------------------------------------------------------
# What files tell themselves


@pytest.fixture(scope="module")
def firmware(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A real MCUboot image of version 1.2.3+4."""
    return files.image(tmp_path_factory.mktemp("mcuboot") / "firmware.bin")


@pytest.fixture(scope="module")
def program(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A real ELF file, for the machine of the test."""
    return files.elf(tmp_path_factory.mktemp("elf") / "program")


def test_nothing_but_the_file_need_be_named(firmware: Path) -> None:
    """An MCUboot image tells version, media type and what it is."""
    version, archive = described(ArchiveSource(firmware), version=None)
    assert (version, archive.name) == ("1.2.3+4", "firmware")
    assert archive.envelope.type == "application/vnd.mcuboot.image"
    assert archive.content == Content(type="mcuboot-image")


def test_what_is_said_wins(firmware: Path) -> None:
    """Each attribute that is said stands, beside those that are told."""
    content = Content(type="zephyr-image", machine="m", attributes={"ram": 64})
    source = ArchiveSource(firmware, "a", "a/b", content)
    version, archive = described(source, version="1.2.3+4")
    assert (version, archive.content, archive.envelope.type) == ("1.2.3+4", content, "a/b")


@pytest.mark.parametrize("version", ["1.2.4", "1.2.3", "v1.2.3+4"])
def test_contradicted_version(firmware: Path, version: str) -> None:
    """Another version than the file's is an error, unless it is forced."""
    with pytest.raises(InvalidDataError) as raised:
        described(ArchiveSource(firmware), version=version)
    assert raised.value.detail == f"{firmware}: version: is 1.2.3+4 in the file, not {version}"
    assert raised.value.hint == "If that is meant, give --force."
    forced, _ = describe([ArchiveSource(firmware)], NAME, version, [], force=True)
    assert version == forced


def test_contradicted_attribute(program: Path) -> None:
    """An architecture that the file is not made for is an error, unless it is forced."""
    content = Content(arch="xtensa", machine="m")
    with pytest.raises(InvalidDataError, match=r"program: arch: is \w+ in the file, not xtensa"):
        described(ArchiveSource(program, content=content))
    source = ArchiveSource(program, content=content)
    _, (archive,) = describe([source], NAME, "1", [], force=True)
    assert content == archive.content


def test_versions_agree(firmware: Path, program: Path, tmp_path: Path) -> None:
    """Files that tell their version tell the same; the others take it."""
    other = files.image(tmp_path / "other.bin", version="1.2.4")
    version, archives = describe([ArchiveSource(p) for p in (program, firmware)], NAME, None, [])
    assert (version, len(archives)) == ("1.2.3+4", 2)
    with pytest.raises(InvalidDataError) as raised:
        describe([ArchiveSource(p) for p in (firmware, other)], NAME, None, [])
    assert raised.value.detail == f"{other}: version: is 1.2.4, but {firmware} has 1.2.3+4"
    assert raised.value.hint.startswith("All archives of a stream have the same version")


@pytest.mark.parametrize(("debug", "expected"), [("n", "board"), ("y", "board-debug")])
def test_a_zephyr_build_names_itself(tmp_path: Path, debug: str, expected: str) -> None:
    """The archive of a Zephyr build is called by its machine, whatever the file is called."""
    image = files.image(tmp_path / "zephyr.signed.bin")
    config = f'CONFIG_BOARD="board"\nCONFIG_ARCH="arm64"\nCONFIG_DEBUG={debug}\n'
    (tmp_path / ".config").write_text(config)
    _, archive = described(ArchiveSource(image), version=None)
    assert expected == archive.name
    assert archive.content == Content(
        type="zephyr-image", arch="aarch64", machine="board", debug=debug == "y"
    )


def test_template_of_a_name_that_is_not_said(tmp_path: Path) -> None:
    """The place that the template stands at is told, and what to do."""
    (tmp_path / "a.bin").write_bytes(b"a")
    with pytest.raises(InvalidDataError) as raised:
        described(ArchiveSource(tmp_path / "a.bin", "{machine}"))
    assert "a.bin: name: '{machine}': the templates are {file}" in raised.value.detail
    assert raised.value.hint.startswith("Give it a name")
