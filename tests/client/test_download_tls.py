"""client/downloads.py over HTTPS: certificates are verified, always."""

from __future__ import annotations

import asyncio
import re
import ssl
from pathlib import Path

import pytest

from netota_coap.client.downloads import download
from tests.client.test_downloads import DATA, archive, check
from tests.support.environment import needs
from tests.support.file_servers import certificate, http_server, ranged, to

pytestmark = needs("openssl")


@pytest.fixture(autouse=True)
def _direct(monkeypatch: pytest.MonkeyPatch) -> None:
    """No proxy stands in the way to this host; no authority is trusted."""
    monkeypatch.setenv("NO_PROXY", "*")
    monkeypatch.setenv("SSL_CERT_FILE", "/dev/null")


@pytest.fixture(scope="module")
def authority(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A certificate of this host, and its key."""
    return certificate(tmp_path_factory.mktemp("tls"))


@pytest.fixture
def tls(authority: Path) -> ssl.SSLContext:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(authority)
    return context


async def test_https(
    tls: ssl.SSLContext, authority: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A certificate is verified, always, against the authorities of the system."""
    async with http_server(lambda request: ranged(DATA, request), tls) as it:
        problem = (await check(it.url)).problem
        assert problem == "certificate refused: self-signed certificate"
        monkeypatch.setenv("SSL_CERT_FILE", str(authority))
        assert (await check(it.url)).problem == ""
        await download(archive(it.url), tmp_path / "image.bin")
        elsewhere = it.url.replace("127.0.0.1", "localhost")
        assert "certificate refused: Hostname mismatch" in (await check(elsewhere)).problem

    assert (tmp_path / "image.bin").read_bytes() == DATA


async def test_redirects_and_https(
    tls: ssl.SSLContext, authority: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A redirect may lead to HTTPS, and never from there to HTTP."""
    monkeypatch.setenv("SSL_CERT_FILE", str(authority))
    async with (
        http_server(lambda request: ranged(DATA, request), tls) as safe,
        http_server(lambda _: to(safe.url)) as plain,
        http_server(lambda _: to(plain.url), tls) as unsafe,
    ):
        assert (await check(plain.url, digest=True)).problem == ""
        plain.requests.clear()
        for digest in (False, True):
            problem = (await check(unsafe.url, digest=digest)).problem
            assert f"redirects to {plain.url}, which is not encrypted" == problem

    assert plain.requests == []


async def test_tls_with_somebody_who_does_not_speak_it() -> None:
    """A server that does not speak TLS is told as such."""

    async def greet(_: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(b"220 hello\r\n")
        writer.close()

    async with await asyncio.start_server(greet, "127.0.0.1", 0) as server:
        url = f"https://127.0.0.1:{server.sockets[0].getsockname()[1]}/"
        assert re.search("(?i)ssl", (await check(url)).problem)
