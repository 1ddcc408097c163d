"""The files that a repository holds itself: their names, how they come in, what is offered."""

from __future__ import annotations

import contextlib
import hashlib
import os
import re
import resource
import shutil
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import attrs
import pytest
from hypothesis import given
from hypothesis import strategies as st

from netota_coap.errors import InvalidDataError, Issue, NetotaError, NotFoundError, RepositoryError
from netota_coap.model.values import Envelope
from netota_coap.publishing.archives import ArchiveSource
from netota_coap.repository import scaffold
from netota_coap.repository.blobs import Blob, Blobs, blob_name, digest_of
from netota_coap.repository.check import check
from netota_coap.repository.loading import Loader
from tests.support.publishing import STABLE, publish
from tests.support.storing import (
    ENVELOPE,
    FIRMWARE,
    PLACE,
    SHA256,
    SHARD,
    can_clone,
    content,
    damage,
    digests,
    temporaries,
)

# ----------------------------------------------------------------------------------------------
# Names


@given(st.binary(min_size=32, max_size=32))
def test_names_there_and_back(sha256: bytes) -> None:
    """A name has 43 characters of base64url, and stands for one digest."""
    name = blob_name(sha256)
    assert re.fullmatch(r"[A-Za-z0-9_-]{43}", name)
    assert sha256 == digest_of(name)


GOOD = blob_name(SHA256)


@pytest.mark.parametrize(
    "name",
    [
        "",
        GOOD[:-1],
        GOOD + "=",
        GOOD + "A",
        "\n" + GOOD[1:],
        GOOD[:-1] + "\n",
        "=" * 43,
        "/" * 43,
        "+" * 43,
        "é" * 43,
        "\ud800" * 43,
        "A" * 42 + "B",  # bits that stand for nothing are set
        "A" * 42 + "C",
        "A" * 42 + "D",
        "A" * 1_000_000,
        SHA256.hex(),
    ],
)
def test_a_digest_has_one_name(name: str) -> None:
    """Every other spelling is the name of nothing."""
    with pytest.raises(NotFoundError, match="invalid name of a blob"):
        digest_of(name)


@given(st.text(alphabet=st.characters(codec="ascii"), min_size=43, max_size=43))
def test_any_text_of_the_right_length(name: str) -> None:
    """What is taken at all is what the digest is called."""
    with contextlib.suppress(NotFoundError):
        assert name == blob_name(digest_of(name))


# ----------------------------------------------------------------------------------------------
# Adding


def test_a_file_is_added(blobs: Blobs, image: Path) -> None:
    """It lies read-only where its digest says, and is there whatever becomes of the file."""
    progress: list[int] = []
    before = time.time()
    added = blobs.add(image, progress=progress.append)
    path = blobs.root / PLACE
    assert (added.sha256, added.size, added.damaged) == (SHA256, 8, False)
    assert before <= added.since <= time.time()
    assert (path.read_bytes(), path.stat().st_mode) == (FIRMWARE, 0o100444)
    assert progress == [8, 8]
    image.write_bytes(b"other")
    assert content(blobs) == FIRMWARE
    assert digests(blobs.all()) == [(SHA256, False)]
    assert temporaries(blobs.root) == []


def test_what_is_there_costs_nothing(blobs: Blobs, image: Path) -> None:
    """It is neither read nor written again, but is as young as a new one, and read-only."""
    blobs.add(image)
    path = blobs.root / PLACE
    path.chmod(0o666)
    before, progress = path.stat(), list[int]()
    while time.time() <= before.st_ctime:  # the clock of files ticks every few ms
        pass
    blobs.add(image, ENVELOPE, progress=progress.append)
    after = path.stat()
    assert progress == []
    assert (before.st_ino, before.st_mtime_ns) == (after.st_ino, after.st_mtime_ns)
    assert after.st_mode == 0o100444
    assert before.st_ctime_ns <= after.st_ctime_ns


