"""What `data=scenes` can be told, and what of it goes together."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from math import comb

from data.sources import digits
from data.sources.raster import COLORS, SHAPES

TYPES = {
    "ray": ("ray_row", "ray_column"),
    "count": ("count",),
    "edge": ("edge_row", "edge_column"),
    "at": ("at",),
    "order": ("order",),
}
"""Question type -> the kinds that are counted and reported apart."""

COUNTS = ("1", "2", "3")
"""What is asked for by `count`: other numbers are too rare to come equally often."""

SPLITS = ("train", "val", "test", "test_large")
HELD_OUT = 8
"""Of so many layouts one is the test's and one the validation's."""


@dataclass(frozen=True)
class Board:
    """What one split draws: a grid, how many objects lie on it, and how many pictures there are."""

    grid: int
    least: int
    most: int
    pictures: int


@dataclass(frozen=True)
class Options:
    """The options of `data.sources.scenes`; raises ValueError where they do not go together."""

    grid: int
    large_grid: int
    min_objects: int
    max_objects: int
    objects: str
    colors: int
    shapes: int
    ask: str
    types: tuple[str, ...]
    questions: int
    image_size: int
    jitter: bool
    train_pictures: int
    test_pictures: int
    seed: int

    def __post_init__(self) -> None:
        self._check_types()
        self._check_objects()
        self._check_room()
        for split in SPLITS:
            self._check_layouts(split)

    @cached_property
    def color_names(self) -> tuple[str, ...]:
        return tuple(COLORS)[: self.colors]

    @cached_property
    def names(self) -> tuple[str, ...]:
        """What an object can be: names of shapes, digits."""
        shapes = SHAPES[: self.shapes] if self.objects != "digits" else ()
        return (*shapes, *(digits.NAMES if self.objects != "shapes" else ()))

    @cached_property
    def kinds(self) -> tuple[str, ...]:
        return tuple(kind for name in TYPES if name in self.types for kind in TYPES[name])

    @property
    def large(self) -> int:
        """Side of the large grid."""
        return self.large_grid or self.grid + 1

    def answers(self, kind: str) -> tuple[str, ...]:
        """What a question of this kind can have as its answer."""
        if kind == "count":
            return COUNTS
        return self.color_names if self.ask == "color" else self.names

    def board(self, split: str) -> Board:
        """The large grid is as densely filled as the others."""
        pictures = self.train_pictures if split == "train" else self.test_pictures
        if split != "test_large":
            return Board(self.grid, self.min_objects, self.max_objects, pictures)
        area, old = self.large**2, self.grid**2
        return Board(self.large, self.min_objects * area // old, self.max_objects * area // old, pictures)

    def _check_types(self) -> None:
        if not self.types or len(set(self.types)) < len(self.types):
            raise ValueError(
                f"data.types={list(self.types)} must name each question type once, at least one of "
                f"{', '.join(TYPES)}; write data.types=[edge,count]"
            )
        if "count" in self.types and self.max_objects < len(COUNTS):
            raise ValueError(
                f"data.max_objects={self.max_objects} leaves nothing to count up to {COUNTS[-1]}; write "
                f"data.max_objects={len(COUNTS) + 2} or more, or take count out of data.types"
            )

    def _check_objects(self) -> None:
        cells = self.grid**2
        if self.min_objects > self.max_objects:
            raise ValueError(
                f"data.min_objects={self.min_objects} is more than data.max_objects={self.max_objects}; "
                f"write data.min_objects={self.max_objects} or less"
            )
        if self.max_objects > cells:
            raise ValueError(
                f"data.max_objects={self.max_objects} do not fit on data.grid={self.grid}, which has {cells} "
                f"cells; write data.max_objects={cells // 2}, or a larger data.grid"
            )
        if self.objects != "shapes":
            digits.require()

    def _check_room(self) -> None:
        if self.large <= self.grid:
            raise ValueError(
                f"data.large_grid={self.large} must be larger than data.grid={self.grid}, for test_large is "
                f"to be the harder split; write data.large_grid={self.grid + 1} or more"
            )
        least = 10 if self.objects == "shapes" else 12
        enough = -(-least * self.large // 16) * 16
        if self.image_size // self.large < least:
            raise ValueError(
                f"data.image_size={self.image_size} leaves {self.image_size // self.large} pixels a cell on "
                f"the {self.large} x {self.large} grid of test_large; to tell {self.objects} apart takes "
                f"{least}: write data.image_size={enough} or more, or smaller grids"
            )

    def _check_layouts(self, split: str) -> None:
        board = self.board(split)
        kinds, cells = self.colors * len(self.names), board.grid**2
        layouts = sum(comb(cells, n) * kinds**n for n in range(board.least, board.most + 1))
        if board.pictures * 4 * HELD_OUT > layouts:
            key = "train_pictures" if split == "train" else "test_pictures"
            raise ValueError(
                f"data.{key}={board.pictures:,} are too many: {board.least} to {board.most} objects of "
                f"{kinds} kinds on a {board.grid} x {board.grid} grid make only {layouts:,} different "
                f"pictures; write data.{key}={layouts // (4 * HELD_OUT)} or less, or more data.max_objects"
            )
