"""Which files and overrides make up a run, weakest first, each value with its place.

Hydra merges; this module follows the same rules on the side, because only here every value still
knows its file and line. Order of strength: scale, base recipes, recipe, command line.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override
from hydra.errors import HydraException

from toolkit import recipes
from toolkit.explain import COMMAND_LINE, BadRecipe, Problem, closest, fail
from toolkit.lines import Marked, load, mark
from toolkit.register import KINDS, components

GROUPS = (*KINDS, "scale", "recipe")


@dataclass(frozen=True)
class Given:
    """One `key=value` with its place: the command line, or a table recipe's sweep."""

    override: Override
    place: str = COMMAND_LINE

    @property
    def key(self) -> str:
        return self.override.key_or_group

    @property
    def text(self) -> str:
        return str(self.override.input_line)


@dataclass(frozen=True)
class Choice:
    """Which option of a group was chosen, and where."""

    option: str
    place: str


@dataclass(frozen=True)
class Layer:
    """Values of one file or one override."""

    values: Marked
    from_file: bool = True


@dataclass
class Plan:
    """Everything one run is made of."""

    recipe: str
    choices: dict[str, Choice]
    layers: list[Layer]
    removed: list[Given] = field(default_factory=list)
    added: list[Given] = field(default_factory=list)  # with a plus sign

    def values(self, *path: str) -> Iterator[Marked]:
        """The values that the layers give under a path, weakest first."""
        for layer in self.layers:
            node: Marked | None = layer.values
            for part in path:
                node = node.value.get(part) if node is not None and isinstance(node.value, dict) else None
            if node is not None:
                yield node

    def stages(self) -> list[str]:
        """Names of the stages that scale and recipes define."""
        found = [name for layer in self.layers if layer.from_file for name in _keys(layer.values, "stages")]
        return list(dict.fromkeys(found))


def _keys(values: Marked, key: str) -> Iterable[str]:
    node = values.value.get(key)
    return node.value if node is not None and isinstance(node.value, dict) else ()


@dataclass(frozen=True)
class _Source:
    """One recipe or scale file: what it includes, what it chooses, what it sets."""

    includes: tuple[tuple[str, str], ...]
    choices: Mapping[str, Choice]
    values: Marked
    place: str


def parse(texts: Sequence[str], place: str = COMMAND_LINE) -> list[Given]:
    """`key=value` texts -> overrides. Raises BadRecipe for what is not one."""
    parser, found = OverridesParser.create(), []
    for text in texts:
        key = text.partition("=")[0]
        if "=" not in text and not text.startswith("~"):
            near = [f"recipe={name}" for name in closest(text, recipes.names())]
            raise fail(place, text, "not a setting", matches=near, fix="write key=value, for example scan=2d")
        try:
            override = parser.parse_override(text)
        except HydraException as error:
            reason = str(error).splitlines()[0]
            raise fail(
                place, key, f"cannot read {text!r}: {reason}", fix=f"quote the value: {key}='\"...\"'"
            ) from error
        found.append(Given(override, place))
    return found


def resolve(given: Sequence[Given]) -> Plan:
    """Follows the defaults lists. Raises BadRecipe for unknown recipes, options and bad entries."""
    choices = _root_choices()
    picked = {g.key: _chosen(g) for g in given if g.key in GROUPS}
    recipe = picked.get("recipe", choices["recipe"])
    chain = list(_chain("recipe", recipe.option, recipe.place, "recipe={}", ()))
    from_recipes: dict[str, Choice] = {}
    for source in chain:
        from_recipes.update(source.choices)
    scale = picked.get("scale", from_recipes.get("scale", choices["scale"]))
    sources = list(_chain("scale", scale.option, scale.place, "scale={}", ()))
    for source in sources:
        choices.update(source.choices)
    choices |= from_recipes | {"scale": scale} | picked
    problems = [p for kind in KINDS if (p := unknown_option(kind, choices[kind])) is not None]
    if problems:
        raise BadRecipe(problems)
    _refuse_empty(recipe.option, chain[-1])
    layers = [Layer(_suited(source, choices)) for source in sources]
    layers += [Layer(source.values) for source in chain]
    layers += [_layer(g) for g in given if g.key not in GROUPS and not g.override.is_delete()]
    removed = [g for g in given if g.override.is_delete()]
    return Plan(recipe.option, choices, layers, removed, [g for g in given if g.override.is_add()])


