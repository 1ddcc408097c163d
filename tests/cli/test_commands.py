"""cli/: the commands, run as their users run them."""

from __future__ import annotations

import asyncio
import json
import os
import pty
import subprocess
import sys
from pathlib import Path

import click
import pytest

from netota_coap import cli
from netota_coap.errors import NetotaError
from netota_coap.repository import lock
from tests.support.serving import COMMAND, PATIENCE_S, PROJECT, netota, served, serving, until


async def ok(*arguments: str | Path) -> str:
    """Run a command that must do well, maybe with warnings; its standard output."""
    code, out, err = await netota(*arguments)
    assert code == 0, err
    assert [line for line in err.splitlines() if not line.startswith("warning: ")] == []
    return out


@pytest.fixture
def image(tmp_path: Path) -> Path:
    path = tmp_path / "image.bin"
    path.write_bytes(b"image")
    return path


async def test_a_day(tmp_path: Path, image: Path) -> None:
    """init, check, list, show, publish, close, reopen: one after the other."""
    root = tmp_path / "repository"
    assert "netota-coap serve" in await ok("init", root, "--sample", "--title", "Ours")
    assert await ok("check", root) == "0 errors, 0 warnings\n"
    listed = json.loads(await ok("list", root, "--json"))
    assert [(row["stream"], row["version"]) for row in listed] == [
        ("edge", "1.1.0-rc1"),
        ("stable", "1.0.0"),
    ]
    published = await ok(
        "publish", root, "sensor-node/stable", "2.0",
        "--archive", f"{image},name=board,machine=board,debug=false,ram=64,secure=true",
        "--offer", "https://example.com/{version}/{name}/{file}?{sha256},5",
        "--offer", "/b/{sha256}", "--allow-missing",
    )  # fmt: skip
    assert published == "sensor-node/stable: 2.0, sequence 2, 1 archives\n"
    shown = json.loads(await ok("show", root, "sensor-node/stable", "--json"))
    assert shown["archives"][0]["content"] == {
        "machine": "board",
        "debug": False,
        "ram": 64,
        "secure": True,
    }
    digest = shown["archives"][0]["envelope"]["sha256"]
    assert [
        {"url": f"https://example.com/2.0/board/image.bin?{digest}", "metric": 5},
        {"url": f"/b/{digest}", "metric": 100},
    ] == shown["archives"][0]["offers"]
    closed = await ok("close", root, "sensor-node/stable", "--replacement", "sensor-node/edge")
    assert closed == "sensor-node/stable: 2.0, sequence 3, closed, replacement sensor-node/edge\n"
    table = await ok("show", root, "sensor-node/stable")
    assert "replacement  sensor-node/edge" in table
    assert "closed" in (await ok("list", root)).splitlines()[-1]
    reopened = await ok("reopen", root, "sensor-node/stable")
    assert reopened == "sensor-node/stable: 2.0, sequence 4, 1 archives\n"


async def test_as_a_client(sample: Path) -> None:
    """list, show, get and watch talk to a server."""
    async with serving(sample) as (uri,):
        stable = f"{uri}/p/sensor-node/s/stable"
        assert json.loads(await ok("list", uri, "--json")) == json.loads(
            await ok("list", sample, "--json")
        )
        shown = json.loads(await ok("show", stable, "--json"))
        assert (
            json.loads(await ok("show", sample, "sensor-node/stable", "--json"))
            | {"poll_s": 86_400}
            == shown
        )
        assert shown == json.loads(await ok("get", stable))
        narrowed = json.loads(await ok("get", stable, "--query", "machine=nrf9160dk"))
        assert [archive["name"] for archive in narrowed["archives"]] == ["nrf9160dk"]
        cbor = json.loads(await ok("get", stable, "--query", "head", "--accept", "cbor"))
        assert (cbor["1"], cbor["2"]) == ("1.0.0", 1)
        links = await ok("get", f"{uri}/.well-known/core")
        assert len(links.splitlines()) == 4


@pytest.mark.parametrize("as_json", [True, False])
async def test_watch(sample: Path, image: Path, as_json: bool) -> None:
    """Watch prints a line per state, for people or for scripts."""
    async with served(sample) as server:
        watching = await asyncio.create_subprocess_exec(
            *COMMAND, "watch", f"{server.uri}/p/sensor-node/s/stable",
            "--query", "machine=nrf52840dk", "--poll-s", "60", *(["--json"] if as_json else []),
            stdout=asyncio.subprocess.PIPE, cwd=PROJECT,
        )  # fmt: skip
        try:
            assert watching.stdout is not None
            async with asyncio.timeout(PATIENCE_S):
                lines = [await watching.stdout.readline()]
                await ok(
                    "publish", sample, "sensor-node/stable", "2.0",
                    "--archive", f"{image},machine=nrf52840dk", "--offer", "/{name}",
                    "--allow-missing",
                )  # fmt: skip
                lines.append(await watching.stdout.readline())
                await ok(
                    "close", sample, "sensor-node/stable", "--replacement", "sensor-node/edge"
                )
                lines.append(await watching.stdout.readline())
        finally:
            watching.terminate()
            await watching.wait()
    texts = [line.decode().rstrip("\n") for line in lines]
    if as_json:
        states = [json.loads(text) for text in texts]
        assert [(state["version"], state["sequence"]) for state in states] == [
            ("1.0.0", 1),
            ("2.0", 2),
            ("2.0", 3),
        ]
    else:
        url = "https://updates.example.com/sensor-node/1.0.0/nrf52840dk.bin"
        assert texts[0].endswith(f" 1.0.0 sequence 1, nrf52840dk, {url}")
        assert texts[1].endswith(" 2.0 sequence 2, image, /image")
        assert texts[2].endswith(
            " 2.0 sequence 3, closed, replacement sensor-node/edge, image, /image"
        )


