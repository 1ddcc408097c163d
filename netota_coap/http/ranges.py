"""Responses with a file, or with one range of its bytes.

Source: RFC 9110, sections 13 and 14; rules H-60 to H-63.
"""

from __future__ import annotations

import asyncio
import re
from collections.abc import AsyncIterator
from http import HTTPStatus

from starlette.responses import Response, StreamingResponse

from netota_coap.catalog.resources import BlobRepresentation
from netota_coap.http.site import HttpError

_CHUNK = 262_144  # bytes read at a time
_RANGE = re.compile(r"bytes=(\d{0,99})-(\d{0,99})", re.IGNORECASE | re.ASCII)


def range_of(value: str, size: int) -> tuple[int, int] | None:
    """Parse a Range header for a file of `size` bytes.

    Returns:
        The first byte and the one after the last; None if the header must be ignored, because it
        is not one range of bytes.

    Raises:
        HttpError: No byte of the file is in the range.
    """
    match = _RANGE.fullmatch(value.strip())
    if match is None or match[1] == match[2] == "":
        return None
    if match[1]:
        first, last = int(match[1]), int(match[2] or size - 1)
        if match[2] and last < first:
            return None
    else:
        first, last = max(size - int(match[2]), 0), size - 1
    if first >= size or last < first:
        status = HTTPStatus.REQUESTED_RANGE_NOT_SATISFIABLE
        raise HttpError(status, f"the file has {size} bytes", Content_Range=f"bytes */{size}")
    return first, min(last, size - 1) + 1


def respond(
    blob: BlobRepresentation, headers: dict[str, str], *, requested: str, if_range: str
) -> Response:
    """Return the response with a file, or with the requested range of it.

    If `if_range` is another ETag than the one in `headers`, the whole file is sent.

    Raises:
        HttpError: No byte of the file is in the range.
        NotFoundError: The file was deleted meanwhile.
    """
    size = blob.size
    part = range_of(requested, size) if if_range in ("", headers["ETag"]) else None
    first, end = part or (0, size)
    headers = {**headers, "Accept-Ranges": "bytes", "Content-Length": str(end - first)}
    if part:
        headers["Content-Range"] = f"bytes {first}-{end - 1}/{size}"
    status = HTTPStatus.PARTIAL_CONTENT if part else HTTPStatus.OK
    return StreamingResponse(_chunks(blob, first, end), status, headers, blob.format.media_type)


async def _chunks(blob: BlobRepresentation, first: int, end: int) -> AsyncIterator[bytes]:
    # A file that vanishes raises here, which ends the connection early (H-63).
    for offset in range(first, end, _CHUNK):
        yield await asyncio.to_thread(blob.part, offset, min(_CHUNK, end - offset))
