"""What a table's report is made of: its arms, their runs, and each run's accuracy over training."""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from typing import Any

from toolkit.explain import COMMAND_LINE, fail
from toolkit.stats import Curve, first_step, over_training, spread

ALL = "all"
"""The name under which every question type together is reported."""

LEVEL = 0.9
"""Accuracy whose first step is reported."""


@dataclass(frozen=True)
class Score:
    """Accuracy of one question type; ci95: half its interval clustered by image, None if not known."""

    accuracy: float
    n: int
    ci95: float | None = None


@dataclass(frozen=True)
class Point:
    """Scores per question type after `step` optimizer steps."""

    step: int
    scores: dict[str, Score]


@dataclass(frozen=True)
class Run:
    """One run: what it was, and its points by rising step, the closing evaluation last if it has ended."""

    seed: int
    arm: dict[str, str]
    image_tokens: int
    points: tuple[Point, ...]
    result: dict[str, Any]

    @property
    def final(self) -> Point:
        return self.points[-1]

    def curve(self, kind: str) -> Curve:
        """(step, accuracy) of a question type."""
        return [(p.step, p.scores[kind].accuracy) for p in self.points if kind in p.scores]

    def floors(self, kind: str) -> dict[str, Any]:
        """`majority` and `blind` of a question type; empty if the run does not know them."""
        known = self.result if kind == ALL else self.result.get("floors", {}).get(kind, {})
        return {key: known[key] for key in ("majority", "blind") if key in known}

    def until(self, step: int) -> Run:
        """The run as it was after `step` steps; BadRecipe if it was not evaluated there."""
        kept = tuple(p for p in self.points if p.step <= step)
        if not kept or kept[-1].step != step:
            steps = ", ".join(str(p.step) for p in self.points)
            what = f"seed {self.seed} of {' '.join(self.arm.values())} was evaluated after {steps} steps"
            raise fail(
                COMMAND_LINE, f"--step {step}", what, fix="take one of these, or train with eval.every"
            )
        return replace(self, points=kept)


@dataclass
class Row:
    """One arm of a table.

    name: as the recipe has it; parts: the values of the keys that rows vary; label: the name for people;
    chosen: the kept value of the table's `best`; missing: commands for runs that there are not.
    """

    name: str
    parts: tuple[str, ...]
    label: str = ""
    chosen: str = ""
    runs: list[Run] = field(default_factory=list)
    missing: list[str] = field(default_factory=list)

    def final(self, kind: str) -> dict[int, float]:
        """Seed -> accuracy at the end."""
        return {r.seed: r.final.scores[kind].accuracy for r in self.runs if kind in r.final.scores}

    def area(self, kind: str) -> dict[int, float]:
        """Seed -> mean accuracy over training, of the seeds that were evaluated while training."""
        found = {r.seed: over_training(r.curve(kind)) for r in self.runs}
        return {seed: value for seed, value in found.items() if value is not None}

    def mean(self, kind: str) -> float | None:
        values = list(self.final(kind).values())
        return statistics.fmean(values) if values else None

    def choosing(self) -> float | None:
        """Mean accuracy on the split that settings are chosen by, or on the reported one without such."""
        known = [run.result["choose"]["accuracy"] for run in self.runs if "choose" in run.result]
        return statistics.fmean(known) if known and len(known) == len(self.runs) else self.mean(ALL)

    def spread(self, kind: str) -> float | None:
        return spread(list(self.final(kind).values()))

    def ci95(self, kind: str) -> float | None:
        """The widest interval of one seed."""
        found = [r.final.scores[kind].ci95 for r in self.runs if kind in r.final.scores]
        known = [c for c in found if c is not None and math.isfinite(c)]
        return max(known) if known else None

    def floor(self, kind: str) -> float | None:
        """The better of the majority answer and the question-only answer, if the runs know them."""
        for run in self.runs:
            known = run.floors(kind)
            if known:
                return float(max(known["majority"], known["blind"] or 0))
        return None

    def steps_to(self, kind: str) -> list[float]:
        """First evaluated step at or above LEVEL per seed, infinity if never; of seeds with a curve."""
        return [first_step(r.curve(kind), LEVEL) for r in self.runs if len(r.curve(kind)) > 1]


@dataclass
class Table:
    """Everything a report shows of one table recipe."""

    recipe: str
    title: str
    caption: str
    published: dict[str, dict[str, float]]
    order: list[str]
    best: str
    rows: list[Row]
    step: int = 0

    @property
    def runs(self) -> list[Run]:
        return [run for row in self.rows for run in row.runs]

    @property
    def kinds(self) -> list[str]:
        """All questions together first, then the types; only the former if there are no types."""
        types = sorted({kind for run in self.runs for kind in run.final.scores} - {ALL})
        return [ALL, *types]

    @property
    def types(self) -> list[str]:
        """What comparisons are counted over: the question types, or all questions if there are none."""
        return self.kinds[1:] or self.kinds

    @property
    def shown(self) -> list[str]:
        """What gets a section and a panel: a single type is not shown twice."""
        return self.types if len(self.types) == 1 else self.kinds

    @property
    def benchmarks(self) -> list[str]:
        return list(dict.fromkeys(b for values in self.published.values() for b in values))

    @property
    def seeds(self) -> list[int]:
        return sorted({run.seed for run in self.runs})

    @property
    def chosen_on(self) -> str:
        """The split that settings were chosen by; empty if that was the reported one."""
        splits = {run.result.get("choose", {}).get("split", "") for run in self.runs}
        return splits.pop() if len(splits) == 1 else ""

    @property
    def curves(self) -> bool:
        return any(len(run.points) > 1 for run in self.runs)


def raw(table: Table) -> Iterator[dict[str, Any]]:
    """One flat row per run, evaluated step and question type; accuracy is a share."""
    for run in table.runs:
        for point in run.points:
            for kind, score in point.scores.items():
                yield {
                    "table": table.recipe,
                    **run.arm,
                    "tokens": run.image_tokens,
                    "seed": run.seed,
                    "step": point.step,
                    "type": kind,
                    "n": score.n,
                    "accuracy": score.accuracy,
                }
