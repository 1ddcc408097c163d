"""Checks zstd's frames and blocks by their headers, without unpacking them.

Source: RFC 8878, "Zstandard Frames" and "Skippable Frames".
"""

from __future__ import annotations

from collections.abc import Generator

from netota_coap.errors import InvalidDataError
from netota_coap.files import File

_MAGIC = 0xFD2FB528
# Sixteen magic numbers differ from it in the last 4 bits.
_SKIPPABLE = 0x184D2A50

_RLE, _RESERVED = 1, 3
_LARGEST_BLOCK = 128 << 10

# Sizes of fields by their bits in the descriptor of a frame.
_DICTIONARY_ID_SIZES = (0, 1, 2, 4)
_CONTENT_SIZE_SIZES = (0, 2, 4, 8)


class Frames:
    """A sink that walks from header to header to check that all frames are whole."""

    def __init__(self, file: File) -> None:
        self._file = file
        self._between = True
        self._walk = self._frames()
        self._skip, self._wanted = next(self._walk)
        self._held = b""

    @property
    def whole(self) -> bool:
        """Whether the last frame has ended."""
        return self._between and not self._skip and not self._held

    def update(self, data: memoryview) -> None:
        """Take the next bytes; raise `InvalidDataError` if a header is malformed."""
        while data:
            if self._skip:
                step = min(self._skip, len(data))
                self._skip -= step
            else:
                step = min(self._wanted - len(self._held), len(data))
                self._held += data[:step]
                if len(self._held) == self._wanted:
                    header, self._held = self._held, b""
                    self._skip, self._wanted = self._walk.send(header)
            data = data[step:]

    def _frames(self) -> Generator[tuple[int, int], bytes, None]:
        """Yield how many bytes to skip and how many to read then; receive the bytes read."""
        skip = 0
        while True:
            self._between = True
            magic = int.from_bytes((yield skip, 4), "little")
            self._between = False
            if magic & ~0xF == _SKIPPABLE:
                skip = int.from_bytes((yield 0, 4), "little")
            elif magic == _MAGIC:
                skip = yield from self._frame()
            else:
                raise self._damaged("what follows a frame is none")

    def _frame(self) -> Generator[tuple[int, int], bytes, int]:
        """Walk to the last block of a frame; return how many bytes to skip after its header."""
        (descriptor,) = yield 0, 1
        if descriptor & 0x08:
            raise self._damaged("a frame has a reserved bit")
        single, checksum = descriptor & 0x20, descriptor & 0x04
        window_size = 0 if single else 1
        dictionary_id_size = _DICTIONARY_ID_SIZES[descriptor & 3]
        content_size_size = _CONTENT_SIZE_SIZES[descriptor >> 6] or (1 if single else 0)
        header = yield 0, window_size + dictionary_id_size + content_size_size
        if single:
            # The window is the content; sizes of 2 bytes begin at 256.
            content_size = int.from_bytes(header[dictionary_id_size:], "little")
            window = content_size + (256 if content_size_size == 2 else 0)
        else:
            window = (8 + (header[0] & 7)) << (7 + (header[0] >> 3))
        largest, skip, last = min(window, _LARGEST_BLOCK), 0, 0
        while not last:
            block = int.from_bytes((yield skip, 3), "little")
            last, kind, size = block & 1, block >> 1 & 3, block >> 3
            if kind == _RESERVED or size > largest:
                raise self._damaged(f"a block is of kind {kind} and {size} bytes")
            skip = 1 if kind == _RLE else size
        return skip + (4 if checksum else 0)

    def _damaged(self, reason: str) -> InvalidDataError:
        return self._file.wrong(f"is not sound zstd: {reason}")
