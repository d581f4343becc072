"""Scores and their intervals."""

from __future__ import annotations

import math

import pytest

from toolkit.metrics import Prediction, accuracy, by_kind, half_width, summary


def made(pairs: list[tuple[str, str, str, int]]) -> list[Prediction]:
    return [
        Prediction(str(i), "?", kind, gold, text, image) for i, (kind, gold, text, image) in enumerate(pairs)
    ]


def test_exact_match_and_types() -> None:
    found = made([("color", "red", " red ", 0), ("color", "red", "Red", 0), ("shape", "circle", "", 1)])
    assert accuracy(found) == pytest.approx(1 / 3)
    kinds = by_kind(found)
    assert {k: (v["accuracy"], v["n"]) for k, v in kinds.items()} == {"color": (0.5, 2), "shape": (0.0, 1)}
    assert all(math.isnan(v["ci95"]) for v in kinds.values())  # one picture each says nothing of others
    assert summary(found)["n"] == 3


def test_interval_is_clustered_by_image() -> None:
    """Four questions per picture, all right or all wrong: as wide as a quarter as many questions."""
    together = made([("", "a", "a" if image % 2 else "b", image) for image in range(50) for _ in range(4)])
    apart = made([("", "a", "a" if i % 2 else "b", i) for i in range(50)])
    assert half_width(together) == pytest.approx(half_width(apart))
    assert half_width(apart) == pytest.approx(1.96 * math.sqrt(0.25 / 49))
    assert math.isnan(half_width(apart[:1]))
