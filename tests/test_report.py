"""Reports of tables from result files made by hand: numbers, words, rows and figures; nothing is trained."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from toolkit.explain import BadRecipe
from toolkit.report_order import expected, pairs, words
from toolkit.report_plot import figure, looks, spaced
from toolkit.report_table import Point, Row, Run, Score, Table
from toolkit.report_text import markdown, steps_to

FLOORS = {"majority": 0.25, "blind": 0.3}
Accuracy = Callable[[str, int, int], dict[str, float]]
"""(row, seed, step) -> accuracy per question type."""


def scores(by_kind: dict[str, float], n: int = 100) -> dict[str, Any]:
    kinds = {kind: {"accuracy": a, "ci95": 0.02, "n": n} for kind, a in by_kind.items()}
    mean = sum(by_kind.values()) / len(by_kind)
    return {"accuracy": mean, "ci95": 0.01, "n": n * len(kinds), "by_kind": kinds}


def result(seed: int, points: dict[int, dict[str, float]]) -> dict[str, Any]:
    """A result.json: the last point is the closing evaluation, the others were made while training."""
    *early, last = points
    return {
        **scores(points[last]),
        **FLOORS,
        "seed": seed,
        "steps": last,
        "curve": [{"step": step, **scores(points[step])} for step in early],
        "floors": {kind: FLOORS for kind in points[last]},
        "image_tokens": 16,
        "parameters": {"rwkv": 1234},
        "seconds": 1.0,
        "commit": "0" * 40,
    }


def made(accuracy: Accuracy, *rows: str, seeds: int = 5, steps: tuple[int, ...] = (100, 200)) -> Table:
    """A table of rows, its runs as they would be collected."""
    found = []
    for name in rows:
        row = Row(name, tuple(name.split(", ")), label=name)
        for seed in range(seeds):
            points = {step: accuracy(name, seed, step) for step in steps}
            arm = dict(zip(("recurrence", "scan", "prompt"), ("rwkv5", name, "prefix"), strict=True))
            seen = tuple(
                Point(s, {k: Score(a, 100, 0.02) for k, a in {"all": sum(p.values()) / len(p), **p}.items()})
                for s, p in points.items()
            )
            row.runs.append(Run(seed, arm, 16, seen, result(seed, points)))
        found.append(row)
    return Table("some/table", "some table", "A caption.", {}, ["2d > uni"], "", found)


def known(name: str, seed: int, step: int) -> dict[str, float]:
    """2d is 20 points ahead on edge with little spread, as good on at, behind on count."""
    noise = 0.01 * ((seed * 7 + len(name)) % 5 - 2)
    early = 0.2 if step == 100 else 0.0
    ahead = name == "2d"
    return {
        "at": 1.0 - early,
        "count": 0.7 + noise - 0.1 * ahead - early,
        "edge": 0.7 + noise + 0.2 * ahead - early,
        "ray": 0.5 + 0.1 * ahead * (-1) ** seed - early,
    }


def test_the_words_are_those_of_the_data() -> None:
    table = made(known, "uni", "2d", seeds=4)
    head, _, line, *rest = words(table)
    assert head == (
        "Of 4 comparisons (1 pair by 4 question types) the expected order holds in 1, is reversed in 1, "
        "is undecided at 4 seeds in 1, has nothing left to show in 1, where both arms solve the task."
    )
    holds, back, open_, solved = (
        line.index(w) for w in ("holds on", "reversed on", "undecided at", "both above")
    )
    assert holds < line.index("edge (+2") < back < line.index("count (−") < open_
    assert (
        open_ < line.index("ray (+0.0 points, p = 1.00)") < solved < line.index("at (+0.0 points, p = 1.00)")
    )
    assert "not in the paper: 2d, uni" in line
    assert "Holm" in rest[-1] and "edge" in rest[-1]
    (pair,) = pairs(table)
    found = pair.at_end("edge")
    assert found is not None and found.mean == pytest.approx(0.2, abs=0.02) and found.ahead == 4


def test_arms_that_learned_nothing_are_not_called_undecided() -> None:
    table = made(lambda name, seed, step: {"edge": 0.31 + 0.001 * seed, "ray": 0.4}, "uni", "2d")
    head, _, line, *_ = words(table)
    assert "holds in 0, is undecided at 5 seeds in 1, has nothing to show yet in 1" in head
    assert (
        "undecided at this number of seeds on ray (+0.0" in line and "above the floors on edge (+0.0" in line
    )


def test_both_arms_have_to_solve_a_type_before_nothing_is_left_to_show() -> None:
    def near(name: str, seed: int, step: int) -> dict[str, float]:
        return {"at": 0.99 if name == "2d" else 0.97 + 0.01 * (seed % 4), "edge": 0.99 + 0.002 * (seed % 2)}

    table = made(near, "uni", "2d", seeds=4)
    (pair,) = pairs(table)
    assert table.rows[0].mean("at") == pytest.approx(0.985) and pair.word("at") == "ceiling"
    table = made(near, "uni", "2d", seeds=2)
    (pair,) = pairs(table)
    assert table.rows[0].mean("at") == pytest.approx(0.975) and pair.word("at") == "undecided"


def test_the_order_turned_round_is_reversed_where_it_held() -> None:
    table = made(known, "uni", "2d")
    table.order = ["uni > 2d"]
    line = list(words(table))[2]
    assert line.startswith("- **uni over 2d**")
    assert line.index("holds on count (+") < line.index("reversed on edge (−")


def test_one_seed_decides_nothing_and_says_so() -> None:
    table = made(known, "uni", "bi", "2d", seeds=1)
    text = markdown(table)
    assert "is undecided at one seed in 3" in text and "edge (+19.0 points)" in text
    assert "Every arm ran with one seed: no spread and no p-value" in text and "One seed: no spread." in text
    assert "p =" not in text and "Holm" not in text and "Decided besides" not in text


def test_paper_beside_every_pair_and_chains_give_every_ordered_pair() -> None:
    table = made(known, "prefix", "suffix", "sandwich", seeds=2)
    table.order = ["sandwich > prefix > suffix"]
    table.published = {
        "sandwich": {"VQA": 69.71, "SQA": 65.20},
        "prefix": {"VQA": 67.93, "SQA": 65.59},
    }
    assert expected(table) == [("sandwich", "prefix"), ("sandwich", "suffix"), ("prefix", "suffix")]
    text = "\n".join(words(table))
    assert "**sandwich over prefix** (paper: ahead on 1 of 2 benchmarks, +0.7 on average)" in text
    assert "**prefix over suffix** (not in the paper: suffix)" in text
    for wrong in ("2d", "2d > 2d", "2d >"):
        table.order = [wrong]
        with pytest.raises(BadRecipe, match=r"report\.order"):
            expected(table)


def test_rows_of_two_keys_are_compared_where_one_differs() -> None:
    names = [f"{p}, {s}" for p in ("prefix", "sandwich") for s in ("uni", "2d")]
    table = made(known, *names, seeds=2)
    table.order = ["2d > uni"]
    found = {pair.name: pair.asked for pair in pairs(table)}
    assert found == {
        "prefix, 2d over prefix, uni": True,
        "sandwich, 2d over sandwich, uni": True,
        "sandwich, uni over prefix, uni": False,
        "sandwich, 2d over prefix, 2d": False,
    }
    seen = looks(table)
    assert len(set(seen.values())) == 4 and seen[names[0]][0] == seen[names[1]][0] != seen[names[2]][0]


def test_many_arms_are_compared_with_the_first_and_as_asked() -> None:
    table = made(known, "uni", "bi", "2d", "snake", "spiral", "hilbert", seeds=2)
    table.order = ["hilbert > snake"]
    found = [(p.b.name, p.a.name, p.asked) for p in pairs(table)]
    assert found[0] == ("snake", "hilbert", True)
    assert [b for b, _, _ in found[1:]] == ["uni"] * 5


def test_steps_to_ninety_percent() -> None:
    """Of five seeds three get there after 100, 200 and 300 steps, two never: the median is the third."""

    def late(name: str, seed: int, step: int) -> dict[str, float]:
        return {"edge": 0.95 if seed < 3 and step >= 100 * (seed + 1) else 0.5}

    (row,) = made(late, "uni", steps=(100, 200, 300, 400)).rows
    assert steps_to(row, "edge") == "300 (3/5)"
    row.runs = row.runs[1:]
    assert steps_to(row, "edge") == "> 400 (2/4)"
    (row,) = made(late, "uni", steps=(400,)).rows  # the end alone does not tell when
    assert steps_to(row, "edge") == "-"


@pytest.mark.parametrize("seeds", [1, 5])
@pytest.mark.parametrize("steps", [(100, 200), (200,)])
def test_figures_have_a_panel_per_type_and_a_line_per_arm(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, seeds: int, steps: tuple[int, ...]
) -> None:
    from matplotlib.figure import Figure

    drawn: list[Figure] = []
    save = Figure.savefig
    monkeypatch.setattr(Figure, "savefig", lambda self, *a, **k: (drawn.append(self), save(self, *a, **k)))
    table = made(known, "uni", "2d", seeds=seeds, steps=steps)
    table.published = {"uni": {"VQA": 51.03, "GQA": 48.09}, "2d": {"VQA": 66.04}}
    assert figure(table, tmp_path / "made/x.png").stat().st_size > 10_000
    panels = [axes for axes in drawn[0].axes if axes.axison]
    titles = [axes.get_title(loc="left") for axes in panels]
    assert titles == ["all questions", "at", "count", "edge", "ray", "published (other data and size)"]
    edge, uni = panels[3], 71 if seeds == 1 else 70
    assert [t.get_text() for t in edge.texts] == (
        [f"uni {uni}", "2d 90"] if len(steps) > 1 else [f"{uni}.0", "90.0"]
    )
    lines = [line.get_xydata().tolist() for line in edge.lines if len(set(line.get_xdata())) > 1]  # type: ignore[union-attr]
    if len(steps) > 1:
        assert [x for x, _ in lines[0]] == [100, 200] and lines[1][1][1] == pytest.approx(90, abs=2)
        assert len(edge.collections) == (2 if seeds > 1 else 0)  # bands


def test_published_dots_of_two_keys_are_told_apart(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from matplotlib.figure import Figure

    drawn: list[Figure] = []
    monkeypatch.setattr(Figure, "savefig", lambda self, *a, **k: drawn.append(self))
    names = [f"{prompt}, {tokens}" for prompt in ("prefix", "suffix", "sandwich") for tokens in (-1, 4, 1)]
    table = made(known, *names)
    table.published = {name: {"VQA": 50.0 + k, "GQA": 40.0 + k} for k, name in enumerate(names[:-1])}
    table.published[names[-1]] = {}
    figure(table, tmp_path / "x.png")
    panel = next(a for a in drawn[0].axes if a.get_title(loc="left").startswith("published"))
    across = [dots.get_offsets()[:, 0].tolist() for dots in panel.collections[:-1]]  # type: ignore[index]
    assert max(x for x, _ in across) < min(x for _, x in across)
    forms = {dots.get_paths()[0].vertices.tobytes() for dots in panel.collections}
    assert len(forms) == 3 and len(panel.texts) == 8
    assert "▲ prefix, 1" in {text.get_text() for text in panel.texts}


def test_labels_are_moved_apart_and_stay_inside() -> None:
    assert spaced([10, 50, 90], 5, 0, 100) == [10, 50, 90]
    assert spaced([50, 50, 50], 5, 0, 100) == [45, 50, 55]
    for values in ([99, 99.5, 100], [0, 0, 1], [97, 98, 99, 99, 100, 100], [3, 50, 51, 100, 100]):
        found = spaced(values, 5, 0, 100)
        assert all(b - a >= 5 - 1e-9 for a, b in itertools.pairwise(found)), found
        assert min(found) >= 0 and max(found) <= 100, found
