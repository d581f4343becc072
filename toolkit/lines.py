"""Reads YAML so that every key keeps its line: what lets an error say `file:line: key`."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from omegaconf._utils import get_yaml_loader

from toolkit.explain import COMMAND_LINE, Problem, fail


@dataclass(frozen=True)
class Marked:
    """A YAML value with its place. `value`: dict of Marked, list of Marked, or a plain scalar."""

    value: Any
    place: str

    def plain(self) -> Any:
        """The value without places."""
        if isinstance(self.value, dict):
            return {key: item.plain() for key, item in self.value.items()}
        if isinstance(self.value, list):
            return [item.plain() for item in self.value]
        return self.value


def shown(path: Path) -> str:
    """A path as a message prints it: relative to the working directory where that is shorter."""
    relative = os.path.relpath(path)
    return relative if len(relative) < len(str(path)) else str(path)


def mark(value: Any, place: str = COMMAND_LINE) -> Marked:
    """Plain values -> Marked, all with one place (what a command line gives)."""
    if isinstance(value, dict):
        return Marked({str(key): mark(item, place) for key, item in value.items()}, place)
    if isinstance(value, list):
        return Marked([mark(item, place) for item in value], place)
    return Marked(value, place)


def load(path: Path) -> Marked:
    """A YAML file as Marked mappings. Syntax errors and duplicate keys raise BadRecipe with the line."""
    loader = get_yaml_loader()(path.read_text(encoding="utf-8"))
    try:
        node = loader.get_single_node()
        if node is None:
            return Marked({}, f"{shown(path)}:1")
        if not isinstance(node, yaml.MappingNode):
            raise fail(
                f"{shown(path)}:{node.start_mark.line + 1}",
                "",
                "a recipe is a mapping of keys to values",
                fix="write `key: value` lines",
            )
        return _marked(loader, node, shown(path))
    except yaml.MarkedYAMLError as error:
        at = error.problem_mark or error.context_mark
        line = at.line + 1 if at else 1
        raise fail(
            f"{shown(path)}:{line}", "", f"not valid YAML: {error.problem}", fix=_syntax_hint(path, line)
        ) from error
    finally:
        loader.dispose()


def _syntax_hint(path: Path, line: int) -> str:
    lines = path.read_text(encoding="utf-8").splitlines()
    text = lines[min(line, len(lines)) - 1] if lines else ""
    if "\t" in text:
        return "indent with spaces, YAML refuses tabs"
    return f"look at line {line} and the one before it: {text.strip()[:60]!r}"


def _marked(loader: Any, node: yaml.Node, file: str) -> Marked:
    place = f"{file}:{node.start_mark.line + 1}"
    if node.tag.startswith("tag:yaml.org,2002:python"):
        raise fail(place, "", f"the tag {node.tag!r} runs Python", fix="a recipe holds plain values only")
    if isinstance(node, yaml.SequenceNode):
        return Marked([_marked(loader, item, file) for item in node.value], place)
    if not isinstance(node, yaml.MappingNode):
        return Marked(loader.construct_object(node, deep=True), place)
    out: dict[str, Marked] = {}
    for key_node, value_node in node.value:
        key, line = str(key_node.value), key_node.start_mark.line + 1
        if key in out:
            before = out[key].place.rsplit(":", 1)[1]
            raise fail(
                f"{file}:{line}", key, f"given twice, first in line {before}", fix="remove one of the two"
            )
        item = _marked(loader, value_node, file)
        out[key] = Marked(item.value, f"{file}:{line}")
    return Marked(out, place)


def line_of(path: Path, key: str) -> int | None:
    """The line (from 1) of a dotted key in a YAML file, None where the file does not hold it."""
    node = load(path)
    for part in key.split("."):
        if not isinstance(node.value, dict) or part not in node.value:
            return None
        node = node.value[part]
    return int(node.place.rsplit(":", 1)[1])


__all__ = ["Marked", "Problem", "line_of", "load", "mark", "shown"]
