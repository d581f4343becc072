"""Scores of predictions: exact match overall and per question type, with honest intervals."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Prediction:
    """One scored answer. image: what clusters the interval (questions about one picture are alike)."""

    key: str
    question: str
    kind: str
    gold: str
    text: str
    image: int

    @property
    def correct(self) -> bool:
        """Exact match after stripping white space; an answer that says nothing is wrong."""
        return self.text.strip() == self.gold.strip()


def accuracy(predictions: Sequence[Prediction]) -> float:
    """Share of exact matches; 0 for none."""
    return sum(p.correct for p in predictions) / max(1, len(predictions))


def by_kind(predictions: Sequence[Prediction]) -> dict[str, dict[str, float]]:
    """Question type -> accuracy, its 95 % half width and number, in alphabetical order."""
    groups: dict[str, list[Prediction]] = defaultdict(list)
    for p in predictions:
        groups[p.kind or "all"].append(p)
    return {
        kind: {"accuracy": accuracy(g), "ci95": half_width(g), "n": len(g)}
        for kind, g in sorted(groups.items())
    }


def half_width(predictions: Sequence[Prediction]) -> float:
    """Half of the 95 % interval of the accuracy, clustered by image (sandwich variance of a mean)."""
    mean = accuracy(predictions)
    residual: dict[int, float] = defaultdict(float)
    for p in predictions:
        residual[p.image] += p.correct - mean
    clusters = len(residual)
    if clusters < 2:
        return float("nan")
    variance = sum(r * r for r in residual.values()) * clusters / (clusters - 1)
    return 1.96 * math.sqrt(variance) / len(predictions)


def summary(predictions: Sequence[Prediction]) -> dict[str, Any]:
    """accuracy, its 95 % half width, n, and the same per question type."""
    return {
        "accuracy": accuracy(predictions),
        "ci95": half_width(predictions),
        "n": len(predictions),
        "by_kind": by_kind(predictions),
    }