def _suited(scale: _Source, choices: Mapping[str, Choice]) -> Marked:
    """A scale's values without those of components that a recipe or the command line replaced."""
    own = {kind: choice.option for kind, choice in scale.choices.items()}
    chosen = {kind: choice.option for kind, choice in choices.items()}
    return Marked(recipes.suited(scale.values.value, own, chosen), scale.values.place)


def _layer(given: Given) -> Layer:
    value: Any = given.override.value()
    for part in reversed(given.key.split(".")):
        value = {part: value}
    return Layer(mark(value, given.place), from_file=False)


def _root_choices() -> dict[str, Choice]:
    """The options that `conf/run.yaml` chooses."""
    entries = load(recipes.CONF / "run.yaml").value["defaults"].value
    pairs = [
        (key, item) for entry in entries if isinstance(entry.value, dict) for key, item in entry.value.items()
    ]
    return {key: Choice(str(item.value), item.place) for key, item in pairs if key in GROUPS}


def _chosen(given: Given) -> Choice:
    """A group override of the command line -> choice. Raises for `+scan=`, `~scan`, lists and nothing."""
    value, key = given.override.value(), given.key
    if given.override.is_delete():
        raise fail(given.place, key, "a run needs one of each group", fix=f"drop `{given.text}`")
    if given.override.is_add() or given.override.is_force_add() or given.override.package:
        raise fail(given.place, key, f"given as {given.text!r}", fix=f"write {key}={value}")
    if value is None or isinstance(value, (list, dict)):
        raise fail(
            given.place, key, f"takes one name, given {value!r}", fix=f"see `python -m toolkit.listing {key}`"
        )
    return Choice(str(value), given.place)


def _chain(group: str, name: str, place: str, fix: str, above: tuple[str, ...]) -> Iterator[_Source]:
    """A file's bases, weakest first, then the file."""
    if name in above:
        raise fail(
            place,
            "defaults",
            f"{group} {name!r} includes itself: {' > '.join((*above, name))}",
            fix="remove it",
        )
    path = _file(group, name, place, fix)
    source = _read(group, path)
    for base, at in source.includes:
        yield from _chain(group, base, at, f"write `/{group}/{{}}`", (*above, name))
    yield source


def _file(group: str, name: str, place: str, fix: str) -> Path:
    if group == "scale":
        path = recipes.SCALES / f"{name}.yaml"
        if path.is_file():
            return path
        known = scales()
        raise fail(
            place,
            "scale",
            f"no scale {name!r}",
            matches=closest(name, known),
            fix=f"one of {', '.join(known)}",
        )
    other = unknown_option("recipe", Choice(name, place), known=recipes.names())
    if other is not None and "=" in "".join(other.matches):
        raise BadRecipe([other])
    return recipes.path_of(name, place=place, fix=fix)


def scales() -> list[str]:
    """Names of the experiment sizes."""
    return sorted(file.stem for file in recipes.SCALES.glob("*.yaml"))


def _read(group: str, path: Path) -> _Source:
    node = load(path)
    defaults = node.value.get("defaults", Marked([], node.place))
    if not isinstance(defaults.value, list):
        raise fail(
            defaults.place,
            "defaults",
            "takes a list",
            fix=f"write `- /{group}/...` or `- override /scan: 2d` lines",
        )
    includes: list[tuple[str, str]] = []
    choices: dict[str, Choice] = {}
    for entry in defaults.value:
        if isinstance(entry.value, dict):
            kind, choice = _choose(group, entry)
            choices[kind] = choice
        elif choices:
            raise fail(
                entry.place, "defaults", f"{entry.value!r} stands after an override", fix="put it first"
            )
        else:
            includes.append((_include(group, entry), entry.place))
    values = Marked({key: item for key, item in node.value.items() if key != "defaults"}, node.place)
    return _Source(tuple(includes), choices, values, node.place)


