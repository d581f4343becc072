"""From what a user typed to plain configs: one job, or the rows of a sweep. Imports no torch."""

from __future__ import annotations

import itertools
import logging
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from hydra import initialize_config_dir
from hydra._internal.hydra import Hydra
from hydra.core.global_hydra import GlobalHydra
from hydra.core.override_parser.types import IntervalSweep, ValueType
from hydra.errors import HydraException
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import ConfigAttributeError, OmegaConfBaseException

from toolkit import check, recipes, register, rules, schema
from toolkit.explain import COMMAND_LINE, BadRecipe, closest, fail
from toolkit.layers import GROUPS, Given, Plan, parse, resolve
from toolkit.lines import Marked

log = logging.getLogger("toolkit.run")

_HYDRA_KEYS = ("hydra.mode", "hydra.verbose", "hydra.sweeper.params", "hydra.launcher", "hydra/launcher")
"""What of Hydra a command line may set; the rest could name code or scatter files."""


@dataclass(frozen=True)
class Job:
    """One run to be: its overrides, its plan with places, and which recipe it came from."""

    given: tuple[Given, ...]
    plan: Plan

    @property
    def recipe(self) -> str:
        return self.plan.recipe

    @property
    def overrides(self) -> list[str]:
        return [g.text for g in self.given]


@dataclass(frozen=True)
class Request:
    """A command line, understood: one job, or the jobs of a sweep."""

    arguments: tuple[str, ...]
    jobs: tuple[Job, ...]
    multirun: bool

    @property
    def fixed(self) -> list[str]:
        """The overrides that no row of the sweep changes."""
        return [g.text for g in parse(self.arguments) if not g.override.is_sweep_override()]


def understand(arguments: Sequence[str], *, multirun: bool = False) -> Request:
    """Finds components, follows the recipe, expands a sweep and checks every row's values.

    multirun: `-m` was given; a table recipe asks for it itself. Raises BadRecipe.
    """
    given = parse(arguments)
    _discover(given)
    own = [g for g in given if not g.override.is_hydra_override()]
    hydra = [g for g in given if g.override.is_hydra_override()]
    _check_hydra(hydra)
    plan = resolve([g for g in own if not g.override.is_sweep_override()])
    recipes.CHOSEN.set({kind: choice.option for kind, choice in plan.choices.items()})
    asked = next((str(g.override.value()) for g in hydra if g.key == "hydra.mode"), None)
    table = [str(m.value) for m in plan.values("hydra", "mode")][-1:]
    sweeping = multirun or (asked or (table[0] if table else "RUN")).upper() == "MULTIRUN"
    if not sweeping:
        _refuse_sweeps(own)
        rows: list[tuple[Given, ...]] = [tuple(own)]
    else:
        rows = list(_rows(_axes(_table_rows(plan, hydra), own)))
    jobs = tuple(_job(row, plan.recipe) for row in rows)
    return Request(tuple(arguments), jobs, sweeping)


def _discover(given: Sequence[Given]) -> None:
    schema.store()
    recipes.mount()
    plugins: list[str] = []
    for g in given:
        if g.key == "plugins":
            value = g.override.value()
            if not isinstance(value, list):
                raise fail(g.place, "plugins", f"takes a list, given {value!r}", fix=f"plugins=[{value}]")
            plugins = [str(item) for item in value]
    try:
        register.discover(plugins)
    except register.PluginError as error:
        fix = f"`python -c 'import {error.plugin}'` shows it alone"
        raise fail(COMMAND_LINE, "plugins", str(error), fix=fix) from error
    except ImportError as error:
        raise fail("toolkit", "", str(error)) from error


def _check_hydra(given: Sequence[Given]) -> None:
    for g in given:
        head = next((k for k in _HYDRA_KEYS if g.key == k or g.key.startswith(f"{k}.")), None)
        if head is None or "_target_" in g.key or g.override.is_add() or g.override.is_force_add():
            near = closest(g.key, _HYDRA_KEYS)
            fix = f"settings under hydra are {', '.join(_HYDRA_KEYS)}, without a plus sign"
            raise fail(g.place, g.key, "not a setting of Hydra that a run may change", matches=near, fix=fix)
        if g.key == "hydra.mode" and str(g.override.value()).upper() not in ("RUN", "MULTIRUN"):
            what = f"given {g.override.value()!r}, must be RUN or MULTIRUN"
            raise fail(g.place, g.key, what, fix="hydra.mode=RUN runs one row, hydra.mode=MULTIRUN all")
        if head == "hydra.sweeper.params" and (g.key == head or g.override.is_delete()):
            what = f"{g.text!r} names no axis with its values"
            raise fail(g.place, g.key, what, fix=f"{head}.scan=uni,2d, or scan=uni,2d for short")


def _refuse_sweeps(given: Sequence[Given]) -> None:
    for g in given:
        if g.override.is_sweep_override():
            _enumerable(g)
            values = list(g.override.sweep_string_iterator())
            fix = f"add -m to run all {len(values)}"
            fix += "" if g.key in GROUPS else f", or {g.key}=[{','.join(values)}] for a list"
            raise fail(g.place, g.key, f"{g.text!r} names {len(values)} values", fix=fix)


def _enumerable(given: Given) -> None:
    """Refuses sweeps that Hydra's basic sweeper cannot list."""
    kind = given.override.value_type
    if kind == ValueType.GLOB_CHOICE_SWEEP:
        fix = f"list the names: {given.key}=first,second"
        raise fail(
            given.place, given.key, "glob() finds nothing in sub-folders and would run no job", fix=fix
        )
    if isinstance(given.override.value(), IntervalSweep):
        fix = f"list the values: {given.key}=1e-4,1e-3"
        raise fail(
            given.place, given.key, f"{given.text!r} is an interval, which needs another sweeper", fix=fix
        )


