"""The commands of release engineers, run as they run them."""

from __future__ import annotations

import asyncio
import functools
import http.server
import json
import os
import re
import shutil
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import tomli

from netota_coap import cli
from netota_coap.repository.loading import Loader
from tests.cli.test_commands import ok
from tests.support.serving import COMMAND, PROJECT, netota, serving
from tools.generate import spec_cli

SPEC = (PROJECT / "netota_coap/spec/cli.md").read_text()
SHAPES = dict(re.findall(r"^```json-shape (\w+)\n(.*?)^```$", SPEC, re.MULTILINE | re.DOTALL))
NAME = "sensor-node/stable"


@pytest.fixture
def images(tmp_path: Path) -> list[str]:
    """What the sample's two boards are published from."""
    machines = ("nrf52840dk", "nrf9160dk")
    for machine in machines:
        (tmp_path / f"{machine}.bin").write_text(f"image of {machine}")
    said = "type=zephyr-image,arch=arm,debug=false"
    return [f"--archive={tmp_path}/{m}.bin,machine={m},{said}" for m in machines]


OFFER = "--offer=https://updates.example.com/{version}/{name}"


async def test_a_release(sample: Path, images: list[str]) -> None:
    """Dry run, publish, log, diff, rollback, promote, remove: one after the other."""
    publish = ("publish", sample, NAME, "2.0", *images, OFFER)
    told = await ok(*publish, "--dry-run")
    assert told.splitlines()[0] == f"{NAME}: 1.0.0, sequence 1 → 2.0, sequence 2"
    assert re.search(r"^nrf9160dk +rebuilt +43 → 18 *$", told, re.MULTILINE)
    assert re.search(r"machine=nrf9160dk debug=false +1\.0\.0 → 2\.0 +18 bytes +\d+ by", told)
    assert await ok("log", sample, NAME, "--json") == await ok("log", sample, NAME, "--json")
    assert len(json.loads(await ok("log", sample, NAME, "--json"))) == 1

    assert await ok(*publish, "-m", "New") == f"{NAME}: 2.0, sequence 2, 2 archives\n"
    assert await ok("diff", sample, NAME) == told
    assert await ok("rollback", sample, NAME) == f"{NAME}: 1.0.0, sequence 3, 2 archives\n"
    promoted = await ok("promote", sample, "sensor-node/edge", NAME, "--message", "Good")
    assert promoted == f"{NAME}: 1.1.0-rc1, sequence 4, 2 archives\n"
    removed = await ok("remove", sample, "sensor-node/edge")
    assert removed == "sensor-node/edge: 1.1.0-rc1, sequence 2, removed\n"
    log = (await ok("log", sample, NAME)).splitlines()
    assert [line.split()[0] for line in log[1:]] == ["4", "3", "2", "1"]
    assert (log[1].rstrip().endswith("Good"), log[3].rstrip().endswith("New")) == (True, True)
    assert "removed" in (await ok("log", sample, "sensor-node/edge")).splitlines()[1]
    old = await ok("show", sample, NAME, "--at", "2")
    assert "message      New" in old
    assert await ok("check", sample) == "0 errors, 0 warnings\n"


async def test_a_lost_build(sample: Path, images: list[str]) -> None:
    """A build that would be missing is told, refused, and let go if that is said."""
    publish = ("publish", sample, NAME, "2.0", images[0], OFFER)
    code, out, _ = await netota(*publish, "-n")
    assert (code, out.splitlines()[-1]) == (
        1, "lost: no archive is left for arch=arm machine=nrf9160dk",
    )  # fmt: skip
    code, out, err = await netota(*publish)
    assert (code, out) == (3, "")
    assert err == (
        f"error: {NAME}: nothing would be left for arch=arm machine=nrf9160dk\n"
        "hint: Add the builds, or give --allow-missing if that is meant.\n"
    )
    code, _, err = await netota(*publish, "--allow-missing")
    assert code == 0
    assert err == (
        "warning: type=zephyr-image arch=arm machine=nrf9160dk debug=false: "
        "nothing suits such a device any more\n"
    )
    other = tuple("2.1" if word == "2.0" else word for word in publish)
    assert (await netota(*other, "-n", "--allow-missing"))[0] == 0


