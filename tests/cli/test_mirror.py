"""The command `netota-coap mirror`, and what becomes of a mirror that is killed."""

from __future__ import annotations

import asyncio
import signal
from pathlib import Path

import pytest
from hypothesis import settings

from netota_coap.repository.blobs import Blobs
from tests.support.file_servers import just
from tests.support.killing import kill
from tests.support.mirroring import BOARD, offered, origin, present, require_correct, version
from tests.support.serving import COMMAND, PROJECT, netota, until


@pytest.mark.slow
async def test_once(tmp_path: Path) -> None:
    """For cron: 0 if all is level, 1 if something is not, 2 and 4 where nothing can be done."""
    root = tmp_path / "mirror"
    async with origin(tmp_path) as upstream, offered(upstream.root) as uris:
        it = ("mirror", uris["coap"], root, "--once")
        upstream.refuse[f"/1.0/{BOARD}"] = lambda _: just("404 Not Found")
        code, out, err = await netota(*it)
        assert (1, f"{uris['coap']}: 1 streams behind\n") == (code, out)
        assert "sensor-node/stable: nrf52840dk: http://" in err
        assert "404 Not Found" in err
        code, out, _ = await netota(*it, "--machine", "nrf9160dk")
        assert (0, f"{uris['coap']}: 0 streams behind\n") == (code, out)
        assert (version(root), Blobs(root).all()) == ("1.0", ())
        upstream.refuse.clear()
        assert (await netota(*it, "--limit-bytes-s", "1000000"))[0] == 0
        require_correct(root)
        await netota(*it, "--package", "none")
        assert present(root) is None
    code, _, err = await netota(*it)
    assert code == 4
    assert "Connection refused" in err
    assert (await netota("mirror", "nonsense", root))[0] == 2


@pytest.mark.slow
async def test_runs_until_it_is_told_to_stop(tmp_path: Path) -> None:
    """It follows, logs what it took, and ends well on SIGTERM."""
    root = tmp_path / "mirror"
    async with origin(tmp_path) as upstream, offered(upstream.root) as uris:
        process = await asyncio.create_subprocess_exec(
            *COMMAND, "mirror", uris["coap"], root, "--announce", "at-once",
            cwd=PROJECT, stderr=asyncio.subprocess.PIPE,
        )  # fmt: skip
        await until(lambda: version(root) == "1.0")
        upstream.publish("1.1")
        await until(lambda: version(root) == "1.1")
        process.send_signal(signal.SIGTERM)
        _, err = await process.communicate()
    assert process.returncode == 0
    assert f"{uris['coap']}: adopted sensor-node/stable 1.1, sequence 2" in err.decode()


@pytest.mark.fuzz
@pytest.mark.slow
@pytest.mark.parametrize(("scheme", "most"), [("http", 2**20), ("coap", 1)])
async def test_kills(tmp_path: Path, scheme: str, most: int) -> None:
    """Killed at random it ends with a correct repository, and little is fetched twice."""
    figures = await kill(tmp_path, settings().max_examples // 20, scheme)
    assert figures.under_way > 0
    assert figures.twice <= most