async def test_watch_waits_for_a_server(sample: Path) -> None:
    """Watch says what it waits for, and goes on when it comes."""
    async with serving(sample) as (uri,):
        pass
    watching = await asyncio.create_subprocess_exec(
        *COMMAND, "watch", f"{uri}/p/sensor-node/s/stable", "--query", "machine=none",
        stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.PIPE, cwd=PROJECT,
    )  # fmt: skip
    try:
        assert watching.stdout is not None
        assert watching.stderr is not None
        async with asyncio.timeout(PATIENCE_S):
            assert (await watching.stderr.readline()).startswith(b"waiting: coap://127.0.0.1")
            async with serving(sample, uri.removeprefix("coap://")):
                assert (await watching.stdout.readline()).endswith(b"nothing suits\n")
    finally:
        watching.terminate()
        await watching.communicate()


MISTAKES = [
    (["check", "{root}/nix"], 1, "error: {root}/nix: is not a directory\n"),
    (["list", "{root}/nix"], 3, "error: {root}/nix: is not a directory\n"),
    (["show", "{root}"], 2, "name one as PKG/STREAM"),
    (["show", "{root}", "sensor-node"], 2, "must be PACKAGE/STREAM"),
    (["show", "{root}", "sensor-node/nix"], 3, "hint: List the streams: netota-coap list"),
    (["show", "{root}", "no/body"], 3, "there is no stream no/body"),
    (["init", "{root}"], 3, "there is a repository already"),
    (["close", "{root}", "sensor-node/nix"], 3, "there is no stream sensor-node/nix"),
    (["close", "{root}", "sensor-node/edge", "--replacement", "a/b"], 3, "there is no stream a/b"),
    (["close", "{root}", "../edge"], 2, "must consist of letters"),
    (["reopen", "{root}", "sensor-node/edge"], 3, "sensor-node/edge is open"),
    (
        ["publish", "{root}", "sensor-node/edge", "2"],
        2,
        "give --archive",
    ),
    (
        ["publish", "{root}", "sensor-node/edge", "2", "--archive", "nix.bin"],
        3,
        "error: nix.bin: cannot be read: No such file or directory\n",
    ),
    (
        ["publish", "{root}", "sensor-node/edge", "2", "--archive", "x,name"],
        3,
        "error: x: name: must be KEY=VALUE\n",
    ),
    (
        ["publish", "{root}/nix", "sensor-node/edge", "2", "--archive", "LICENSE"],
        3,
        "hint: Make one: netota-coap init",
    ),
    (["serve", "{root}", "--bind", "192.0.2.99:5683"], 4, "choose another"),
    (["serve", "{root}", "--bind", "[::"], 2, "must be HOST:PORT"),
    (["serve", "{root}/nix"], 3, "error: {root}/nix: is not a directory\n"),
    (["get", "http://localhost/"], 2, "only coap:// is supported"),
    (
        ["get", "coap://127.0.0.1:1/p"],
        4,
        "error: coap://127.0.0.1:1/p: Connection refused\nhint: ",
    ),
    (["spec", "nix"], 2, "no document 'nix'"),
    (["nix"], 2, "No such command"),
]


@pytest.mark.parametrize(
    ("arguments", "code", "said"), MISTAKES, ids=[" ".join(row[0]) for row in MISTAKES]
)
async def test_mistakes(arguments: list[str], code: int, said: str, sample: Path) -> None:
    """Each mistake has its exit code, a line that says what, and one that helps."""
    exited, out, err = await netota(*(text.format(root=sample) for text in arguments))

    assert code == exited
    assert said.format(root=sample) in out + err
    assert "Traceback" not in err


async def test_a_second_server_on_a_port(sample: Path) -> None:
    """It fails with exit code 4, and says so."""
    async with serving(sample) as (uri,):
        bind = uri.removeprefix("coap://")
        code, _, err = await netota("serve", sample, "--bind", bind)

    assert code == 4
    assert f"error: cannot listen on {bind}: Address already in use\nhint: " in err


