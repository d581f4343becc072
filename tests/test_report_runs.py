"""Reports of run directories: what is collected, what is missing, earlier steps, the best of a grid."""

from __future__ import annotations

import csv
import json
import math
import shlex
from pathlib import Path

import pytest

from data.tokens import CompactTokenizer
from tests.test_report import Accuracy, known, made, result, scores
from toolkit import compose, report
from toolkit.build import build_model, from_dict, on_meta, parameters_by_part
from toolkit.explain import BadRecipe
from toolkit.report import write
from toolkit.report_collect import collect
from toolkit.report_plot import figure
from toolkit.report_table import Score
from toolkit.report_text import markdown
from toolkit.rundir import RunDir, write_json

SMALL = ["scale=quick", "encoder=patch", "encoder.patch=32", "data.limit=12"]


def put(tmp_path: Path, accuracy: Accuracy, words: list[str], *, old: bool = False) -> list[str]:
    """Writes the result of every run of ablation/scan; returns the words that ask for them."""
    asked = [*SMALL, *words, f"paths.runs={tmp_path / 'runs'}"]
    for job in compose.understand(["recipe=ablation/scan", *asked]).jobs:
        cfg = compose.compose(job)
        scan, seed = cfg["scan"]["name"], cfg["seed"]
        found = result(seed, {step: accuracy(scan, seed, step) for step in (100, 200)})
        for key in ("curve", "floors", "image_tokens") if old else ():
            del found[key]
        write_json(RunDir(tmp_path / "runs", cfg).result, found)
    return asked