@pytest.mark.parametrize("what", ["truncated", "directory link", "pipe", "link"])
def test_what_cannot_be_it_is_replaced(
    blobs: Blobs, image: Path, tmp_path: Path, what: str
) -> None:
    """Another size, a link or a pipe in the place of a blob gives way; no link is followed."""
    blobs.add(image)
    path = blobs.root / PLACE
    other = tmp_path / "other"
    other.write_bytes(FIRMWARE)
    other.chmod(0o640)
    path.unlink()
    match what:
        case "truncated":
            path.write_bytes(FIRMWARE[:4])
        case "directory link":
            path.symlink_to(tmp_path)
        case "pipe":
            os.mkfifo(path)
        case "link":
            path.symlink_to(other)
    blobs.add(image, ENVELOPE)
    assert path.is_file()
    assert not path.is_symlink()
    assert content(blobs) == FIRMWARE
    assert other.stat().st_mode == 0o100640


@pytest.mark.parametrize(
    "promised",
    [
        attrs.evolve(ENVELOPE, size=9),
        attrs.evolve(ENVELOPE, sha256=bytes(32)),
    ],
)
@pytest.mark.parametrize("link", [False, True])
def test_what_was_not_promised(blobs: Blobs, image: Path, promised: Envelope, link: bool) -> None:
    """Nothing is left of a file that is not what it was promised to be."""
    with pytest.raises(InvalidDataError, match=rf"has SHA-256 {SHA256.hex()}") as raised:
        blobs.add(image, promised, link=link)
    assert str(image) in raised.value.detail
    assert blobs.all() == ()
    assert temporaries(blobs.root) == []


@pytest.mark.parametrize(
    ("file", "reason"),
    [
        ("none", "cannot be read: No such file"),
        (".", "is not a regular file"),
        ("/proc/self/mem", "cannot be read: Input/output error"),
    ],
)
@pytest.mark.parametrize("promised", [None, ENVELOPE])
def test_what_cannot_be_read(
    blobs: Blobs, file: str, reason: str, promised: Envelope | None
) -> None:
    """A file that cannot be read is named, not the store."""
    path = blobs.root / file  # which is the file itself where that is absolute
    with pytest.raises(InvalidDataError, match=f"^{path}: {reason}"):
        blobs.add(path, promised)
    assert temporaries(blobs.root) == []


def test_only_a_repository_has_blobs(tmp_path: Path, image: Path) -> None:
    """Any other directory is left alone."""
    calls: list[Callable[[Blobs], object]] = [
        lambda blobs: blobs.add(image),
        lambda blobs: blobs.verify(),
        lambda blobs: blobs.gc(0),
    ]
    for call in calls:
        with pytest.raises(RepositoryError, match="not a repository"):
            call(Blobs(tmp_path))
    assert [image] == list(tmp_path.iterdir())


def test_a_large_file(blobs: Blobs, tmp_path: Path) -> None:
    """More than one piece is copied as it is."""
    data = os.urandom(1_000_003)
    (tmp_path / "large").write_bytes(data)
    assert data == content(blobs, blobs.add(tmp_path / "large").sha256)


def test_reflink(blobs: Blobs, tmp_path: Path) -> None:
    """Where the file system can, no byte is copied."""
    if not can_clone(tmp_path):
        pytest.skip("a file system without reflinks")
    (tmp_path / "large").write_bytes(os.urandom(1 << 20))
    os.sync()
    before = os.statvfs(tmp_path)
    sha256 = blobs.add(tmp_path / "large").sha256
    os.sync()
    after = os.statvfs(tmp_path)
    assert (before.f_bfree - after.f_bfree) * after.f_frsize < 1 << 19
    damage(tmp_path / "large", b"other")
    assert blobs.verify() == ()
    assert sha256 == hashlib.sha256(content(blobs, sha256)).digest()


def test_hard_link(blobs: Blobs, image: Path, tmp_path: Path) -> None:
    """If asked for, a blob is the file itself; a link to it is followed to the file."""
    (tmp_path / "link").symlink_to(image)
    blobs.add(tmp_path / "link", link=True)
    assert (blobs.root / PLACE).samefile(image)
    assert image.stat().st_mode == 0o100444
    assert content(blobs) == FIRMWARE


def test_no_hard_link(blobs: Blobs) -> None:
    """A file of another file system is copied."""
    elsewhere = Path("/dev/shm")
    if not elsewhere.is_dir() or elsewhere.stat().st_dev == blobs.root.stat().st_dev:
        pytest.skip("there is no other file system")
    with tempfile.NamedTemporaryFile(dir=elsewhere) as other:
        other.write(FIRMWARE)
        other.flush()
        blobs.add(Path(other.name), link=True)
        assert Path(other.name).stat().st_mode == 0o100600
    assert content(blobs) == FIRMWARE


