"""Registers components by name: tables per kind, decorators, a typed schema from each signature.

A factory's positional parameters are *wired* by the model builder and fixed per kind; its
keyword-only parameters are *the recipe's* and become a typed config schema:

    @register.scan("2d")
    def rows_and_columns(n_layer, height, width, *, columns: bool = True):
        "Rows, reversed rows, columns, reversed columns, in turn by layer."
"""

from __future__ import annotations

import dataclasses
import importlib
import importlib.util
import inspect
import os
import sys
import traceback
import typing
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from importlib.metadata import entry_points
from pathlib import Path
from typing import Any, TypeVar

from toolkit.parameters import (
    Choices,
    Constraint,
    FilePath,
    Nested,
    Parameter,
    Range,
    holdable,
    split_annotation,
)

__all__ = [
    "KINDS", "WIRED", "Choices", "Component", "Constraint", "FilePath", "Nested", "Parameter", "PluginError",
    "Range", "bind", "components", "data", "discover", "encoder", "projector", "prompt", "recurrence", "scan",
    "schema_of", "split_annotation",
]  # fmt: skip

F = TypeVar("F", bound=Callable[..., Any])

WIRED: dict[str, tuple[str, ...]] = {
    "encoder": (),
    "projector": ("d_in", "d_out", "grid"),
    "scan": ("n_layer", "height", "width"),
    "prompt": ("turns",),
    "recurrence": ("d_model", "n_layer"),
    "data": ("cache",),
}
"""Kind -> names of the positional parameters that the builder supplies."""

KINDS = tuple(WIRED)


@dataclass(frozen=True)
class Component:
    """A registered factory and what the listing, the schema and errors need to know of it."""

    kind: str
    name: str
    factory: Callable[..., Any]
    parameters: Mapping[str, Parameter]
    summary: str
    file: str
    line: int


_TABLE: dict[str, dict[str, Component]] = {kind: {} for kind in KINDS}


def components(kind: str) -> Mapping[str, Component]:
    """The registered components of a kind, by name."""
    return _TABLE[kind]


def _recipe_parameters(kind: str, name: str, factory: Callable[..., Any]) -> dict[str, Parameter]:
    """The keyword-only parameters of a factory; raises TypeError where the contract is broken."""
    signature = inspect.signature(factory)
    wired = tuple(
        p.name
        for p in signature.parameters.values()
        if p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD)
    )
    where = f"{kind} {name!r} ({_place(factory)})"
    if wired != WIRED[kind]:
        raise TypeError(
            f"{where}: positional parameters are {wired}, a {kind} takes {WIRED[kind]}; "
            "everything a recipe may set goes after a `*`"
        )
    own = [p for p in signature.parameters.values() if p.kind is p.KEYWORD_ONLY]
    if len(own) + len(wired) != len(signature.parameters):
        raise TypeError(f"{where}: *args and **kwargs are not allowed; name each parameter after a `*`")
    missing = [p.name for p in own if p.annotation is p.empty]
    if missing:
        raise TypeError(f"{where}: parameter {missing[0]!r} needs a type annotation")
    # Only the recipe's annotations are resolved: the others may name types imported for checking only.
    holder = type("Recipe", (), {"__annotations__": {p.name: p.annotation for p in own}})
    hints = typing.get_type_hints(holder, globalns=factory.__globals__, include_extras=True)
    parameters = {}
    for p in own:
        held, constraints = split_annotation(hints[p.name])
        if not holdable(held):
            raise TypeError(f"{where}: {p.name!r} has type {p.annotation}, which a recipe cannot hold")
        default = dataclasses.MISSING if p.default is p.empty else p.default
        parameters[p.name] = Parameter(p.name, held, default, constraints)
    return parameters


def _place(factory: Callable[..., Any]) -> str:
    code = inspect.unwrap(factory).__code__
    return f"{code.co_filename}:{code.co_firstlineno}"


def _qualname(factory: Callable[..., Any]) -> str:
    return inspect.unwrap(factory).__qualname__


def _first_sentence(factory: Callable[..., Any]) -> str:
    text = " ".join((inspect.getdoc(factory) or "").split("\n\n")[0].split())
    return text.split(". ")[0].rstrip(".") + "." if text else ""


def _add(kind: str, name: str, factory: F) -> F:
    where = _place(factory)
    summary = _first_sentence(factory)
    if not summary:
        raise TypeError(
            f"{kind} {name!r} ({where}): the first docstring sentence is required, it is the listing's text"
        )
    parameters = _recipe_parameters(kind, name, factory)
    taken = _TABLE[kind].get(name)
    file, line = where.rsplit(":", 1)
    # The same function loaded again (a reload, a plug-in imported under two names) replaces itself.
    again = taken is not None and (taken.file, _qualname(taken.factory)) == (file, _qualname(factory))
    if taken is not None and not again:
        raise KeyError(
            f"{kind} {name!r} is registered twice: {taken.file}:{taken.line} and {where}; rename one"
        )
    _TABLE[kind][name] = Component(kind, name, factory, parameters, summary, file, int(line))
    _store(kind, name, parameters)
    return factory


