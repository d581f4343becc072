"""Runs on disk: which there are, and the config of one, checked before it is built. Imports no torch."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from toolkit import lines, values
from toolkit.explain import BadRecipe, Problem, closest, fail, given
from toolkit.register import KINDS, FilePath, Parameter, components
from toolkit.schema import RunConf
from toolkit.specs import Open, Spec, group_of

CONFIG = "config.yaml"
VOCABULARY = "vocabulary.json"
WEIGHTS = "checkpoints/last"
ROOT = Path("runs")
_SHOWN = 8


@dataclass(frozen=True)
class Finished:
    """A run whose training has ended, with its accuracy if it was evaluated."""

    path: Path
    accuracy: float | None

    def __str__(self) -> str:
        score = "" if self.accuracy is None else f"  accuracy {100 * self.accuracy:.2f} %"
        return f"{lines.shown(self.path)}{score}"


def finished(root: Path) -> list[Finished]:
    """The runs below `root` that can be asked, the newest first."""
    if not root.is_dir():
        return []
    found = [p for p in root.iterdir() if (p / CONFIG).is_file() and (p / WEIGHTS).is_dir()]
    newest = sorted(found, key=lambda p: (-(p / WEIGHTS).stat().st_mtime, p.name))
    return [Finished(p, _accuracy(p)) for p in newest]


def _accuracy(run: Path) -> float | None:
    try:
        return float(json.loads((run / "result.json").read_text(encoding="utf-8"))["accuracy"])
    except (OSError, ValueError, KeyError, TypeError):
        return None


def find(given: str) -> Path:
    """The run that a command line names: its folder, or its name in `runs`. BadRecipe lists the runs."""
    path = Path(given).expanduser()
    for candidate in (path, ROOT / given) if given else ():
        if (candidate / CONFIG).is_file() and (candidate / WEIGHTS).is_dir():
            return candidate
    roots = list(dict.fromkeys((path, path.parent, ROOT))) if given else [ROOT]
    known = [run for root in roots for run in finished(root)]
    what = f"{given!r} is no finished run" if given else "no run is named"
    if given and (path / CONFIG).is_file():
        what = f"{given!r} has no {WEIGHTS}: its training has not ended"
    raise fail("command line", "run", what, matches=_near(given, known), fix=_fix(known))


def _near(given: str, known: Sequence[Finished]) -> list[str]:
    names = {run.path.name: lines.shown(run.path) for run in known}
    return [f"run={names[n]}" for n in closest(Path(given).name, names)] if given else []


def _fix(known: Sequence[Finished]) -> str:
    if not known:
        return "no finished run is in `runs`; `python -m toolkit.run` makes one, or write run=FOLDER"
    listed = "".join(f"\n    {run}" for run in known[:_SHOWN])
    more = f"\n    and {len(known) - _SHOWN} more" if len(known) > _SHOWN else ""
    return f"write run=FOLDER with one of these{listed}{more}"


def read_config(folder: Path, plugins: Sequence[str] = ()) -> dict[str, Any]:
    """A run's config.yaml as plain values. BadRecipe, with the line, for what no schema declares or holds."""
    marked = lines.load(folder / CONFIG)
    known = group_of(RunConf).fields
    for key, item in marked.value.items():
        if key not in known:
            what, fix = "no such key in a run's config", "load it with the version that wrote it"
            raise fail(item.place, key, what, matches=closest(key, known), fix=fix)
        if key in KINDS:
            _check_component(key, item, plugins, marked.plain().get("plugins") or [])
        elif problems := list(_misfits(item, known[key], key)):
            raise BadRecipe(problems)
    found: dict[str, Any] = marked.plain()
    missing = [kind for kind in (*KINDS, "model", "hardware") if kind not in found]
    if missing:
        raise fail(f"{lines.shown(folder / CONFIG)}:1", missing[0], "not given; this is no run's config")
    return found


def _check_component(kind: str, node: lines.Marked, plugins: Sequence[str], wanted: Sequence[str]) -> None:
    value = node.plain()
    name = str(value.get("name")) if isinstance(value, dict) else ""
    if kind == "data":
        return  # the data is not read; its source may be gone
    if name not in components(kind):
        absent = [str(p) for p in wanted if p not in plugins]
        fix = f"plugins=[{','.join(absent)}] if you trust that code" if absent else ""
        what = f"no {kind} named {name!r}" + (" without the run's plug-ins" if absent else "")
        raise fail(node.place, kind, what, matches=closest(name, components(kind)), fix=fix)
    declared = components(kind)[name].parameters
    for key, item in node.value.items():
        if key != "name" and key not in declared:
            raise fail(
                item.place, f"{kind}.{key}", f"no such key in {kind} {name!r}", matches=closest(key, declared)
            )
        if key != "name" and (problems := list(_misfits(item, declared[key], f"{kind}.{key}"))):
            raise BadRecipe(problems)


def _misfits(node: lines.Marked, spec: Spec, path: str) -> Iterator[Problem]:
    """Values of another type or outside of their bounds. Files may be gone: a run has its own weights."""
    if isinstance(spec, Parameter):
        bounds = tuple(c for c in spec.constraints if not isinstance(c, FilePath))
        yield from values.check(node.plain(), dataclasses.replace(spec, constraints=bounds), path, node.place)
    elif not isinstance(node.value, dict):
        yield Problem(node.place, path, f"holds settings, given {given(node.value)}")
    else:
        fields = dict.fromkeys(node.value, spec.item) if isinstance(spec, Open) else spec.fields
        for key, item in node.value.items():
            if key in fields:
                yield from _misfits(item, fields[key], f"{path}.{key}")
