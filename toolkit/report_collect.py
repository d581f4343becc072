"""From a table recipe to its finished runs: every row and seed composed, its result looked up by run id."""

from __future__ import annotations

import itertools
import json
import shlex
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from data.tokens import load_tokenizer
from toolkit import compose, curve
from toolkit.explain import fail
from toolkit.layers import parse, resolve
from toolkit.report_table import ALL, Point, Row, Run, Score, Table
from toolkit.rundir import RunDir


def collect(recipe: str, overrides: Sequence[str], *, step: int = 0) -> Table:
    """Composes every row and seed of a table recipe and looks its results up by run id.

    step: report as it was after so many optimizer steps, runs that have not ended with it; 0: at the end.
    """
    request = compose.understand([f"recipe={recipe}", *overrides])
    fixed = tuple(g for g in parse(request.arguments) if not g.override.is_sweep_override())
    asked = compose.compose(compose.Job(fixed, resolve(fixed)), complete=False)
    plan = asked["report"]
    rows: dict[tuple[str, str], Row] = {}
    if not plan["rows"]:
        raise fail(recipe, "report.rows", "this recipe is no table", fix="name one, e.g. ablation/scan")
    for job in request.jobs:
        cfg = compose.compose(job)
        parts = (job.recipe,) if plan["rows"] == "recipe" else row_parts(cfg, plan["rows"])
        chosen = str(_value(cfg, plan["best"])) if plan["best"] else ""
        name = ", ".join(parts)
        row = rows.setdefault((name, chosen), Row(name, parts, chosen=chosen))
        run = _run(RunDir(Path(cfg["paths"]["runs"]).expanduser(), cfg), cfg, step)
        if run is None:
            row.missing.append(shlex.join(["python", "-m", "toolkit.run", *dict.fromkeys(job.overrides)]))
        else:
            _refuse_twins(recipe, row, run)
            row.runs.append(run)
    kept = _best(list(rows.values()))
    _name(kept, plan["names"])
    facts = {key: plan[key] for key in ("caption", "published", "order", "best")}
    return Table(recipe, asked["title"], **facts, rows=kept, step=step)


def _run(folder: RunDir, cfg: Mapping[str, Any], step: int) -> Run | None:
    """The run of a directory after `step` steps, 0: at its end; None if it has not come so far."""
    result = folder.finished()
    if result is not None:
        run = run_of(cfg, result)
        return run.until(step) if step else run
    points = curve.read(folder.curve) if step else []
    if step not in [point["step"] for point in points]:
        return None
    return _unfinished(folder, cfg, points).until(step)


def _unfinished(folder: RunDir, cfg: Mapping[str, Any], points: Sequence[Mapping[str, Any]]) -> Run:
    """A run that has not ended, from its points; floors and the split of the choice are told at the end."""
    from toolkit.job import check

    facts, vocabulary = check(cfg), load_tokenizer(folder.path / "vocabulary.json").size
    status = json.loads(folder.status.read_text(encoding="utf-8"))
    parameters = dict(facts["parameters"])
    if facts["per_vocabulary_entry"]:  # counted with a vocabulary of one
        parameters["rwkv"] += facts["per_vocabulary_entry"] * (vocabulary - 1)
    result = {"seed": cfg["seed"], "commit": status["commit"], "parameters": parameters, "state": "not ended"}
    return Run(int(cfg["seed"]), _arm(cfg), int(facts["image_tokens"]), tuple(map(_point, points)), result)


def _arm(cfg: Mapping[str, Any]) -> dict[str, str]:
    return {kind: str(cfg[kind]["name"]) for kind in ("recurrence", "scan", "prompt")}


def row_parts(cfg: Mapping[str, Any], keys: str) -> tuple[str, ...]:
    """The values of the keys that rows vary: a component's name, or a setting by its dotted path."""
    return tuple(str(_value(cfg, key.strip())) for key in keys.split(","))


def _value(cfg: Mapping[str, Any], key: str) -> Any:
    value: Any = cfg
    for part in key.split("."):
        value = value[part]
    return value["name"] if isinstance(value, dict) else value


def _best(rows: list[Row]) -> list[Row]:
    """Of rows with one name the one with the best `Row.choosing`; what others miss is still missing."""
    groups: dict[str, list[Row]] = {}
    for row in rows:
        groups.setdefault(row.name, []).append(row)
    kept = []
    for same in groups.values():
        best = max(same, key=lambda row: row.choosing() or 0.0)
        best.missing = [command for row in same for command in row.missing]
        kept.append(best)
    return kept


def _refuse_twins(recipe: str, row: Row, run: Run) -> None:
    if any(other.seed == run.seed for other in row.runs):
        what = f"row {row.name!r} has two runs of seed {run.seed}, so another key varies too"
        fix = "name every key that varies but the seed (rows: scan,prompt), or choose by it (report.best)"
        raise fail(recipe, "report.rows", what, fix=fix)


def run_of(cfg: Mapping[str, Any], result: dict[str, Any]) -> Run:
    """A run from its config and its result.json, also one written before points were kept."""
    tokens = result["image_tokens"] if "image_tokens" in result else _image_tokens(cfg)
    seen = [*result.get("curve", ()), {"step": result["steps"], **result}]
    return Run(int(result["seed"]), _arm(cfg), tokens, tuple(_point(p) for p in seen), result)


def _image_tokens(cfg: Mapping[str, Any]) -> int:
    from toolkit.job import check

    return int(check(cfg)["image_tokens"])


def _point(scores: Mapping[str, Any]) -> Point:
    kinds = {ALL: scores, **{k: v for k, v in scores["by_kind"].items() if k != ALL}}
    found = {k: Score(v["accuracy"], v["n"], v.get("ci95")) for k, v in kinds.items()}
    return Point(int(scores["step"]), found)


def _name(rows: list[Row], names: Mapping[str, str]) -> None:
    """Labels for people: `report.names` for values, without the folder and words that all share."""
    labels = [", ".join(names.get(part, part) for part in row.parts) for row in rows]
    first, last = min(labels), max(labels)
    shared = "".join(
        a for a, _ in itertools.takewhile(lambda ab: ab[0] == ab[1], zip(first, last, strict=False))
    )
    cut = max(shared.rfind("/"), shared.rfind("_")) + 1
    for row, label in zip(rows, labels, strict=True):
        row.label = label[cut:]
