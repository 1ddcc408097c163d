"""http/page_updates.py: what open pages are sent, over real sockets."""

from __future__ import annotations

import contextlib
import json
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import httpx2
import pytest

from netota_coap.http.event_stream import Events
from netota_coap.http.server import serving
from tests.support import publishing
from tests.support.pages import Shown
from tests.support.publishing import STABLE
from tests.support.serving import PATIENCE_S, until

STABLE_PATH = ("p", "sensor-node", "s", "stable")
_INTERVAL_S = 0.02


@pytest.fixture
async def shown(repository_dir: Path) -> AsyncIterator[tuple[Shown, str]]:
    """The typical repository, looked at more often, and where it is served."""
    shown = Shown(repository_dir)
    shown.site.page.updates.interval_s = _INTERVAL_S
    async with serving(shown.site, "127.0.0.1:0") as (uri,):
        yield shown, uri


@contextlib.asynccontextmanager
async def following(uri: str, page: str) -> AsyncIterator[AsyncIterator[dict[str, Any]]]:
    """Be an open page: what its events say."""
    url = f"{uri}/live?page={page}"
    async with (
        httpx2.AsyncClient(timeout=PATIENCE_S) as client,
        client.stream("GET", url) as answer,
    ):
        lines = answer.aiter_lines()
        yield (json.loads(line[6:]) async for line in lines if line.startswith("data: "))


async def test_stream_is_followed(shown: tuple[Shown, str]) -> None:
    """A page is told its counts and mark at once, then only what changed."""
    site, uri = shown
    mark = site.site.page.updates.mark(STABLE_PATH, ())
    async with following(uri, "/".join(STABLE_PATH)) as events:
        key = "/".join(STABLE_PATH)
        assert await anext(events) == {"page": mark, "observers": 0, "told": 0, key: 0}
        site.observers[STABLE_PATH] = 3
        assert await anext(events) == {"observers": 3, key: 3}
        site.observers["p", "other", "s", "x"] = 1
        assert await anext(events) == {"observers": 4}
        site.told = 3
        assert await anext(events) == {"told": 3}
        publishing.close(site.root, STABLE)
        site.reload()
        (fresh,) = (await anext(events)).values()
        assert fresh == site.site.page.updates.mark(STABLE_PATH, ()) != mark
        site.issues = ("bad",)
        assert await anext(events) == {"page": site.site.page.updates.mark(STABLE_PATH, ("bad",))}
        site.issues = ()
        assert await anext(events) == {"page": fresh}
        publishing.remove(site.root, STABLE)
        site.reload()
        assert (await anext(events))["page"] == "gone"


async def test_index_is_followed(shown: tuple[Shown, str]) -> None:
    """The page of all is told the counts of each stream, and of any change."""
    site, uri = shown
    async with following(uri, "") as events:
        first = await anext(events)
        assert sorted(name for name in first if "/" in name) == sorted(
            "/".join(path) for path in site.site.catalog.resources if len(path) == 4
        )
        publishing.remove(site.root, STABLE)
        site.reload()
        assert list(await anext(events)) == ["page"]


async def test_other_streams_change_nothing(shown: tuple[Shown, str]) -> None:
    """A page is not brought up to date because of a stream that it does not show."""
    site, _ = shown
    live = site.site.page.updates
    paths = (STABLE_PATH, ())
    stable, everything = (live.mark(path, ()) for path in paths)
    publishing.close(site.root, ("sensor-node", "edge"))
    site.reload()
    assert (live.mark(STABLE_PATH, ()) == stable, live.mark((), ()) == everything) == (True, False)


async def test_nobody_looks_for_nothing(shown: tuple[Shown, str]) -> None:
    """While no page is open, nothing is done; one look serves all that are."""
    site, uri = shown
    live, looks = site.site.page.updates, 0
    original = site.site.status

    def counting() -> Any:
        nonlocal looks
        looks += 1
        return original()

    site.site.status = counting
    async with following(uri, "") as one, following(uri, "") as other:
        await anext(one)
        await anext(other)
        await until(lambda: looks > 3)
        assert live._timer
    await until(lambda: live._timer is None)


async def test_too_many_pages(repository_dir: Path) -> None:
    """Open pages count among those who follow, of whom there is a bound."""
    shown = Shown(repository_dir, options={"events": Events(most=0)})
    answer = await shown.get("/live", "text/event-stream")
    assert (answer.status_code, answer.headers["retry-after"]) == (503, "60")


async def test_head(repository_dir: Path) -> None:
    """Whoever only asks what it is, is told."""
    answer = await Shown(repository_dir).get("/live", method="HEAD")
    assert answer.headers["content-type"].startswith("text/event-stream")
