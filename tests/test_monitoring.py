"""monitoring.py: what is counted, and how it is shown."""

from __future__ import annotations

import math
from datetime import UTC, datetime
from pathlib import Path

import attrs
import pytest

from netota_coap.catalog.catalog import Catalog
from netota_coap.coap import options as coap
from netota_coap.coap.frontdoor import FrontDoor
from netota_coap.coap.responder import Responder
from netota_coap.coap.site import CoapSite
from netota_coap.model.values import Repository
from netota_coap.monitoring import (
    METRICS,
    Exchange,
    FanOut,
    Metrics,
    Status,
    UpstreamStatus,
    resource_class,
)
from netota_coap.repository.loading import Loader
from tests.conftest import FIXTURES
from tests.support.device import GET, POST, RST, device
from tests.support.environment import needs_ipv6

STATUS = Status("1.0", 12.3456, 2, 3, 4, datetime(2026, 11, 24, 9, 30, tzinfo=UTC))
UPSTREAM = UpstreamStatus(
    uri="coap://up", last_contact=STATUS.reloaded, behind=2, refused=3, error="away"
)
GATEWAY = attrs.evolve(STATUS, upstreams=(UPSTREAM,), fetched_bytes=5)
STABLE = "p/sensor-node/s/stable"


def figures(metrics: Metrics, status: Status = STATUS) -> dict[tuple[str, ...], float]:
    """Return the samples by name and labels."""
    return {(metric.name, *labels): value for metric, labels, value in metrics.samples(status)}


@pytest.mark.parametrize(
    ("path", "name"),
    [
        ((".well-known", "core"), "core"),
        (("p",), "packages"),
        (("p", "a"), "package"),
        (("p", "a", "s", "b"), "stream"),
        (("p", "a", "x", "b"), "other"),
        (("b", "digest"), "blob"),
        (("status",), "status"),
        ((), "other"),
        (("p", "a", "s"), "other"),
        (("x",) * 30, "other"),
    ],
)
def test_classes_of_resources(path: tuple[str, ...], name: str) -> None:
    """There are few, whatever is asked for."""
    assert name == resource_class(path)


async def test_requests_and_notifications_are_counted() -> None:
    """By resource and code, ready or not; an observer from registration to reset."""
    typical = Catalog.of(Loader(Path(FIXTURES) / "repositories" / "typical").load())
    site = CoapSite(Responder(typical))
    door = await FrontDoor.open(site, ["127.0.0.1:0"])
    async with device(door.uris[0]) as it:
        sizes = [len((await it.ask(GET, STABLE)).payload) for _ in range(3)]
        await it.ask(GET, "nothing")
        await it.ask(POST, STABLE)
        await it.observe(STABLE)
        assert site.observers.fan_out is None
        site.swap(Catalog.of(Repository(format=1)))
        await it.notification()
        await it.observe("p")
        site.swap(typical)
        it.acknowledge(await it.receive(), RST)
        await it.ask(GET, "p")
    await door.close()
    found = figures(site.metrics)
    assert found["netota_requests_total", "coap", "stream", "2.05"] == 4
    assert found["netota_requests_total", "coap", "stream", "4.05"] == 1
    assert found["netota_requests_total", "coap", "other", "4.04"] == 1
    assert found[("netota_ready_answers_total",)] == 2
    assert found["netota_sent_bytes_total", "coap"] > sum(sizes)
    assert found["netota_notifications_total", "sent"] == 2
    assert found["netota_notifications_total", "acknowledged"] == 1
    assert site.observers.of(("p",)) == 0
    assert site.observers.fan_out is None  # of the last change: nobody acknowledged it


