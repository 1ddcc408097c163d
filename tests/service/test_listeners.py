"""The service's other doors, as `serve` opens them: HTTP, being found, /status."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import httpx2

from tests.support.publishing import NOW, publish
from tests.support.serving import PATIENCE_S, PROJECT, Served, netota, served, until

STABLE = ("sensor-node", "stable")
PATH = "p/sensor-node/s/stable"
BIND = ("--bind", "127.0.0.1:0")


async def second_uri(server: Served) -> str:
    """Return the other one that is listened on."""
    assert server.process.stdout
    async with asyncio.timeout(PATIENCE_S):
        return (await server.process.stdout.readline()).decode().split()[-1]


async def test_http(sample: Path, tmp_path: Path) -> None:
    """HTTP serves what CoAP does, follows a publish, and is configured with it."""
    file = tmp_path / "config.toml"
    file.write_text("[http]\nprefix = '/ota'\n[coap]\nmax_age_s = 9\n")
    options = (*BIND, "--http", "127.0.0.1:0", "--config", str(file))
    async with served(sample, *options) as server:
        uri = await second_uri(server)
        assert uri.startswith("http://127.0.0.1:")
        async with httpx2.AsyncClient(base_url=uri, trust_env=False) as client:
            answer = await client.get(PATH)
            assert (answer.status_code, answer.json()["version"]) == (200, "1.0.0")
            assert "max-age=9" in answer.headers["cache-control"]
            links = await client.get("p", headers={"Accept": "application/link-format"})
            assert links.text.startswith("</ota/p/sensor-node>")
            publish(sample, STABLE, "2.0", [], now=NOW)
            await until(lambda: server.log)
            assert (await client.get(PATH)).json()["version"] == "2.0"
            file.write_text("[coap]\nmax_age_s = 8\n")
            server.signal(signal.SIGHUP)
            await until(lambda: len(server.log) == 3)
            assert "max-age=8" in (await client.get(PATH)).headers["cache-control"]
            assert (await client.get("readyz")).status_code == 200
            (sample / "packages/sensor-node/streams/edge.toml").write_text("version=")
            await until(lambda: len(server.log) >= 5)
            assert (await client.get("readyz")).status_code == 503
            metrics = (await client.get("metrics")).text
    assert 'netota_reloads_total{result="taken"} 2.0' in metrics
    assert 'netota_reloads_total{result="refused"} 1.0' in metrics
    assert "WARNING http.prefix: takes effect after a restart" in server.log


def test_http_is_an_extra(sample: Path) -> None:
    """Without what HTTP takes, the service says how to get it."""
    child = "import sys; sys.modules['starlette'] = None; import netota_coap.cli as c; c.main()"
    command = [sys.executable, "-c", child, "serve", sample, *BIND, "--http", "127.0.0.1:0"]
    done = subprocess.run(command, cwd=PROJECT, capture_output=True, text=True, timeout=PATIENCE_S)

    assert done.returncode == 2
    assert "error: HTTP needs a package that is not installed: starlette" in done.stderr
    assert done.stderr.endswith("\nhint: pip install 'netota-coap[http]'\n")


async def test_multicast_of_no_interface(sample: Path) -> None:
    """An interface that is not there is said at the start."""
    code, _, err = await netota("serve", sample, "--bind", "[::]:0", "--multicast", "nowhere0")

    assert code == 2
    assert "error: nowhere0: no such interface; there is " in err


async def test_status(sample: Path, tmp_path: Path) -> None:
    """The command shows what a service does; whom the configuration leaves out may not read it."""
    file = tmp_path / "config.toml"
    file.write_text("")
    async with served(sample, *BIND, "--config", str(file), environment=plain_log()) as server:
        (sample / "packages/sensor-node/streams/edge.toml").write_text("version=")
        await until(lambda: len(server.log) >= 2)
        code, out, _ = await netota("status", server.uri, "--json")
        status = json.loads(out)
        assert (code, status["packages"], status["streams"], status["observers"]) == (0, 1, 2, 0)
        assert status["issues"][0].startswith("packages/sensor-node/streams/edge.toml: is not")
        file.write_text('[status]\nreaders = ["192.0.2.0/24"]\n')
        server.signal(signal.SIGHUP)
        refused = ""
        while "only 192.0.2.0/24 may read it" not in refused:
            _, _, refused = await netota("status", server.uri)


def plain_log() -> dict[str, str]:
    return {**os.environ, "NETOTA_COAP_LOG_FORMAT": "plain"}
