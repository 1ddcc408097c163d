"""The benchmark of observers runs, and counts what it says."""

from __future__ import annotations

import asyncio
import io
import json
import sys
from pathlib import Path
from typing import Any

import attrs
import pytest
from click.testing import CliRunner
from rich.console import Console

from netota_coap.coap import options as coap
from tests.support.environment import needs
from tools.bench import bench_observe, peers
from tools.bench.bench_observe import (
    ADDED,
    PATH,
    VARIANTS,
    Bench,
    Server,
    Variant,
    Watching,
    measure,
)
from tools.bench.peers import together

pytestmark = [pytest.mark.bench, needs("cc", "coap-server-notls")]

CON, NON, ACK = range(3)
OBSERVERS = 60
FIGURES = {
    *("registered", "refused", "per_second", "register_cpu_s", "rss_per_observer", "cpu_s"),
    *("first_s", "median_s", "p99_s", "last_s", "get_ms"),
    *("untold", "twice", "repeated", "old", "strays"),
}


@pytest.fixture(scope="module")
def bench(tmp_path_factory: pytest.TempPathFactory) -> Bench:
    """What all runs share."""
    return Bench.prepare(tmp_path_factory.mktemp("bench"), OBSERVERS)


@pytest.fixture(autouse=True)
def hurry(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nobody waits long for what does not come."""
    monkeypatch.setattr(bench_observe, "QUIET_S", 0.1)
    monkeypatch.setattr(bench_observe, "LONGEST_S", 10.0)


# ----------------------------------------------------------------------------------------------
# Real servers


@pytest.mark.parametrize("key", ["plain", "libcoap", "dead", "restart"])
def test_all_are_told(bench: Bench, key: str) -> None:
    """Each server tells all the living once, and answers others meanwhile."""
    measured = measure(bench, VARIANTS[key], seed=1)

    assert set(measured) == FIGURES
    assert measured["registered"] == OBSERVERS
    assert dict.fromkeys(ADDED, 0) == {name: measured[name] for name in ADDED}
    assert 0 < measured["first_s"] <= measured["median_s"] <= measured["p99_s"]
    assert measured["p99_s"] <= measured["last_s"] < 10
    assert measured["per_second"] > 0
    assert measured["get_ms"] > 0


def test_loss(bench: Bench) -> None:
    """What is lost is repeated, until all are told."""
    few = attrs.evolve(bench, observers=20)
    measured = measure(few, VARIANTS["loss_5"], seed=9)

    assert (measured["registered"], measured["untold"], measured["twice"]) == (20, 0, 0)
    assert measured["last_s"] > 2  # it was repeated at least once


def test_most(bench: Bench) -> None:
    """A variant that takes only so many observers is measured with as many."""
    few = attrs.evolve(VARIANTS["libcoap"], most=3)
    assert measure(bench, few, seed=1)["registered"] == 3


# ----------------------------------------------------------------------------------------------
# Servers that are wrong


@pytest.mark.parametrize(
    ("program", "said"),
    [
        ("raise SystemExit('no such thing')", "the server ended, code 1: no such thing"),
        ("import time; time.sleep(9)", r"the server does not answer in 0\.3 s"),
    ],
)
def test_servers_that_do_not_serve(
    bench: Bench, monkeypatch: pytest.MonkeyPatch, program: str, said: str
) -> None:
    """A server that does not answer is an error that says so."""
    ours = bench_observe._ours

    def broken(bench: Bench, directory: Path) -> Server:
        return attrs.evolve(ours(bench, directory), command=(sys.executable, "-c", program))

    monkeypatch.setattr(bench_observe, "_ours", broken)
    monkeypatch.setattr(peers, "PATIENCE_S", 0.3 if "sleep" in program else 10)
    with pytest.raises(SystemExit, match=said):
        measure(bench, VARIANTS["plain"], seed=1)


def test_put_without_an_answer(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    """A server that takes no new state is not measured."""
    monkeypatch.setattr(bench_observe, "ANSWER_S", 0.01)
    server = bench_observe._libcoap(bench, bench.directory)
    with pytest.raises(SystemExit, match=r"libcoap: no answer to PUT in 0\.01 s"):
        server.change(server)


def test_nobody_is_told(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    """If nobody is told, there is nothing to measure."""
    ours = bench_observe._ours
    monkeypatch.setattr(
        bench_observe, "_ours", lambda *of: attrs.evolve(ours(*of), change=lambda _: 1)
    )
    monkeypatch.setattr(bench_observe, "LONGEST_S", 0.5)
    with pytest.raises(SystemExit, match=r"no observer was notified in 0\.5 s"):
        measure(bench, VARIANTS["plain"], seed=1)


# ----------------------------------------------------------------------------------------------
# The observers


def notification(payload: bytes, message_id: int, kind: int = CON, code: int = 0x45) -> bytes:
    """Make a notification, but for its token."""
    tail = coap.encode([(coap.OBSERVE, b"\x05"), (coap.MAX_AGE, b"\x3c")], payload)
    return bytes((0x44 | kind << 4, code)) + message_id.to_bytes(2, "big") + b"...." + tail


class Peer(asyncio.DatagramProtocol):
    """Answers registrations with a state, and then sends what it is told to."""

    def __init__(self, telling: list[bytes], *, observed: bool = True) -> None:
        self.telling = telling
        self.observed = observed
        self.endpoints: set[Any] = set()
        self.acknowledged: list[bytes] = []

    def connection_made(self, transport: asyncio.DatagramTransport) -> None:  # type: ignore[override]
        self.transport = transport
        self.port: int = transport.get_extra_info("sockname")[1]

    def datagram_received(self, data: bytes, address: Any) -> None:
        if data[1] == 0:
            self.acknowledged.append(data)
            return
        is_repeated = address in self.endpoints
        self.endpoints.add(address)
        options = [(coap.OBSERVE, b"")] if self.observed else []
        reply = b"\x64\x45" + data[2:8] + coap.encode(options, b"old")
        self.transport.sendto(reply, address)
        for each in () if is_repeated else self.telling:
            self.transport.sendto(each[:4] + data[4:8] + each[8:], address)


async def watch(
    bench: Bench, telling: list[bytes], *, seed: int = 1, observed: bool = True, **variant: Any
) -> tuple[list[Any], Peer]:
    """Let observers be told something; their lines."""
    loop = asyncio.get_running_loop()
    transport, peer = await loop.create_datagram_endpoint(
        lambda: Peer(telling, observed=observed), local_addr=("127.0.0.1", 0)
    )
    target = [(coap.URI_PATH, segment.encode()) for segment in PATH]
    server = Server((), peer.port, target, lambda _: 0)

    def run() -> list[Any]:
        with Watching.start(bench, Variant("", **variant), server, seed) as watching:
            return [watching.line() for _ in range(3)]

    try:
        return await asyncio.to_thread(run), peer
    finally:
        transport.close()


@pytest.mark.parametrize(
    ("telling", "told", "counts"),
    [
        ([notification(b"new", 1)], 1, {}),
        ([notification(b"new", 1, NON)], 1, {}),
        ([notification(b"new", 1), notification(b"new", 1)], 1, {"repeated": 1}),
        ([notification(b"new", 1), notification(b"new", 2)], 1, {"twice": 1}),
        ([notification(b"old", 1), notification(b"new", 2)], 1, {"old": 1}),
        ([notification(b"old", 1)], 0, {"old": 1}),
        ([notification(b"gone", 1, code=0x84)], 0, {"strays": 1}),
        ([notification(b"new", 1)[:9]], 0, {"strays": 1}),
        ([b"\x40\x45\0\1...."], 0, {"strays": 1}),
    ],
    ids=["CON", "NON", "repeated", "twice", "both", "old", "error", "cut", "no token"],
)
async def test_counts(
    bench: Bench,
    monkeypatch: pytest.MonkeyPatch,
    telling: list[bytes],
    told: int,
    counts: dict[str, int],
) -> None:
    """Told is who got the new state and acknowledged it; the rest is counted apart."""
    monkeypatch.setattr(bench_observe, "LONGEST_S", 0.2)
    one = attrs.evolve(bench, observers=1)
    (registered, heard, ended), peer = await watch(one, telling)

    assert (registered["registered"], registered["refused"], len(peer.endpoints)) == (1, 0, 1)
    assert (heard["living"], len(heard["told_ns"])) == (1, told)
    nothing = {"twice": 0, "repeated": 0, "old": 0, "strays": 0, "lost": 0}
    assert nothing | counts == {name: ended[name] for name in nothing}
    confirmable = [each for each in telling if each[0] == 0x44 and len(each) > 9]
    assert [b"\x60\0" + each[2:4] for each in confirmable] == peer.acknowledged


async def test_endpoints(bench: Bench) -> None:
    """Each observer is an endpoint of its own; the dead register, too, and say nothing then."""
    (registered, heard, _), peer = await watch(bench, [notification(b"new", 1)], dead=50)

    assert registered["registered"] == len(peer.endpoints) == OBSERVERS
    assert len({address for address, _ in peer.endpoints}) > 1
    assert 0 < heard["living"] < OBSERVERS
    assert len(heard["told_ns"]) == len(peer.acknowledged) == heard["living"]


async def test_seed(bench: Bench) -> None:
    """The same seed lets the same observers die, another one others."""
    told = [
        (await watch(bench, [notification(b"new", 1)], seed=seed, dead=50))[0][1]["living"]
        for seed in (1, 1, 2)
    ]
    assert told[0] == told[1] != told[2]


async def test_losing(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    """All register in the end; what is lost later is for the server to repeat."""
    monkeypatch.setattr(bench_observe, "LONGEST_S", 1.5)
    (registered, heard, ended), _ = await watch(bench, [notification(b"new", 1)], loss=20)

    assert registered["registered"] == heard["living"] == OBSERVERS
    assert 0 < len(heard["told_ns"]) < OBSERVERS
    assert ended["lost"] > 0


async def test_refused(bench: Bench) -> None:
    """Who is answered without Observe is refused, and is nobody to be told."""
    (registered, heard, _), _ = await watch(bench, [], observed=False)
    assert (registered["registered"], registered["refused"]) == (0, OBSERVERS)
    assert heard == {"living": 0, "told_ns": []}


def test_observers_that_fail(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    """What the observers' program says is said, when nobody answers it, or it is asked wrongly."""
    monkeypatch.setattr(bench_observe, "LONGEST_S", 0.2)
    server = Server((), peers.free_port(), [], lambda _: 0)
    for dead, said in ((0, f"watch: only 0 of {OBSERVERS} registrations"), (101, "from 0 to 100")):
        variant = Variant("", dead=dead)
        with (
            Watching.start(bench, variant, server, seed=1) as watching,
            pytest.raises(SystemExit, match=said),
        ):
            watching.line()


# ----------------------------------------------------------------------------------------------
# Telling


def test_json() -> None:
    """A program gets the figures, and what they are of."""
    asked = ["--observers", "30", "--runs", "2", "--variant", "plain", "--json"]
    done = CliRunner().invoke(bench_observe.main, asked, catch_exceptions=False)
    told = json.loads(done.stdout)

    assert (done.exit_code, done.stderr) == (0, "")
    assert (told["observers"], told["runs"], told["seed"]) == (30, 2, 1)
    assert set(told) == {"observers", "runs", "seed", "plain"}
    assert set(told["plain"]) == FIGURES


def test_libcoap_that_is_not_there(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without its program libcoap is left out, with a line that says so; people see a table."""
    monkeypatch.setattr(bench_observe, "LIBCOAP", "coap-server-of-nobody")
    monkeypatch.setenv("COLUMNS", "80")
    asked = ["--observers", "5", "--runs", "1", "--variant", "plain", "--variant", "libcoap"]
    done = CliRunner().invoke(bench_observe.main, asked, catch_exceptions=False)

    assert done.stderr == "libcoap: coap-server-notls is not installed, so it is not measured\n"
    assert "5 observers, s after the publish, medians of 1 runs" in done.stdout
    assert [line.split()[0] for line in done.stdout.splitlines() if line[:5] == " ours"] == [
        "ours"
    ]
    assert "libcoap" not in done.stdout


GOOD = dict.fromkeys(FIGURES, 0.0) | {
    "registered": 10_000,
    "per_second": 123_456.0,
    "rss_per_observer": 999.0,
    "first_s": 12.345,
    "median_s": 12.345,
    "p99_s": 12.345,
    "last_s": 2.0,
    "get_ms": 19.9,
}


def test_table() -> None:
    """People see each variant in a line, and nothing is cut off."""
    out = io.StringIO()
    Console(file=out, width=80).print(
        bench_observe.table(dict.fromkeys(VARIANTS, GOOD | {"cpu_s": 12.34}), "title")
    )
    rows = [line for line in out.getvalue().splitlines() if "123,456" in line]
    assert [variant.what for variant in VARIANTS.values()] == [row[:10].strip() for row in rows]
    figures = ["123,456", "999", "12.345", "12.345", "12.345", "2.000", "12.34", "19.9", "0", "0"]
    assert [figures] * len(VARIANTS) == [row[10:].split() for row in rows]


@pytest.mark.parametrize(
    ("key", "worse", "said"),
    [
        ("plain", {}, []),
        ("plain", {"last_s": 2.1}, ["ours: last 2.100, wanted ≤ 2.000"]),
        ("plain", {"last_s": 2.1, "registered": 9}, ["ours: 9 observers"]),
        ("plain", {"per_second": 9_999}, ["ours: reg/s 9,999, wanted ≥ 10,000"]),
        ("plain", {"rss_per_observer": 1_100}, ["ours: B each 1,100, wanted ≤ 1,000"]),
        ("plain", {"get_ms": 20.5}, ["ours: GET ms 20.5, wanted ≤ 20.0"]),
        (
            "loss_1",
            {"last_s": 46, "twice": 1},
            ["last 46.000, wanted ≤ 45", "twice 1, wanted ≤ 0"],
        ),
        ("loss_5", {"untold": 1}, []),
        ("dead", {"last_s": 2.6}, ["10 % dead: last 2.600, wanted ≤ 2.500"]),
        ("restart", {"last_s": 2.1}, ["restart: last 2.100, wanted ≤ 2.000"]),
        ("restart", {"untold": 3}, ["restart: untold 3, wanted ≤ 0"]),
        ("libcoap", {"registered": 5_000}, ["libcoap: 5,000 observers"]),
    ],
)
def test_notes(key: str, worse: dict[str, float], said: list[str]) -> None:
    """What falls short of what is wanted is said, and who was measured with fewer observers."""
    figures = dict.fromkeys(VARIANTS, GOOD) | {key: GOOD | worse}
    notes = list(bench_observe.notes(figures, 10_000))
    assert len(said) == len(notes)
    assert all(part in note for part, note in zip(said, notes, strict=True))


def test_goals_of_a_variant_that_was_not_measured() -> None:
    """What was not measured cannot fall short, nor be compared with."""
    assert list(bench_observe.notes({"dead": GOOD | {"last_s": 99.0}}, 10_000)) == []


def test_runs_together() -> None:
    """Figures are medians over the runs; no median hides who was not told."""
    runs = [{"plain": {"last_s": last, "untold": last == 9}} for last in (1, 9, 2)]
    assert together(runs, ADDED) == {"plain": {"last_s": 2, "untold": 1}}
