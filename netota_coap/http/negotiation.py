"""Reads requests: path, query, Accept and If-None-Match. Pure functions.

Source: rules H-2, H-3, H-10 and H-20.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from urllib.parse import unquote_to_bytes

from starlette.requests import Request

from netota_coap.catalog.resources import ResourcePath
from netota_coap.errors import InvalidDataError, Issue, NotFoundError

_MOST_PARAMETERS = 64  # CoAP accepts as many options

_QUALITY = re.compile(r"0(?:\.\d{0,3})?|1(?:\.0{0,3})?")
_ORIGIN = re.compile(rb"https?://[^/]*", re.IGNORECASE)
_TAG = re.compile(r'(?:W/)?"([^"]*)"')


def path_of(raw: bytes) -> ResourcePath:
    """Return the segments of a request target without its query, each decoded exactly once.

    Raises:
        NotFoundError: The path does not begin with `/`, or is not UTF-8.
    """
    absolute = _ORIGIN.match(raw)
    if absolute:
        raw = raw[absolute.end() :] or b"/"
    start, *segments = raw.split(b"/")
    if start:
        raise NotFoundError("nothing exists at a path that does not begin with '/'")
    try:
        decoded = tuple(unquote_to_bytes(segment).decode() for segment in segments)
    except UnicodeDecodeError as error:
        raise NotFoundError("nothing exists at a path that is not UTF-8") from error
    return () if decoded == ("",) else decoded


def joined(request: Request, header: str) -> str:
    """Return all values of a header, joined by commas; "" if there is none."""
    return ", ".join(request.headers.getlist(header))


def parameters_of(query: bytes) -> list[str]:
    """Return the parameters of a query, as Uri-Query options of CoAP would hold them.

    Raises:
        InvalidDataError: There are too many, or one is not UTF-8.
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
    """Return the media type that a client prefers, or None if it accepts none.

    Args:
        accept: The values of Accept, joined by commas; without a valid one, anything is accepted.
        offered: Among media types of equal quality, the first one is chosen.
    """
    ranges = dict(_ranges(accept)) or {"*/*": 1.0}

    def quality(media_type: str) -> float:
        kind = media_type.partition("/")[0]
        fitting = (ranges.get(each) for each in (media_type, f"{kind}/*", "*/*"))
        return next((each for each in fitting if each is not None), 0.0)

    best = max(offered, key=quality)
    return best if quality(best) > 0 else None


def _ranges(accept: str) -> Iterator[tuple[str, float]]:
    """Yield media ranges with their quality; invalid ones are ignored."""
    for item in accept.lower().split(","):
        media_range, *parameters = (part.strip() for part in item.split(";"))
        pairs = (parameter.partition("=") for parameter in parameters)
        quality = next((value.strip() for name, _, value in pairs if name.strip() == "q"), "1")
        if "/" in media_range and _QUALITY.fullmatch(quality):
            yield media_range, float(quality)


def is_current(if_none_match: str, etag: str) -> bool:
    """Tell whether a client's cached representation has this ETag (given without quotes)."""
    return if_none_match.strip() == "*" or etag in _TAG.findall(if_none_match)
