"""The scan benchmark runs, on small sizes, and writes what it says."""

from __future__ import annotations

import json
from pathlib import Path

from benchmarks import scan_cost


def test_small_run_writes_both_files(tmp_path: Path) -> None:
    scan_cost.main(["--tiny", "--out", str(tmp_path)])
    found = json.loads((tmp_path / "scan_cost.json").read_text())
    assert [row["weights"] for row in found["rows"]] == ["float32, autocast", "bfloat16"]
    for row in found["rows"]:
        assert row["ratio"]["2d"] == row["ms"]["2d"] / row["ms"]["uni"]
    assert "| bfloat16 |" in (tmp_path / "scan_cost.md").read_text()
