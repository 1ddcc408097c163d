"""Serve a repository that three devices observe, publish, and show when each was notified."""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import hashlib
import shlex
import shutil
import sys
import tempfile
import time
from collections.abc import AsyncIterator, Callable
from pathlib import Path

import attrs
from aiocoap.message import Message
from aiocoap.numbers.codes import Code
from aiocoap.protocol import Context

from netota_coap.coap.protocol import DEFAULT_PORT
from netota_coap.coap.sockets import open_sockets
from netota_coap.encoding.codecs import Format
from netota_coap.encoding.documents import decode
from netota_coap.errors import AddressError
from netota_coap.model.values import Stream

PROJECT = Path(__file__).parent.parent
COMMAND = Path(sys.executable).with_name("netota-coap")
BOARDS = {
    "nrf52840": ("arm", "nrf52840dk"),
    "nrf9160": ("arm", "nrf9160dk"),
    "esp32c3": ("riscv", "xiao_esp32c3"),
}
PATIENCE_S = 10.0
QUIET_S = 0.3


@attrs.define
class Received:
    """A response or notification: its time (seconds since the epoch), payload size and content."""

    at: float
    size: int
    stream: Stream


@attrs.define
class Device:
    """A device that observes one stream, narrowed to its machine."""

    name: str
    path: str
    received: list[Received] = attrs.field(factory=list)

    async def run(self, context: Context, uri: str) -> None:
        """Register, and record the response and all notifications."""
        message = Message(code=Code.GET, uri=f"{uri}/{self.path}")
        message.opt.observe = 0
        request = context.request(message, handle_blockwise=False)
        self._record(await request.response)
        async for notification in request.observation:
            self._record(notification)

    def _record(self, message: Message) -> None:
        stream = decode(Stream, message.payload, Format.CBOR)
        self.received.append(Received(time.time(), len(message.payload), stream))


def say(text: str = "") -> None:
    """Print a line without delay."""
    print(text, flush=True)


async def until(condition: Callable[[], bool], patience_s: float = PATIENCE_S) -> None:
    """Wait until a condition holds."""
    async with asyncio.timeout(patience_s):
        while not condition():  # noqa: ASYNC110 - the condition is over several devices
            await asyncio.sleep(0.001)


async def command(*arguments: str | Path) -> None:
    """Print a command line, and run it."""
    say(f"$ netota-coap {shlex.join(map(str, arguments))}")
    process = await asyncio.create_subprocess_exec(COMMAND, *map(str, arguments))
    if await process.wait():
        raise SystemExit(f"the command failed with exit code {process.returncode}")


@contextlib.asynccontextmanager
async def server(root: Path, bind: str) -> AsyncIterator[str]:
    """Run `netota-coap serve` until the block ends; yields its URI."""
    arguments = ("serve", str(root), "--bind", bind, "--state", str(root.with_name("state")))
    say(f"$ netota-coap {shlex.join(arguments)}")
    process = await asyncio.create_subprocess_exec(
        COMMAND, *arguments, stdout=asyncio.subprocess.PIPE
    )
    assert process.stdout is not None
    try:
        async with asyncio.timeout(PATIENCE_S):
            line = (await process.stdout.readline()).decode().strip()
        say(line)
        yield line.split()[-1]
    finally:
        if process.returncode is None:
            process.terminate()
        await process.wait()


def free_bind() -> str:
    """Return an address with the standard port, or with any port if that is in use."""
    try:
        for opened in open_sockets("127.0.0.1"):
            opened.close()
    except AddressError:
        return "127.0.0.1:0"
    return f"127.0.0.1:{DEFAULT_PORT}"


def report(devices: list[Device], since: dict[str, int], renamed: float) -> None:
    """Print which devices were notified, and how long after the rename of the stream's file."""
    for device in devices:
        news = device.received[since[device.name] :]
        if not news:
            say(f"  {device.name:<24} got no notification in {QUIET_S:g} s")
        for message in news:
            stream = message.stream
            best = (stream.archives or ())[0]
            what = f"version {stream.version}, build {best.name}, {best.envelope.size} bytes"
            if stream.closed:
                where = "/".join(stream.replacement or ("nowhere",))
                what = f"the stream is closed, its replacement is {where}"
            delay_ms = (message.at - renamed) * 1e3
            say(
                f"  {device.name:<24} was notified after {delay_ms:4.1f} ms, "
                f"in one datagram of {message.size} bytes: {what}"
            )


