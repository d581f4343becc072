"""The closed world: every key must be declared, every value must fit its type and bounds."""

from __future__ import annotations

import dataclasses
import types
import typing
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from toolkit.explain import COMMAND_LINE, Problem, closest, given
from toolkit.layers import GROUPS, Choice, Layer, Plan, unknown_option
from toolkit.lines import Marked
from toolkit.register import (
    KINDS,
    Choices,
    Component,
    FilePath,
    Nested,
    Parameter,
    Range,
    components,
    split_annotation,
)
from toolkit.schema import RunConf


@dataclass(frozen=True)
class Group:
    """A mapping with declared keys. `kind` where it is a component's node."""

    fields: Mapping[str, Spec]
    title: str
    kind: str = ""


@dataclass(frozen=True)
class Open:
    """A mapping whose keys are names of the user's own, e.g. stages."""

    item: Group


Spec = Group | Open | Parameter

_HYDRA = Group(
    {
        "mode": Parameter("mode", str, None, (Choices("RUN", "MULTIRUN"),)),
        "sweeper": Group({"params": Parameter("params", dict[str, Any], None)}, "the sweep"),
    },
    "Hydra, as far as a recipe may set it",
)


def type_text(hint: Any) -> str:
    """A type as users read it: int, str, list[str], int | None."""
    return hint.__name__ if isinstance(hint, type) and not typing.get_args(hint) else str(hint).replace("typing.", "")


@cache
def group_of(cls: type, title: str = "the schema") -> Group:
    """A schema dataclass as a tree of specs."""
    hints = typing.get_type_hints(cls, include_extras=True)
    return Group({f.name: _spec(f, hints[f.name]) for f in dataclasses.fields(cls)}, title)


def _spec(field: dataclasses.Field[Any], annotation: Any) -> Spec:
    held, constraints = split_annotation(annotation)
    if dataclasses.is_dataclass(held):
        return group_of(typing.cast(type, held), f"'{field.name}'")
    args = typing.get_args(held)
    if args and dataclasses.is_dataclass(args[-1]):
        return Open(group_of(args[-1], "a stage"))
    return Parameter(field.name, held, field.default, constraints)


def world(plan: Plan) -> Group:
    """Everything that may be set in this run, given which components were chosen."""
    fields = dict(group_of(RunConf).fields)
    for kind in KINDS:
        fields[kind] = node_of(components(kind)[plan.choices[kind].option])
    return Group(fields, "the schema")


def node_of(component: Component) -> Group:
    return Group(component.parameters, f"{component.kind} {component.name!r}", component.kind)


def check(plan: Plan) -> list[Problem]:
    """Every problem of a run's values, in reading order."""
    root, problems = world(plan), []
    for layer in plan.layers:
        walker = _Walker(plan, layer, root)
        fields = {**root.fields, "hydra": _HYDRA} if layer.from_file else root.fields
        problems += walker.group(layer.values, Group(fields, root.title), ())
    for given_ in plan.removed:
        if not _exists(given_.key.split("."), root, plan):
            near = tuple("~" + path for path in closest(given_.key, paths(root, plan)))
            problems.append(Problem(given_.place, given_.key, "nothing there to remove", near, "drop it"))
    return problems


def _exists(parts: list[str], spec: Spec, plan: Plan) -> bool:
    for part in parts:
        if isinstance(spec, Open) and part in plan.stages():
            spec = spec.item
        elif isinstance(spec, Group) and part in spec.fields:
            spec = spec.fields[part]
        else:
            return False
    return True


def paths(spec: Spec, plan: Plan, head: str = "") -> Iterator[str]:
    """Every dotted key below a spec."""
    if isinstance(spec, Parameter):
        return
    items = {n: spec.item for n in plan.stages()} if isinstance(spec, Open) else spec.fields
    for name, item in items.items():
        yield head + name
        yield from paths(item, plan, f"{head}{name}.")


