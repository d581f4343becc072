"""The listing and the entry point: what they print, and how a sweep ends when a row fails."""

from __future__ import annotations

import logging
import os
import subprocess
import sys
import types
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.compositions import registry
from toolkit import listing, register, run


@pytest.fixture
def jobs(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[list[dict[str, Any]]]:
    """Runs are only noted down; a run with seed 13 fails."""
    noted: list[dict[str, Any]] = []

    def run_job(cfg: dict[str, Any], *, recipe: str, argv: list[str]) -> None:
        noted.append({"cfg": cfg, "recipe": recipe, "argv": argv})
        if cfg["seed"] == 13:
            raise RuntimeError("thirteen brings\nno luck")
        if cfg["seed"] == 14:
            raise ValueError("a sentence for the user")

    fake = types.ModuleType("toolkit.job")
    fake.run_job = run_job  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "toolkit.job", fake)
    monkeypatch.chdir(tmp_path)
    yield noted


def test_every_kind_is_listed_with_its_parameters(capsys: pytest.CaptureFixture[str]) -> None:
    assert listing.main([]) == 0
    text = capsys.readouterr().out
    for kind in register.KINDS:
        for name, component in register.components(kind).items():
            assert f"  {name}  {component.summary}" in text
    assert "columns: bool = True" in text
    assert "model: str = required" in text
    assert "(one of v6, v5)" in text
    assert "components/scans.py:" in text
    assert "  ablation/scan_2d  Table 4" in text and "  paper_1b6  The paper's 1.6B model" in text


