"""The questions about a scene, in words, and which of them are asked so that guessing does not pay."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from data.sources.scene_options import COUNTS, Options
from data.sources.stream import Stream


@dataclass(frozen=True)
class Thing:
    """An object on the grid; rows and columns count from 1 at the top left."""

    row: int
    column: int
    color: str
    name: str

    @property
    def words(self) -> str:
        return f"{self.color} {self.name}"


@dataclass(frozen=True)
class Question:
    """A question, its kind and its answer."""

    kind: str
    text: str
    answer: str


_RAYS = (
    ("ray_row", "left of", 0, -1),
    ("ray_row", "right of", 0, 1),
    ("ray_column", "above", -1, 0),
    ("ray_column", "below", 1, 0),
)
_EDGES = (
    ("edge_row", "row", ("leftmost", "rightmost")),
    ("edge_column", "column", ("topmost", "bottommost")),
)


def all_questions(things: Sequence[Thing], options: Options) -> Iterator[Question]:
    """Every question that can be asked about a scene, of every kind; no text twice.

    things: in reading order. Rows and columns beyond `options.grid` are never named, because training
    never names them.
    """
    counts = Counter(t.words for t in things)
    single = [t for t in things if counts[t.words] == 1]  # only these can be named
    for find in (_rays, _order):
        yield from find(things, single, options)
    for find_places in (_edges, _at):
        yield from find_places(things, options)
    yield from _counts(things, options)


def _open(kind: str, rest: str, answer: Thing, options: Options) -> Question:
    if options.ask == "color":
        return Question(kind, f"what color is the {rest}?", answer.color)
    return Question(kind, f"what is the {rest}?", answer.name)


def _rays(things: Sequence[Thing], single: Sequence[Thing], options: Options) -> Iterator[Question]:
    """The first thing that one meets going from a thing in a straight line."""
    for start in single:
        for kind, where, down, right in _RAYS:
            met = [t for t in things if _ahead(start, t, down, right)]
            if met:
                first = min(met, key=lambda t: abs(t.row - start.row) + abs(t.column - start.column))
                yield _open(kind, f"first thing {where} the {start.words}", first, options)


def _ahead(start: Thing, thing: Thing, down: int, right: int) -> bool:
    rows, columns = thing.row - start.row, thing.column - start.column
    return (rows * down > 0 and columns == 0) or (columns * right > 0 and rows == 0)


def _order(things: Sequence[Thing], single: Sequence[Thing], options: Options) -> Iterator[Question]:
    """The neighbours of a thing when the scene is read row by row, each from left to right."""
    for i, thing in enumerate(things):
        if thing not in single:
            continue
        for where, j in (("before", i - 1), ("after", i + 1)):
            if 0 <= j < len(things):
                yield _open(
                    "order", f"thing just {where} the {thing.words} in reading order", things[j], options
                )


def _edges(things: Sequence[Thing], options: Options) -> Iterator[Question]:
    """The first and last thing of a row or column that holds at least two."""
    for kind, line, ends in _EDGES:
        for number in range(1, options.grid + 1):
            inside = [t for t in things if (t.row if line == "row" else t.column) == number]
            if len(inside) > 1:
                for end, thing in zip(ends, (inside[0], inside[-1]), strict=True):
                    yield _open(kind, f"{end} thing in {line} {number}", thing, options)


def _at(things: Sequence[Thing], options: Options) -> Iterator[Question]:
    for t in things:
        if max(t.row, t.column) <= options.grid:
            yield _open("at", f"thing at row {t.row}, column {t.column}", t, options)


def _counts(things: Sequence[Thing], options: Options) -> Iterator[Question]:
    colors, names = Counter(t.color for t in things), Counter(t.name for t in things)
    found = [(f"{color} things", n) for color, n in colors.items()]
    found += [(_plural(name), n) for name, n in names.items()]
    for what, n in found:
        if str(n) in COUNTS:
            yield Question("count", f"how many {what} are there?", str(n))


def _plural(name: str) -> str:
    return name + ("es" if name.endswith("s") else "s")


class Balance:
    """Chooses questions so that every answer to the same words comes equally often in a split.

    Then neither the most frequent answer nor the words alone tell more than chance. A question is left
    out while its answer is ahead of another answer to the same words by more than one.
    """

    def __init__(self, options: Options) -> None:
        self._options = options
        self._asked: defaultdict[tuple[str, str], Counter[str]] = defaultdict(Counter)
        self.lacking: Counter[str] = Counter()
        """Kind -> scenes that were refused for want of questions of this kind."""

    def choose(self, found: Sequence[Question], stream: Stream) -> list[Question] | None:
        """`options.questions` of each kind, the most needed first; None if the scene has too few."""
        chosen: list[Question] = []
        for kind in self._options.kinds:
            fitting = [(self._times(q), stream.below(1 << 32), q) for q in found if q.kind == kind]
            wanted = [item for item in fitting if self._needed(item[2], item[0])]
            if len(wanted) < self._options.questions:
                self.lacking[kind] += 1
                return None
            wanted.sort(key=lambda item: item[:2])
            chosen += [question for *_, question in wanted[: self._options.questions]]
        for q in chosen:
            self._asked[q.kind, q.text][q.answer] += 1
        return chosen

    def _times(self, q: Question) -> int:
        return self._asked[q.kind, q.text][q.answer]

    def _needed(self, q: Question, times: int) -> bool:
        asked = self._asked[q.kind, q.text]
        return times <= 1 + min(asked[answer] for answer in self._options.answers(q.kind))
