"""The page for people in a real browser: Debian's Chromium, without a screen."""

from __future__ import annotations

import asyncio
import contextlib
import struct
import threading
from collections.abc import Callable, Iterator
from datetime import timedelta
from pathlib import Path

import attrs
import pytest
from selenium import webdriver
from selenium.webdriver.common.by import By
from selenium.webdriver.common.keys import Keys

from netota_coap.http.page_content import age
from netota_coap.http.server import serving
from netota_coap.model.values import Stream
from netota_coap.publishing import publish
from netota_coap.publishing.publish import Edit
from netota_coap.repository.store import DirectoryStore
from tests.http.test_page import HOSTILE, STABLE_PATH, hostile
from tests.support.environment import needs
from tests.support.pages import Shown
from tests.support.publishing import NOW, STABLE, change
from tests.support.serving import PATIENCE_S
from tools.generate import screenshot
from tools.generate.screenshot import chromium, picture, view, wait

pytestmark = [pytest.mark.slow, needs("chromium", "chromedriver")]

KEY = "/".join(("p", STABLE[0], "s", STABLE[1]))


@attrs.define(eq=False)
class Visit:
    """A browser at a site that is served in another thread.

    Attributes:
        driver: Of the browser.
        shown: The site.
        uri: Where it is served.
        loop: That it is served in.
    """

    driver: webdriver.Chrome
    shown: Shown
    uri: str
    loop: asyncio.AbstractEventLoop

    def open(self, path: str, *, live: bool = True) -> None:
        self.driver.get(self.uri + path)
        if live:
            wait(self.driver, lambda: self.texts(".live.on") == ["live"])

    def do(self, change: Callable[[], object]) -> None:
        """Change something of the site."""

        async def call() -> None:
            change()

        asyncio.run_coroutine_threadsafe(call(), self.loop).result(PATIENCE_S)

    def texts(self, selector: str) -> list[str]:
        script = "return [...document.querySelectorAll(arguments[0])].map(e => e.innerText)"
        texts: list[str] = self.driver.execute_script(script, selector)
        return texts

    def shows(self, selector: str, *texts: str) -> None:
        """Wait until what a selector finds has these texts."""
        with contextlib.suppress(Exception):
            wait(self.driver, lambda: self.texts(selector) == list(texts))
        assert self.texts(selector) == list(texts)

    def run(self, script: str) -> object:
        return self.driver.execute_script(script)


@pytest.fixture(scope="module")
def browser() -> Iterator[webdriver.Chrome]:
    with chromium() as driver:
        yield driver


@pytest.fixture
def visit(browser: webdriver.Chrome, repository_dir: Path) -> Iterator[Visit]:
    """The typical repository, served."""
    shown = Shown(repository_dir)
    started: list[tuple[str, asyncio.AbstractEventLoop, asyncio.Event]] = []
    ready = threading.Event()

    async def serve() -> None:
        stopping = asyncio.Event()
        async with serving(shown.site, "127.0.0.1:0") as (uri,):
            started.append((uri, asyncio.get_running_loop(), stopping))
            ready.set()
            await stopping.wait()

    thread = threading.Thread(target=asyncio.run, args=(serve(),))
    thread.start()
    assert ready.wait(10)
    ((uri, loop, stopping),) = started
    view(browser, 1200, 900)
    try:
        yield Visit(browser, shown, uri, loop)
        # Neither a script failed, nor did the policy have to stop anything.
        assert [line["message"] for line in browser.get_log("browser")] == []
    finally:
        browser.get("about:blank")
        loop.call_soon_threadsafe(stopping.set)
        thread.join(10)


def replace(root: Path, version: str) -> None:
    """Publish the present archives as another version."""

    def make(present: Stream | None) -> Stream:
        assert present
        return attrs.evolve(present, version=version, message=f"Why {version}")

    change(root, STABLE, make)


