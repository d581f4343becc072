"""Ways to damage a shard, each with what must be said about it."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path

from PIL import Image

from data.index import Index
from data.shards import Record

from .helpers import conversation, picture

BAD = 3
"""The record that a fault is about, out of N."""
N = 6


def records(*, bad: bytes | None = None, tags: int = 1) -> list[Record]:
    """N records with JPEG pictures; record BAD has this picture or this number of image tags."""
    made: list[Record] = []
    for i in range(N):
        image = picture(i, kind="JPEG", size=(64, 48))
        turns = conversation(f"q{i}", f"a{i}")
        if i == BAD:
            image = bad or image
            turns = conversation("<image>" * (tags - 1) + "q", "a", image=tags > 0)
        made.append(({"id": f"id{i}", "conversations": turns}, image))
    return made


def bomb() -> bytes:
    """177 million pixels in a few kilobytes."""
    out = BytesIO()
    Image.new("1", (15_000, 11_800)).save(out, "PNG", optimize=True)
    return out.getvalue()


def flip(file: Path, at: int) -> None:
    with file.open("r+b") as opened:
        opened.seek(at)
        (byte,) = opened.read(1)
        opened.seek(at)
        opened.write(bytes([byte ^ 1]))


def zeros(file: Path, at: int, size: int) -> None:
    with file.open("r+b") as opened:
        opened.seek(at)
        opened.write(bytes(size))


@dataclass(frozen=True)
class Damage:
    """do: changes a shard. bad: records that cannot be read then. at, cause: of the first fault found.

    fields: members of the records that are lost.
    """

    do: Callable[[Path, Index], None]
    bad: tuple[int, ...]
    at: Callable[[Index], int]
    cause: str
    key: str = f"{BAD:08d}"
    field: str = "jpg"


def image_at(index: Index) -> int:
    return index.images(BAD)[0].offset


def text_at(index: Index) -> int:
    return index.text(BAD).offset


STRUCTURE = {
    "cut at a member boundary": Damage(
        lambda f, x: os.truncate(f, image_at(x) - 512), (3, 4, 5), lambda x: image_at(x) - 512,
        "the file was cut before the two empty blocks",
    ),
    "cut in a header": Damage(
        lambda f, x: os.truncate(f, image_at(x) - 400), (3, 4, 5), lambda x: image_at(x) - 512,
        "the file was cut in a header",
    ),
    "cut in data": Damage(
        lambda f, x: os.truncate(f, image_at(x) + 100), (3, 4, 5), image_at,
        "the file was cut in this member: 100 of",
    ),
    "header bit flip": Damage(
        lambda f, x: flip(f, image_at(x) - 512 + 2), (), lambda x: image_at(x) - 512,
        "damaged header: its checksum does not fit",
    ),
    "zero block": Damage(
        lambda f, x: zeros(f, image_at(x) - 512, 1024), (3,), lambda x: image_at(x) - 512,
        "empty blocks in the middle; the next header is at byte",
    ),
    "payload bit flip": Damage(
        lambda f, x: flip(f, text_at(x) + 20), (3,), text_at, "damaged data: CRC-32 is", field="json",
    ),
}  # fmt: skip

whole = picture(BAD, kind="JPEG", size=(64, 48))
CONTENT = {
    "damaged JPEG": (records(bad=whole[:4] + bytes(200) + whole[204:]), "jpg", "the picture"),
    "truncated JPEG": (records(bad=whole[: len(whole) // 2]), "jpg", "the picture cannot be decoded"),
    "bomb": (records(bad=bomb()), "png", "177,000,000 pixels, at most 64,000,000"),
    "no image tag": (records(tags=0), "json", "0 <image> tags"),
    "two image tags": (records(tags=2), "json", "2 <image> tags"),
}