async def test_check_finds(sample: Path) -> None:
    """Problems are listed with file, place and reason; exit code 1; nothing is lost as JSON."""
    stream = sample / "packages/sensor-node/streams/stable.toml"
    stream.write_text(stream.read_text().replace("1.0.0", "1.0.1"))
    (sample / "notes.txt").touch()
    code, out, _ = await netota("check", sample)
    plain = json.loads((await netota("check", sample, "--json"))[1])

    assert code == 1
    file = "packages/sensor-node/streams/stable.toml"
    assert out.splitlines()[:2] == [
        f"error: {file}: sequence: must be above 1, the sequence of another state",
        "warning: notes.txt: is ignored: it is no file of a repository",
    ]
    assert out.splitlines()[-1] == "1 errors, 1 warnings"
    assert (plain["errors"][0]["place"], len(plain["warnings"])) == ("sequence", 1)


async def test_locked(sample: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A publisher that waits in vain says why, and exits with 3."""
    import fcntl

    child = (
        "import netota_coap.repository.store as r; locked = r.locked; "
        "r.locked = lambda root: locked(root, 0.1); from netota_coap.cli import main; main()"
    )
    with (sample / lock.FILE).open("ab") as held:
        fcntl.flock(held, fcntl.LOCK_EX)
        process = await asyncio.create_subprocess_exec(
            sys.executable, "-c", child, "close", str(sample), "sensor-node/edge",
            stderr=asyncio.subprocess.PIPE, cwd=PROJECT,
        )  # fmt: skip
        _, err = await process.communicate()

    assert process.returncode == 3
    assert b"somebody else is still writing after 0.1 s of waiting" in err


async def test_spec() -> None:
    """The documents are shipped with the package."""
    names = (await ok("spec")).splitlines()
    assert {"repository.md", "wire.md", "wire.cddl", "resources.md", "CHANGES.md"} <= set(names)
    for name in ("wire.cddl", "wire", "resources"):
        assert await ok("spec", name)


async def test_help_and_version() -> None:
    """Each command stands under a heading with a sentence, which begins its own help, too."""
    lines = (await ok("--help")).splitlines()
    for heading, rows in cli.COMMANDS.items():
        at = lines.index(f"{heading}:") + 1
        assert lines[at : at + len(rows)] == [
            f"  {name:10}  {sentence}" for name, (_, sentence) in rows.items()
        ]
        for name, (_, sentence) in rows.items():
            command = cli.cli.get_command(click.Context(cli.cli), name)
            assert command is not None
            assert (command.help or "").splitlines()[0] == command.short_help == sentence
    assert "netota-coap, version " in await ok("--version")


@pytest.mark.parametrize(
    ("error", "code", "said"),
    [
        (ZeroDivisionError("oops"), 70, "bug: ZeroDivisionError at test_commands.py:"),
        (NetotaError("wrong", hint="do right"), 3, "error: wrong\nhint: do right\n"),
        (KeyboardInterrupt(), 130, ""),
        (click.Abort(), 130, ""),
        (BrokenPipeError(), 1, ""),
    ],
)
def test_main(
    error: BaseException,
    code: int,
    said: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """No traceback reaches a user, whatever happens."""

    def fail(**_: object) -> None:
        raise error

    monkeypatch.setattr(cli.cli, "main", fail)
    with pytest.raises(SystemExit) as caught:
        cli.main()

    assert code == caught.value.code
    assert said in capsys.readouterr().err


def test_progress_bar(sample: Path, tmp_path: Path) -> None:
    """Reading a large file shows a bar on a terminal, and leaves the answer alone."""
    large = tmp_path / "large.bin"
    with large.open("wb") as stream:
        stream.truncate(64 * 2**20)
    ours, theirs = pty.openpty()
    process = subprocess.Popen(
        [*COMMAND, "publish", sample, "sensor-node/new", "9", "--archive", large],
        stdout=subprocess.PIPE, stderr=theirs, cwd=PROJECT, env=os.environ | {"TERM": "xterm"},
    )  # fmt: skip
    os.close(theirs)
    shown = b""
    while True:
        try:
            shown += os.read(ours, 4096)
        except OSError:  # the other end is closed
            break
    out, _ = process.communicate()
    os.close(ours)

    assert out == b"sensor-node/new: 9, sequence 1, 1 archives\n"
    assert b"67.1" in shown


async def test_markup_stays_text(sample: Path, image: Path) -> None:
    """What publishers write is never read as markup."""
    package = sample / "packages/sensor-node/package.toml"
    package.write_text('title = "[red]danger[/red]"\n')

    assert "[red]danger[/red]" in await ok("list", sample)


async def test_log_of_the_service(sample: Path) -> None:
    """The log says what was reloaded, and what was not, in single lines."""
    async with served(sample) as server:
        stream = sample / "packages/sensor-node/streams/stable.toml"
        before = stream.read_text()
        stream.write_text("version=")
        await until(lambda: len(server.log) >= 2)
        stream.write_text(before)
        await until(lambda: len(server.log) >= 3)

    assert server.log[0] == "ERROR not reloaded, the old state is still served:"
    assert server.log[1].startswith("ERROR   packages/sensor-node/streams/stable.toml: is not")
    assert server.log[2].startswith("INFO reloaded 1 files in ")
