"""The benchmark of the loader's wait runs, on small sizes, and writes what it says."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from benchmarks import loader_wait


def test_small_run_writes_both_files(tmp_path: Path) -> None:
    out = ["--out", str(tmp_path)]
    loader_wait.main(["--tiny", "--device", "cpu", "--rounds", "1", "--workers", "0,1", *out])
    rows = json.loads((tmp_path / "loader_wait.json").read_text())
    modes = ["resident", "workers=0", "workers=1"]
    expected = [(m, d, mode) for m, d in SETS for mode in modes]
    assert [(r["model"], r["data"], r["mode"]) for r in rows] == expected
    for row in rows:
        assert (row["over_resident"] == 1) == (row["mode"] == "resident")
        assert row["wait_p95_share"] == pytest.approx(row["wait_p95_ms"] / row["step_ms"], abs=2e-4)
    assert "| paper | pictures | 4 in 2s | workers=1 |" in (tmp_path / "loader_wait.md").read_text()


def test_what_is_not_measured_again_stays() -> None:
    old = [{"model": "small", "data": "features", "mode": m, "step_ms": 1} for m in "ab"]
    old += [{"model": "paper", "data": "pictures", "mode": "a", "step_ms": 1}]
    new = [{"model": "small", "data": "features", "mode": "a", "step_ms": 2}]
    assert loader_wait.merged(old, new) == [old[2], *new]


def test_a_row_tells_medians_and_the_share_of_the_slowest_waits() -> None:
    blocks = [(10.0, [0.0] * 9 + [1.0]), (30.0, [0.0] * 10), (11.0, [0.0] * 10)]
    row = loader_wait.told("workers=2", blocks, [10.0, 10.0, 10.0])
    assert (row["step_ms"], row["over_resident"]) == (11.0, 1.1)
    assert row["wait_mean_ms"] == 0.033 and row["wait_p95_ms"] == 0.0
    late = loader_wait.told("workers=2", [(10.0, [0.0, 2.0])], [10.0])
    assert late["wait_p95_ms"] == 1.9 and late["wait_p95_share"] == 0.19


SETS = (("small", "features"), ("small", "pictures"), ("paper", "pictures"))


def test_a_block_s_length_is_refused_where_it_would_be_ignored(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        loader_wait.main(["--tiny", "--device", "cpu", "--only", "paper", "--steps", "3"])
    assert "--steps is of small's blocks; leave it out, or --only paper" in capsys.readouterr().err
