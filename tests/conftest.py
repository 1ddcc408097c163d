"""Fixtures that several modules share."""

from __future__ import annotations

import os
import shutil
import signal
from collections.abc import AsyncIterator, Callable, Iterator
from pathlib import Path

import pytest
from hypothesis import HealthCheck, settings

from netota_coap.model.values import Stream, StreamName
from netota_coap.publishing import publish
from netota_coap.publishing.archives import ArchiveSource
from netota_coap.repository import scaffold
from netota_coap.repository.blobs import Blobs
from netota_coap.repository.store import DirectoryStore
from tests.support import environment, publishing
from tests.support.mirroring import Origin, origin
from tests.support.publishing import NOW, STABLE

# The ordinary run takes the same few examples each time, tools/check_fuzz many others. Neither
# looks at the clock: a busy machine is no reason to fail.
settings.register_profile(
    "tests",
    max_examples=40,
    derandomize=True,
    deadline=None,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.function_scoped_fixture],
)
settings.register_profile(
    "thorough", settings.get_profile("tests"), max_examples=1_000, derandomize=False
)
settings.load_profile("tests")

# A shell starts what is in its background with SIGINT ignored, and all its children inherit that.
signal.signal(signal.SIGINT, signal.default_int_handler)

FIXTURES = Path(__file__).parent.parent / "fixtures"


@pytest.fixture(scope="session", autouse=True)
def somebody(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Nothing depends on who runs the tests, with what environment."""
    with environment.somebodys(tmp_path_factory.mktemp("home")):
        yield


@pytest.fixture
def repository_dir(tmp_path: Path) -> Path:
    """A copy of fixtures/repositories/typical."""
    root = tmp_path / "typical"
    shutil.copytree(FIXTURES / "repositories" / "typical", root)
    return root


@pytest.fixture
async def upstream(tmp_path: Path) -> AsyncIterator[Origin]:
    """An upstream that is not served yet."""
    async with origin(tmp_path) as it:
        yield it


@pytest.fixture
def sample(tmp_path: Path) -> Path:
    """A small repository, as `init --sample` makes it."""
    root = tmp_path / "sample"
    scaffold.init(root)
    publish.sample(DirectoryStore(root), NOW)
    for path in root.rglob("*.toml"):
        os.utime(path, (1, 1))  # files this young would be read again
    return root


@pytest.fixture
def image(tmp_path: Path) -> Path:
    """A file to be published."""
    path = tmp_path / "nrf52840dk.bin"
    path.write_bytes(b"firmware")
    return path


@pytest.fixture
def blobs(sample: Path) -> Blobs:
    """The blobs of a small repository: none."""
    return Blobs(sample)


@pytest.fixture
def release(repository_dir: Path, image: Path) -> Callable[..., Stream]:
    """Publish the image as a version."""

    def release(version: str, name: StreamName = STABLE, **options: object) -> Stream:
        sources = [ArchiveSource(image, "nrf52840dk")]
        return publishing.publish(repository_dir, name, version, sources, **{"now": NOW} | options)

    return release
