"""Takes the screenshot of a stream's page in the README, with Debian's Chromium.

Rules for editors: everything in the picture is generated here or comes from the fixtures, so that
it can be taken again at any time. Tests use `chromium`, too.
"""

from __future__ import annotations

import asyncio
import base64
import contextlib
import shutil
import tempfile
from collections.abc import Callable, Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import TypeVar

import attrs
from selenium import webdriver
from selenium.webdriver.support.wait import WebDriverWait

from netota_coap import __version__
from netota_coap.catalog.catalog import Catalog
from netota_coap.http.server import HttpSite, serving
from netota_coap.monitoring import FanOut, Metrics, Status
from netota_coap.repository import loading, store

PROJECT = Path(__file__).parents[2]
FIXTURE = PROJECT / "fixtures" / "repositories" / "typical"
PICTURE = PROJECT / "fixtures" / "stream-page.png"
STREAM = ("sensor-node", "stable")

T = TypeVar("T")

_TIMEOUT_S = 10.0
_WIDTH, _HEIGHT = 1200, 840
_UP = timedelta(days=40)
_AGO = timedelta(minutes=3)


@contextlib.contextmanager
def chromium(
    width: int = _WIDTH, height: int = _HEIGHT, *, dark: bool = False
) -> Iterator[webdriver.Chrome]:
    """Run a headless browser until the block ends; sizes are in CSS pixels."""
    options = webdriver.ChromeOptions()
    options.binary_location = "/usr/bin/chromium"
    for argument in ("headless=new", "no-sandbox", "disable-gpu", "hide-scrollbars"):
        options.add_argument(f"--{argument}")
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    driver = webdriver.Chrome(options, webdriver.ChromeService("/usr/bin/chromedriver"))
    try:
        view(driver, width, height, dark=dark)
        yield driver
    finally:
        driver.quit()


def view(driver: webdriver.Chrome, width: int, height: int, *, dark: bool = False) -> None:
    """Set the size of a page in CSS pixels, and the colour scheme."""
    size = {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": False}
    driver.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", size)
    scheme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
    driver.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": [scheme]})


def picture(driver: webdriver.Chrome) -> bytes:
    """Return a PNG of the visible part of the page."""
    taken = driver.execute_cdp_cmd("Page.captureScreenshot", {"format": "png"})
    return base64.b64decode(taken["data"])


def wait(driver: webdriver.Chrome, condition: Callable[[], T]) -> T:
    """Wait until a condition is true, and return its value."""
    waiting = WebDriverWait(driver, _TIMEOUT_S, poll_frequency=0.02)
    return waiting.until(lambda _: condition())


def _served(root: Path) -> HttpSite:
    """Return a site that seems to have run for a while, with devices that observe."""
    catalog = Catalog.of(loading.Loader(root).load())
    paths = [path for path in catalog.resources if len(path) == 4]
    status = Status(
        version=__version__,
        uptime_s=_UP.total_seconds(),
        packages=len({path[1] for path in paths}),
        streams=len(paths),
        observers=1_240,
        reloaded=datetime.now(UTC),
        fan_out=FanOut(told=1_186, seconds=0.4),
    )
    return HttpSite(
        catalog,
        status=lambda: status,
        metrics=Metrics(),
        root=root,
        observers_of=lambda path: {STREAM: 1_186}.get((path[1], path[3]), 18),
    )


def _take(uri: str) -> bytes:
    with chromium() as driver:
        driver.get(uri)
        wait(driver, lambda: driver.find_element("css selector", ".live.on"))
        return picture(driver)


def _publish(root: Path) -> None:
    """Publish without debug builds, which keeps the picture small."""
    directory = store.DirectoryStore(root)
    read = directory.read(STREAM)
    assert read.present
    state = attrs.evolve(
        read.present,
        published=(datetime.now(UTC) - _AGO).replace(microsecond=0),
        message="Sleeps longer between two measurements",
        archives=tuple(a for a in read.present.archives or () if not a.content.debug),
    )
    directory.commit(read.next(state))


async def _pictured() -> bytes:
    with tempfile.TemporaryDirectory() as directory:
        root = Path(directory) / "fleet"
        shutil.copytree(FIXTURE, root)
        _publish(root)
        async with serving(_served(root), "127.0.0.1:0") as (uri, *_):
            return await asyncio.to_thread(_take, f"{uri}/p/{STREAM[0]}/s/{STREAM[1]}")


def main(target: Path = PICTURE) -> None:
    """Take the picture."""
    taken = asyncio.run(_pictured())
    target.write_bytes(taken)
    print(f"{target}: {len(taken)} bytes")


if __name__ == "__main__":
    main()
