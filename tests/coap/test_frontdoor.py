"""coap/frontdoor.py: sockets, vetting, and the private names of aiocoap that it stands on."""

from __future__ import annotations

import asyncio
import contextlib
import errno
import importlib.metadata
import inspect
import os
import socket
import sys
from pathlib import Path

import pytest
from aiocoap.messagemanager import MessageManager
from aiocoap.numbers.codes import Code
from aiocoap.protocol import Context
from aiocoap.transports.udp6 import MessageInterfaceUDP6
from aiocoap.util.asyncio.recvmsg import RecvmsgSelectorDatagramTransport
from hypothesis import given
from hypothesis import strategies as st

from netota_coap.catalog.catalog import Catalog
from netota_coap.coap import options as coap
from netota_coap.coap import response_cache, vetting
from netota_coap.coap.frontdoor import FrontDoor
from netota_coap.coap.responder import Responder
from netota_coap.coap.response_cache import ResponseCache
from netota_coap.coap.site import CoapSite
from netota_coap.coap.vetting import RequestLimiter, vet
from netota_coap.model.values import Repository
from netota_coap.monitoring import Tally
from netota_coap.repository.loading import Loader
from tests.support.device import ACK, CON, FETCH, GET, NON, POST, RST, code, device
from tests.support.environment import needs_ipv6
from tests.support.publishing import NOW, publish
from tests.support.serving import PATIENCE_S, run, serving

EMPTY = Repository(format=1)


def test_private_names() -> None:
    """The release of aiocoap is the one whose private names were tried, and has them."""
    assert importlib.metadata.version("aiocoap") == "0.4.17"
    assert list(
        inspect.signature(Context._append_tokenmanaged_messagemanaged_transport).parameters
    ) == ["self", "message_interface_constructor"]
    assert ["sock", "ctx", "log", "loop", "multicast"][:4] == list(
        inspect.signature(MessageInterfaceUDP6._create_transport_endpoint).parameters
    )[:4]
    assert list(inspect.signature(MessageInterfaceUDP6.datagram_msg_received).parameters) == [
        "self",
        "data",
        "ancdata",
        "flags",
        "address",
    ]
    assert callable(MessageManager._next_message_id)
    assert "self._recent_messages" in inspect.getsource(MessageManager.__init__)
    # `Interface.listen` replaces the reader that this one adds.
    assert "loop.add_reader" in inspect.getsource(RecvmsgSelectorDatagramTransport.__init__)
    for name in ("send", "error_received"):
        assert callable(getattr(MessageInterfaceUDP6, name))


@needs_ipv6
async def test_answers_from_the_address_that_was_asked(sample: Path) -> None:
    """On a wildcard the answer comes from the address that the request went to, v4 and v6."""
    async with serving(sample, "[::]:0") as uris:
        port = uris[0].rsplit(":", 1)[1]
        for host in ("127.0.0.1", "127.0.0.3", "[::1]"):
            # A connected socket drops what comes from elsewhere.
            async with device(f"coap://{host}:{port}") as it:
                assert (await it.ask(GET, "p")).code == "2.05"


@needs_ipv6
async def test_notified_from_the_address_that_was_asked(sample: Path) -> None:
    """On a wildcard a notification comes from the address that was asked, v4 and v6."""
    async with serving(sample, "[::]:0") as (uri,), contextlib.AsyncExitStack() as stack:
        port = uri.rsplit(":", 1)[1]
        hosts = ("127.0.0.1", "127.0.0.3", "[::1]")
        devices = [await stack.enter_async_context(device(f"coap://{h}:{port}")) for h in hosts]
        for it in devices:
            await it.observe("p")
        for version in ("2.0", "3.0"):
            publish(sample, ("sensor-node", "stable"), version, [], now=NOW)
            for it in devices:
                await it.notification()
        assert [await it.silent(0.02) for it in devices] == [True] * 3


@needs_ipv6
async def test_several_addresses(sample: Path) -> None:
    """One server listens on several addresses."""
    async with serving(sample, "127.0.0.1:0", "[::1]:0") as uris:
        for uri in uris:
            async with device(uri) as it:
                assert (await it.ask(GET, "p")).code == "2.05"

    assert len(uris) == 2


