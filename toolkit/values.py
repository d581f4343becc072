"""Whether a value fits its declared type and bounds."""

from __future__ import annotations

import dataclasses
import types
import typing
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from toolkit.explain import COMMAND_LINE, Problem, closest, given
from toolkit.register import Choices, FilePath, Parameter, Range


def type_text(hint: Any) -> str:
    """A type as users read it: int, str, list[str], int | None."""
    return (
        hint.__name__
        if isinstance(hint, type) and not typing.get_args(hint)
        else str(hint).replace("typing.", "")
    )


def check(value: Any, spec: Parameter, key: str, place: str) -> Iterator[Problem]:
    """The problems of one value, as a recipe or an override gives it."""
    held, wrong = convert(spec.type, value)
    if wrong:
        what = f"takes {type_text(spec.type)}, given {given(value)}"
        yield Problem(place, key, what, (), f"write {_example(spec, key, place)}")
        return
    for item in held if isinstance(held, list) else [held]:
        yield from _bounds(item, spec, key, place)


@cache
def _cell(hint: Any) -> type:
    return dataclasses.make_dataclass("Cell", [("value", hint, dataclasses.field(default="???"))])


def convert(hint: Any, value: Any) -> tuple[Any, bool]:
    """(value as the type holds it, whether it does not fit)."""
    if isinstance(hint, types.UnionType) and type(None) in hint.__args__ and value is None:
        return None, False
    if hint is bool and isinstance(value, int) and value not in (0, 1):
        return None, True
    cell = OmegaConf.structured(_cell(hint))
    try:
        cell.value = value
        return OmegaConf.to_container(cell)["value"], False  # type: ignore[call-overload, index]
    except (OmegaConfBaseException, ValueError, TypeError):
        return None, True


def _bounds(value: Any, spec: Parameter, key: str, place: str) -> Iterator[Problem]:
    for constraint in spec.constraints:
        if isinstance(constraint, Range) and isinstance(value, (int, float)) and not constraint.holds(value):
            fix = f"write a number {constraint}"
            yield Problem(place, key, f"given {value!r}, must be {constraint}", (), fix)
        elif isinstance(constraint, Choices) and value is not None and value not in constraint.values:
            near = tuple(closest(str(value), constraint.values))
            best = near[0] if near else constraint.values[0]
            fix = f"{key}={best}" if place == COMMAND_LINE else f"write `{key.rsplit('.', 1)[-1]}: {best}`"
            yield Problem(place, key, f"given {value!r}, must be {constraint}", near, fix)
        elif isinstance(constraint, FilePath) and value and not _present(str(value), constraint):
            near = tuple(_siblings(str(value)))
            yield Problem(
                place, key, f"{value!r} is not {constraint}", near, "give the path of one that exists"
            )


def _present(value: str, constraint: FilePath) -> bool:
    path = Path(value).expanduser()
    return path.is_dir() if constraint.folder else path.is_file()


def _siblings(value: str) -> list[str]:
    parent = Path(value).expanduser().parent
    return closest(value, [str(p) for p in parent.iterdir()]) if parent.is_dir() else []


def _example(spec: Parameter, key: str, place: str) -> str:
    bounds = next((str(c) for c in spec.constraints), "")
    samples = {int: "64", float: "0.001", bool: "true", str: "text", list[str]: "[a,b]"}
    sample = spec.default if isinstance(spec.default, (int, float, str)) and spec.default != "" else None
    text = (
        str(sample if sample is not None else samples.get(spec.type, "..."))
        .replace("True", "true")
        .replace("False", "false")
    )
    form = f"{key}={text}" if place == COMMAND_LINE else f"`{key.rsplit('.', 1)[-1]}: {text}`"
    return f"{form}{f' ({bounds})' if bounds else ''}, for example"
