"""Decodes pictures from bytes that nobody vouches for."""

from __future__ import annotations

import logging
from collections.abc import Callable
from contextlib import suppress
from functools import cache, partial
from io import BytesIO
from typing import TYPE_CHECKING, Any

from PIL import Image, ImageFile, UnidentifiedImageError

if TYPE_CHECKING:
    from PIL.Image import Image as Picture
    from torch import Tensor

log = logging.getLogger("toolkit.data")

FORMATS = ("JPEG", "PNG", "WEBP")
MAX_PIXELS = 64_000_000
"""Largest width x height that is decoded."""
MAX_RATIO = 2_000
"""Largest decoded size (3 bytes a pixel) per encoded byte."""
RATIO_FROM = 1 << 20
"""Pixels from which MAX_RATIO counts: a small flat picture compresses that well and harms nobody."""


class BadPicture(ValueError):
    """A picture that cannot or must not be decoded: a fault of the data, not of a setting."""


def extension(data: bytes) -> str | None:
    """ "png", "jpg" or "webp" by the first bytes; None for anything else."""
    if data.startswith(b"\x89PNG\r\n\x1a\n"):
        return "png"
    if data.startswith(b"\xff\xd8\xff"):
        return "jpg"
    if data[:4] == b"RIFF" and data[8:12] == b"WEBP":
        return "webp"
    return None


def header(data: bytes, where: str) -> tuple[int, int]:
    """(width, height) from the header, after the size checks; no pixel is decoded.

    Raises BadPicture naming `where` for other formats, damaged headers and decompression bombs.
    """
    return _open(data, where).size


def decode(data: bytes, where: str, *, draft: int = 0) -> Picture:
    """A picture in RGB. Transparency and EXIF rotation are ignored, as in the original code.

    draft: a JPEG may be decoded at a half, a quarter or an eighth of its size, as long as both sides keep
    this many pixels; 0 decodes all of it. Measured from 1280 x 960 to 336: 2.2 times as fast, pixels differ
    by 0.4 of 255 on average, 5 at most.
    Raises BadPicture naming `where` as `header` does, and for truncated or damaged pixel data.
    """
    return _decoded(_open(data, where), where, draft)


def pixels(data: bytes, where: str, *, draft: int = 0) -> Tensor:
    """The same pixels as `decode`, [height, width, 3] uint8.

    A JPEG in color is decoded by torchvision, which copies less, with the same library behind it; what that
    cannot read is Pillow's to judge, so both accept the same files. Raises BadPicture as `decode` does.
    """
    import numpy as np
    import torch

    read = None if draft else _jpeg_reader()
    size = _plain_jpeg(data)
    if read is not None and size is not None:
        _check_size(size, len(data), where)
        with suppress(RuntimeError):
            made = read(torch.frombuffer(bytearray(data), dtype=torch.uint8)).permute(1, 2, 0)
            if (made.shape[1], made.shape[0]) == size:
                return made
    return torch.from_numpy(np.array(decode(data, where, draft=draft)))


def _plain_jpeg(data: bytes) -> tuple[int, int] | None:
    """(width, height) of a JPEG of three channels of 8 bits; None for whatever is not plainly one."""
    at = 2 if data.startswith(b"\xff\xd8\xff") else len(data)
    while at + 9 < len(data) and data[at] == 0xFF:
        kind = data[at + 1]
        if kind in _FRAMES:
            height, width = (int.from_bytes(data[at + k : at + k + 2]) for k in (5, 7))
            return (width, height) if data[at + 4] == 8 and data[at + 9] == 3 and width and height else None
        if kind not in _SEGMENTS:
            return None
        at += 2 + int.from_bytes(data[at + 2 : at + 4])
    return None


_FRAMES = (0xC0, 0xC1, 0xC2)
"""JPEG markers of a frame: baseline, extended and progressive Huffman coding."""
_SEGMENTS = {0xC4, 0xDB, 0xDD, 0xFE, *range(0xE0, 0xF0)}
"""Markers that may come before it: tables, restart interval, comment, applications' notes."""


def transformed(transform: Callable[..., Any], data: bytes, where: str, *, draft: int = 0) -> Any:
    """What an encoder's transform makes of a picture: of a PIL image, or of `pixels` if it `takes_pixels`.

    Raises BadPicture as `decode` does.
    """
    reading: Any = pixels if getattr(transform, "takes_pixels", False) else decode
    return transform(reading(data, where, draft=draft))


@cache
def _jpeg_reader() -> Callable[[Tensor], Tensor] | None:
    """torchvision's decoder to RGB [3, height, width]; None, told once, where there is none."""
    import torch

    probe = BytesIO()
    Image.new("RGB", (8, 8)).save(probe, "JPEG")
    try:
        # Deprecated since torchvision 0.29, without a date for its end.
        from torchvision.io import ImageReadMode, decode_jpeg

        read = partial(decode_jpeg, mode=ImageReadMode.RGB)
        read(torch.frombuffer(bytearray(probe.getvalue()), dtype=torch.uint8))
    except (ImportError, RuntimeError) as error:
        log.warning("torchvision decodes no JPEG here, so Pillow does: %s", error)
        return None
    return read


def _decoded(picture: Picture, where: str, draft: int) -> Picture:
    # Paper: its code sets this flag, so a cut JPEG trains as grey pixels under its true caption.
    ImageFile.LOAD_TRUNCATED_IMAGES = False
    try:
        if draft:
            picture.draft("RGB", (draft, draft))
        picture.load()
        if picture.mode.startswith("I"):
            # Paper: its code cuts 16 bits of grey at 255, which leaves a white picture.
            picture = picture.point(lambda value: value / 256)
        return picture if picture.mode == "RGB" else picture.convert("RGB")
    except Exception as error:  # the decoders raise many kinds of error on damaged bytes
        raise BadPicture(
            f"{where}: the picture cannot be decoded: {error or type(error).__name__}"
        ) from error


def _open(data: bytes, where: str) -> Picture:
    if extension(data) is None:
        raise BadPicture(
            f"{where}: no JPEG, PNG or WebP picture (starts with {data[:8]!r}); convert it to one of these"
        )
    try:
        picture: Picture = Image.open(BytesIO(data), formats=FORMATS)
    except UnidentifiedImageError as error:  # its words hold an address in memory, another in each run
        raise BadPicture(f"{where}: the picture's header cannot be read") from error
    except Exception as error:  # as above
        raise BadPicture(
            f"{where}: the picture's header cannot be read: {error or type(error).__name__}"
        ) from error
    _check_size(picture.size, len(data), where)
    return picture


def _check_size(size: tuple[int, int], n_bytes: int, where: str) -> None:
    width, height = size
    pixels = width * height
    if pixels > MAX_PIXELS:
        raise BadPicture(
            f"{where}: the picture has {width} x {height} = {pixels:,} pixels, at most {MAX_PIXELS:,} are "
            "decoded; "
            "scale it down"
        )
    if pixels >= RATIO_FROM and pixels * 3 > MAX_RATIO * n_bytes:
        raise BadPicture(
            f"{where}: {n_bytes:,} bytes would decode to {pixels * 3:,}, more than {MAX_RATIO:,} times as "
            "much; "
            "this looks like a decompression bomb"
        )
