"""What a request says, read: path, query, what the client takes and what it has.

Pure functions over text. Source: rules H-2, H-3, H-10 and H-20.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from urllib.parse import unquote_to_bytes

from netota_coap.catalog.resources import ResourcePath
from netota_coap.errors import InvalidDataError, Issue, NotFoundError

_MOST_PARAMETERS = 64  # as many as CoAP takes options

_QUALITY = re.compile(r"0(?:\.\d{0,3})?|1(?:\.0{0,3})?")
_ORIGIN = re.compile(rb"https?://[^/]*", re.IGNORECASE)
_TAG = re.compile(r'(?:W/)?"([^"]*)"')


def path_of(raw: bytes) -> ResourcePath:
    """Return the segments of a path, each decoded exactly once.

    Args:
        raw: As it stands in the request, without the query; may be that of an absolute URI.

    Raises:
        NotFoundError: It is no path, or not UTF-8, so nothing is there.
    """
    absolute = _ORIGIN.match(raw)
    if absolute:
        raw = raw[absolute.end() :] or b"/"
    start, *segments = raw.split(b"/")
    if start:
        raise NotFoundError("there is nothing at what does not begin with '/'")
    try:
        decoded = tuple(unquote_to_bytes(segment).decode() for segment in segments)
    except UnicodeDecodeError as error:
        raise NotFoundError("there is nothing at a path that is not UTF-8") from error
    return () if decoded == ("",) else decoded


def parameters_of(query: bytes) -> list[str]:
    """Return the parameters of a query, as CoAP has them in its options.

    Raises:
        InvalidDataError: They are too many, or not UTF-8.
    """
    parts = query.split(b"&")
    if len(parts) > _MOST_PARAMETERS:
        reason = f"must have at most {_MOST_PARAMETERS} parameters, not {len(parts)}"
        raise InvalidDataError([Issue("query", reason)])
    try:
        return [unquote_to_bytes(part).decode() for part in parts if part]
    except UnicodeDecodeError as error:
        raise InvalidDataError([Issue("query", "must be UTF-8")]) from error


def chosen(accept: str, offered: Sequence[str]) -> str | None:
    """Return the media type that a client likes best.

    Args:
        accept: The values of its `Accept`, joined by commas; if nothing in it can be read, it
            takes anything.
        offered: Media types; of those that it likes equally, the first one is taken.

    Returns:
        One of `offered`, or None: it takes none of them.
    """
    ranges = dict(_ranges(accept)) or {"*/*": 1.0}

    def quality(media_type: str) -> float:
        kind = media_type.partition("/")[0]
        fitting = (ranges.get(each) for each in (media_type, f"{kind}/*", "*/*"))
        return next((each for each in fitting if each is not None), 0.0)

    best = max(offered, key=quality)
    return best if quality(best) > 0 else None


def _ranges(accept: str) -> Iterator[tuple[str, float]]:
    """Yield media ranges with their quality; what cannot be read is left out."""
    for item in accept.lower().split(","):
        media_range, *parameters = (part.strip() for part in item.split(";"))
        pairs = (parameter.partition("=") for parameter in parameters)
        quality = next((value.strip() for name, _, value in pairs if name.strip() == "q"), "1")
        if "/" in media_range and _QUALITY.fullmatch(quality):
            yield media_range, float(quality)


def has(if_none_match: str, etag: str) -> bool:
    """Tell whether a client has what an ETag stands for.

    Args:
        if_none_match: The values of its `If-None-Match`, joined by commas; "": it has nothing.
        etag: Without quotes.
    """
    return if_none_match.strip() == "*" or etag in _TAG.findall(if_none_match)