def test_a_publish_is_followed(visit: Visit) -> None:
    """A publish appears by itself; what was opened, focused and scrolled to stays so."""
    visit.open(STABLE_PATH)
    visit.run("window.same = true; document.getElementById('kind-1').open = false")
    visit.driver.find_element(By.CSS_SELECTOR, "#kind-3 summary").send_keys(Keys.ENTER)
    before = visit.run("return scrollY")
    visit.do(lambda: (replace(visit.shown.root, "2.5.0"), visit.shown.reload()))
    visit.shows(".tiles .version", "2.5.0")
    visit.shows("#state-18 .version", "2.4.1 → 2.5.0")
    visit.shows("#state-18 > p", "Why 2.5.0 — Release team")
    assert visit.texts("h1") == [f"Stable {'/'.join(STABLE)}"]
    assert visit.run("return document.title") == "sensor-node/stable 2.5.0"
    assert visit.run("return [...document.querySelectorAll('details[open]')].map(d => d.id)") == [
        "kind-3"
    ]
    assert visit.run("return document.activeElement.closest('details').id") == "kind-3"
    assert visit.run("return [window.same, scrollY]") == [True, before]
    assert "the page was updated" in visit.texts("#news")[0]


def test_counts_go_up(visit: Visit) -> None:
    """Observers, and how many of them were told, are counted while one looks."""
    shown, path = visit.shown, tuple(KEY.split("/"))

    def count(more: int) -> None:
        shown.observers[path] += more
        shown.told += more

    for page in ("/", STABLE_PATH):
        visit.open(page)
        for more in (7, 1_240):
            visit.do(lambda more=more: count(more))
            for selector in (f"[data-live='{KEY}']", "[data-live=observers]", "[data-live=told]"):
                visit.shows(selector, f"{shown.told:,}")


def test_all_is_followed_on_one_page(visit: Visit) -> None:
    """The first page learns of a refusal, its end, a new stream and one that is gone."""
    visit.open("/")
    visit.do(lambda: setattr(visit.shown, "issues", ("stable.toml: <b>bad</b>",)))
    visit.shows(".refused li", "stable.toml: <b>bad</b>")
    visit.do(lambda: setattr(visit.shown, "issues", ()))
    visit.shows(".refused li")
    edit = Edit(now=NOW, allow_missing=True)

    def promote() -> None:
        publish.promote(DirectoryStore(visit.shown.root), STABLE, ("sensor-node", "zz"), edit=edit)
        publish.remove(DirectoryStore(visit.shown.root), ("sensor-node", "v1"), edit=edit)
        visit.shown.reload()

    visit.do(promote)
    names = ("beta Beta", "edge Every night's build", "stable Stable", "zz")
    visit.shows("[aria-labelledby=sensor-node] tbody th", *names)


def test_a_stream_that_is_removed(visit: Visit) -> None:
    """Who looks at a stream when it is removed learns that it is."""
    visit.open(STABLE_PATH)
    edit = Edit(now=NOW, allow_missing=True)
    store = DirectoryStore(visit.shown.root)
    visit.do(lambda: (publish.remove(store, STABLE, edit=edit), visit.shown.reload()))
    visit.shows("h1", "Stream not found")
    # The browser tells of the 404 that this is.
    assert [line["source"] for line in visit.driver.get_log("browser")] == ["network"]


def test_a_server_that_stops(visit: Visit) -> None:
    """A page says when what it shows may be out of date."""
    visit.open("/")
    visit.do(visit.shown.site.events.end)
    visit.shows(".live", "not connected")


def test_ages(visit: Visit) -> None:
    """The page tells ages as the server does."""
    visit.open("/")
    seconds = [0, 59, 60, 3_599, 7_200, 86_400, 2_629_800, 31_557_600, 99_999_999]
    ages = [age(NOW, NOW + timedelta(seconds=each)) for each in seconds]
    assert visit.run(f"return {seconds}.map(age)") == ages


