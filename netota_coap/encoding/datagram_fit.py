"""Fits a stream into one datagram. Source: `spec/wire.md`, rules W-30 to W-32."""

from __future__ import annotations

import attrs

from netota_coap.encoding.codecs import Format
from netota_coap.encoding.documents import encode
from netota_coap.model.values import LIMITS, Stream


def in_one_datagram(stream: Stream) -> bytes:
    """Encode a stream in CBOR within `LIMITS["datagram"]` bytes.

    Each archive's offers must be in order, the best first, as `Selection.narrow` leaves them.
    Offers of the highest metrics are left out first, but each archive keeps its best one; if that
    is not enough, all archives are. `more` says that something was left out.
    """
    return fit(stream, encode(stream, Format.CBOR))


def fit(stream: Stream, whole: bytes) -> bytes:
    """Encode like `in_one_datagram`; `whole` is the stream encoded without a bound."""
    bound = LIMITS["datagram"].value
    archives = stream.archives
    if len(whole) <= bound or archives is None:
        return whole
    spare = sorted(
        (offer.metric, index, place)
        for index, archive in enumerate(archives)
        for place, offer in enumerate(archive.offers[1:])
    )

    def with_spare(count: int) -> bytes:
        """Encode with each archive's best offer and some of the spare ones."""
        kept = [list(archive.offers[:1]) for archive in archives]
        for _, index, place in spare[:count]:
            kept[index].append(archives[index].offers[1 + place])
        fewer = tuple(
            attrs.evolve(archive, offers=tuple(offers))
            for archive, offers in zip(archives, kept, strict=True)
        )
        return encode(attrs.evolve(stream, archives=fewer, more=True), Format.CBOR)

    # The smallest is tried first: most streams that are too long do not fit even so.
    if spare and len(smallest := with_spare(0)) <= bound:
        counts = range(len(spare) - 1, 0, -1)
        return next((p for count in counts if len(p := with_spare(count)) <= bound), smallest)
    return encode(attrs.evolve(stream, archives=None, more=True), Format.CBOR)