async def test_a_release_file(sample: Path, tmp_path: Path, images: list[str]) -> None:
    """A draft is made, read back, and published; what is given besides wins or is refused."""
    file = tmp_path / "release.toml"
    drafted = await ok("release", *(re.findall("=(.*?),", image)[0] for image in images))
    assert len(tomli.loads(drafted)["archives"]) == 2
    assert await ok("release", tmp_path / "nrf52840dk.bin", "-o", file) == ""
    text = file.read_text() + '\nversion = "2.0"\n'
    assert (await netota("release", tmp_path / "nrf52840dk.bin", "-o", file))[0] == 2
    file.write_text(
        'version = "2.0"\nmessage = "From the file"\n'
        '[[offers]]\nurl = "https://example.com/{stream}/{name}"\nmetric = 5\n'
        '[[archives]]\nfile = "nrf*dk.bin"\n[archives.content]\narch = "arm"\n'
    )
    assert "release.toml" in text
    publish = ("publish", sample, "new/stable")
    assert await ok(*publish, "--release", file) == "new/stable: 2.0, sequence 1, 2 archives\n"
    stream = Loader(sample).load().packages["new"].streams["stable"]
    assert stream.message == "From the file"
    urls = [archive.offers[0].url for archive in stream.archives or ()]
    assert urls == [f"https://example.com/stable/{name}" for name in ("nrf52840dk", "nrf9160dk")]

    code, _, err = await netota(*publish, "3.0", "--release", file)
    assert code == 3
    assert err == (
        "error: version: is 2.0 in the release file, not 3.0\n"
        "hint: If that is meant, give --force.\n"
    )
    said = await ok(*publish, "3.0", "--release", file, "--force", "-m", "Mine")
    assert said == "new/stable: 3.0, sequence 2, 2 archives\n"
    assert Loader(sample).load().packages["new"].streams["stable"].message == "Mine"


@pytest.mark.parametrize(
    ("arguments", "code", "said"),
    [
        (["publish", "{root}", NAME, "--archive", "LICENSE"], 3, "version: must be given"),
        (
            ["publish", "{root}", NAME, "--release", "x", "--archive", "y"],
            2,
            "give --archive",
        ),
        (
            ["publish", "{root}", NAME, "--release", "x", "--offer", "/y"],
            2,
            "--offer cannot be used",
        ),
        (["publish", "{root}", NAME, "--release", "nix"], 3, "error: nix: is not a file\n"),
        (["release", "{root}"], 3, "there is nothing to publish"),
        (["promote", "{root}", NAME, NAME], 3, "cannot be promoted to itself"),
        (["rollback", "{root}", NAME], 3, "never held anything else"),
        (
            ["rollback", "{root}", NAME, "--to", "7"],
            3,
            "has no sequence 7\nhint: Show its",
        ),
        (["remove", "{root}", "sensor-node/nix"], 3, "there is no stream sensor-node/nix"),
        (["close", "{root}", NAME, "-m", ""], 3, "message: must not be empty"),
        (["log", "{root}", "sensor-node/nix"], 3, "and never was"),
        (["show", "{root}", NAME, "--at", "9"], 3, "has no sequence 9"),
        (["show", "coap://127.0.0.1/x", "--at", "9"], 2, "a server has no history"),
        (["diff", "{root}", NAME, "--to", "x"], 2, "is not a valid integer"),
        (["inspect", "nix"], 3, "error: nix: "),
        (["completion", "tcsh"], 2, "is not one of"),
    ],
    ids=lambda value: value[0] if isinstance(value, list) else "",
)
async def test_mistakes(arguments: list[str], code: int, said: str, sample: Path) -> None:
    """Each mistake has its exit code, a line that says what, and one that helps."""
    exited, out, err = await netota(*(text.format(root=sample) for text in arguments))
    assert code == exited, err
    assert said.format(root=sample) in out + err
    assert "Traceback" not in err
    assert Loader(sample).load().packages["sensor-node"].streams["stable"].sequence == 1