@pytest.mark.skipif(os.getuid() != 0, reason="making a network namespace takes root")
async def test_without_ipv6(sample: Path) -> None:
    """Where IPv6 is off by sysctl, IPv4 is served, by any name."""
    script = Path(__file__).parents[1] / "support" / "without_ipv6.py"
    code, out, err = await run("unshare", "--net", sys.executable, script, sample)

    assert (code, err) == (0, "")
    assert out.splitlines() == [
        "[::]:0 2.05",
        "127.0.0.1:0 2.05",
        "localhost:0 2.05",
        "cannot listen on [::1]:0: Cannot assign requested address",
    ]


async def test_nothing_else_is_opened(sample: Path) -> None:
    """UDP is all that is listened on."""
    async with serving(sample) as (uri,):
        port = int(uri.rsplit(":", 1)[1])
        with socket.socket() as tcp:
            tcp.setblocking(True)
            assert tcp.connect_ex(("127.0.0.1", port)) == errno.ECONNREFUSED


# Datagrams: what is answered to them; None: silence. The message ID is 0x1234.
REFUSED = [
    ("", None),
    ("40", None),
    ("00011234", None),  # version 0
    ("80011234", None),  # version 2
    ("49011234" + "00" * 9, "70001234"),  # token of 9 bytes
    ("4f011234", "70001234"),
    ("59011234" + "00" * 9, None),  # the same, not confirmable
    ("44011234aabb", "70001234"),  # token cut off
    ("40211234", "70001234"),  # reserved class 1
    ("40e11234", "70001234"),  # reserved class 7
    ("40001234", "70001234"),  # ping
    ("4000123400", "70001234"),  # empty, but not
    ("41001234aa", "70001234"),
    ("50001234", None),
    ("40011234ff", "70001234"),  # payload marker without payload
    ("40011234f0", "70001234"),  # reserved delta
    ("40011234b5aabb", "70001234"),  # option cut off
    ("60011234b170", None),  # a request that acknowledges
    ("70011234b170", None),  # a reset with a code
    ("41011234aab1ff", "61821234aa"),  # path that is not UTF-8
    ("40011234d302808080", "60821234"),  # query that is not UTF-8
    ("40011234d304010203", "60821234"),  # Accept of 3 bytes
]


@pytest.mark.parametrize(("datagram", "reply"), REFUSED)
async def test_refused(sample: Path, datagram: str, reply: str | None) -> None:
    """Malformed datagrams get RFC 7252's answer or silence, and the next good one an answer."""
    async with serving(sample) as (uri,), device(uri) as it:
        it.send(bytes.fromhex(datagram))
        if reply is not None:
            answer = await it.receive()
            expected = bytes.fromhex(reply)
            assert (expected[0] >> 4 & 3, 0x1234) == (answer.kind, answer.message_id)
            assert f"{expected[1] >> 5}.{expected[1] & 31:02}" == answer.code
            assert expected[4:] == answer.token
        after = await it.ask(GET, "p")
        assert (after.code, after.token) == ("2.05", b"t")


async def test_refused_without_confirmation(sample: Path) -> None:
    """A bad option in a non-confirmable request is answered by a non-confirmable message."""
    async with serving(sample) as (uri,), device(uri) as it:
        it.send(bytes.fromhex("51011234aab1ff"))
        answer = await it.receive()

        assert (answer.kind, answer.code, answer.token) == (NON, "4.02", b"\xaa")


async def test_ping(sample: Path) -> None:
    """An empty confirmable message is a ping, answered by a reset."""
    async with serving(sample) as (uri,), device(uri) as it:
        it.send(bytes.fromhex("40001234"))
        answer = await it.receive()

        assert (answer.kind, answer.code, answer.message_id) == (RST, "0.00", 0x1234)


async def test_too_long(sample: Path) -> None:
    """What is longer than the buffer is not taken for its beginning."""
    async with serving(sample) as (uri,), device(uri) as it:
        it.send(it.message(GET, "p", payload=b"x" * 5_000))

        assert (await it.receive()).kind == RST


@pytest.mark.parametrize("kind", [CON, NON])
async def test_types(sample: Path, kind: int) -> None:
    """A confirmable request is answered in the acknowledgement, another by its like."""
    async with serving(sample) as (uri,), device(uri) as it:
        answer = await it.ask(GET, "p", kind=kind, token=b"")

        assert (ACK if kind == CON else NON, "2.05", b"") == (
            answer.kind,
            answer.code,
            answer.token,
        )


