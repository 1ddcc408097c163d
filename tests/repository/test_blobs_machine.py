"""Whatever is done to blobs, in any order and at the same time, none is lost or wrong."""

from __future__ import annotations

import hashlib
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from netota_coap.publishing.archives import ArchiveSource
from netota_coap.repository import scaffold
from netota_coap.repository.blobs import Blobs, path_of
from netota_coap.repository.check import check
from netota_coap.repository.loading import Loader
from tests.support.publishing import NOW, STABLE, publish, remove
from tests.support.serving import PROJECT
from tests.support.storing import damage, digests
from tests.support.strategies import fewer

# ----------------------------------------------------------------------------------------------
# A kill, and a disk that is full, are in test_crash.py. Here: whatever is done, in any order.

CONTENTS = (b"one", b"two", b"three")
contents = st.sampled_from(CONTENTS)


class BlobsMachine(RuleBasedStateMachine):
    """The model: which contents are held, which are damaged or set aside, what was published.

    Attributes:
        good: Contents that are held.
        bad: Those of which the blob is damaged, and nobody noticed.
        aside: Those that were set aside.
        states: What the stream held, the last first; None where it was removed.
    """

    def __init__(self) -> None:
        super().__init__()
        self.directory = Path(tempfile.mkdtemp())
        self.root = self.directory / "root"
        scaffold.init(self.root)
        self.blobs = Blobs(self.root)
        self.good: set[bytes] = set()
        self.bad: set[bytes] = set()
        self.aside: set[bytes] = set()
        self.states: list[bytes | None] = []
        for data in CONTENTS:
            (self.directory / data.decode()).write_bytes(data)

    def teardown(self) -> None:
        """Leave nothing behind."""
        shutil.rmtree(self.directory)

    def path(self, data: bytes) -> Path:
        return self.root / path_of(hashlib.sha256(data).digest())

    @rule(data=contents, link=st.booleans())
    def add(self, data: bytes, link: bool) -> None:
        file = self.directory / data.decode()
        if link:  # a file of its own: damage must not spread
            file = self.directory / f"{data.decode()}-linked"
            file.unlink(missing_ok=True)
            file.write_bytes(data)
        self.blobs.add(file, link=link)
        if data not in self.bad:
            self.good.add(data)

    @rule(data=contents)
    def publish(self, data: bytes) -> None:
        source = ArchiveSource(self.directory / data.decode())
        version = str(len(self.states))
        publish(self.root, STABLE, version, [source], now=NOW, store_files=True)
        self.states.insert(0, data)
        if data not in self.bad:
            self.good.add(data)

    @precondition(lambda self: self.states and self.states[0] is not None)
    @rule()
    def remove(self) -> None:
        remove(self.root, STABLE)
        self.states.insert(0, None)

    @rule(data=contents)
    def damage(self, data: bytes) -> None:
        if data in self.good:
            damage(self.path(data), data[::-1] if data[::-1] != data else data[1:] + b"x")
            self.good.remove(data)
            self.bad.add(data)

    @rule()
    def verify(self) -> None:
        found = {blob.sha256 for blob in self.blobs.verify()}
        assert {hashlib.sha256(data).digest() for data in self.bad} == found
        self.aside |= self.bad
        self.bad = set()

    @rule(keep=st.integers(0, 3))
    def gc(self, keep: int) -> None:
        kept = set(self.states[: 1 + keep])
        self.blobs.gc(keep, grace_s=0)
        self.good &= kept  # type: ignore[arg-type]
        self.bad &= kept  # type: ignore[arg-type]
        self.aside = set()

    @rule()
    def young_blobs_stay(self) -> None:
        assert self.blobs.gc(0) == ()

    @invariant()
    def what_is_held_is_listed(self) -> None:
        expected = {(hashlib.sha256(d).digest(), False) for d in self.good | self.bad}
        expected |= {(hashlib.sha256(d).digest(), True) for d in self.aside}
        assert expected == set(digests(self.blobs.all()))
        assert all(data == self.path(data).read_bytes() for data in self.good)
        assert check(self.root).errors == ()

    @invariant()
    def what_is_present_is_held(self) -> None:
        present = self.blobs.present(Loader(self.root).load())
        current = {self.states[0]} if self.states else set()
        there: set[bytes] = current & (self.good | self.bad)  # type: ignore[operator,assignment]
        assert {(hashlib.sha256(data).digest(), len(data)) for data in there} == present


BlobsMachine.TestCase.settings = fewer(5, stateful_step_count=20)
test_blobs_machine = BlobsMachine.TestCase


# ----------------------------------------------------------------------------------------------
# Two that race

ADDING = """
import sys
from pathlib import Path
from netota_coap.repository.blobs import Blobs
blobs = Blobs(Path(sys.argv[1]))
print("ready", flush=True)
for _ in range(60):
    blobs.add(Path(sys.argv[2]))
"""


def test_add_and_gc_race(blobs: Blobs, image: Path) -> None:
    """A blob that is added while others remove it is there, or removed: nothing in between."""
    adding = subprocess.Popen(
        [sys.executable, "-c", ADDING, str(blobs.root), str(image)],
        stdout=subprocess.PIPE, cwd=PROJECT,
    )  # fmt: skip
    assert adding.stdout is not None
    assert adding.stdout.readline() == b"ready\n"
    while adding.poll() is None:
        blobs.gc(0, grace_s=0)
    adding.communicate()
    assert adding.returncode == 0
    assert blobs.verify() == ()