def test_many_at_once(blobs: Blobs, tmp_path: Path) -> None:
    """Who adds the same at the same time does not get in the way of the others."""
    data = os.urandom(300_000)
    files = [tmp_path / str(number) for number in range(8)]
    for file in files:
        file.write_bytes(data)
    added: list[Blob] = []
    threads = [threading.Thread(target=lambda f=f: added.append(blobs.add(f))) for f in files]  # type: ignore[misc]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert [hashlib.sha256(data).digest()] * 8 == [blob.sha256 for blob in added]
    assert blobs.verify() == ()
    assert temporaries(blobs.root) == []


@contextlib.contextmanager
def short_files(size: int) -> Iterator[None]:
    """Let no file become longer."""
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, limits[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)


def test_no_room(blobs: Blobs, tmp_path: Path) -> None:
    """A blob that cannot be written to its end is told by its place, and leaves nothing."""
    if can_clone(tmp_path):
        pytest.skip("nothing is written where there are reflinks")
    (tmp_path / "large").write_bytes(bytes(500_000))
    sha256 = hashlib.sha256(bytes(500_000)).hexdigest()
    place = f"{blobs.root}/blobs/sha256/{sha256[:2]}/.{sha256}"
    with (
        short_files(400_000),
        pytest.raises(RepositoryError, match=rf"^{place}\S+: cannot be written: File too large$"),
    ):
        blobs.add(tmp_path / "large")
    assert blobs.all() == ()
    assert temporaries(blobs.root) == []
    blobs.add(tmp_path / "large")


# ----------------------------------------------------------------------------------------------
# Links and other things in the way

WAYS = ["blobs", "blobs/sha256", SHARD]


@pytest.mark.parametrize("place", WAYS)
def test_no_link_is_followed(blobs: Blobs, image: Path, tmp_path: Path, place: str) -> None:
    """Behind a link in place of a directory nothing is read, written or removed."""
    blobs.add(image)
    outside = tmp_path / "outside"
    (blobs.root / place).rename(outside)
    (blobs.root / place).symlink_to(outside)
    before = sorted(outside.rglob("*"))
    assert blobs.all() == ()
    assert frozenset() == blobs.held([ENVELOPE])
    with pytest.raises(NotFoundError, match=rf"there is no blob {SHA256.hex()}"):
        blobs.open(SHA256)
    with pytest.raises(RepositoryError, match=rf"{blobs.root / place}: cannot be written: Not a"):
        blobs.add(image)
    assert blobs.verify() == ()
    assert blobs.gc(0, grace_s=0) == ()
    assert before == sorted(outside.rglob("*"))
    reason = "is not a directory: nothing below it is served"
    assert (Issue("", reason, place),) == check(blobs.root).warnings


@pytest.mark.parametrize("what", ["link", "pipe", "directory"])
def test_only_regular_files_are_blobs(
    blobs: Blobs, image: Path, tmp_path: Path, what: str
) -> None:
    """Nothing else is opened, listed, or removed."""
    blobs.add(image)
    path = blobs.root / PLACE
    path.rename(tmp_path / "outside")
    match what:
        case "link":
            path.symlink_to(tmp_path / "outside")
        case "pipe":
            os.mkfifo(path)
        case "directory":
            path.mkdir()
    with pytest.raises(NotFoundError):
        blobs.open(SHA256)
    assert ((), frozenset()) == (blobs.all(), blobs.held([ENVELOPE]))
    assert (blobs.verify(), blobs.gc(0, grace_s=0)) == ((), ())
    assert os.path.lexists(path)
    warnings = check(blobs.root).warnings
    if what != "directory":
        assert (Issue("", "is not a regular file: it is not served", PLACE),) == warnings
    else:
        assert PLACE in {issue.file for issue in warnings}
        with pytest.raises(RepositoryError, match="cannot be written: Is a directory"):
            blobs.add(image)
        assert temporaries(blobs.root) == []


def test_the_quarantine_is_no_link(blobs: Blobs, image: Path, tmp_path: Path) -> None:
    """A damaged blob is not moved to where a link leads."""
    blobs.add(image)
    damage(blobs.root / PLACE, b"Firmware")
    (blobs.root / "blobs/quarantine").symlink_to(tmp_path)
    with pytest.raises(NetotaError, match="blobs/quarantine: cannot be written: Not a directory"):
        blobs.verify()
    assert not (tmp_path / SHA256.hex()).exists()


