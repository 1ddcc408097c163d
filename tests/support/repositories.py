"""Repositories on disk, as tests change them."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from netota_coap.errors import InvalidDataError
from netota_coap.model.values import Stream
from netota_coap.repository.loading import Loader
from tests.conftest import FIXTURES

REPOSITORIES = FIXTURES / "repositories"
STABLE = "packages/sensor-node/streams/stable.toml"
HISTORY = "packages/sensor-node/history/stable/{:08}.toml"


def age(root: Path) -> None:
    """Make all files look old, so that none has to be read again for being young."""
    for path in root.rglob("*.toml"):
        old = path.stat().st_mtime_ns - 1_000_000_000
        os.utime(path, ns=(old, old))


def edit(path: Path, old: str, new: str) -> None:
    """Edit a file by hand, to be noticed for certain."""
    text = path.read_text()
    assert old in text
    path.write_text(text.replace(old, new))


def stable(root: Path) -> Stream:
    """Return sensor-node/stable."""
    return Loader(root).load().packages["sensor-node"].streams["stable"]


def refusal(loader: Loader) -> InvalidDataError:
    """Load what cannot be loaded."""
    with pytest.raises(InvalidDataError) as raised:
        loader.load()
    return raised.value
