"""The benchmark of ablation tables: the ordinary sweep, its report, and rows that replace only their own."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from benchmarks import ablations


def test_a_table_is_run_reported_and_kept(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "out/ablations.jsonl"
    file.parent.mkdir()
    others = [{"scale": "small", "table": "ablation/scan"}, {"scale": "tiny", "table": "ablation/prompt"}]
    old = {"scale": "tiny", "table": "ablation/scan", "accuracy": 2}
    file.write_text("".join(json.dumps(row) + "\n" for row in [*others, old]))
    words = [
        *("scan", "scan=uni", "seed=0", "data.train_pictures=24", "data.test_pictures=8", "model.n_layer=2"),
        *("stages.tune.steps=2", "stages.tune.warmup=0", "stages.tune.global_batch=8", "eval.every=1"),
        *(f"paths.runs={tmp_path / 'runs'}", f"paths.cache={tmp_path / 'cache'}"),
    ]
    # Settings may stand before and behind an option.
    assert ablations.main([*words[:2], "--out", str(file.parent), *words[2:]]) == 0
    rows = [json.loads(line) for line in file.read_text().splitlines()]
    assert rows[:2] == others and old not in rows
    types = {"all", "count", "edge_row", "edge_column"}
    assert {(row["step"], row["type"]) for row in rows[2:]} == {(s, t) for s in (1, 2) for t in types}
    assert len(rows) == 2 + 8
    columns = "scale table recurrence scan prompt tokens seed step type n accuracy"
    assert all(list(row) == columns.split() for row in rows[2:])
    assert (file.parent / "ablations-tiny/ablation-scan.png").stat().st_size > 10_000
    assert "1 runs" in capsys.readouterr().out


def test_a_table_that_is_not_there_ends_with_its_name(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert ablations.main(["sacn", "--out", str(tmp_path)]) == 2
    assert "no recipe 'ablation/sacn'" in capsys.readouterr().err
    assert not (tmp_path / "ablations.jsonl").exists()