def test_without_javascript(visit: Visit) -> None:
    """All but what is live is there, and nothing that does not work."""
    visit.driver.execute_cdp_cmd("Emulation.setScriptExecutionDisabled", {"value": True})
    try:
        visit.open(STABLE_PATH, live=False)
        elements = visit.driver.find_elements(By.CSS_SELECTOR, "h1, h2, .tiles .version, .copy")
        texts = [element.text for element in elements if element.is_displayed()]
        assert texts[1:] == ["2.4.1", "Archives", "What a device gets", "History"]
        visit.driver.find_element(By.LINK_TEXT, "Packages").click()
        wait(visit.driver, lambda: visit.driver.current_url == f"{visit.uri}/")
    finally:
        visit.driver.execute_cdp_cmd("Emulation.setScriptExecutionDisabled", {"value": False})


def test_keyboard(visit: Visit) -> None:
    """Tab leads to the skip link, then to all links in their order, each with a visible focus."""
    visit.open("/")
    focused = []
    for _ in range(6):
        webdriver.ActionChains(visit.driver).send_keys(Keys.TAB).perform()
        focused.append(
            visit.run("""
                const e = document.activeElement, style = getComputedStyle(e);
                return [e.innerText.trim(), style.outlineStyle, e.getBoundingClientRect().top >= 0]
            """)
        )
    names = ["Skip to the content", "Devices of the Example Company"]
    names += ["https://example.com/products/gateway", "beta", "stable"]
    names += ["https://example.com/products/sensor-node"]
    assert focused == [[name, "solid", True] for name in names]
    visit.driver.find_element(By.CSS_SELECTOR, ".skip").send_keys(Keys.ENTER)
    assert visit.run("return document.activeElement.id") == "main"


def test_copy(visit: Visit) -> None:
    """A digest is copied by a button."""
    visit.open(STABLE_PATH)
    allowed = {"permissions": ["clipboardReadWrite", "clipboardSanitizedWrite"]}
    visit.driver.execute_cdp_cmd("Browser.grantPermissions", allowed)
    visit.driver.find_element(By.CSS_SELECTOR, "#archive-nrf52840 .copy").click()
    visit.shows("#archive-nrf52840 .copy", "Copied")
    copied = visit.driver.execute_async_script(
        "navigator.clipboard.readText().then(arguments[arguments.length - 1])"
    )
    assert copied == "315686e6fd68a8573dcb25d0104e16125d38673a97730bdbb3feaa02036cffce"


@pytest.mark.parametrize("text", HOSTILE.values(), ids=HOSTILE)
def test_hostile_texts(visit: Visit, text: str) -> None:
    """Nothing that a publisher writes runs, or makes a page wider than a phone."""
    hostile(visit.shown.root, text)
    visit.do(visit.shown.reload)
    view(visit.driver, 360, 740)
    for path in ("/", f"/p/evil/s/{'s' * 32}"):
        visit.open(path)
        assert visit.run("return document.scripts.length") == 1
        assert visit.run("return document.documentElement.scrollWidth") <= 360


def test_dark(visit: Visit) -> None:
    """Who likes it dark gets it dark, and a picture of it is drawn."""
    grounds = []
    for dark in (False, True):
        view(visit.driver, 1200, 900, dark=dark)
        visit.open(STABLE_PATH)
        grounds.append(visit.run("return getComputedStyle(document.body).backgroundColor"))
        assert picture(visit.driver).startswith(b"\x89PNG")
    assert grounds == ["rgb(246, 247, 249)", "rgb(14, 19, 22)"]


def test_picture(tmp_path: Path) -> None:
    """The picture of the README can be taken again, and is a small one."""
    screenshot.main(tmp_path / "page.png")
    for path in (tmp_path / "page.png", screenshot.PICTURE):
        data = path.read_bytes()
        assert (data[:4], struct.unpack(">I", data[16:20])) == (b"\x89PNG", (1_200,))
        assert len(data) < 150_000