async def test_json_is_json(sample: Path, images: list[str]) -> None:
    """Whatever was written, and whatever the locale: JSON can be read back."""
    message = "l'été\u00a0: \u00ad\U0001f1ea\u202e"
    await ok("publish", sample, NAME, "2.0", *images, OFFER, "-m", message)
    for command in ("log", "show", "diff"):
        process = await asyncio.create_subprocess_exec(
            *COMMAND, command, str(sample), NAME, "--json",
            stdout=asyncio.subprocess.PIPE, cwd=PROJECT,
            env=os.environ | {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"},
        )  # fmt: skip
        out, _ = await process.communicate()
        assert message in json.dumps(json.loads(out), ensure_ascii=False)


async def test_links_lead_nowhere(sample: Path, tmp_path: Path, images: list[str]) -> None:
    """A repository with links in it makes nobody write elsewhere."""
    precious = tmp_path / "precious"
    precious.write_text("mine")
    lock, streams = sample / ".lock", sample / "packages/sensor-node/streams"
    publish = ("publish", sample, NAME, "2.0", *images, OFFER)
    lock.unlink(missing_ok=True)
    lock.symlink_to(precious)
    code, _, err = await netota(*publish)
    assert (code, err.splitlines()[0]) == (
        3, f"error: {lock}: cannot be written: Too many levels of symbolic links",
    )  # fmt: skip
    lock.unlink()
    (streams / ".stable.toml.tmp").symlink_to(precious)
    await ok(*publish)
    assert (precious.read_text(), (streams / "stable.toml").is_symlink()) == ("mine", False)


async def test_inspect(tmp_path: Path) -> None:
    """What a file tells is printed, for people and for scripts."""
    files = [tmp_path / "a", tmp_path / "b"]
    for file in files:
        file.write_text("text")
    for_people = await ok("inspect", *files)
    assert for_people.count("media type   application/octet-stream") == 2
    plain = json.loads(await ok("inspect", *files, "--json"))
    assert [(each["file"], each["size"]) for each in plain] == [(str(f), 4) for f in files]


# ----------------------------------------------------------------------------------------------
# Offers and downloads


class _Quiet(http.server.SimpleHTTPRequestHandler):
    """Serves files without a word."""

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture
def web(tmp_path: Path) -> Iterator[str]:
    """The URI of a web server of the images."""
    handler = functools.partial(_Quiet, directory=str(tmp_path))
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        serving = threading.Thread(target=server.serve_forever)
        serving.start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()
        serving.join()


async def test_check_online(sample: Path, tmp_path: Path, images: list[str], web: str) -> None:
    """Each offer is asked; a bad one is named, with exit code 1."""
    stream = "boards/stable"
    offers = (f"--offer={web}/{{file}}", "--offer=/{file},5")
    await ok("publish", sample, stream, "1", *images, *offers)
    await ok("remove", sample, NAME)
    await ok("remove", sample, "sensor-node/edge")
    asked = ("check", sample, "--online", "--server", web)
    lines = (await ok(*asked)).splitlines()
    assert lines[1] == f"ok: {stream}: nrf52840dk: {web}/nrf52840dk.bin"
    assert lines[-1] == "4 offers, 0 bad"
    (tmp_path / "nrf9160dk.bin").write_text("image of nrf9160dX")
    assert (await netota(*asked))[0] == 0
    code, out, _ = await netota(*asked, "--digest")
    assert (code, out.splitlines()[-1]) == (1, "4 offers, 2 bad")
    (tmp_path / "nrf9160dk.bin").unlink()
    code, out, _ = await netota(*asked, "--json")
    asked_offers = json.loads(out)["offers"]
    assert code == 1
    assert keys(asked_offers) == keys(json.loads(SHAPES["offers"]))
    assert [offer["problem"] for offer in asked_offers] == ["", "", *["404 Not Found"] * 2]
    code, out, _ = await netota("check", sample, "--online")
    relative = f"relative: Name the server: --server URI: {stream}: nrf52840dk: /nrf52840dk.bin"
    assert (code, out.splitlines()[1:3]) == (1, [lines[1], relative])


async def test_download(sample: Path, tmp_path: Path, images: list[str], web: str) -> None:
    """The best archive for a device is fetched: as a repository has it, or a server."""
    await ok("publish", sample, "boards/stable", "1", *images, f"--offer={web}/{{file}}")
    file = tmp_path / "out.bin"
    fetch = ("download", sample, "boards/stable", "--machine", "nrf9160dk", "-o", file)
    said = f"{file}: nrf9160dk, 18 bytes, "
    assert await ok(*fetch) == f"{said}from {web}/nrf9160dk.bin\n"
    assert file.read_text() == "image of nrf9160dk"
    assert await ok(*fetch) == f"{said}already complete\n"
    file.unlink()
    async with serving(sample) as (uri,):
        remote = ("download", uri, "boards/stable", "-o", file, "--json")
        got = json.loads(await ok(*remote, "--arch=arm", "--query=type=zephyr-image"))
        assert (got["archive"], got["url"]) == ("nrf52840dk", f"{web}/nrf52840dk.bin")
        assert got.keys() == json.loads(SHAPES["downloaded"]).keys()
    code, _, err = await netota(*fetch[:-4], "--scheme=coap", "-o", file)
    said = "error: no archive of boards/stable suits scheme=coap"
    assert (code, err.splitlines()[0]) == (3, said)
    (tmp_path / "nrf9160dk.bin").write_text("another one")
    file.unlink()
    code, _, err = await netota(*fetch)
    assert (code, file.exists()) == (4, False)
    assert "nrf9160dk.bin" in err


# ----------------------------------------------------------------------------------------------
# JSON


def keys(plain: Any) -> Any:
    """Return what is called how, without the values; free attributes have no fixed names."""
    if isinstance(plain, dict):
        return {
            key: keys(value) if key not in ("kind", "content", "facts") else {}
            for key, value in plain.items()
        }
    return [keys(plain[0])] if isinstance(plain, list) and plain else None


@pytest.mark.parametrize(
    ("shape", "arguments"),
    [
        ("findings", ["check", "{root}"]),
        ("artefact", ["inspect", "LICENSE"]),
        ("row", ["list", "{root}"]),
        ("stream", ["show", "{root}", NAME]),
        ("entry", ["log", "{root}", NAME]),
        ("difference", ["diff", "{root}", NAME]),
        ("difference", ["close", "{root}", NAME]),
        ("difference", ["promote", "{root}", "sensor-node/edge", NAME, "--allow-missing"]),
    ],
)
async def test_shapes(sample: Path, images: list[str], shape: str, arguments: list[str]) -> None:
    """What is printed has the keys that cli.md shows."""
    shutil.copy(PROJECT / "LICENSE", sample / "LICENSE")
    await ok("publish", sample, NAME, "2.0", *images, OFFER, "-m", "why")
    expected = keys(json.loads(SHAPES[shape]))
    printed = keys(json.loads(await ok(*(a.format(root=sample) for a in arguments), "--json")))
    if shape == "findings":
        printed.pop("offers")
    if shape == "difference":
        # Lists that are empty here have no keys to compare.
        for plain in (expected, printed):
            del plain["lost"], plain["warnings"]
    assert expected == printed


# ----------------------------------------------------------------------------------------------
# Help and shells


def test_each_command_has_an_example() -> None:
    """Each example is a command line that exists, of the command that it stands at."""
    for name, command in spec_cli.each_command(cli.cli):
        assert command.epilog is not None
        assert f"{command.epilog} ".startswith(f"Example: netota-coap {name} ")
        options = {option for param in command.params for option in param.opts}
        assert set(re.findall(r" (--?[a-z][a-z-]*)", command.epilog)) <= options, name


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
async def test_completion(shell: str) -> None:
    """What a shell asks for is there."""
    assert "_NETOTA_COAP_COMPLETE" in await ok("completion", shell)


@pytest.mark.parametrize(
    ("words", "found"),
    [
        ("netota-coap show {root} sensor-node/s", ["sensor-node/stable"]),
        ("netota-coap re", ["release", "reopen", "remove"]),
        ("netota-coap serve --multi", ["--multicast"]),
        ("netota-coap config ch", ["check"]),
    ],
)
async def test_completion_in_a_shell(sample: Path, words: str, found: list[str]) -> None:
    """A shell is told commands, options, and the streams of the repository on the line."""
    line = words.format(root=sample)
    complete = "_netota_coap_completion netota-coap"
    process = await asyncio.create_subprocess_exec(
        "bash", "-c", 'source <(netota-coap completion bash); COMP_WORDS=(' + line + '); '
        f'COMP_CWORD={line.count(" ")}; {complete}; echo "${{COMPREPLY[@]}}"',
        stdout=asyncio.subprocess.PIPE, cwd=PROJECT,
        env=os.environ | {"PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"},
    )  # fmt: skip
    out, _ = await process.communicate()
    assert out.decode().split() == found
