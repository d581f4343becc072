"""What may be set in a run: the schema and the chosen components as one tree of declared keys."""

from __future__ import annotations

import dataclasses
import typing
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from toolkit.layers import Plan
from toolkit.register import KINDS, Choices, Component, Parameter, components, split_annotation
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

HYDRA = Group(
    {
        "mode": Parameter("mode", str, None, (Choices("RUN", "MULTIRUN"),)),
        "sweeper": Group({"params": Parameter("params", dict[str, Any], None)}, "the sweep"),
    },
    "Hydra, as far as a recipe may set it",
)


def group_of(cls: type, title: str = "the schema") -> Group:
    """A schema dataclass as a tree of specs."""
    hints = typing.get_type_hints(cls, include_extras=True)
    return Group({f.name: _spec(f, hints[f.name]) for f in dataclasses.fields(cls)}, title)


def _spec(field: dataclasses.Field[Any], annotation: Any) -> Spec:
    held, constraints = split_annotation(annotation)
    if dataclasses.is_dataclass(held):
        return group_of(typing.cast(Any, held), f"'{field.name}'")
    args = typing.get_args(held)
    if args and dataclasses.is_dataclass(args[-1]):
        return Open(group_of(typing.cast(Any, args[-1]), "a stage"))
    return Parameter(field.name, held, field.default, constraints)


def world(plan: Plan) -> Group:
    """Everything that may be set in this run, given which components were chosen."""
    fields = dict(group_of(RunConf).fields)
    for kind in KINDS:
        fields[kind] = node_of(components(kind)[plan.choices[kind].option])
    return Group(fields, "the schema")


def node_of(component: Component) -> Group:
    return Group(component.parameters, f"{component.kind} {component.name!r}", component.kind)


def exists(parts: list[str], spec: Spec, plan: Plan) -> bool:
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


def unchosen(key: str, plan: Plan) -> Iterable[str]:
    """Components that were not chosen but have this parameter."""
    for kind in KINDS:
        for name, component in components(kind).items():
            if key in component.parameters and name != plan.choices[kind].option:
                yield f"{kind}={name} (which has it)"