def _include(group: str, entry: Marked) -> str:
    """`/recipe/ablation/base` -> `ablation/base`."""
    text = str(entry.value)
    if text == "_self_":
        raise fail(
            entry.place,
            "defaults",
            "`_self_` is not needed: a file's own values come last",
            fix="remove the line",
        )
    prefix = f"/{group}/"
    if not text.startswith(prefix):
        known = recipes.names() if group == "recipe" else scales()
        near = [
            prefix + name for name in closest(re.sub(r"^[./]+", "", text).removeprefix(f"{group}/"), known)
        ]
        raise fail(
            entry.place,
            "defaults",
            f"{text!r} is not a path from the root",
            matches=near,
            fix=f"write `- {near[0] if near else prefix + '...'}`",
        )
    return text.removeprefix(prefix)


def _choose(group: str, entry: Marked) -> tuple[str, Choice]:
    """`override /scan: 2d` -> ("scan", 2d)."""
    (text, item), *rest = entry.value.items()
    if rest:
        raise fail(entry.place, "defaults", "one entry a line", fix="start each with `- `")
    kind = text.removeprefix("override ").strip().removeprefix("/")
    allowed = [g for g in GROUPS if g not in ("recipe", *(("scale",) if group == "scale" else ()))]
    if kind not in allowed:
        near = [f"override /{k}" for k in closest(kind, allowed)]
        hint = "launchers and sweepers are chosen on the command line" if kind.startswith("hydra") else ""
        fix = hint or f"kinds are {', '.join(allowed)}"
        raise fail(entry.place, "defaults", f"no group {kind!r} to choose from", matches=near, fix=fix)
    if text != f"override /{kind}":
        raise fail(
            entry.place,
            "defaults",
            f"{text!r} chooses nothing",
            fix=f"write `- override /{kind}: {item.value}`",
        )
    if item.value is None or isinstance(item.value, (list, dict)):
        raise fail(entry.place, kind, "takes one name", fix=f"write `- override /{kind}: NAME`")
    return kind, Choice(str(item.value), item.place)


def unknown_option(kind: str, choice: Choice, known: Iterable[str] | None = None) -> Problem | None:
    """The problem with an option that its group does not have, or None. A name of another group is found."""
    options = list(components(kind) if known is None else known)
    if choice.option in options or choice.option.removesuffix(".yaml") in options:
        return None
    on_line = choice.place == COMMAND_LINE or kind == "recipe"
    form = "{}={}" if on_line else "override /{}: {}"
    elsewhere = [form.format(k, choice.option) for k in KINDS if k != kind and choice.option in components(k)]
    if kind != "recipe" and on_line:
        elsewhere += [form.format("recipe", n) for n in recipes.names() if choice.option == n]
        elsewhere += [form.format("scale", n) for n in scales() if choice.option == n]
    elif kind == "recipe":
        elsewhere += [form.format("scale", n) for n in scales() if choice.option == n]
    near = closest(choice.option, options)
    matches = tuple([*elsewhere, *near][:3])
    best = elsewhere[0] if elsewhere else form.format(kind, near[0] if near else "NAME")
    fix = f"{'' if on_line else 'write '}{best}"
    if not matches:
        fix = (
            "choose one of these, or import the plug-in that has it: plugins=[its_module] on the command line"
        )
    shown = ", ".join(sorted(options)[:8])
    return Problem(choice.place, kind, f"no {kind} named {choice.option!r}; known: {shown}", matches, fix)


def _refuse_empty(name: str, source: _Source) -> None:
    """A recipe that changes nothing of its base would train the base under another name."""
    own = set(source.values.value) - {"title", "report"}
    if source.includes and not own and not source.choices:
        base = source.includes[-1][0]
        raise fail(
            source.place,
            "",
            f"recipe {name!r} changes nothing of its base {base!r}",
            fix="add what it changes, for example `- override /scan: 2d`, or run the base",
        )
