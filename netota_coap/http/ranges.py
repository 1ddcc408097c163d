"""Files over HTTP: whole, or one range of them.

Source: RFC 9110, sections 13 and 14; rules H-60 to H-63.
"""

from __future__ import annotations

import asyncio
import re
from collections.abc import AsyncIterator
from http import HTTPStatus

from starlette.responses import Response, StreamingResponse

from netota_coap.catalog.resources import BlobRepresentation
from netota_coap.http.site import RefusedError

_PIECE = 262_144  # bytes that are read at a time
_RANGE = re.compile(r"bytes=(\d{0,99})-(\d{0,99})", re.IGNORECASE | re.ASCII)


def range_of(asked: str, size: int) -> tuple[int, int] | None:
    """Read a Range header.

    Args:
        asked: Its value.
        size: Of the file, bytes.

    Returns:
        First byte, and the one after the last; None: the whole is to be sent, since it is no
        range of bytes, or several.

    Raises:
        RefusedError: No byte of the file is in it.
    """
    match = _RANGE.fullmatch(asked.strip())
    if match is None or match[1] == match[2] == "":
        return None
    if match[1]:
        first, last = int(match[1]), int(match[2] or size - 1)
        if match[2] and last < first:
            return None
    else:
        first, last = max(size - int(match[2]), 0), size - 1
    if first >= size or last < first:
        detail = f"the file has {size} bytes"
        status = HTTPStatus.REQUESTED_RANGE_NOT_SATISFIABLE
        raise RefusedError(status, detail, Content_Range=f"bytes */{size}")
    return first, min(last, size - 1) + 1


def respond(
    blob: BlobRepresentation, headers: dict[str, str], *, asked: str, if_range: str
) -> Response:
    """Return the answer with a file, or with the range that is asked for.

    Args:
        blob: The file.
        headers: Of the answer, `ETag` among them.
        asked: Value of the Range header.
        if_range: Value of the If-Range header: of another file, the whole is sent.

    Raises:
        RefusedError: No byte of the file is in the range.
        NotFoundError: The file is not there any more.
    """
    size = blob.size
    part = range_of(asked, size) if if_range in ("", headers["ETag"]) else None
    first, end = part or (0, size)
    headers = {**headers, "Accept-Ranges": "bytes", "Content-Length": str(end - first)}
    if part:
        headers["Content-Range"] = f"bytes {first}-{end - 1}/{size}"
    status = HTTPStatus.PARTIAL_CONTENT if part else HTTPStatus.OK
    return StreamingResponse(_pieces(blob, first, end), status, headers, blob.format.media_type)


async def _pieces(blob: BlobRepresentation, first: int, end: int) -> AsyncIterator[bytes]:
    """Read one piece after the other; a file that is gone ends the connection early."""
    for offset in range(first, end, _PIECE):
        yield await asyncio.to_thread(blob.part, offset, min(_PIECE, end - offset))