@dataclass(frozen=True)
class _Walker:
    """Walks one layer along the specs."""

    plan: Plan
    layer: Layer
    root: Group

    def group(self, node: Marked, spec: Group, path: tuple[str, ...]) -> Iterator[Problem]:
        if not isinstance(node.value, dict):
            yield self._not_a_group(node, spec, path)
            return
        for key, item in node.value.items():
            here = (*path, key)
            if (problem := self._forbidden(item, here, spec)) is not None:
                yield problem
            elif key not in spec.fields:
                yield self._unknown(item, here, spec)
            else:
                yield from self._any(item, spec.fields[key], here)

    def _any(self, node: Marked, spec: Spec, path: tuple[str, ...]) -> Iterator[Problem]:
        if isinstance(spec, Group):
            yield from self.group(node, spec, path)
        elif isinstance(spec, Open):
            yield from self._open(node, spec, path)
        else:
            yield from self._leaf(node, spec, path)

    def _open(self, node: Marked, spec: Open, path: tuple[str, ...]) -> Iterator[Problem]:
        if not isinstance(node.value, dict):
            yield self._not_a_group(node, Group({}, "'stages'"), path)
            return
        for name, item in node.value.items():
            if (problem := self._new_stage(name, item)) is not None:
                yield problem
            else:
                yield from self.group(item, spec.item, (*path, name))

    def _new_stage(self, name: str, node: Marked) -> Problem | None:
        """A stage that is new: meant, or a slip that would train a stage too many?"""
        others = [stage for stage in self.plan.stages() if stage != name]
        near = tuple(closest(name, others))
        if self.layer.from_file:
            first = next((s for s in self.plan.stages() if s in (name, *near)), name)
            if not near or first == name:
                return None
            fix = f"write `{near[0]}`, or give a new stage a name less like it"
        elif name in self.plan.stages() or self.layer.adds:
            return None
        else:
            fix = f"write stages.{near[0] if near else others[0]}..., or +stages.{name}... for a new stage"
        return Problem(node.place, f"stages.{name}", f"no such stage; stages: {', '.join(others)}", near, fix)

    def _forbidden(self, node: Marked, path: tuple[str, ...], spec: Group) -> Problem | None:
        key, dotted = path[-1], ".".join(path)
        if key.startswith("_") and key.endswith("_"):
            return Problem(node.place, dotted, "settings name no Python code", (), "choose a registered component by name")
        if isinstance(node.value, str) and "${" in node.value:
            what = f"interpolation {node.value!r}: a recipe reads nothing from the environment or elsewhere"
            return Problem(node.place, dotted, what, (), "write the value itself")
        if spec.kind and key == "name":
            return self._by_hand(node, path, str(node.value))
        if dotted == "plugins" and self.layer.from_file:
            what = "a recipe cannot import code"
            return Problem(node.place, dotted, what, (), f"give plugins=[{_listed(node)}] on the command line")
        return None

    def _by_hand(self, node: Marked, path: tuple[str, ...], option: str) -> Problem:
        kind = path[0]
        near = unknown_option(kind, Choice(option, node.place))
        form = f"{kind}={option}" if node.place == COMMAND_LINE else f"`- override /{kind}: {option}` under defaults"
        matches = near.matches if near is not None else ()
        return Problem(node.place, ".".join(path), f"{option!r} written by hand", matches, f"choose it with {form}")

    def _not_a_group(self, node: Marked, spec: Group, path: tuple[str, ...]) -> Problem:
        if spec.kind and isinstance(node.value, (str, int, float)):
            return self._by_hand(node, path, str(node.value))
        inside = next(iter(spec.fields), "NAME")
        key = ".".join(path)
        return Problem(node.place, key, f"holds settings, given {given(node.value)}", (), f"set {key}.{inside} or others in it")

    def _unknown(self, node: Marked, path: tuple[str, ...], spec: Group) -> Problem:
        key, dotted = path[-1], ".".join(path)
        if len(path) == 1 and key in GROUPS:
            return Problem(node.place, key, "is chosen, not set", (), f"choose it on the command line: {key}=NAME")
        prefix = dotted[: -len(key)]
        near = [prefix + name for name in closest(key, spec.fields)]
        if len(path) == 1:
            near = closest(key, [*spec.fields, *(GROUPS if node.place == COMMAND_LINE else ())])
        same = [p for p in paths(self.root, self.plan) if p.rsplit(".", 1)[-1] == key]
        unchosen = list(_unchosen(key, self.plan))
        matches = tuple(dict.fromkeys([*same, *near, *unchosen]))[:3]
        matches = matches or tuple(closest(dotted, paths(self.root, self.plan)))
        what = f"no such key in {spec.title} (given {given(node.plain())})"
        return Problem(node.place, dotted, what, matches, self._fix(matches, node, spec))

    def _fix(self, matches: tuple[str, ...], node: Marked, spec: Group) -> str:
        if not matches:
            return f"keys of {spec.title}: {', '.join(spec.fields) or 'none'}"
        best = matches[0]
        if best.endswith(")"):
            return f"choose {best.partition(' (')[0]} first, or drop the key"
        value = node.value if isinstance(node.value, (str, int, float, bool)) else "..."
        return f"{best}={value}" if node.place == COMMAND_LINE else f"write `{best.rsplit('.', 1)[-1]}` under {_above(best)}"

    def _leaf(self, node: Marked, spec: Parameter, path: tuple[str, ...]) -> Iterator[Problem]:
        key = ".".join(path)
        for part in _scalars(node):
            if isinstance(part.value, str) and "${" in part.value:
                yield Problem(part.place, key, f"interpolation {part.value!r}: values are plain", (), "write the value itself")
                return
        nested = next((c for c in spec.constraints if isinstance(c, Nested)), None)
        if nested is not None:
            yield from self._nested(node, nested, path)
            return
        value, wrong = convert(spec.type, node.plain())
        if wrong:
            fix = f"write {_example(spec, key, node.place)}"
            yield Problem(node.place, key, f"takes {type_text(spec.type)}, given {given(node.plain())}", (), fix)
            return
        for item in value if isinstance(value, list) else [value]:
            yield from _bounds(item, spec, key, node.place)

    def _nested(self, node: Marked, nested: Nested, path: tuple[str, ...]) -> Iterator[Problem]:
        """A list of component nodes."""
        kind, key = nested.kind, ".".join(path)
        if not isinstance(node.value, list):
            yield Problem(node.place, key, f"takes {nested}, given {given(node.plain())}", (), "write a list of `- name: ...`")
            return
        for item in node.value:
            name = item.value.get("name") if isinstance(item.value, dict) else None
            if name is None:
                fix = f"write `name: ...` and its parameters; see `python -m toolkit.listing {kind}`"
                yield Problem(item.place, key, f"each item is a {kind} with a name", (), fix)
            elif (problem := unknown_option(kind, Choice(str(name.value), name.place))) is not None:
                yield dataclasses.replace(problem, key=f"{key}.name", fix=f"see `python -m toolkit.listing {kind}`")
            else:
                rest = Marked({k: v for k, v in item.value.items() if k != "name"}, item.place)
                yield from self.group(rest, Group(node_of(components(kind)[str(name.value)]).fields, f"{kind} {name.value!r}"), path)


def _listed(node: Marked) -> str:
    return ",".join(str(p.value) for p in _scalars(node))


def _scalars(node: Marked) -> Iterator[Marked]:
    if isinstance(node.value, (dict, list)):
        for item in node.value.values() if isinstance(node.value, dict) else node.value:
            yield from _scalars(item)
    else:
        yield node


def _above(path: str) -> str:
    return f"`{path.rsplit('.', 1)[0]}`" if "." in path else "no other key, at the left margin"


def _unchosen(key: str, plan: Plan) -> Iterable[str]:
    """Components that were not chosen but have this parameter."""
    for kind in KINDS:
        for name, component in components(kind).items():
            if key in component.parameters and name != plan.choices[kind].option:
                yield f"{kind}={name} (which has it)"


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
            yield Problem(place, key, f"{value!r} is not {constraint}", near, "give the path of one that exists")


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
    text = str(sample if sample is not None else samples.get(spec.type, "...")).replace("True", "true").replace("False", "false")
    form = f"{key}={text}" if place == COMMAND_LINE else f"`{key.rsplit('.', 1)[-1]}: {text}`"
    return f"{form}{f' ({bounds})' if bounds else ''}, for example"
