"""The closed world: every key must be declared, every value must fit its type and bounds."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from dataclasses import dataclass

from toolkit import values
from toolkit.explain import COMMAND_LINE, Problem, closest, given
from toolkit.layers import GROUPS, Choice, Layer, Plan, unknown_option
from toolkit.lines import Marked
from toolkit.register import Nested, Parameter, components
from toolkit.specs import HYDRA, Group, Open, Spec, exists, node_of, paths, unchosen, world


def check(plan: Plan) -> list[Problem]:
    """Every problem of a run's values, in reading order."""
    root = world(plan)
    problems: list[Problem] = []
    for layer in plan.layers:
        walker = _Walker(plan, layer, root)
        fields = {**root.fields, "hydra": HYDRA} if layer.from_file else root.fields
        problems += walker.group(layer.values, Group(fields, root.title), ())
    for given_ in plan.removed:
        if not exists(given_.key.split("."), root, plan):
            near = tuple("~" + path for path in closest(given_.key, paths(root, plan)))
            problems.append(Problem(given_.place, given_.key, "nothing there to remove", near, "drop it"))
        elif not (given_.key.startswith("stages.") and given_.key.count(".") == 1):
            fix = f"leave it out for its default, or write {given_.key}=VALUE"
            problems.append(Problem(given_.place, given_.key, "every run has it; only stages go", (), fix))
    for given_ in plan.added:
        if exists(given_.key.split("."), root, plan):
            fix = f"write {given_.text.removeprefix('+')}"
            problems.append(Problem(given_.place, given_.key, "is there already", (), fix))
    return problems


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
        elif name in self.plan.stages():
            return None
        else:
            fix = f"write stages.{[*near, *others, 'NAME'][0]}...; a new stage goes into a recipe"
        what = f"no such stage; stages: {', '.join(others)}"
        return Problem(node.place, f"stages.{name}", what, near, fix)

    def _forbidden(self, node: Marked, path: tuple[str, ...], spec: Group) -> Problem | None:
        key, dotted = path[-1], ".".join(path)
        if key.startswith("_") and key.endswith("_"):
            return Problem(
                node.place,
                dotted,
                "settings name no Python code",
                (),
                "choose a registered component by name",
            )
        if isinstance(node.value, str) and "${" in node.value:
            what = f"interpolation {node.value!r}: a recipe reads nothing from the environment or elsewhere"
            return Problem(node.place, dotted, what, (), "write the value itself")
        if spec.kind and key == "name":
            return self._by_hand(node, path, str(node.value))
        if dotted == "plugins" and self.layer.from_file:
            what = "a recipe cannot import code"
            return Problem(
                node.place, dotted, what, (), f"give plugins=[{_listed(node)}] on the command line"
            )
        return None

    def _by_hand(self, node: Marked, path: tuple[str, ...], option: str) -> Problem:
        kind = path[0]
        near = unknown_option(kind, Choice(option, node.place))
        form = (
            f"{kind}={option}"
            if node.place == COMMAND_LINE
            else f"`- override /{kind}: {option}` under defaults"
        )
        matches = near.matches if near is not None else ()
        return Problem(
            node.place, ".".join(path), f"{option!r} written by hand", matches, f"choose it with {form}"
        )

    def _not_a_group(self, node: Marked, spec: Group, path: tuple[str, ...]) -> Problem:
        if spec.kind and isinstance(node.value, (str, int, float)):
            return self._by_hand(node, path, str(node.value))
        inside = next(iter(spec.fields), "NAME")
        key = ".".join(path)
        return Problem(
            node.place,
            key,
            f"holds settings, given {given(node.value)}",
            (),
            f"set {key}.{inside} or others in it",
        )

    def _unknown(self, node: Marked, path: tuple[str, ...], spec: Group) -> Problem:
        key, dotted = path[-1], ".".join(path)
        if len(path) == 1 and key in GROUPS:
            return Problem(
                node.place, key, "is chosen, not set", (), f"choose it on the command line: {key}=NAME"
            )
        prefix = dotted[: -len(key)]
        near = [prefix + name for name in closest(key, spec.fields)]
        if len(path) == 1:
            near = closest(key, [*spec.fields, *(GROUPS if node.place == COMMAND_LINE else ())])
        same = [p for p in paths(self.root, self.plan) if p.rsplit(".", 1)[-1] == key]
        others = list(unchosen(key, self.plan))
        # A key that another choice of this very group has is nearer than one of its name elsewhere.
        here = [other for other in others if other.startswith(f"{path[0]}=")]
        matches = tuple(dict.fromkeys([*here, *same, *near, *others]))[:3]
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
        return (
            f"{best}={value}"
            if node.place == COMMAND_LINE
            else f"write `{best.rsplit('.', 1)[-1]}` under {_above(best)}"
        )

    def _leaf(self, node: Marked, spec: Parameter, path: tuple[str, ...]) -> Iterator[Problem]:
        key = ".".join(path)
        for part in _scalars(node):
            if isinstance(part.value, str) and "${" in part.value:
                yield Problem(
                    part.place,
                    key,
                    f"interpolation {part.value!r}: values are plain",
                    (),
                    "write the value itself",
                )
                return
        nested = next((c for c in spec.constraints if isinstance(c, Nested)), None)
        if nested is not None:
            yield from self._nested(node, nested, path)
            return
        yield from values.check(node.plain(), spec, key, node.place)

    def _nested(self, node: Marked, nested: Nested, path: tuple[str, ...]) -> Iterator[Problem]:
        """A list of component nodes."""
        kind, key = nested.kind, ".".join(path)
        if not isinstance(node.value, list):
            yield Problem(
                node.place,
                key,
                f"takes {nested}, given {given(node.plain())}",
                (),
                "write a list of `- name: ...`",
            )
            return
        for item in node.value:
            name = item.value.get("name") if isinstance(item.value, dict) else None
            if name is None:
                fix = f"write `name: ...` and its parameters; see `python -m toolkit.listing {kind}`"
                yield Problem(item.place, key, f"each item is one {kind} with a name", (), fix)
            elif (problem := unknown_option(kind, Choice(str(name.value), name.place))) is not None:
                yield dataclasses.replace(
                    problem, key=f"{key}.name", fix=f"see `python -m toolkit.listing {kind}`"
                )
            else:
                rest = Marked({k: v for k, v in item.value.items() if k != "name"}, item.place)
                yield from self.group(
                    rest,
                    Group(node_of(components(kind)[str(name.value)]).fields, f"{kind} {name.value!r}"),
                    path,
                )


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
