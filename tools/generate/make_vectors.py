"""Writes fixtures/vectors/valid; with `--check`, only compares it.

Usage: tools/generate/make_vectors.py [--check]
The vectors are for implementations of the wire format in other languages. Each file has one value
in all formats of its class: CBOR as hexadecimal digits, JSON as an object, TOML as text. The
vectors in fixtures/vectors/invalid are written by hand: a document, and what is wrong with it.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator, Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import attrs

from netota_coap.encoding.codecs import Format
from netota_coap.encoding.documents import (
    encode,
    encode_list,
    encode_problem,
    selection_to_cbor,
    selection_to_query,
)
from netota_coap.model.selection import Selection
from netota_coap.model.values import (
    Archive,
    Content,
    Envelope,
    Offer,
    PackageEntry,
    Stream,
    StreamEntry,
    Value,
)

VALID = Path(__file__).parents[2] / "fixtures" / "vectors" / "valid"

PUBLISHED = datetime(2026, 11, 20, 9, 30, tzinfo=UTC)
DIGEST = bytes.fromhex("9f86d081884c7d659a2feaa0c55ad015a3bf4f1b2b0b822cd15d6c15b0f00a08")

IMAGE = Archive(
    name="nrf52840dk",
    envelope=Envelope(type="application/vnd.mcuboot.image", size=214_016, sha256=DIGEST),
    content=Content(type="zephyr-image", arch="arm", machine="nrf52840dk", debug=False),
    offers=(Offer(url="https://cdn.example.com/sensor-node/2.4.1/nrf52840dk.bin", metric=100),),
)
BARE = Archive(name="a", envelope=Envelope(type="x", size=0, sha256=bytes(32)))
MINIMAL = Stream(version="1", sequence=1, published=datetime.fromtimestamp(0, UTC), archives=())
TYPICAL = Stream(
    version="2.4.1", sequence=17, published=PUBLISHED, poll_s=86_400, archives=(IMAGE,)
)

# By file name: what the vector shows, its rule in wire.cddl, and the value.
STREAMS: Mapping[str, tuple[str, str, Stream]] = {
    "stream-minimal": ("nothing that can be left out", "full", MINIMAL),
    "stream-typical": ("one archive with one offer", "full", TYPICAL),
    "stream-empty": (
        "nothing suits: an empty list",
        "full",
        attrs.evolve(TYPICAL, archives=()),
    ),
    "stream-head": ("?head: no archives", "head", attrs.evolve(TYPICAL, archives=None)),
    "stream-more-offers": (
        "some offers are left out; ?full has them",
        "stream",
        attrs.evolve(TYPICAL, more=True),
    ),
    "stream-more": (
        "all archives are left out; ?full has them",
        "stream",
        attrs.evolve(TYPICAL, archives=None, more=True),
    ),
    "stream-closed": (
        "closed, without a replacement",
        "full",
        attrs.evolve(MINIMAL, closed=True),
    ),
    "stream-replacement": (
        "closed, with a replacement",
        "full",
        attrs.evolve(TYPICAL, closed=True, replacement=("sensor-node", "lts")),
    ),
    "stream-largest": (
        "the largest numbers, and the longest names and version",
        "head",
        Stream(
            version="v" * 64,
            sequence=2**32 - 1,
            published=datetime(9999, 12, 31, 23, 59, 59, tzinfo=UTC),
            closed=True,
            replacement=("p" * 32, "s" * 32),
            poll_s=2**32 - 1,
        ),
    ),
    "stream-two-archives": (
        "two archives; an offer of this server before one of another",
        "full",
        attrs.evolve(
            TYPICAL,
            archives=(
                attrs.evolve(
                    IMAGE,
                    offers=(
                        Offer(url="/b/n4bQgYhMfWWaL-qgxVrQFaO_TxsrC4Is0V1sFbDwCgg", metric=10),
                        *IMAGE.offers,
                    ),
                ),
                BARE,
            ),
        ),
    ),
}

VALUES: Mapping[str, tuple[str, str, Value]] = {
    "archive-minimal": ("neither content nor offers", "archive", BARE),
    "content-all": (
        "all attributes that have a key",
        "content",
        Content(
            type="rootfs",
            arch="arm64",
            machine="imx8mm",
            debug=True,
            filesystem="squashfs",
            compression="zstd",
        ),
    ),
    "content-free": (
        "free attributes: text, integers, booleans; text of several scripts",
        "content",
        Content(
            arch="arm",
            attributes={
                "flash": 512,
                "secure": True,
                "tainted": False,
                "zero": 0,
                "offset": -1,
                "colour": "rød",
                "label": "名前",
                "a-name.of_64+bytes-" + "x" * 45: "y" * 64,
            },
        ),
    ),
    "content-largest": (
        "the largest integers of free attributes",
        "content",
        Content(attributes={"high": 2**63 - 1, "low": -(2**63) + 1}),
    ),
    **{
        f"envelope-{name.partition('/')[2]}": (
            "a media type that is a Content-Format number in CBOR",
            "envelope",
            Envelope(type=name, size=1, sha256=DIGEST),
        )
        for name in (
            "application/xml",
            "application/octet-stream",
            "application/json",
            "application/cbor",
        )
    },
    "envelope-largest": (
        "the largest size, the longest media type",
        "envelope",
        Envelope(type="application/" + "x" * 52, size=2**63 - 1, sha256=bytes([255]) * 32),
    ),
    "offer-relative": ("a path: this server", "offer", Offer(url="/b/x", metric=0)),
    "offer-largest": (
        "the largest metric, the longest URL",
        "offer",
        Offer(url="coap://[2001:db8::1]/" + "x" * 234, metric=65_535),
    ),
}

LISTS: Mapping[str, tuple[str, str, Mapping[str, Value]]] = {
    "packages-none": ("no packages", "packages", {}),
    "packages": (
        "a package with a title, one without",
        "packages",
        {"gateway": PackageEntry(title=""), "sensor-node": PackageEntry(title="Sensor node")},
    ),
    "streams": (
        "an open stream and a closed one",
        "streams",
        {
            "beta": StreamEntry(version="2.5.0-rc1", sequence=2**32 - 1, closed=True),
            "stable": StreamEntry(version="2.4.1", sequence=17, closed=False),
        },
    ),
}

SELECTIONS: Mapping[str, tuple[str, Selection]] = {
    "selection-none": ("nothing said", Selection()),
    "selection-typical": (
        "one machine, one scheme",
        Selection.of({"machine": "nrf52840dk", "scheme": "coap"}),
    ),
    "selection-all": (
        "all keys, several values, free attributes",
        Selection.of(
            {
                "type": ["zephyr-image", "mcuboot"],
                "arch": "arm",
                "machine": ["nrf52840dk", "nrf52"],
                "debug": False,
                "filesystem": "squashfs",
                "compression": ["zstd", "none"],
                "scheme": ["coaps", "coap"],
                "flash": [512, "1024"],
                "secure": True,
            }
        ),
    ),
}

PROBLEMS: Mapping[str, tuple[str, str, str]] = {
    "problem-title": ("a title alone", "4.04 Not Found", ""),
    "problem-detail": (
        "a title and a detail",
        "4.04 Not Found",
        "the stream does not hold sequence 17 any more, but 18",
    ),
}


def _valued(value: Value, on_disk: bool) -> dict[str, Any]:
    document: dict[str, Any] = {
        "cbor": encode(value, Format.CBOR).hex(),
        "json": json.loads(encode(value, Format.JSON)),
    }
    if on_disk:
        document["toml"] = encode(value, Format.TOML).decode()
    return document


def vectors() -> Iterator[tuple[str, dict[str, Any]]]:
    """Yield each file's name and its content."""
    for name, (shows, rule, value) in {**STREAMS, **VALUES}.items():
        # TOML has no streams without their archives.
        on_disk = not isinstance(value, Stream) or (value.archives is not None and not value.more)
        if isinstance(value, Stream) and value.more:
            # JSON is always full, so it has no key 8.
            document: dict[str, Any] = {"cbor": encode(value, Format.CBOR).hex()}
        else:
            document = _valued(value, on_disk)
        yield name, {"shows": shows, "class": type(value).__name__, "rule": rule} | document
    for name, (shows, rule, entries) in LISTS.items():
        cls = "PackageEntry" if rule == "packages" else "StreamEntry"
        yield (
            name,
            {
                "shows": shows,
                "class": cls,
                "rule": rule,
                "cbor": encode_list(entries, Format.CBOR).hex(),
                "json": json.loads(encode_list(entries, Format.JSON)),
            },
        )
    for name, (shows, selection) in SELECTIONS.items():
        yield (
            name,
            {
                "shows": shows,
                "class": "Selection",
                "rule": "selection",
                "cbor": selection_to_cbor(selection).hex(),
                "query": selection_to_query(selection),
            },
        )
    for name, (shows, title, detail) in PROBLEMS.items():
        yield (
            name,
            {
                "shows": shows,
                "class": "problem",
                "rule": "problem",
                "cbor": encode_problem(title, detail).hex(),
                "title": title,
                "detail": detail,
            },
        )


def files() -> dict[str, str]:
    """Return the text of each file by its name."""
    return {
        f"{name}.json": json.dumps({"name": name, **vector}, ensure_ascii=False, indent=2) + "\n"
        for name, vector in vectors()
    }


def main(arguments: list[str]) -> int:
    wanted = files()
    present = {path.name: path.read_text() for path in VALID.glob("*.json")}
    if arguments == ["--check"]:
        names = sorted(wanted.keys() | present.keys())
        different = [name for name in names if wanted.get(name) != present.get(name)]
        for name in different:
            print(f"fixtures/vectors/valid/{name} is stale: run tools/generate/make_vectors.py")
        return 1 if different else 0
    if arguments:
        print("usage: tools/generate/make_vectors.py [--check]")
        return 2
    VALID.mkdir(parents=True, exist_ok=True)
    for name in present.keys() - wanted.keys():
        (VALID / name).unlink()
    for name, text in wanted.items():
        (VALID / name).write_text(text)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