def build(images: Path) -> Path:
    """Create images for each board, and the release file that describes them."""
    release = images / "release.toml"
    text = 'version = "2.5.0"\nmessage = "For the demo"\n'
    for board, (arch, machine) in BOARDS.items():
        for name, debug in ((board, "false"), (f"{board}-dbg", "true")):
            (images / f"{name}.bin").write_bytes(hashlib.sha512(name.encode()).digest() * 3_000)
            text += (
                f'\n[[archives]]\nfile = "{name}.bin"\n[archives.content]\ntype = "zephyr-image"\n'
                f'arch = "{arch}"\nmachine = "{machine}"\ndebug = {debug}\n'
            )
    release.write_text(text)
    return release


async def demo(root: Path, images: Path, *, once: bool) -> None:
    """Run the demo; unless `once`, serve until cancelled."""
    stable = "p/sensor-node/s/stable?debug=false&scheme=https&machine="
    devices = [
        Device("nrf52840dk on stable", stable + "nrf52840dk"),
        Device("nrf9160dk on stable", stable + "nrf9160dk"),
        Device("nrf52840dk on edge", "p/sensor-node/s/edge?debug=false&machine=nrf52840dk"),
    ]
    stream_file = root / "packages/sensor-node/streams/stable.toml"

    async with contextlib.AsyncExitStack() as stack:
        uri = await stack.enter_async_context(server(root, free_bind()))
        context = await Context.create_client_context(transports=["udp6"])
        stack.push_async_callback(context.shutdown)
        group = await stack.enter_async_context(asyncio.TaskGroup())
        tasks = [group.create_task(device.run(context, uri)) for device in devices]
        await until(lambda: all(device.received for device in devices))
        say("\nThree devices observe:")
        for device in devices:
            say(f"  {device.name:<24} got version {device.received[0].stream.version}")

        async def change(*arguments: str | Path) -> None:
            since = {device.name: len(device.received) for device in devices}
            say()
            await command(*arguments)
            renamed = stream_file.stat().st_ctime
            notified, quiet = devices[:2], devices[2]
            await until(lambda: all(len(d.received) > since[d.name] for d in notified))
            with contextlib.suppress(TimeoutError):
                await until(lambda: len(quiet.received) > since[quiet.name], QUIET_S)
            report(devices, since, renamed)

        release = build(images)
        await change("publish", root, "sensor-node/stable", "--release", release)
        replacement = ("--replacement", "sensor-node/edge")
        await change("close", root, "sensor-node/stable", *replacement)

        if not once:
            say("\nThe server runs until Ctrl-C. Try it from another terminal:")
            say(f"  .venv/bin/aiocoap-client --accept 50 {uri}/p/sensor-node/s/edge")
            say(f"  coap-client-notls -m get -s 600 '{uri}/p/sensor-node/s/edge?head'")
            say(f"  .venv/bin/netota-coap watch {uri}/p/sensor-node/s/edge")
            say(f"  .venv/bin/netota-coap reopen {root} sensor-node/stable")
            await asyncio.Event().wait()
        for task in tasks:
            task.cancel()


def main() -> None:
    """Run the demo on a copy of `fixtures/repositories/typical`."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        "--once", action="store_true", help="end after the demo, instead of serving until Ctrl-C"
    )
    once = parser.parse_args().once
    with tempfile.TemporaryDirectory(prefix="netota-demo-") as directory:
        root, images = Path(directory) / "repository", Path(directory) / "images"
        images.mkdir()
        shutil.copytree(PROJECT / "fixtures/repositories/typical", root)
        with contextlib.suppress(KeyboardInterrupt):
            asyncio.run(demo(root, images, once=once))


if __name__ == "__main__":
    main()
