"""HTTP behind Debian's real nginx, under a prefix."""

from __future__ import annotations

import asyncio
import contextlib
import shutil
import socket
from collections.abc import AsyncIterator
from pathlib import Path

import httpx2
import pytest
import pytest_asyncio

from netota_coap.http.server import HttpSite, serving
from tests.support import environment
from tests.support.file_servers import free_port
from tests.support.serving import PATIENCE_S
from tests.support.web import archive, catalog, connected, site, stream

NGINX = shutil.which("nginx", path=environment.PATH)
BIG = "/ota/p/pkg/s/big"

pytestmark = [
    pytest.mark.asyncio(loop_scope="module"),
    environment.needs("nginx"),
]

CONFIGURATION = """
daemon off;
master_process off;
pid {directory}/pid;
error_log stderr error;
events {{}}
http {{
    access_log off;
    client_body_temp_path {directory}/body;
    proxy_temp_path {directory}/proxy;
    fastcgi_temp_path {directory}/fastcgi;
    uwsgi_temp_path {directory}/uwsgi;
    scgi_temp_path {directory}/scgi;
    server {{
        listen 127.0.0.1:{port};
        location /ota/ {{
            proxy_pass {uri}/;
            proxy_set_header X-Forwarded-Proto https;
        }}
    }}
}}
"""


@contextlib.asynccontextmanager
async def nginx(directory: Path, uri: str) -> AsyncIterator[str]:
    """Run nginx in front of a server; its URI."""
    port = free_port(socket.SOCK_STREAM)
    path = directory / "nginx.conf"
    path.write_text(CONFIGURATION.format(directory=directory, port=port, uri=uri))
    process = await asyncio.create_subprocess_exec(
        str(NGINX), "-p", directory, "-c", path, "-e", "stderr", stderr=asyncio.subprocess.PIPE
    )
    try:
        async with asyncio.timeout(PATIENCE_S):
            while process.returncode is None:
                with contextlib.suppress(ConnectionError):
                    async with connected(f"http://127.0.0.1:{port}"):
                        break
                await asyncio.sleep(0.01)
        yield f"http://127.0.0.1:{port}"
    finally:
        if process.returncode is None:
            process.terminate()
        _, errors = await process.communicate()
    assert (process.returncode, errors) == (0, b"")


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def it(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[tuple[HttpSite, str]]:
    """A site behind nginx, and nginx' URI."""
    served = site(catalog({"big": stream(7, archives=(archive("only", "/b/x"),))}), prefix="/ota")
    async with (
        serving(served, "127.0.0.1:0") as (uri,),
        nginx(tmp_path_factory.mktemp("nginx"), uri) as front,
    ):
        yield served, front


async def test_under_a_prefix(it: tuple[HttpSite, str]) -> None:
    """Resources are where links and redirections lead, and the scheme is what nginx says."""
    async with httpx2.AsyncClient(base_url=it[1]) as client:
        links = (await client.get("/ota/p", headers={"Accept": "application/link-format"})).text
        assert links.startswith("</ota/p/pkg>;")
        assert (await client.get("/ota/", follow_redirects=True)).url.path == "/ota/p"
        for scheme, found in (("https", 1), ("http", 0)):
            assert len((await client.get(f"{BIG}?scheme={scheme}")).json()["archives"]) == found


async def test_conditional(it: tuple[HttpSite, str]) -> None:
    """What tells caches what they have passes."""
    async with httpx2.AsyncClient(base_url=it[1]) as client:
        answer = await client.get(BIG)
        again = await client.get(BIG, headers={"If-None-Match": answer.headers["etag"]})
        assert (answer.status_code, again.status_code, again.content) == (200, 304, b"")
        assert again.headers["cache-control"] == "public, max-age=60"
        assert (await client.head(BIG)).headers["etag"] == answer.headers["etag"]


async def test_event_streams_pass_at_once(it: tuple[HttpSite, str]) -> None:
    """Each state comes when it is there, and the client's end reaches the server."""
    served, front = it
    async with connected(front) as connection:
        await connection.follow(BIG)
        assert '"sequence":7' in (await connection.event())["data"]
        for sequence in (8, 9):
            served.swap(catalog({"big": stream(sequence)}, served.catalog))
            assert f'"sequence":{sequence}' in (await connection.event())["data"]
        assert len(served.events) == 1
    async with asyncio.timeout(PATIENCE_S):
        while len(served.events):  # noqa: ASYNC110 - what is waited for is nginx
            await asyncio.sleep(0.005)
