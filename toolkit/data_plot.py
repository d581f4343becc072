"""A contact sheet of a data source: pictures of each split with questions and answers."""

from __future__ import annotations

import textwrap
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from data.images import decode

if TYPE_CHECKING:
    from matplotlib.figure import SubFigure

    from data.reader import ShardReader
    from data.records import Example

_COLUMNS = 4  # pictures of a split
_ASKED = 8  # questions under a picture
_COLUMN = 3.4  # inches
_SIDE = 2.6  # inches of a picture
_ANSWER = 2.62  # inches from a column's left to its answers
_WIDTH = 50  # characters of a question's line
_LINE = 0.125  # inches
_INK, _FAINT, _ACCENT = "#222222", "#bbbbbb", "#0b5394"


def draw(title: str, readers: Mapping[str, ShardReader], path: Path) -> Path:
    """Draws the first pictures of each split, a row each, to an image file and returns its path.

    Under a picture stand one question of each type, then further ones, with their expected answers.
    The suffix of `path` decides the format.
    """
    from matplotlib.figure import Figure

    shown = {split: _samples(reader) for split, reader in readers.items()}
    heights = [_SIDE + 0.45 + _LINE * max(_lines(e) for _, e in samples) for samples in shown.values()]
    figure = Figure(figsize=(_COLUMN * _COLUMNS, sum(heights) + 0.35), facecolor="white")
    whole: Any = figure.subfigures(2, 1, height_ratios=[0.35, sum(heights)], hspace=0)
    whole[0].text(0.5, 0.4, title, ha="center", va="center", fontsize=13, color=_INK)
    parts = whole[1].subfigures(len(shown), 1, height_ratios=heights, squeeze=False, hspace=0)[:, 0]
    for part, height, (split, samples) in zip(parts, heights, shown.items(), strict=True):
        _row(part, height, f"{split} ({len(readers[split]):,} records)", samples, readers[split])
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=130, facecolor="white")
    return path


def _samples(reader: ShardReader) -> list[tuple[int, list[Example]]]:
    """(record, its questions) of the first records."""
    found: dict[int, list[Example]] = {}
    for example in reader.all_examples():
        if example.record not in found and len(found) == _COLUMNS:
            break
        found.setdefault(example.record, []).append(example)
    return [(record, _picked(examples)) for record, examples in found.items()]


def _picked(examples: Sequence[Example]) -> list[Example]:
    """The first question of each type, then others, in their order."""
    firsts = list({e.kind: e for e in reversed(examples)}.values())
    chosen = (firsts + [e for e in examples if e not in firsts])[:_ASKED]
    return sorted(chosen, key=examples.index)


def _text(example: Example) -> list[str]:
    """The question, wrapped."""
    words = example.question.replace("$", r"\$")
    return textwrap.wrap(words, _WIDTH, max_lines=3, subsequent_indent="   ")


def _lines(examples: Sequence[Example]) -> int:
    return sum(len(_text(e)) for e in examples)


def _row(
    part: SubFigure,
    height: float,
    title: str,
    samples: Sequence[tuple[int, list[Example]]],
    reader: ShardReader,
) -> None:
    """One split: title, pictures, and text below each."""
    part.text(0.012, 1 - 0.14 / height, title, fontsize=10, weight="bold", color=_INK, va="center")
    for column, (record, examples) in enumerate(samples):
        left = (column + 0.05) / _COLUMNS
        data = reader.image_bytes(record)
        if data is not None:
            box = (left, 1 - (_SIDE + 0.28) / height, _SIDE / (_COLUMN * _COLUMNS), _SIDE / height)
            axes = part.add_axes(box)
            axes.imshow(decode(data, reader.key(record)), interpolation="nearest")
            axes.set(xticks=[], yticks=[])
            for spine in axes.spines.values():
                spine.set_color(_FAINT)
        _dialogs(part, height, left, examples)


def _dialogs(part: SubFigure, height: float, left: float, examples: Sequence[Example]) -> None:
    """Questions below a picture, each with its answer to the right of it."""
    top = _SIDE + 0.38
    for example in examples:
        lines, y = _text(example), 1 - top / height
        style: dict[str, Any] = {"fontsize": 6.6, "va": "top", "linespacing": 1.1}
        part.text(left, y, "\n".join(lines), color=_INK, **style)
        answer = textwrap.shorten(example.gold, 14, placeholder="…").replace("$", r"\$")
        part.text(left + _ANSWER / (_COLUMN * _COLUMNS), y, answer, color=_ACCENT, weight="bold", **style)
        top += _LINE * len(lines)