def _table_rows(plan: Plan, hydra: Sequence[Given]) -> list[Given]:
    """The sweep that a table recipe carries, then what the command line says of it."""
    found: dict[str, Given] = {}
    for node in plan.values("hydra", "sweeper", "params"):
        for key, item in node.value.items() if isinstance(node.value, dict) else ():
            found[key] = parse([f"{key}={_text(item)}"], item.place)[0]
    for g in hydra:
        if g.key.startswith("hydra.sweeper.params."):
            key = g.key.removeprefix("hydra.sweeper.params.")
            text = g.text.partition("=")[2] if g.override.is_sweep_override() else g.override.value()
            found[key] = parse([f"{key}={text}"], g.place)[0]
    return list(found.values())


def _text(node: Marked) -> str:
    value = node.plain()
    if isinstance(value, list):
        raise fail(
            node.place,
            "hydra.sweeper.params",
            f"takes text, given {value!r}",
            fix=f'write "{",".join(map(str, value))}"',
        )
    return "null" if value is None else str(value)


def _axes(table: list[Given], own: list[Given]) -> list[Given]:
    """A table whose rows are recipes replaces the recipe that named it; else the command line wins."""
    by_recipe = any(g.key == "recipe" for g in table)
    return [*table, *(g for g in own if not (by_recipe and g.key == "recipe"))]


def _rows(given: Sequence[Given]) -> Iterator[tuple[Given, ...]]:
    """The product of all sweeps, the first axis turning slowest."""
    axes: dict[str, list[Given]] = {}
    for g in given:
        values = [g]
        if g.override.is_sweep_override():
            _enumerable(g)
            texts = list(g.override.sweep_string_iterator())
            if not texts:
                fix = f"list the values: {g.key}=first,second"
                raise fail(g.place, g.key, f"{g.text!r} names no value and would run no job", fix=fix)
            twice = next((t for t in texts if texts.count(t) > 1), None)
            if twice is not None:
                raise fail(g.place, g.key, f"{g.text!r} names {twice!r} twice", fix="name each value once")
            values = parse([f"{g.override.get_key_element()}={text}" for text in texts], g.place)
        axes[g.override.get_key_element()] = values
    yield from itertools.product(*axes.values())


def _job(row: tuple[Given, ...], asked: str) -> Job:
    plan = resolve(row)
    tables = [m for m in plan.values("hydra", "mode") if str(m.value) == "MULTIRUN"]
    if tables and plan.recipe != asked:
        what = f"{plan.recipe!r} is a table with a sweep of its own and cannot be a row of another"
        raise fail(plan.choices["recipe"].place, "recipe", what, fix=f"run it alone: recipe={plan.recipe}")
    problems = check.check(plan)
    if problems:
        raise BadRecipe(problems)
    return Job(row, plan)


def row_name(job: Job, request: Request) -> str:
    """What tells a row from the others: the overrides that change over the sweep."""
    changing = [text for text in job.overrides if any(text not in other.overrides for other in request.jobs)]
    return " ".join(changing or job.overrides) or job.recipe


def compose(job: Job, *, complete: bool = True) -> dict[str, Any]:
    """The resolved config of one job as plain values. complete: also where the data lies."""
    recipes.CHOSEN.set({kind: choice.option for kind, choice in job.plan.choices.items()})
    with mounted() as hydra:
        try:
            cfg = hydra.compose_config(
                "run", job.overrides, run_mode=RunMode.RUN, with_log_configuration=False
            )
        except (HydraException, OmegaConfBaseException) as error:
            raise _translated(error, job.plan) from error
    return finish(cfg, job.plan, complete=complete)


def _place_of_files(key: str) -> bool:
    """Settings that say where something lies: counting parameters needs none of them."""
    return key.startswith("data.") or key.endswith(".weights")


def finish(cfg: DictConfig, plan: Plan, *, complete: bool = True) -> dict[str, Any]:
    """A composed config -> plain values, after the checks that need all of it."""
    task = OmegaConf.masked_copy(cfg, [str(key) for key in cfg if key != "hydra"])
    keys = sorted(OmegaConf.missing_keys(task))
    values: Any = OmegaConf.to_container(task, resolve=True, throw_on_missing=False)
    problems = rules.check(values, plan)
    absent = rules.missing(values, keys, plan)
    problems = [*(p for p in absent if complete or not _place_of_files(p.key)), *problems]
    if problems:
        raise BadRecipe(problems)
    return dict(values)


def _translated(error: Exception, plan: Plan) -> BadRecipe:
    """What Hydra or OmegaConf found and our own check did not: the place of the key, and their words."""
    cause = error if isinstance(error, OmegaConfBaseException) else (error.__cause__ or error)
    key = str(getattr(cause, "full_key", "") or "")
    text = next((line for line in str(cause).splitlines() if line.strip()), type(cause).__name__)
    place = rules.where(plan, key) if key else plan.choices["recipe"].place
    fix = "TOOLKIT_TRACE=1 shows where this was found"
    if isinstance(cause, ConfigAttributeError) and key.startswith("report.published."):
        text, fix = "no such row or benchmark", f"+{key}=VALUE adds one"
    return fail(place, key, text, fix=fix)


@contextmanager
def mounted() -> Iterator[Hydra]:
    """Hydra, initialized on our configs and recipe folders."""
    GlobalHydra.instance().clear()
    with initialize_config_dir(str(recipes.CONF), version_base="1.3", job_name="run"):
        hydra = GlobalHydra.instance().hydra
        assert hydra is not None
        yield hydra