def test_zephyr_acknowledgement() -> None:
    """An acknowledgement with a token, as Zephyr 1.14 sends it, is let through."""
    datagram = bytes.fromhex("64001234aabbccdd")
    assert datagram == vet(datagram)


@given(st.binary(max_size=64))
def test_vet_any_bytes(data: bytes) -> None:
    """Any datagram is judged without an error, and never answered by more than it is."""
    verdict = vet(data)

    if isinstance(verdict, bytes):
        assert data.startswith(verdict[:4])
        assert len(verdict) <= len(data)
    else:
        assert verdict.code in (None, Code.EMPTY, Code.BAD_OPTION)


@pytest.mark.parametrize(
    ("option", "code", "registers"),
    [
        ((coap.OBSERVE, b""), "2.05", True),
        ((coap.OBSERVE, bytes(3)), "2.05", True),
        ((coap.OBSERVE, bytes(4)), "2.05", False),
        ((coap.CONTENT_FORMAT, bytes(3)), "2.05", False),
        ((coap.ETAG, bytes(9)), "2.05", False),
        ((coap.URI_PORT, bytes(3)), "4.02", False),
        ((coap.BLOCK2, bytes(4)), "4.02", False),
        ((coap.ACCEPT, bytes(3)), "4.02", False),
    ],
)
async def test_lengths(sample: Path, option: coap.Option, code: str, registers: bool) -> None:
    """A length that an option cannot have: refused where it is critical, else as if not there."""
    async with serving(sample) as (uri,), device(uri) as it:
        answer = await it.ask(GET, "p", options=[option])

        assert (code, registers) == (answer.code, answer.uint(coap.OBSERVE) is not None)
        if code == "4.02":
            assert answer.uint(coap.CONTENT_FORMAT) == 257


async def test_dead_observers_cost_the_living_nothing(sample: Path) -> None:
    """Closed ports among the observers, with their ICMP errors, keep nobody from being told."""
    path = "p/sensor-node/s/stable"
    async with serving(sample) as (uri,), contextlib.AsyncExitStack() as living:
        told = []
        for number in range(10):
            async with device(uri) as dead:
                await dead.observe(path, token=bytes((number,)))
            told.append(await living.enter_async_context(device(uri)))
            await told[-1].observe(path)
        for version in ("2.0", "3.0", "4.0"):
            publish(sample, ("sensor-node", "stable"), version, [], now=NOW)
            for it in told:
                answer = await it.notification()
                assert version.encode() in answer.payload


async def test_message_ids_of_notifications_are_their_own(sample: Path) -> None:
    """Notifications have IDs that no other message of the server has."""
    path = "p/sensor-node/s/stable"
    async with serving(sample) as (uri,), device(uri) as it:
        await it.observe(path)
        publish(sample, ("sensor-node", "stable"), "2.0", [], now=NOW)
        told = await it.notification()
        others = [
            await it.ask(GET, "p", kind=NON),
            await it.ask(GET, "p", kind=NON, options=[(258, b"")]),  # answered by aiocoap
        ]

    assert told.message_id >= 0x8000
    assert all(other.message_id < 0x8000 for other in others)


async def test_whom_nothing_can_be_sent_to(sample: Path) -> None:
    """Who is not to be reached is not registered, and costs the others nothing."""
    site = CoapSite(Responder(Catalog.of(Loader(sample).load())))
    door = await FrontDoor.open(site, ["127.0.0.1:0"])
    (manager,) = door._context.request_interfaces
    interface = manager.token_interface.message_interface
    async with device(door.uris[0]) as it:
        nowhere = ("::ffff:127.0.0.1", 0, 0, 0)
        request = it.message(GET, "p", options=[(coap.OBSERVE, b"")])
        interface._process(request, interface._pktinfo, nowhere)
        assert len(site.observers) == 0
        assert (await it.observe("p")).uint(coap.OBSERVE) == 3
    await door.close()


def test_options_that_mean_nothing_are_not_handed_on() -> None:
    """Elective options that are ignored are taken out; a crowd of options is refused."""
    head = bytes.fromhex("40011234")
    sent = [(coap.URI_PATH, b"p"), (18, b"x"), (coap.OBSERVE, bytes(4)), (258, b"\x02")]
    kept = [(coap.URI_PATH, b"p"), (258, b"\x02")]
    assert head + coap.encode(kept, b"1") == vet(head + coap.encode(sent, b"1"))
    crowd = vet(head + coap.encode([(18, b"x")] * 65))
    assert not isinstance(crowd, bytes)
    assert crowd.code == Code.BAD_OPTION