def test_what_is_at_no_place_that_counts(blobs: Blobs, image: Path) -> None:
    """Names that are none of a blob are neither listed nor removed, and a check tells them."""
    blobs.add(image)
    strays = [
        "blobs/notes.txt",
        f"blobs/sha256/00/{SHA256.hex()}",
        f"blobs/sha256/zz/{SHA256.hex()}",
        f"{SHARD}/{SHA256.hex()}.bin",
        f"{SHARD}/{SHA256.hex().upper()}",
    ]
    for stray in strays:
        (blobs.root / stray).parent.mkdir(exist_ok=True)
        (blobs.root / stray).write_bytes(b"")
    assert digests(blobs.all()) == [(SHA256, False)]
    reason = "is ignored: it is no file of a repository"
    assert {Issue("", reason, stray) for stray in strays} == set(check(blobs.root).warnings)
    blobs.gc(0, grace_s=0)
    assert all((blobs.root / stray).exists() for stray in strays)


def as_nobody(function: Callable[[], object]) -> str:
    """Run a function in a child without rights; what it raises, or returns."""
    reading, writing = os.pipe()
    child = os.fork()
    if child == 0:
        try:
            if os.geteuid() == 0:
                os.setgroups([])
                os.setgid(65534)
                os.setuid(65534)
            told = repr(function())
        except BaseException as error:  # noqa: BLE001 - the child must end here
            told = f"{type(error).__name__}: {error}"
        os.write(writing, told.encode())
        os._exit(0)
    os.close(writing)
    with os.fdopen(reading) as stream:
        told = stream.read()
    os.waitpid(child, 0)
    return told


@pytest.fixture
def public(image: Path) -> Iterator[Blobs]:
    """A repository with a blob that others can read, and the image."""
    with tempfile.TemporaryDirectory() as directory:
        root = Path(directory)
        root.chmod(0o755)
        scaffold.init(root)
        shutil.copy(image, root / ".image")
        Blobs(root).add(image)
        yield Blobs(root)


def test_without_rights(public: Blobs) -> None:
    """Who may read only is told so, and what nobody may read is not offered."""
    if os.geteuid() != 0:
        pytest.skip("only root can become somebody without rights")
    image = public.root / ".image"
    assert as_nobody(lambda: public.add(image).sha256 == SHA256) == "True"  # there already
    (public.root / ".other").write_bytes(b"other")
    told = as_nobody(lambda: public.add(public.root / ".other"))
    assert re.match(r"RepositoryError: \S+: cannot be written: Permission denied", told)
    shard = public.root / SHARD
    (public.root / PLACE).chmod(0o400)
    assert "PermissionError" not in as_nobody(lambda: public.open(SHA256))
    assert f"{PLACE}: cannot be read: Permission denied" in as_nobody(lambda: public.open(SHA256))
    shard.chmod(0o700)
    assert as_nobody(lambda: public.held([ENVELOPE])) == "frozenset()"
    assert as_nobody(public.all).endswith(f"{SHARD}: cannot be read: Permission denied")


# ----------------------------------------------------------------------------------------------
# What can be offered


def test_held_goes_by_size(blobs: Blobs, image: Path) -> None:
    """A blob of another size than promised is not offered; a lie takes it from nobody else."""
    absent = attrs.evolve(ENVELOPE, sha256=bytes(32))
    longer = attrs.evolve(ENVELOPE, size=9)
    assert frozenset() == blobs.held([ENVELOPE])
    blobs.add(image)
    assert frozenset([SHA256]) == blobs.held([ENVELOPE, absent, ENVELOPE])
    assert frozenset() == blobs.held([longer])
    assert frozenset([SHA256]) == blobs.held([ENVELOPE, longer])
    damage(blobs.root / PLACE, b"x")
    assert frozenset() == blobs.held([ENVELOPE])


def test_present_is_what_the_streams_hold(blobs: Blobs, image: Path, tmp_path: Path) -> None:
    """Of all blobs, those of the present state can be offered."""
    publish(blobs.root, STABLE, "2.0", [ArchiveSource(image)], store_files=True)
    (tmp_path / "other").write_bytes(b"other")
    blobs.add(tmp_path / "other")
    assert frozenset([(SHA256, ENVELOPE.size)]) == blobs.present(Loader(blobs.root).load())
