"""Sort-of-CLEVR (Santoro et al. 2017, arXiv 1706.01427, section 4.2), drawn from a seed.

Paper: its questions are bit strings, ours are words; and whether a picture may be asked the same twice
is not said, ours never is.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from data.shards import Record
from data.sources.from_scenes import dialog
from data.sources.generated import generated
from data.sources.raster import palette, png, shape
from data.sources.scene_questions import Question
from data.sources.stream import Stream

_VERSION = 1  # raise it when records change
_SIDE = 75
# Paper: these six names; the shades are not published.
_COLORS = ("red", "green", "blue", "orange", "gray", "yellow")
# Paper: the size of the objects is not published; 11 pixels is what reimplementations use.
_SIZE = 11
_ASKED = 10  # relational questions about a picture, and as many others


@dataclass(frozen=True)
class Object:
    """x, y: centre in pixels from the top left."""

    x: int
    y: int
    color: str
    shape: str


def prepare(cache: Path, *, seed: int, train_pictures: int, test_pictures: int) -> dict[str, Path]:
    """Split -> folder, drawn into `cache` at first use."""
    pictures = {"train": train_pictures, "test": test_pictures}
    splits = {split: partial(records, split, n, seed) for split, n in pictures.items()}
    return generated(cache, "sort_of_clevr", [_VERSION, seed, pictures], splits, probe())


def probe() -> tuple[str, Any]:
    """Name and records of the small sample that shows whether this machine draws as others do."""
    return "sort_of_clevr", partial(records, "train", 16, 0)


def records(split: str, pictures: int, seed: int) -> Iterator[Record]:
    """The records of a split: objects, ten relational and ten other questions, picture."""
    # One stream for each picture: a smaller split is the beginning of a larger one.
    for number in range(pictures):
        stream = Stream("sort_of_clevr", _VERSION, seed, split, number)
        objects = _objects(stream)
        asked = [
            *stream.sample(list(relational(objects)), _ASKED),
            *stream.sample(list(plain(objects)), _ASKED),
        ]
        meta = {
            "id": f"{split}-{number}",
            "source": "sort_of_clevr",
            "things": [[o.x, o.y, o.color, o.shape] for o in objects],
            "dialogs": [dialog(q) for q in asked],
        }
        yield meta, _picture(objects)


def _objects(stream: Stream) -> list[Object]:
    """One object of each color, none touching another; to every question about them one answer."""
    while True:
        places: list[tuple[int, int]] = []
        while len(places) < len(_COLORS):
            x, y = (stream.between(_SIZE // 2, _SIDE - 1 - _SIZE // 2) for _ in range(2))
            if all(max(abs(x - a), abs(y - b)) > _SIZE for a, b in places):
                places.append((x, y))
        # Paper: nothing is said of equal distances or of the very middle; such a picture is drawn again.
        if all(_SIDE // 2 not in place and _distinct(place, places) for place in places):
            shapes = [stream.pick(("circle", "square")) for _ in places]
            return [Object(*p, c, s) for p, c, s in zip(places, _COLORS, shapes, strict=True)]


def _distinct(place: tuple[int, int], places: Sequence[tuple[int, int]]) -> bool:
    far = sorted((place[0] - x) ** 2 + (place[1] - y) ** 2 for x, y in places if (x, y) != place)
    return far[0] < far[1] and far[-2] < far[-1]


def relational(objects: Sequence[Object]) -> Iterator[Question]:
    """The 18 questions about an object's relation to the others."""
    for o in objects:
        others = sorted((p for p in objects if p is not o), key=partial(_apart, o))
        same = sum(p.shape == o.shape for p in objects)
        start, end = "what is the shape of the object", f"the {o.color} object?"
        yield Question("relational_closest", f"{start} that is closest to {end}", others[0].shape)
        yield Question("relational_furthest", f"{start} that is furthest from {end}", others[-1].shape)
        yield Question("relational_count", f"how many objects have the shape of {end}", str(same))


def _apart(a: Object, b: Object) -> int:
    return (a.x - b.x) ** 2 + (a.y - b.y) ** 2


def plain(objects: Sequence[Object]) -> Iterator[Question]:
    """The 18 questions about one object alone."""
    for o in objects:
        yield Question("plain_shape", f"what is the shape of the {o.color} object?", o.shape)
        yield Question("plain_left", f"is the {o.color} object on the left?", _yes(o.x < _SIDE // 2))
        yield Question("plain_top", f"is the {o.color} object on the top?", _yes(o.y < _SIDE // 2))


def _yes(holds: bool) -> str:
    return "yes" if holds else "no"


def _picture(objects: Sequence[Object]) -> bytes:
    pixels = np.zeros((_SIDE, _SIDE), dtype=np.uint8)
    for o in objects:
        drawn = shape(o.shape, _SIZE)
        top, left = o.y - _SIZE // 2, o.x - _SIZE // 2
        part = pixels[top : top + _SIZE, left : left + _SIZE]
        np.copyto(part, np.uint8(1 + _COLORS.index(o.color)), where=drawn > 0)
    return png(pixels, palette(_COLORS, levels=1))
