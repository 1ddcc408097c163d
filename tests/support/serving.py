"""Services for the tests: in this process, and as the real command in another."""

from __future__ import annotations

import asyncio
import contextlib
import io
import logging
import signal
import sys
import threading
from collections.abc import AsyncIterator, Callable
from pathlib import Path

import attrs
import pytest

from netota_coap import cli
from netota_coap.service.config import Config
from netota_coap.service.service import Service

COMMAND = (sys.executable, "-W", "error", "-m", "netota_coap")
PROJECT = Path(__file__).parents[2]
PATIENCE_S = 25.0
"""How long is waited, on a busy machine, for what takes a moment on an idle one.

It is less than the 30 s after which a service tries again by itself.
"""


async def until(condition: Callable[[], object], timeout_s: float = PATIENCE_S) -> None:
    """Wait for a condition."""
    async with asyncio.timeout(timeout_s):
        while not condition():  # noqa: ASYNC110 - what is waited for is often a file or a log
            await asyncio.sleep(0.002)


@contextlib.asynccontextmanager
async def serving(root: Path, *binds: str, **settings: object) -> AsyncIterator[list[str]]:
    """Serve in this process; the URIs that are listened on."""
    uris: list[str] = []
    config = Config(repository=root, coap_bind=binds or ("127.0.0.1:0",), **settings)  # type: ignore[arg-type]
    service = Service(config, uris.append)
    running = asyncio.create_task(service.run())
    try:
        await until(lambda: uris or running.done())
        if running.done():
            running.result()
        yield uris
    finally:
        service.stop()
        await running


@attrs.define
class Served:
    """A `netota-coap serve` in another process.

    Attributes:
        uri: Where it listens.
        log: Its lines on standard error so far.
    """

    process: asyncio.subprocess.Process
    uri: str = ""
    log: list[str] = attrs.field(factory=list)

    def signal(self, number: signal.Signals) -> None:
        self.process.send_signal(number)


@contextlib.asynccontextmanager
async def served(
    root: Path | None, *arguments: str, environment: dict[str, str] | None = None, code: int = 0
) -> AsyncIterator[Served]:
    """Run the command until the block ends; it must end by itself on SIGTERM, with a code.

    Where there is no root, the arguments tell it.
    """
    process = await asyncio.create_subprocess_exec(
        *COMMAND,
        "serve",
        *((str(root),) if root else ()),
        *(arguments or ("--bind", "127.0.0.1:0")),
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.PIPE,
        cwd=PROJECT,
        env=environment,
    )
    server = Served(process)
    assert process.stdout and process.stderr

    async def read_log(lines: asyncio.StreamReader) -> None:
        async for line in lines:
            # What the kernel grants is not the same on each machine.
            if b" buffer: " not in line and b"no --state" not in line:
                server.log.append(line.decode().rstrip("\n"))

    reading = asyncio.create_task(read_log(process.stderr))
    try:
        async with asyncio.timeout(PATIENCE_S):
            line = (await process.stdout.readline()).decode()
        assert line.startswith("listening on "), (line, server.log)
        server.uri = line.split()[-1]
        yield server
    finally:
        if process.returncode is None:
            process.terminate()
        async with asyncio.timeout(PATIENCE_S):
            await process.wait()
            await reading
    assert process.returncode == code, server.log


async def run(*command: str | Path, timeout_s: float = PATIENCE_S) -> tuple[int, str, str]:
    """Run a command to its end: exit code, standard output, standard error."""
    process = await asyncio.create_subprocess_exec(
        *map(str, command),
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.PIPE,
        cwd=PROJECT,
    )
    try:
        async with asyncio.timeout(timeout_s):
            out, err = await process.communicate()
    except TimeoutError:
        process.kill()
        await process.communicate()
        raise
    assert process.returncode is not None
    return process.returncode, out.decode(), err.decode()


async def netota(*arguments: str | Path) -> tuple[int, str, str]:
    """Run `netota-coap`: as a process if it serves, else in this one, which is far quicker."""
    words = [*map(str, arguments)]
    if words[0] in ("dev", "mirror", "serve"):
        return await run(*COMMAND, *words)
    return await asyncio.to_thread(_main, words)


_ONE = threading.Lock()  # there is one sys.stdout


def _main(words: list[str]) -> tuple[int, str, str]:
    out, err = (io.TextIOWrapper(io.BytesIO(), "utf-8", write_through=True) for _ in range(2))
    loggers = [logging.getLogger(name) for name in ("netota_coap.aiocoap", "asyncio")]
    levels = [logger.level for logger in loggers]
    with (
        _ONE,
        contextlib.redirect_stdout(out),
        contextlib.redirect_stderr(err),
        pytest.MonkeyPatch.context() as patch,
        pytest.raises(SystemExit) as ended,
    ):
        patch.setattr(sys, "argv", ["netota-coap", *words])
        cli.main()
    for logger, level in zip(loggers, levels, strict=True):
        logger.setLevel(level)
    assert isinstance(ended.value.code, int)
    return ended.value.code, *(stream.buffer.getvalue().decode() for stream in (out, err))  # type: ignore[attr-defined]
