"""The examples of spec/client.md are run as they are printed, against real servers."""

from __future__ import annotations

import ast
import asyncio
import re
import shutil
import sys
from pathlib import Path

import pytest

import netota_coap
from netota_coap import client
from netota_coap.client import Selection, Stream
from netota_coap.model.values import Content
from netota_coap.publishing.archives import ArchiveSource
from netota_coap.repository import scaffold
from tests.support.publishing import STABLE, close, publish
from tests.support.serving import COMMAND, PROJECT, netota, run, serving

pytestmark = pytest.mark.slow

DOCUMENT = (Path(netota_coap.__file__).parent / "spec" / "client.md").read_text(encoding="utf-8")
EXAMPLES = dict(re.findall(r"^```python (\S+)\n(.*?)^```$", DOCUMENT, re.MULTILINE | re.DOTALL))
LOOPBACK = """
ip link set lo up multicast on
ip route add 224.0.0.0/4 dev lo
ip -6 route add ff02::/16 dev lo table local
"$@" serve "$ROOT" --bind [::]:5683 --multicast lo >"$OUT" & server=$!
until grep -q listening "$OUT"; do kill -0 $server; done
python="$1" && "$python" "$EXAMPLE"
kill $server
"""


def example(directory: Path, name: str) -> Path:
    """Write an example as it is printed."""
    file = directory / name
    file.write_text(EXAMPLES[name], encoding="utf-8")
    return file


@pytest.fixture
def image(tmp_path: Path) -> Path:
    file = tmp_path / "image"
    file.write_bytes(b"firmware" * 1000)
    return file


@pytest.fixture
def root(tmp_path: Path, image: Path) -> Path:
    """Return a repository whose only file the server itself offers."""
    root = tmp_path / "repository"
    scaffold.init(root)
    publish_version(root, image, "1.0")
    return root


def publish_version(root: Path, image: Path, version: str) -> Stream:
    source = ArchiveSource(image, "firmware", content=Content(machine="nrf52840dk"))
    return publish(root, STABLE, version, [source], store_files=True)


async def run_example(directory: Path, name: str, *arguments: str) -> str:
    """Run an example to its end in a directory; return what it printed."""
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-W", "error", str(example(directory, name)), *arguments),
        cwd=directory,
        env={"PYTHONPATH": str(PROJECT)},
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.PIPE,
    )
    async with asyncio.timeout(30):
        out, err = await process.communicate()
    assert (process.returncode, err.decode()) == (0, "")
    return out.decode()


async def test_stream(root: Path, tmp_path: Path) -> None:
    """The stream is printed with the preferred archive and its offer."""
    async with serving(root) as (uri,):
        out = await run_example(tmp_path, "stream.py", uri)
    assert re.fullmatch(r"version 1\.0, sequence 1\nfirmware 8000 /b/[\w-]{43}\n", out)


async def test_observe(root: Path, image: Path, tmp_path: Path) -> None:
    """Each publish is printed, and the end of the stream ends the program."""
    async with serving(root) as (uri,), asyncio.timeout(30):
        process = await asyncio.create_subprocess_exec(
            *(sys.executable, "-W", "error", str(example(tmp_path, "observe.py")), uri),
            cwd=PROJECT,
            env={"PYTHONPATH": str(PROJECT)},
            stdout=asyncio.subprocess.PIPE,
        )
        assert process.stdout
        assert await process.stdout.readline() == b"run 1.0\n"
        publish_version(root, image, "2.0")
        assert await process.stdout.readline() == b"run 2.0\n"
        close(root, STABLE)
        assert await process.stdout.read() == b"run 2.0\n"
        assert await process.wait() == 0


async def test_download(root: Path, image: Path, tmp_path: Path) -> None:
    """The file is downloaded once."""
    async with serving(root) as (uri,):
        assert (await run_example(tmp_path, "download.py", uri)).startswith("from /b/")
        assert (await run_example(tmp_path, "download.py", uri)) == "was complete already\n"
    assert (tmp_path / "firmware.bin").read_bytes() == image.read_bytes()


async def test_discover(root: Path, tmp_path: Path) -> None:
    """A server of the network, here of a loopback interface of its own, is found."""
    code, _, _ = await run("unshare", "--net", "true")
    if code or not shutil.which("ip"):
        pytest.skip("a network of its own takes root, and Debian's iproute2")
    names = {"ROOT": root, "OUT": tmp_path / "out", "EXAMPLE": example(tmp_path, "discover.py")}
    settings = [f"{name}={value}" for name, value in names.items()]
    shell = ("unshare", "--net", "sh", "-eu", "-c", LOOPBACK, "sh", *COMMAND)
    code, out, err = await run("env", *settings, f"PYTHONPATH={PROJECT}", *shell)
    assert (code, out) == (0, "coap://127.0.0.1\n"), err


async def test_errors(root: Path, tmp_path: Path) -> None:
    """A refusal, an unreachable server and a wrong URI are told apart."""
    async with serving(root) as (uri,):
        assert await run_example(tmp_path, "errors.py", uri) == "refused with 4.04\n"
    assert (await run_example(tmp_path, "errors.py", uri)).startswith("try again later: ")
    wrong = await run_example(tmp_path, "errors.py", "http://localhost")
    assert wrong == "http://localhost/p/sensor-node/s/unknown: only coap:// is supported \n"


async def test_the_command_prints_it() -> None:
    """`netota-coap spec client` is the document."""
    assert await netota("spec", "client") == (0, DOCUMENT, "")


def test_each_example_is_run() -> None:
    """No example of the document is left out above, and each can be read."""
    assert len(EXAMPLES) == DOCUMENT.count("```python")
    assert set(re.findall(r'"(\w+\.py)"', Path(__file__).read_text())) == EXAMPLES.keys()
    assert all(ast.parse(text) for text in EXAMPLES.values())


def test_the_names_for_users() -> None:
    """All of them can be imported, and the document names each; others are missing."""
    assert all(getattr(client, name) for name in client.__all__)
    assert [name for name in client.__all__ if f"`{name}`" not in DOCUMENT] == []
    with pytest.raises(AttributeError, match="has no attribute 'nonsense'"):
        _ = client.nonsense  # type: ignore[attr-defined]


async def test_the_names_are_light() -> None:
    """What is not used is not loaded: the command imports modules of this package."""
    program = "import sys, netota_coap.client; print({'aiocoap', 'httpx2'} & sys.modules.keys())"
    assert await run(sys.executable, "-c", program) == (0, "set()\n", "")


@pytest.mark.parametrize("wrong", [{"attributes": [("machine", "x")]}, {"schemes": "coap"}])
def test_a_selection_of_the_wrong_form(wrong: dict[str, object]) -> None:
    """It would select nothing; it is refused with the right way to write it."""
    with pytest.raises(TypeError, match=r"Selection\.of\("):
        Selection(**wrong)  # type: ignore[arg-type]
