"""Draws shapes and digits with whole numbers only and writes PNG without a compressor.

Drawing and compression libraries give other bytes in other versions; these never do.
"""

from __future__ import annotations

import struct
import zlib
from collections.abc import Callable, Sequence
from functools import cache

import numpy as np
from numpy.typing import NDArray

Pixels = NDArray[np.uint8]
Color = tuple[int, int, int]

COLORS: dict[str, Color] = {
    "red": (214, 39, 40),
    "green": (44, 160, 44),
    "blue": (31, 96, 200),
    "yellow": (240, 196, 25),
    "purple": (148, 80, 189),
    "orange": (245, 130, 30),
    "gray": (127, 127, 127),
    "black": (20, 20, 20),
}
WHITE: Color = (255, 255, 255)
LEVELS = 4
"""Shades of a color, from nearly white to full: handwriting is drawn in all, shapes in full color."""

_Ints = NDArray[np.int64]
_INSIDE: dict[str, Callable[[_Ints, _Ints, int], NDArray[np.bool_]]] = {
    "circle": lambda x, y, m: x * x + y * y <= m * m,
    "square": lambda x, y, m: 8 * np.maximum(abs(x), abs(y)) <= 7 * m,
    "triangle": lambda x, y, m: 2 * abs(x) <= y + m + 1,
    "cross": lambda x, y, m: np.minimum(abs(x), abs(y)) * 3 <= m,
    "diamond": lambda x, y, m: abs(x) + abs(y) <= m,
    "ring": lambda x, y, m: (x * x + y * y <= m * m) & (3 * (x * x + y * y) >= m * m),
}
"""Whether a pixel centre lies inside a shape m pixels wide; x and y are in half pixels from its middle."""

SHAPES = tuple(_INSIDE)


@cache
def shape(name: str, size: int) -> Pixels:
    """[size, size] levels, 0 or LEVELS."""
    across = 2 * np.arange(size, dtype=np.int64) + 1 - size
    inside = _INSIDE[name](across[None, :], across[:, None], size)
    return (inside * LEVELS).astype(np.uint8)


def shrunk(picture: Pixels, size: int) -> Pixels:
    """A gray picture [n, n] as [size, size] levels 0..LEVELS, each pixel the mean of what it covers."""
    n = len(picture)
    share = _overlaps(n, size)  # [size, n]
    total = share @ picture.astype(np.int64) @ share.T  # [size, size], 255 * n * n at most
    # Thin strokes turn pale when they shrink: half as much again makes up for it.
    bright = np.minimum(total * 3 // (2 * n * n), 255)
    return ((bright * LEVELS + 127) // 255).astype(np.uint8)


@cache
def _overlaps(n: int, size: int) -> _Ints:
    """How much of input pixel j output pixel i covers, in 1/size of a pixel, [size, n]."""
    begin, start = np.arange(size)[:, None] * n, np.arange(n)[None, :] * size
    overlap = np.minimum(begin + n, start + size) - np.maximum(begin, start)
    return np.maximum(overlap, 0).astype(np.int64)


def palette(colors: Sequence[str], *, levels: int) -> list[Color]:
    """White, then `levels` shades of each color, ending in the full one."""
    shades = [WHITE]
    for name in colors:
        for level in range(LEVELS - levels + 1, LEVELS + 1):
            red, green, blue = (255 + (c - 255) * level // LEVELS for c in COLORS[name])
            shades.append((red, green, blue))
    return shades


def png(pixels: Pixels, shades: Sequence[Color]) -> bytes:
    """A PNG file of palette indices [height, width]: 4 bits a pixel up to 16 shades, else 8; not compressed.

    Source: PNG specification (ISO/IEC 15948) 11.2; stored blocks: RFC 1951, 3.2.4.
    """
    height, width = pixels.shape
    depth = 4 if len(shades) <= 16 else 8
    rows = _halved(pixels) if depth == 4 else pixels
    lines = np.pad(rows, ((0, 0), (1, 0))).tobytes()  # filter type 0 before each line
    head = struct.pack(">IIBBBBB", width, height, depth, 3, 0, 0, 0)
    parts = ((b"IHDR", head), (b"PLTE", bytes(c for s in shades for c in s)), (b"IDAT", _stored(lines)))
    return b"\x89PNG\r\n\x1a\n" + b"".join(_chunk(*part) for part in (*parts, (b"IEND", b"")))


def _halved(pixels: Pixels) -> Pixels:
    """Two pixels in a byte, the left one in the high bits."""
    even = np.pad(pixels, ((0, 0), (0, pixels.shape[1] % 2)))
    return (even[:, ::2] << 4 | even[:, 1::2]).astype(np.uint8)


def _chunk(name: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))


def _stored(data: bytes) -> bytes:
    """A zlib stream that holds `data` as it is."""
    out = b"\x78\x01"
    for start in range(0, len(data), 0xFFFF):
        block = data[start : start + 0xFFFF]
        last = start + 0xFFFF >= len(data)
        out += struct.pack("<BHH", last, len(block), len(block) ^ 0xFFFF) + block
    return out + struct.pack(">I", zlib.adler32(data))