# ----------------------------------------------------------------------------------------------
# Ready answers


def test_ready_answers_are_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    """The least recently used leave at a number of entries, or of bytes; all leave at a swap."""
    before, after = Responder(Catalog.of(EMPTY)), Responder(Catalog.of(EMPTY))
    ready = ResponseCache()
    table = ready.of(before)
    monkeypatch.setattr(response_cache, "MOST_ENTRIES", 3)
    for number in range(3):
        ready.put(bytes((number,)), Code.CONTENT, b"tail", Tally(4))
    table.move_to_end(b"\0")
    ready.put(b"\3", Code.VALID, b"tail", Tally(4))
    assert list(table) == [b"\2", b"\0", b"\3"]
    ready.put(b"\3", Code.VALID, b"tail", Tally(4))
    monkeypatch.setattr(response_cache, "MOST_BYTES", 2 * (300 + 1 + 4))
    ready.put(b"\4", Code.CONTENT, b"tail", Tally(4))
    assert list(table) == [b"\3", b"\4"]
    assert ready.of(before) is table
    assert list(ready.of(after)) == []
    monkeypatch.setattr(response_cache, "MOST_BYTES", 305)
    ready.put(b"\5", Code.CONTENT, b"tail", Tally(4))
    assert list(table) == [b"\5"]


@pytest.mark.parametrize(
    "bind",
    ["127.0.0.1:0", pytest.param("[::1]:0", marks=needs_ipv6), "[::]:0", "0.0.0.0:0"],
)
@pytest.mark.parametrize("kind", [CON, NON])
async def test_ready_answers(sample: Path, bind: str, kind: int) -> None:
    """What was asked before is answered alike, from any socket, until a swap."""
    path = "p/sensor-node/s/stable?head"
    async with serving(sample, bind) as (uri,), device(uri.replace("[::]", "127.0.0.1")) as it:
        answers = [await it.ask(GET, path, kind=kind, token=bytes(n)) for n in (0, 8, 3)]
        assert {answer.payload for answer in answers} == {answers[0].payload}
        assert [len(answer.token) for answer in answers] == [0, 8, 3]
        assert {answer.kind for answer in answers} == {ACK if kind == CON else NON}
        assert len({answer.message_id for answer in answers}) == 3
        publish(sample, ("sensor-node", "stable"), "2.0", [], now=NOW)
        async with asyncio.timeout(PATIENCE_S):
            while (await it.ask(GET, path)).payload == answers[0].payload:  # noqa: ASYNC110
                await asyncio.sleep(0.002)


async def test_what_is_refused_is_not_kept(sample: Path) -> None:
    """Only what was answered well is ready; asking for what is not there fills nothing."""
    site = CoapSite(Responder(Catalog.of(Loader(sample).load())))
    door = await FrontDoor.open(site, ["127.0.0.1:0"])
    async with device(door.uris[0]) as it:
        for path in ("p", "p/none", "p?x", "p/sensor-node/s/stable?sequence=x&full"):
            await it.ask(GET, path)
        await it.ask(GET, "p?y", payload=b"x")
        await it.ask(GET, "p?z", options=[(coap.OBSERVE, b"\x01")])
        await it.observe("p")
        await it.observe("p/sensor-node")
        await it.ask(GET, "p", options=[(258, b"")])  # No-Response is for aiocoap
        await it.ask(FETCH, "p/sensor-node/s/stable", options=[(coap.CONTENT_FORMAT, b"\x3c")],
                     payload=b"\xa0")  # fmt: skip
    (manager,) = door._context.request_interfaces
    table = manager.token_interface.message_interface._cache.of(site.responder)
    assert sorted(table) == [
        coap.encode([(coap.URI_PATH, b"p")]),
        coap.encode([(coap.URI_PATH, b"p"), (coap.URI_QUERY, b"x")]),
    ]
    # Of all these, aiocoap was given one.
    assert len(manager.token_interface._recent_messages) == 1
    await door.close()