@needs_ipv6
async def test_requests_are_heard() -> None:
    """Each as often as it comes, by whichever way it is answered."""
    heard: list[Exchange] = []
    site = CoapSite(Responder(Catalog.of(Repository(format=1))), metrics=Metrics(heard.append))
    door = await FrontDoor.open(site, ["[::]:0"])
    port = door.uris[0].rsplit(":", 1)[1]
    async with device(f"coap://127.0.0.1:{port}") as it, device(f"coap://[::1]:{port}") as other:
        for _ in range(2):
            await it.ask(GET, "p?a=b&c")
        await it.observe("p")
        await other.ask(POST, "p")
        await other.ask(GET, "nowhere")
    await door.close()
    assert [(each.method, list(each.path), list(each.query), each.code) for each in heard] == [
        ("GET", ["p"], ["a=b", "c"], "2.05"),
        ("GET", ["p"], ["a=b", "c"], "2.05"),
        ("GET", ["p"], [], "2.05"),
        ("POST", ["p"], [], "4.05"),
        ("GET", ["nowhere"], [], "4.04"),
    ]
    assert heard[0].who.startswith("127.0.0.1:")
    assert heard[3].who.startswith("[::1]:")
    assert all(each.took_us > 0 and each.size > 0 for each in heard)


def test_all_metrics_have_samples() -> None:
    """Each row of the table is told, and nothing else; what never was is not a number."""
    metrics = Metrics()
    metrics.answered("http", "stream", "200", 10)
    metrics.notifications["sent"] += 1
    metrics.reloads["taken"] += 1
    assert {metric.name for metric in METRICS} == {name for name, *_ in figures(metrics, GATEWAY)}
    assert figures(metrics, GATEWAY)[("netota_upstream_streams_behind", "coap://up")] == 2
    assert ("netota_fetched_bytes_total",) not in figures(metrics)
    assert math.isnan(figures(metrics)[("netota_fan_out_seconds",)])
    refused = Status(
        *("1.0", 1.0, 0, 0, 0, STATUS.reloaded), issues=("a.toml: bad",), fan_out=FanOut(3, 0.25)
    )
    assert figures(metrics, refused)[("netota_repository_accepted",)] == 0
    assert figures(metrics, refused)[("netota_fan_out_seconds",)] == 0.25


def test_status() -> None:
    """What is not so is left out; one line says it to a service manager."""
    assert GATEWAY.to_plain()["upstreams"] == (
        {
            "uri": "coap://up",
            "last_contact": "2026-11-24T09:30:00Z",
            "behind": 2,
            "refused": 3,
            "error": "away",
        },
    )
    assert GATEWAY.to_plain()["fetched_bytes"] == 5
    assert str(GATEWAY).endswith("; coap://up: 2 streams behind, seen 2026-11-24 09:30:00Z: away")
    never = attrs.evolve(UPSTREAM, last_contact=None)
    assert "seen never" in str(attrs.evolve(STATUS, upstreams=(never,)))
    assert STATUS.to_plain() == {
        "version": "1.0",
        "uptime_s": 12.346,
        "packages": 2,
        "streams": 3,
        "observers": 4,
        "reloaded": "2026-11-24T09:30:00Z",
    }
    assert STATUS.is_ready
    assert "serving: 2 packages, 3 streams, 4 observers" in str(STATUS)


async def test_status_is_read_by_its_readers_only() -> None:
    """Blocks of one status go together; others are refused, and it is listed nowhere."""
    told = []

    def status() -> Status:
        told.append(1)
        return Status(*("1.0", 1.0, 0, 0, len(told), STATUS.reloaded), issues=("x" * 300,))

    site = CoapSite(Responder(Catalog.of(Repository(format=1))), status=status)
    door = await FrontDoor.open(site, ["127.0.0.1:0"])
    async with device(door.uris[0]) as it:
        first = await it.ask(GET, "status")
        rest = await it.ask(GET, "status", options=[(coap.BLOCK2, b"\x14")])
        assert (first.code, rest.code, first.uint(coap.MAX_AGE)) == ("2.05", "2.05", 0)
        assert first.values(coap.ETAG) == rest.values(coap.ETAG)
        assert b'"observers":1' in first.payload + rest.payload
        as_cbor = await it.ask(GET, "status", options=[(coap.ACCEPT, b"\x3c")])
        assert (as_cbor.code, as_cbor.uint(coap.CONTENT_FORMAT)) == ("2.05", 60)
        assert b"status" not in (await it.ask(GET, ".well-known/core")).payload
        site.status_readers = ("192.0.2.0/24", "2001:db8::/32")
        assert (await it.ask(GET, "status")).code == "4.03"
    await door.close()
