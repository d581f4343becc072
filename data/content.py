"""What the bytes of one sample must be, whoever wrote them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from data.images import BadPicture, decode, extension, header
from data.records import IMAGE_TAG, BadRecord, dialogs_of, parse_record

MAX_PICTURE = 128 << 20
"""Largest picture file in bytes that is read at all."""


def check_text(text: bytes, layout: Mapping[str, Any] | None, n_images: int) -> int:
    """The number of dialogs in a sample's text. Raises BadRecord, without naming the sample."""
    record = parse_record(text, "the text", layout, n_images)
    dialogs = dialogs_of(record, "the text")
    for dialog in dialogs:
        tags = sum(turn.text.count(IMAGE_TAG) for turn in dialog.turns)
        if tags != n_images:
            raise BadRecord(f"{tags} {IMAGE_TAG} tags for {n_images} pictures; the numbers must be equal")
    return len(dialogs)


def check_picture(data: bytes, *, full: bool) -> str:
    """The extension that a picture's first bytes ask for. Raises BadPicture, without naming the sample.

    full: decode it; otherwise its header is read.
    """
    if not full:
        header(data, "the picture")
    else:
        decode(data, "the picture")
    kind = extension(data)
    if kind is None:
        raise BadPicture("no JPEG, PNG or WebP picture")
    return kind