def _store(kind: str, name: str, parameters: Mapping[str, Parameter]) -> None:
    """Puts the schema into Hydra's ConfigStore, so that the group *is* the registry."""
    from hydra.core.config_store import ConfigStore

    ConfigStore.instance().store(group=kind, name=name, node=schema_of(kind, name, parameters), package=kind)


def schema_of(kind: str, name: str, parameters: Mapping[str, Parameter]) -> type:
    """A dataclass with one typed field per recipe parameter, and `name`."""
    fields: list[Any] = [("name", str, dataclasses.field(default=name))]
    for p in parameters.values():
        if p.required:
            fields.append((p.name, p.type, dataclasses.field(default="???")))
        elif isinstance(p.default, (list, dict, tuple)):
            value = list(p.default) if isinstance(p.default, tuple) else p.default
            fields.append((p.name, p.type, dataclasses.field(default_factory=partial(_copy, value))))
        else:
            fields.append((p.name, p.type, dataclasses.field(default=p.default)))
    return dataclasses.make_dataclass(f"{kind}_{name}", fields)


def _copy(value: Any) -> Any:
    return type(value)(value)


def _decorator(kind: str) -> Callable[[str], Callable[[F], F]]:
    def named(name: str) -> Callable[[F], F]:
        return partial(_add, kind, name)

    named.__doc__ = f"Registers a {kind} factory under `name`; wired parameters: {WIRED[kind] or 'none'}."
    return named


encoder = _decorator("encoder")
projector = _decorator("projector")
scan = _decorator("scan")
prompt = _decorator("prompt")
recurrence = _decorator("recurrence")
data = _decorator("data")


def bind(kind: str, node: Mapping[str, Any]) -> Callable[..., Any]:
    """The factory that a config node names, with the recipe's parameters filled in.

    node: a resolved mapping `{name: ..., parameter: value, ...}`. The caller supplies the wired part.
    No config object enters a component: values arrive as plain Python.
    """
    values = dict(node)
    found = _TABLE[kind][values.pop("name")]
    for p in found.parameters.values():
        nested = next((c for c in p.constraints if isinstance(c, Nested)), None)
        if nested is not None and p.name in values:
            values[p.name] = [bind(nested.kind, item) for item in values[p.name]]
    return partial(found.factory, **values)


CATALOGUES = (
    "components.encoders",
    "components.projectors",
    "components.recurrences",
    "components.scans",
    "components.prompts",
    "data.sources",
)
"""Modules whose import registers what we ship; each is cheap: heavy imports happen inside factories."""

ENTRY_POINTS = "toolkit.components"


class PluginError(ValueError):
    """A plug-in could not be imported."""

    def __init__(self, plugin: str, reason: str) -> None:
        self.plugin = plugin
        super().__init__(f"plug-in {plugin!r} failed to import: {reason}")


def discover(plugins: Sequence[str] = ()) -> None:
    """Fills the registry: our catalogues, installed entry points, then `plugins` by import name.

    The working directory is on the import path. Idempotent. Raises PluginError, naming the plug-in and
    the last line of its own traceback; ImportError if another package stands where ours should.
    """
    for package in ("components", "data", "kernels"):
        _check_beside_toolkit(package)
    for module in CATALOGUES:
        importlib.import_module(module)
    for point in sorted(entry_points(group=ENTRY_POINTS), key=lambda p: p.name):
        _load_plugin(point.name, point.load)
    if plugins and os.getcwd() not in sys.path and "" not in sys.path:
        sys.path.insert(0, os.getcwd())
    for name in plugins:
        _load_plugin(name, partial(importlib.import_module, name))


def _check_beside_toolkit(package: str) -> None:
    """`data`, `kernels` and `components` are common names: make sure that ours would be imported."""
    home = Path(__file__).resolve().parent.parent
    spec = importlib.util.find_spec(package)
    found = spec and (spec.origin or next(iter(spec.submodule_search_locations or ()), None))
    if not found or home / package not in (Path(found).resolve(), *Path(found).resolve().parents):
        raise ImportError(
            f"'{package}' would be imported from {found or 'nowhere'}, the toolkit needs {home / package}; "
            f"rename yours, run from another folder, or install the toolkit into an environment of its own"
        )


def _load_plugin(name: str, load: Callable[[], Any]) -> None:
    try:
        load()
    except Exception as error:
        if isinstance(error, ModuleNotFoundError) and error.name == name.split(".")[0]:
            raise PluginError(
                name, f"no module {error.name!r} on the import path (working directory included)"
            ) from error
        last = traceback.format_exception_only(error)[-1].strip()
        frame = traceback.extract_tb(error.__traceback__)[-1]
        raise PluginError(name, f"{frame.filename}:{frame.lineno}: {last}") from error
