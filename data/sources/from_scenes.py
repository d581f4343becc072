"""Scenes: several objects on a grid, and questions that need position, order and number.

The tasks follow the small studies that they are meant for: what is the first thing left of, right of,
above or below another (ray), at the end of a row or column (edge), in a given place (at), next in
reading order (order), and how many (count).
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from data.records import IMAGE_TAG, dump_json
from data.shards import Record
from data.sources import digits
from data.sources.generated import generated
from data.sources.raster import LEVELS, Pixels, palette, png, shape, shrunk
from data.sources.scene_options import HELD_OUT, SPLITS, Board, Options
from data.sources.scene_questions import Balance, Question, Thing, all_questions
from data.sources.stream import Stream

_VERSION = 1  # raise it when records change
_PATIENCE = 3000
"""Scenes that may be refused in a row before the options are."""

_PROBE = Options(
    grid=3,
    large_grid=4,
    min_objects=5,
    max_objects=7,
    objects="shapes",
    colors=8,
    shapes=6,
    ask="color",
    types=("ray", "count", "edge", "at", "order"),
    questions=1,
    image_size=48,
    jitter=True,
    train_pictures=24,
    test_pictures=8,
    seed=0,
)


def prepare(cache: Path, options: Options) -> dict[str, Path]:
    """Split -> folder, drawn into `cache` at first use."""
    splits = {split: partial(records, split, options) for split in SPLITS}
    sample = probe(options.objects)
    return generated(cache, "scenes", [_VERSION, _named(options)], splits, sample)


def _named(options: Options) -> dict[str, Any]:
    """The options that name a data set and seed it: without `jitter` where it is on.

    It came later than the others, and what was drawn before keeps its name and its bytes.
    """
    named = asdict(options)
    if options.jitter:
        del named["jitter"]
    return named


def probe(objects: str) -> tuple[str, Any]:
    """Name and records of the small sample that shows whether this machine draws as others do."""
    options = replace(_PROBE, objects=objects)
    return f"scenes_{objects}", lambda: (r for split in SPLITS for r in records(split, options))


def records(split: str, options: Options) -> Iterator[Record]:
    """The records of a split: layout, questions of every kind with their answers, picture."""
    # The numbers of pictures are left out: a smaller split is the beginning of a larger one.
    same = replace(options, train_pictures=1, test_pictures=1)
    stream = Stream("scenes", _VERSION, split, dump_json(_named(same)).decode())
    board, balance, seen = options.board(split), Balance(options), set[bytes]()
    for number in range(board.pictures):
        things, asked = _scene(split, options, board, balance, seen, stream)
        meta = {
            "id": f"{split}-{number}",
            "source": "scenes",
            "grid": board.grid,
            "things": [[t.row, t.column, t.color, t.name] for t in things],
            "dialogs": [dialog(q) for q in asked],
        }
        yield meta, _picture(things, split, options, board, stream)


def dialog(question: Question) -> dict[str, Any]:
    """A question as a conversation of its own about the picture."""
    human = {"from": "human", "value": f"{IMAGE_TAG}\n{question.text}"}
    return {"type": question.kind, "conversations": [human, {"from": "gpt", "value": question.answer}]}


def _scene(
    split: str, options: Options, board: Board, balance: Balance, seen: set[bytes], stream: Stream
) -> tuple[list[Thing], list[Question]]:
    """A layout that this split alone may have, that it has not had, and that gives enough questions."""
    for _ in range(_PATIENCE):
        things = _things(options, board, stream)
        layout = dump_json([[t.row, t.column, t.color, t.name] for t in things])
        if layout in seen or (board.grid == options.grid and _owner(layout) != split):
            continue
        asked = balance.choose(list(all_questions(things, options)), stream)
        if asked is not None:
            seen.add(layout)
            return things, asked
    kind = max(balance.lacking, key=lambda k: balance.lacking[k], default=options.kinds[0])
    raise ValueError(
        f"data=scenes: {_PATIENCE:,} scenes in a row gave too few balanced {kind} questions; write "
        f"data.questions={max(1, options.questions - 1)}, more data.max_objects, or leave "
        f"{kind.split('_')[0]} out of data.types"
    )


def _owner(layout: bytes) -> str:
    """Which split may hold a layout: a matter of its hash, so that splits need not know each other."""
    part = hashlib.sha256(layout).digest()[0] % HELD_OUT
    return {0: "test", 1: "val"}.get(part, "train")


def _things(options: Options, board: Board, stream: Stream) -> list[Thing]:
    """Objects in different cells, in reading order, colors and names drawn alone."""
    n = stream.between(board.least, board.most)
    cells = sorted(stream.sample(range(board.grid**2), n))
    return [
        Thing(
            1 + cell // board.grid,
            1 + cell % board.grid,
            stream.pick(options.color_names),
            stream.pick(options.names),
        )
        for cell in cells
    ]


def _picture(things: Sequence[Thing], split: str, options: Options, board: Board, stream: Stream) -> bytes:
    """A PNG file: each object in its cell, of varying size and a little beside the middle."""
    cell = options.image_size // board.grid
    edge = (options.image_size - cell * board.grid) // 2
    levels = 1 if options.objects == "shapes" else LEVELS
    pixels = np.zeros((options.image_size, options.image_size), dtype=np.uint8)
    for t in things:
        drawn = _drawn(t.name, cell, split, options, stream)
        top = edge + (t.row - 1) * cell + _margin(cell - len(drawn), options, stream)
        left = edge + (t.column - 1) * cell + _margin(cell - len(drawn), options, stream)
        before = options.color_names.index(t.color) * levels - (LEVELS - levels)  # white is shade 0
        part = pixels[top : top + len(drawn), left : left + len(drawn)]
        np.copyto(part, (drawn.astype(np.int64) + before).astype(np.uint8), where=drawn > 0)
    return png(pixels, palette(options.color_names, levels=levels))


def _margin(free: int, options: Options, stream: Stream) -> int:
    """Pixels in front of an object, of those that it leaves free in its cell."""
    return stream.between(1, max(1, free - 1)) if options.jitter else free // 2


def _drawn(name: str, cell: int, split: str, options: Options, stream: Stream) -> Pixels:
    """Levels of one object, [size, size]; every digit drawn is somebody's handwriting."""
    if name not in digits.NAMES:
        least, most = cell * 5 // 8, cell * 13 // 16
        return shape(name, stream.between(least, most) if options.jitter else cell * 3 // 4)
    written = digits.handwritten(name, split)
    size = stream.between(cell * 3 // 4, cell * 7 // 8) if options.jitter else cell * 7 // 8
    return shrunk(written[stream.below(len(written))], size)