def test_report_and_raw_rows_of_run_directories(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    asked = put(tmp_path, known, ["seed=0,1,2"])
    raw = tmp_path / "raw.jsonl"
    other = {"table": "ablation/prompt", "accuracy": 1}
    raw.write_text(json.dumps(other) + "\n" + json.dumps({"table": "ablation/scan"}) + "\n")
    command = ["ablation/scan", *asked, "--out", str(tmp_path / "out"), "--raw", str(raw)]
    assert report.main(command) == 0 and report.main(command) == 0
    first, *rows = [json.loads(line) for line in raw.read_text().splitlines()]
    assert first == other and len(rows) == 3 * 3 * 2 * 5
    fields = "table recurrence scan prompt tokens seed step type n accuracy"
    assert all(" ".join(row) == fields for row in rows)
    (row,) = (r for r in rows if (r["scan"], r["seed"], r["step"], r["type"]) == ("2d", 1, 100, "edge"))
    assert row["table"] == "ablation/scan" and row["recurrence"] == "rwkv5" and row["prompt"] == "prefix"
    assert row["tokens"] == 16 and row["n"] == 100
    assert row["accuracy"] == pytest.approx(known("2d", 1, 100)["edge"])
    text = (tmp_path / "out/ablation-scan.md").read_text()
    assert "**2d over uni** (paper: ahead on 4 of 4 benchmarks, +4.9 on average)" in text
    assert "| 2d  | 1,234      | 16           | 200   | 3     |" in text and "## edge" in text
    lines = list(csv.DictReader((tmp_path / "out/ablation-scan.csv").open()))
    assert len(lines) == 9 and float(lines[-1]["edge"]) == pytest.approx(known("2d", 2, 200)["edge"])
    capsys.readouterr()


def test_the_command_for_what_is_missing_survives_a_shell(tmp_path: Path) -> None:
    words = [f"paths.runs='{tmp_path}/my runs'", "seed=0", "title='$HOME > x'"]
    for row in collect("ablation/scan", words).rows:
        (command,) = row.missing
        compose.understand(shlex.split(command)[3:])
        assert set(words) <= set(shlex.split(command))


def test_no_picture_of_other_runs_stays_beside_an_empty_table(tmp_path: Path) -> None:
    (tmp_path / "ablation-scan.png").touch()
    words = ["seed=0", f"paths.runs={tmp_path}/none", "--out", str(tmp_path)]
    assert report.main(["ablation/scan", *words]) == 1
    assert not (tmp_path / "ablation-scan.png").exists()


def test_a_report_that_cannot_be_written_says_where(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "file").touch()
    words = ["seed=0", f"paths.runs={tmp_path}/none", "--out", str(tmp_path / "file")]
    assert report.main(["ablation/scan", *words]) == 2
    assert "name a folder that can be written" in capsys.readouterr().err


def test_report_at_an_earlier_step(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    asked = put(tmp_path, known, ["seed=0,1"])
    table = collect("ablation/scan", asked, step=100)
    assert table.rows[2].final("edge")[0] == pytest.approx(known("2d", 0, 100)["edge"])
    assert report.main(["ablation/scan", *asked, "--out", str(tmp_path), "--step", "100"]) == 0
    assert (tmp_path / "ablation-scan-step100.md").exists()
    assert report.main(["ablation/scan", *asked, "--step", "150"]) == 2
    error = capsys.readouterr().err
    assert "was evaluated after 100, 200 steps" in error and "take one of these" in error
    (tmp_path / "bad.jsonl").write_text("{}\n")
    assert report.main(["ablation/scan", *asked, "--raw", str(tmp_path / "bad.jsonl")]) == 2
    assert "line 1 is no row of a table" in capsys.readouterr().err


def test_runs_that_have_not_ended_count_where_they_were_evaluated(tmp_path: Path) -> None:
    asked = put(tmp_path, known, ["seed=0,1"])
    ended = collect("ablation/scan", asked, step=100)
    for job in compose.understand(["recipe=ablation/scan", *asked]).jobs:
        cfg = compose.compose(job)
        folder, scan, seed = RunDir(tmp_path / "runs", cfg), cfg["scan"]["name"], cfg["seed"]
        if scan == "uni" or seed == 0:
            folder.result.unlink()
            points = [{"step": step, **scores(known(scan, seed, step))} for step in (50, 100, 150)]
            folder.curve.write_text("".join(json.dumps(point) + "\n" for point in points))
            CompactTokenizer([5, 7]).save(folder.path / "vocabulary.json")
            write_json(folder.status, {"state": "stopped", "commit": "0" * 40})
    table = collect("ablation/scan", asked, step=100)
    for before, now in zip(ended.rows, table.rows, strict=True):
        assert now.final("edge") == before.final("edge") and not now.missing
    text = markdown(table)
    assert "4 of 6 runs have not ended: floors, and" in text and "Floors: majority answer 25.00" in text
    (parameters,) = {run.result["parameters"]["rwkv"] for run in table.rows[0].runs}
    with on_meta():  # padding, the end, and the two above
        model = build_model(from_dict(cfg), vocab_size=4)
    assert parameters == parameters_by_part(model)["rwkv"] and table.rows[0].runs[0].image_tokens == 4
    assert write(table, tmp_path / "out")[-1].suffix == ".png"
    assert [len(row.runs) for row in collect("ablation/scan", asked).rows] == [0, 1, 1]


def test_results_from_before_there_were_points(tmp_path: Path) -> None:
    table = collect("ablation/scan", put(tmp_path, known, [], old=True))
    assert [row.runs[0].image_tokens for row in table.rows] == [4, 4, 4]
    text = markdown(table)
    assert "No evaluation before the last" in text and "undecided at one seed" in text
    assert figure(table, tmp_path / "x.png").exists()


def grid(folder: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """Writes a table recipe of two scans by two rates; returns the word for its runs' folder."""
    (folder / "grid.yaml").write_text(
        "# G.\ndefaults:\n  - /recipe/ablation/base\nreport: {rows: scan, best: stages.tune.lr}\n"
        'hydra:\n  mode: MULTIRUN\n  sweeper: {params: {scan: "uni,2d", stages.tune.lr: "1e-3,4e-3"}}\n'
    )
    monkeypatch.setenv("TOOLKIT_RECIPES", str(folder))
    return f"paths.runs={folder / 'runs'}"


def test_the_best_of_a_grid_and_a_key_forgotten(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    runs = grid(tmp_path, monkeypatch)
    for job in compose.understand(["recipe=grid", *SMALL, runs]).jobs:
        cfg = compose.compose(job)
        fast, scan = cfg["stages"]["tune"]["lr"] > 2e-3, cfg["scan"]["name"]
        value = 0.8 if fast == (scan == "2d") else 0.6
        write_json(RunDir(tmp_path / "runs", cfg).result, result(0, {200: {"edge": value}}))
    table = collect("grid", [*SMALL, runs])
    assert [(row.name, row.chosen, row.mean("all")) for row in table.rows] == [
        ("uni", "0.001", 0.8),
        ("2d", "0.004", 0.8),
    ]
    assert "| stages.tune.lr |" in markdown(table) and "one grid for all rows" in markdown(table)
    assert "accuracy on these questions" in markdown(table)
    with pytest.raises(BadRecipe, match="two runs of seed 0, so another key varies too"):
        collect("grid", [*SMALL, runs, "report.best=''"])


def test_a_rate_is_chosen_on_the_split_named_for_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The rate that is better on val is kept, although the other is better on the reported questions."""
    runs = grid(tmp_path, monkeypatch)
    for job in compose.understand(["recipe=grid", *SMALL, runs]).jobs:
        cfg = compose.compose(job)
        fast = cfg["stages"]["tune"]["lr"] > 2e-3
        found = result(0, {200: {"edge": 0.9 if fast else 0.7}})
        found["choose"] = {"split": "val", "accuracy": 0.6 if fast else 0.8, "n": 50}
        write_json(RunDir(tmp_path / "runs", cfg).result, found)
    table = collect("grid", [*SMALL, runs])
    assert [(row.chosen, row.mean("all")) for row in table.rows] == [("0.001", 0.7)] * 2
    assert "best mean accuracy on the split val, not here" in markdown(table)


def test_what_is_not_finite_is_told_as_unknown() -> None:
    table = made(known, "uni", "2d", seeds=2)
    for run in table.runs:
        run.final.scores["edge"] = Score(0.5, 1, math.nan)
    assert "nan" not in markdown(table)


def test_values_have_names_for_people(tmp_path: Path) -> None:
    asked = put(tmp_path, known, ["seed=0,1,2", "+report.names.uni=one way"])
    table = collect("ablation/scan", asked)
    assert [(row.name, row.label) for row in table.rows][:2] == [("uni", "one way"), ("bi", "bi")]
    assert "**2d over one way** (paper: ahead on 4 of 4 benchmarks" in markdown(table)
    tokens = collect("ablation/tokens", [*SMALL, f"paths.runs={tmp_path / 'none'}"])
    assert [(row.name, row.label) for row in tokens.rows] == [("-1", "all"), ("4", "4"), ("1", "1")]