def test_one_kind_only(capsys: pytest.CaptureFixture[str]) -> None:
    assert listing.main(["prompt"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "prompt" and not any("rwkv" in line for line in lines)


def test_an_unknown_kind(capsys: pytest.CaptureFixture[str]) -> None:
    assert listing.main(["scans"]) == 2
    assert "did you mean: scan" in capsys.readouterr().err


def test_plot_draws_each_scan_and_tells_which_it_leaves_out(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    drawn: dict[str, Any] = {}

    def draw(name: str, table: Any, height: int, width: int, path: Path) -> Path:
        drawn[name] = (table, height, width, path)
        return path

    fake = types.ModuleType("toolkit.scan_plot")
    fake.draw = draw  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "toolkit.scan_plot", fake)
    with registry():

        @register.scan("picky")
        def picky(n_layer: int, height: int, width: int) -> Any:
            """Refuses every grid."""
            raise ValueError("no grid will do")

        assert listing.main(["scan", "--plot", str(tmp_path), "--grid", "2x3", "--layers", "2"]) == 0
    table, height, width, path = drawn["bi"]
    assert (table, height, width) == ([[0, 1, 2, 3, 4, 5], [5, 4, 3, 2, 1, 0]], 2, 3)
    assert path == tmp_path / "scan_bi.png"
    assert "picky" not in drawn and "picky: left out: no grid will do" in capsys.readouterr().out


def test_plot_refuses_another_kind(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert listing.main(["prompt", "--plot", str(tmp_path)]) == 2
    assert "drawings are of scans" in capsys.readouterr().err


def test_help_names_everything(capsys: pytest.CaptureFixture[str]) -> None:
    assert run.main(["--help"]) == 0
    text = capsys.readouterr().out
    for word in (
        "rwkv6",
        "sandwich",
        "hilbert",
        "easy_vqa",
        "ablation/scan",
        "paper_7b",
        "--check",
        "plugins=",
    ):
        assert word in text


def test_bare_is_the_quick_start(jobs: list[dict[str, Any]]) -> None:
    assert run.main([]) == 0
    assert [job["recipe"] for job in jobs] == ["quickstart"]
    assert type(jobs[0]["cfg"]) is dict and "hydra" not in jobs[0]["cfg"]
    assert jobs[0]["cfg"]["encoder"]["name"] == "lite0"


def test_a_single_run_gets_plain_values_and_its_command(jobs: list[dict[str, Any]], tmp_path: Path) -> None:
    assert run.main(["recipe=ablation/scan_2d", "seed=3"]) == 0
    assert (
        jobs[0]["argv"] == ["recipe=ablation/scan_2d", "seed=3"] and jobs[0]["recipe"] == "ablation/scan_2d"
    )
    assert list(tmp_path.iterdir()) == []


def test_a_failing_row_hides_no_other(jobs: list[dict[str, Any]], capsys: pytest.CaptureFixture[str]) -> None:
    assert run.main(["-m", "seed=12,13,15", "scan=uni"]) == 1
    assert [job["cfg"]["seed"] for job in jobs] == [12, 13, 15]
    lines = capsys.readouterr().err.splitlines()
    assert "2 of 3 rows done, 1 failed:" in lines
    last = lines[-1].strip()
    assert last.startswith("seed=13: RuntimeError: thirteen brings no luck (test_listing.py:")


def test_a_table_runs_all_its_rows_and_leaves_no_litter(jobs: list[dict[str, Any]], tmp_path: Path) -> None:
    assert run.main(["recipe=ablation/prompt", "seed=1,2", "hardware.parallel=1"]) == 0
    names = [(job["recipe"], job["cfg"]["prompt"]["name"], job["cfg"]["seed"]) for job in jobs]
    assert names[0] == ("ablation/prompt_prefix", "prefix", 1) and len(names) == len(set(names)) == 6
    assert {p.name for p in tmp_path.iterdir()} <= {"runs"}
    assert not [p for p in tmp_path.rglob("*") if p.is_file()]


def test_one_bad_row_stops_a_sweep_before_it_starts(
    jobs: list[dict[str, Any]], capsys: pytest.CaptureFixture[str]
) -> None:
    assert run.main(["-m", "recurrence.head_size=32,48"]) == 2
    assert jobs == [] and "48 does not divide" in capsys.readouterr().err


def test_a_users_error_is_a_sentence_another_a_traceback(
    jobs: list[dict[str, Any]], capsys: pytest.CaptureFixture[str]
) -> None:
    assert run.main(["seed=14"]) == 1
    assert "ValueError: a sentence for the user" in capsys.readouterr().err
    with pytest.raises(RuntimeError):
        run.main(["seed=13"])


def test_cfg_job_prints_the_composed_recipe(capsys: pytest.CaptureFixture[str]) -> None:
    assert run.main(["recipe=ablation/scan_bi", "--cfg", "job"]) == 0
    text = capsys.readouterr().out
    assert "name: bi" in text and "hydra:" not in text


def test_info_shows_how_it_was_composed(capsys: pytest.CaptureFixture[str]) -> None:
    handlers = logging.getLogger().handlers[:]
    assert run.main(["recipe=ablation/scan_bi", "--info", "defaults"]) == 0
    assert "recipe/ablation/base" in capsys.readouterr().out
    assert logging.getLogger().handlers == handlers, (
        "Hydra's own handler writes to a stream that may be closed"
    )


def test_check_counts_parameters_without_data(capsys: pytest.CaptureFixture[str]) -> None:
    assert run.main(["--check", "encoder=patch", "recipe=ablation/base"]) == 0
    text = capsys.readouterr().out
    assert "rwkv" in text and "tokens" in text and "learn" in text


def test_a_reader_that_goes_ends_a_listing_without_a_word() -> None:
    words = [sys.executable, "-m", "toolkit.listing"]
    reader, writer = os.pipe()
    os.close(reader)
    done = subprocess.run(words, stdout=writer, stderr=subprocess.PIPE, timeout=60, check=False)
    os.close(writer)
    assert (done.returncode, done.stderr) == (141, b"")


def test_a_check_names_the_place_of_what_does_not_fit(capsys: pytest.CaptureFixture[str]) -> None:
    assert run.main(["--check", "encoder=patch", "encoder.image_size=65"]) == 2
    assert capsys.readouterr().err.startswith("command line: encoder.image_size")
