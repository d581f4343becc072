"""A contact sheet of a data source: pictures of each split with questions, answers and a rendered prompt."""

from __future__ import annotations

import textwrap
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from data.images import decode
from data.index import FEATURE_KIND
from toolkit.data_samples import Rendering, described

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
_PROMPT = 64  # characters of a rendered prompt's line
_PROMPT_LINES = 9
_INK, _QUIET, _FAINT, _ACCENT = "#222222", "#666666", "#bbbbbb", "#0b5394"


def draw(title: str, readers: Mapping[str, ShardReader], path: Path, rendering: Rendering) -> Path:
    """Draws the first pictures of each split, a row each, to an image file and returns its path.

    Under a picture stand one question of each type, then further ones, with their expected answers, and
    the first question's prompt as the model reads it, with its number of positions.
    The suffix of `path` decides the format.
    """
    from matplotlib.figure import Figure

    shown = {split: _samples(reader) for split, reader in readers.items()}
    prompts = {
        split: [_prompt(rendering, asked[0]) for _, asked in samples] for split, samples in shown.items()
    }
    heights = [
        _SIDE + 0.55 + _LINE * max(_lines(e) + len(p) for (_, e), p in zip(samples, prompts[s], strict=True))
        for s, samples in shown.items()
    ]
    figure = Figure(figsize=(_COLUMN * _COLUMNS, sum(heights) + 0.35), facecolor="white")
    whole: Any = figure.subfigures(2, 1, height_ratios=[0.35, sum(heights)], hspace=0)
    whole[0].text(0.5, 0.4, title, ha="center", va="center", fontsize=13, color=_INK)
    parts = whole[1].subfigures(len(shown), 1, height_ratios=heights, squeeze=False, hspace=0)[:, 0]
    for part, height, (split, samples) in zip(parts, heights, shown.items(), strict=True):
        _row(part, height, f"{split} ({len(readers[split]):,} records)", samples, readers[split])
        for column, ((_, asked), lines) in enumerate(zip(samples, prompts[split], strict=True)):
            top = _SIDE + 0.48 + _LINE * _lines(asked)
            left, y = (column + 0.05) / _COLUMNS, 1 - top / height
            style: dict[str, Any] = {"fontsize": 5.2, "va": "top", "linespacing": 1.35, "color": _QUIET}
            part.text(left, y, "\n".join(lines), family="monospace", **style)
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


def _prompt(rendering: Rendering, example: Example) -> list[str]:
    """Lines of a rendered prompt and its count."""
    lines = [
        piece
        for line in described(rendering, example).replace("$", r"\$").split("\n")
        for piece in textwrap.wrap(line.strip(), _PROMPT, break_long_words=True)
    ]
    return lines if len(lines) <= _PROMPT_LINES else [*lines[: _PROMPT_LINES - 1], "..."]


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
        kind, data = next(iter(reader.images(record)), ("", b""))
        if kind not in ("", FEATURE_KIND):
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
