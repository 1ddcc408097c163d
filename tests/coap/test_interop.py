"""Real peers: libcoap's and aiocoap's command-line clients against our service.

Under `CI=true` a missing peer is a failure; elsewhere its tests are skipped.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import shutil
import sys
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from netota_coap.encoding.codecs import Format
from netota_coap.encoding.documents import decode, selection_to_cbor
from netota_coap.model.selection import Selection
from netota_coap.model.values import Offer, Stream
from netota_coap.publishing.archives import ArchiveSource
from tests.support.environment import needs
from tests.support.publishing import NOW, publish
from tests.support.serving import PATIENCE_S, run, serving

pytestmark = pytest.mark.slow

LIBCOAP = shutil.which("coap-client-notls") or ""
AIOCOAP = str(Path(sys.executable).with_name("aiocoap-client"))
AIOCOAP_PEER = (sys.executable, str(Path(__file__).parents[1] / "support" / "aiocoap_peer.py"))
STABLE = "/p/sensor-node/s/stable"
EDGE = "/p/sensor-node/s/edge"

needs_libcoap = needs("coap-client-notls")


@pytest.fixture
async def server(sample: Path) -> AsyncIterator[str]:
    async with serving(sample) as (uri,):
        yield uri


def republish(root: Path, version: str, count: int = 1) -> None:
    image = root.with_name("image")
    image.write_bytes(b"image")
    sources = [ArchiveSource(image, f"board{n}") for n in range(count)]
    offer = Offer(url="https://example.com/sensor-node/{version}/{sha256}/{name}.bin", metric=1)
    publish(root, ("sensor-node", "stable"), version, sources, [offer], now=NOW)


async def libcoap(*arguments: str, output: Path) -> bytes:
    """Run libcoap's client to its end; the payload that it got, to the byte."""
    code, _, err = await run(LIBCOAP, "-v", "3", "-o", output, *arguments)
    assert (code, err) == (0, "")
    return output.read_bytes()


@contextlib.asynccontextmanager
async def running(*command: str) -> AsyncIterator[asyncio.StreamReader]:
    """Run a client beside the test; its standard output."""
    process = await asyncio.create_subprocess_exec(
        *command, stdout=asyncio.subprocess.PIPE, env=os.environ | {"PYTHONUNBUFFERED": "1"}
    )
    assert process.stdout is not None
    try:
        yield process.stdout
    finally:
        if process.returncode is None:
            process.terminate()
        await process.communicate()


async def seen(stream: asyncio.StreamReader, text: bytes) -> None:
    """Wait for a text in the output of a client."""
    async with asyncio.timeout(PATIENCE_S):
        await stream.readuntil(text)


@needs_libcoap
async def test_libcoap_get(server: str, tmp_path: Path) -> None:
    """Libcoap's client gets a stream."""
    payload = await libcoap("-m", "get", server + STABLE + "?head", output=tmp_path / "o")

    assert decode(Stream, payload, Format.CBOR).version == "1.0.0"


@needs_libcoap
async def test_libcoap_fetch(server: str, tmp_path: Path) -> None:
    """Libcoap's client narrows a stream by FETCH."""
    selection = tmp_path / "selection"
    selection.write_bytes(selection_to_cbor(Selection.of({"machine": "nrf9160dk"})))
    payload = await libcoap(
        "-m", "fetch", "-t", "60", "-f", str(selection), server + STABLE,
        output=tmp_path / "o",
    )  # fmt: skip
    archives = decode(Stream, payload, Format.CBOR).archives or ()

    assert [archive.name for archive in archives] == ["nrf9160dk"]


@needs_libcoap
async def test_libcoap_observe(server: str, sample: Path) -> None:
    """Libcoap's client is notified of a publish."""
    async with running(LIBCOAP, "-m", "get", "-A", "60", "-s", "20", server + STABLE) as out:
        await seen(out, b"1.0.0")
        republish(sample, "2.0")
        await seen(out, b"2.0")


@needs_libcoap
@pytest.mark.parametrize("size", [64, 256, 1024])
async def test_libcoap_blocks(size: int, sample: Path, tmp_path: Path) -> None:
    """Libcoap's client gets a list in 100 blocks of any size."""
    republish(sample, "2.0", min(size, 1_000))
    async with serving(sample) as (server,):
        uri = server + STABLE + "?full"
        payload = await libcoap("-m", "get", "-b", str(size), uri, output=tmp_path / "o")

    assert len(payload) >= 100 * size
    assert len(decode(Stream, payload, Format.CBOR).archives or ()) == min(size, 1_000)


@needs_libcoap
async def test_libcoap_discovers(server: str, tmp_path: Path) -> None:
    """Libcoap's client finds the streams."""
    links = await libcoap(
        "-m", "get", server + "/.well-known/core?rt=netota.stream", output=tmp_path / "o"
    )

    assert [f"<{EDGE}>", f"<{STABLE}>"] == [
        link.split(";")[0] for link in links.decode().split(",")
    ]


async def aiocoap(*arguments: str) -> str:
    code, out, err = await run(AIOCOAP, *arguments)
    assert (code, err) == (0, "")
    return out


async def test_aiocoap_get(server: str) -> None:
    """Aiocoap's client gets a stream, in both formats."""
    found = await aiocoap("--accept", "application/json", server + STABLE)
    plain = await aiocoap("--accept", "50", server + STABLE + "?head")

    assert json.loads(found)["version"] == "1.0.0"
    assert "1.0.0" in plain


async def test_aiocoap_fetch(server: str) -> None:
    """Aiocoap's client narrows a stream by FETCH."""
    payload = selection_to_cbor(Selection.of({"machine": "nrf9160dk"}))
    path = "/dev/stdin"
    process = await asyncio.create_subprocess_exec(
        AIOCOAP, "-q", "-m", "FETCH", "--content-format", "60", "--payload", f"@{path}",
        server + STABLE,
        stdin=asyncio.subprocess.PIPE, stdout=asyncio.subprocess.PIPE,
    )  # fmt: skip
    out, _ = await process.communicate(payload)

    assert b"nrf9160dk" in out
    assert b"nrf52840dk" not in out


async def test_aiocoap_client_registers(server: str) -> None:
    """Aiocoap's command-line client registers, and shows the state at that time."""
    async with running(AIOCOAP, "--observe", "--accept", "50", server + STABLE) as out:
        await seen(out, b'"1.0.0"')


async def test_aiocoap_observe(server: str, sample: Path) -> None:
    """Aiocoap is notified of a publish, and gets the blocks after the first by itself."""
    async with running(*AIOCOAP_PEER, "observe", server + STABLE) as out:
        await seen(out, b'"1.0.0"')
        republish(sample, "2.0", 9)
        await seen(out, b'"2.0"')
        await seen(out, b"board8.bin")


@pytest.mark.parametrize("szx", [2, 4, 6])
async def test_aiocoap_blocks(szx: int, sample: Path) -> None:
    """Aiocoap gets a list in 100 blocks of any size."""
    size = 1 << (szx + 4)
    republish(sample, "2.0", min(size, 1_000))
    async with serving(sample) as (server,):
        uri = server + STABLE + "?full"
        async with running(*AIOCOAP_PEER, "get", uri, str(szx)) as out:
            payload = await out.read()

    assert len(payload) >= 100 * size
    assert len(decode(Stream, payload, Format.CBOR).archives or ()) == min(size, 1_000)


async def test_aiocoap_discovers(server: str) -> None:
    """Aiocoap's client finds the streams."""
    links = await aiocoap(server + "/.well-known/core?rt=netota.stream")

    assert STABLE in links
    assert EDGE in links
