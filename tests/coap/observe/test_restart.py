"""What a server remembers over a restart: `serve --state`, killed, stopped, and begun again."""

from __future__ import annotations

import asyncio
import contextlib
import signal
from pathlib import Path

import pytest

from netota_coap.coap import options as coap
from netota_coap.errors import InvalidDataError
from tests.support.device import GET, device
from tests.support.publishing import NOW, publish
from tests.support.serving import PATIENCE_S, served, serving, until

pytestmark = pytest.mark.slow

STABLE = ("sensor-node", "stable")
PATH = "p/sensor-node/s/stable"
FILE = "packages/sensor-node/streams/stable.toml"


async def kept(state: Path, what: bytes) -> None:
    """Wait until something stands in the state directory."""
    file = state / "observers.journal"
    await until(lambda: file.exists() and what in file.read_bytes())


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM])
async def test_told_after_a_restart(sample: Path, tmp_path: Path, number: signal.Signals) -> None:
    """Whoever observed when a server was killed or stopped is told what was published since."""
    state = tmp_path / "state"
    options = ("--bind", "127.0.0.1:0", "--state", str(state))
    async with contextlib.AsyncExitStack() as devices:
        async with served(
            sample, *options, code=-number if number == signal.SIGKILL else 0
        ) as server:
            told = [await devices.enter_async_context(device(server.uri)) for _ in range(20)]
            for it in told:
                await it.observe(PATH, token=b"token")
            await told[1].ask(GET, PATH, token=b"token", options=[(coap.OBSERVE, b"\x01")])
            await told[0].observe("p/sensor-node/s/edge", token=b"the last")
            await kept(state, b"the last")
            server.signal(number)
            await server.process.wait()
        publish(sample, STABLE, "2.0", [], now=NOW)
        again = ("--bind", server.uri.removeprefix("coap://"), "--state", str(state))
        async with served(sample, *again) as server:
            for it in (told[0], *told[2:]):
                answer = await it.notification()
                assert answer.token == b"token"
                assert b"2.0" in answer.payload
            assert await told[0].silent()
            assert await told[1].silent()
        # All have the newest state now: nobody is told again.
        async with served(sample, *again):
            assert await told[2].silent(0.3)


async def test_a_planned_stop_tells_nobody(sample: Path, tmp_path: Path) -> None:
    """Stopping and starting again costs an observer no message, and no observation."""
    async with contextlib.AsyncExitStack() as stack:
        async with serving(sample, state=tmp_path / "state") as (uri,):
            observer = await stack.enter_async_context(device(uri))
            await observer.observe(PATH)
        address = uri.removeprefix("coap://")
        async with serving(sample, address, state=tmp_path / "state"):
            assert await observer.silent()
            publish(sample, STABLE, "2.0", [], now=NOW)
            await observer.notification()


async def test_what_went_back_is_refused_at_the_start(sample: Path, tmp_path: Path) -> None:
    """A server that was restarted remembers the sequences that it served."""
    before = (sample / FILE).read_bytes()
    async with serving(sample, state=tmp_path / "state") as (uri,):
        publish(sample, STABLE, "2.0", [], now=NOW)
        async with device(uri) as it, asyncio.timeout(PATIENCE_S):
            while b"2.0" not in (await it.ask(GET, PATH)).payload:  # noqa: ASYNC110
                await asyncio.sleep(0.002)
    (sample / FILE).write_bytes(before)
    with pytest.raises(
        InvalidDataError, match=r"stable\.toml: sequence: must be above 2"
    ) as caught:
        async with serving(sample, state=tmp_path / "state"):
            pass

    assert "rollback" in caught.value.hint


async def test_what_went_back_is_refused_later(
    sample: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """A stream that was removed before the restart does not come back as another one."""
    caplog.set_level("INFO", "netota_coap")
    before = (sample / FILE).read_bytes()
    async with serving(sample, state=tmp_path / "state"):
        publish(sample, STABLE, "2.0", [], now=NOW)
        await until(lambda: "reloaded" in caplog.text)
    (sample / FILE).unlink()
    async with serving(sample, state=tmp_path / "state"):
        (sample / FILE).write_bytes(before)
        await until(lambda: "must be above 2" in caplog.text)
