"""What a recipe may set: a parameter's type and bounds, as read from an annotation."""

from __future__ import annotations

import dataclasses
import math
import typing
from dataclasses import dataclass
from pathlib import Path
from types import UnionType
from typing import Any, Union


@dataclass(frozen=True)
class Range:
    """Bounds of a number, inclusive unless `open_low` or `open_high`: `Annotated[int, Range(1)]`."""

    low: float | None = None
    high: float | None = None
    open_low: bool = False
    open_high: bool = False

    def holds(self, value: float) -> bool:
        if isinstance(value, float) and not math.isfinite(value):  # nan is neither below nor above
            return False
        if self.low is not None and (value <= self.low if self.open_low else value < self.low):
            return False
        return self.high is None or value < self.high or (value == self.high and not self.open_high)

    def __str__(self) -> str:
        if self.high is None:
            return f"{'greater than' if self.open_low else 'at least'} {self.low:.12g}"
        if self.low is None:
            return f"at most {self.high:.12g}"
        to = "to below" if self.open_high else "to"
        return f"{'above' if self.open_low else 'from'} {self.low:.12g} {to} {self.high:.12g}"


@dataclass(frozen=True)
class Choices:
    """The values a string may take: `Annotated[str, Choices("sample", "batch")]`; same as `Literal`."""

    values: tuple[str, ...]

    def __init__(self, *values: str) -> None:
        object.__setattr__(self, "values", values)

    def __str__(self) -> str:
        return "one of " + ", ".join(self.values)


@dataclass(frozen=True)
class FilePath:
    """A path that must exist (empty = not given): `Annotated[str, FilePath()]`."""

    folder: bool = False

    def __str__(self) -> str:
        return "an existing folder" if self.folder else "an existing file"


@dataclass(frozen=True)
class Nested:
    """A list of component nodes: `Annotated[list[dict[str, Any]], Nested("encoder")]`.

    Each item is {name: ..., parameters ...}; `bind` hands the factory a list of bound factories.
    """

    kind: str

    def __str__(self) -> str:
        return f"a list of {self.kind} nodes, each with a name"


Constraint = Range | Choices | FilePath | Nested


@dataclass(frozen=True)
class Parameter:
    """One recipe parameter of a component or one field of the schema."""

    name: str
    type: Any
    default: Any
    constraints: tuple[Constraint, ...] = ()

    @property
    def required(self) -> bool:
        return self.default is dataclasses.MISSING


def split_annotation(hint: Any) -> tuple[Any, tuple[Constraint, ...]]:
    """A type hint -> (type that OmegaConf can hold, constraints).

    `Literal["a", "b"]` becomes (str, Choices("a", "b")); `Annotated` is unwrapped.
    """
    constraints: tuple[Constraint, ...] = ()
    if typing.get_origin(hint) is typing.Annotated:
        hint, *extras = typing.get_args(hint)
        constraints = tuple(e for e in extras if isinstance(e, Constraint))
    if typing.get_origin(hint) is typing.Literal:
        constraints += (Choices(*typing.get_args(hint)),)
        hint = str
    return hint, constraints


def holdable(hint: Any) -> bool:
    """Whether OmegaConf 2.3 can hold a value of this type in a structured config."""
    if hint in (int, float, bool, str, Path, Any, type(None)):
        return True
    origin, args = typing.get_origin(hint), typing.get_args(hint)
    if origin in (list, dict, Union, UnionType):
        return bool(args) and all(holdable(a) for a in args)
    return False