async def test_aiocoap_sees_neither_other_methods_nor_responses(sample: Path) -> None:
    """The door refuses the ones and drops the others: for each, memory would be taken."""
    async with serving(sample) as (uri,), device(uri) as it:
        refused = await it.ask(POST, "p", payload=b"x")
        assert (refused.code, b"nothing can be changed" in refused.payload) == ("4.05", True)
        unknown = await it.ask(31, "p", kind=NON)
        assert (unknown.code, unknown.kind) == ("4.05", NON)
        content = [(coap.CONTENT_FORMAT, b"\xff\xfe")]
        for kind in (NON, ACK):
            it.send(it.message(code("2.05"), "p", kind=kind, options=content))
        it.send(it.message(code("2.05"), "p", kind=CON, options=content))
        assert (await it.receive()).kind == RST
        assert await it.silent()
        assert (await it.ask(GET, "p")).code == "2.05"


async def test_what_aiocoap_would_have_to_remember_is_bounded(
    sample: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Over the limit, who asks for more than an answer shall come again; others are served."""
    monkeypatch.setattr(vetting, "MOST_REMEMBERED", 2)
    async with serving(sample) as (uri,), device(uri) as it:
        wants = [(258, b"")]  # No-Response
        for _ in range(2):
            await it.ask(GET, "p", options=wants)
        refused = await it.ask(GET, "p", options=wants)
        assert (refused.code, refused.uint(coap.MAX_AGE)) == ("5.03", 10)
        assert (await it.ask(GET, "p")).code == "2.05"


async def test_one_source_cannot_fill_what_is_remembered_for_all(
    sample: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Over its own limit, one source is told when to come again."""
    monkeypatch.setattr(vetting, "MOST_OF_SOURCE", 2)
    async with serving(sample) as (uri,), device(uri) as it:
        wants = [(258, b"")]  # No-Response
        for _ in range(2):
            await it.ask(GET, "p", options=wants)
        refused = await it.ask(GET, "p", options=wants)
        assert refused.code == "4.29"
        assert 50 <= refused.uint(coap.MAX_AGE) <= 60
        assert (await it.ask(GET, "p")).code == "2.05"


LOOPBACK = bytes(10) + b"\xff\xff\x7f\x00\x00\x01"
HOST_OF_64 = bytes.fromhex("20010db8000000000000000000000001")
OTHER_OF_64 = bytes.fromhex("20010db80000000000000000000000ff")
LINK_LOCAL = bytes.fromhex("fe800000000000000000000000000001")
OTHER_LINK_LOCAL = bytes.fromhex("fe800000000000000000000000000002")


@pytest.mark.parametrize(
    ("one", "other", "same"),
    [
        (LOOPBACK, LOOPBACK, True),
        (LOOPBACK, LOOPBACK[:-1] + b"\x02", False),
        (HOST_OF_64, OTHER_OF_64, True),
        (LINK_LOCAL, OTHER_LINK_LOCAL, False),
    ],
)
def test_sources(one: bytes, other: bytes, *, same: bool) -> None:
    """What one host may have to itself is one source; each has its own limit, for a minute."""
    limiter = RequestLimiter()
    assert all(limiter.refusal(100.0, one, 0) is None for _ in range(1_024))
    assert limiter.refusal(130.0, one, 0) == (Code.TOO_MANY_REQUESTS, 30)
    assert (limiter.refusal(130.0, other, 0) is not None) is same
    assert limiter.refusal(160.0, one, 0) is None
    assert limiter.refusal(160.0, one, 16_384) == (Code.SERVICE_UNAVAILABLE, 10)


async def test_dead_peers_cost_the_living_no_answer(sample: Path) -> None:
    """Requests of closed ports, with their ICMP errors, lose nobody an answer."""
    async with serving(sample) as (uri,), device(uri) as it:
        for _ in range(50):
            async with device(uri) as dead:
                dead.send(dead.message(GET, "p"))
            assert (await it.ask(GET, "p")).code == "2.05"


async def test_a_burst_starves_nobody(sample: Path) -> None:
    """While one asks without end, an observer is told of a publish, and timers run."""
    async with serving(sample) as (uri,), device(uri) as crowd, device(uri) as observer:
        await observer.observe("p/sensor-node/s/stable")
        asking = True

        async def burst() -> None:
            while asking:
                for _ in range(200):
                    with contextlib.suppress(BlockingIOError):
                        crowd.send(crowd.message(GET, "p"))
                await asyncio.sleep(0)

        task = asyncio.create_task(burst())
        publish(sample, ("sensor-node", "stable"), "2.0", [], now=NOW)
        told = await observer.notification()
        asking = False
        await task
        assert b"2.0" in told.payload
