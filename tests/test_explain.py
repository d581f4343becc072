"""Seeded mistakes: each is caught before torch, told where, with the right suggestion first and a fix."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.compositions import composed
from tests.slips import IN_FILES, Slip
from tests.slips_of_words import TOGETHER_AND_WORDS
from toolkit.explain import BadRecipe, Problem, closest

ROOT = Path(__file__).resolve().parent.parent

SLIPS = [*IN_FILES, *TOGETHER_AND_WORDS]


@pytest.mark.parametrize("slip", SLIPS, ids=lambda s: s.name)
def test_a_mistake_is_told(slip: Slip, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "recipes").mkdir()
    words = slip.words.split()
    if slip.file:
        (tmp_path / "recipes/bad.yaml").write_text(f"# A recipe with a mistake.\n{slip.file}\n")
        words = ["recipe=bad"]
    with pytest.raises(BadRecipe) as error:
        composed(*words, multirun=slip.multirun, complete=slip.complete)
    problem, text = error.value.problems[0], error.value.message()
    if not slip.complete:
        assert (problem.place, problem.key) == (slip.place, slip.key), text
    assert next(iter(problem.matches), "") == slip.first or not slip.first, text
    assert all(fragment in text for fragment in slip.fragments), text
    assert problem.fix and len(text.splitlines()) <= 12
    assert "Traceback" not in text


def test_at_least_forty_mistakes_and_all_differ() -> None:
    assert len({slip.name for slip in SLIPS}) == len(SLIPS) >= 40


def test_several_problems_come_together(tmp_path: Path) -> None:
    with pytest.raises(BadRecipe) as error:
        composed("seed=a", "model.n_layer=0", "titel=x", "scan.colums=1", "loss.l3=1", "eval.bacth=2")
    assert len(error.value.problems) == 6
    text = error.value.message()
    assert len(text.splitlines()) <= 12 and text.endswith("... and 3 more; fix these first")


def test_close_matches_prefer_the_whole_then_the_last_part() -> None:
    assert closest("scan_2d", ["ablation/scan_2d", "ablation/scan_bi", "quickstart"])[0] == "ablation/scan_2d"
    assert closest("zzz", ["scan", "prompt"]) == []


def test_a_problem_prints_in_at_most_three_lines() -> None:
    text = str(Problem("r.yaml:3", "scan", "no such", ("a", "b", "c", "d"), "write a"))
    assert text == "r.yaml:3: scan: no such\n  did you mean: a, b, c\n  fix: write a"


_PROBE = """
import sys
from toolkit.{module} import main
code = main(sys.argv[1:])
names = ("torch", "lightning", "webdataset", "timm", "open_clip", "numpy", "PIL")
heavy = [name for name in names if name in sys.modules]
print("HEAVY", heavy)
sys.exit(code)
"""


def _probe(module: str, *words: str, env: dict[str, str] | None = None) -> subprocess.CompletedProcess[str]:
    variables = {**os.environ, "PYTHONPATH": str(ROOT), **(env or {})}
    command = [sys.executable, "-c", _PROBE.format(module=module), *words]
    return subprocess.run(command, env=variables, capture_output=True, text=True)


@pytest.mark.parametrize(
    ("module", "words", "code"),
    [
        ("run", ["--help"], 0),
        ("run", ["--cfg", "job"], 0),
        ("run", ["recipe=ablation/scan_3d"], 2),
        ("run", ["scan.colums=1"], 2),
        ("listing", [], 0),
    ],
)
def test_answers_without_heavy_imports(module: str, words: list[str], code: int) -> None:
    done = _probe(module, *words)
    assert done.returncode == code, done.stderr
    assert "HEAVY []" in done.stdout


def test_trace_shows_the_traceback_on_request() -> None:
    assert "Traceback" not in _probe("run", "seed=a").stderr
    done = _probe("run", "seed=a", env={"TOOLKIT_TRACE": "1"})
    assert "Traceback" in done.stderr and "BadRecipe" in done.stderr
