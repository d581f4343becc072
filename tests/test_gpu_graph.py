"""Training steps as a CUDA graph: the bits of steps launched one by one, and the ordinary loop's numbers."""

from __future__ import annotations

import csv
import json
import signal
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from toolkit import checkpoint, graphs, run
from toolkit.model import VisualRWKV

pytestmark = pytest.mark.gpu

WORDS = [
    "scale=small",
    "data.train_pictures=80",
    "data.test_pictures=24",
    "stages.tune.steps=12",
    "stages.tune.warmup=3",
    "stages.tune.lr=1e-3",
    "log.every=1",
    "log.tensorboard=false",
    "eval.every=4",
    "eval.every_limit=24",
    "eval.limit=24",
    "hardware.device=cuda",
]
ROWS = pytest.mark.parametrize(
    ("recurrence", "precision"), [("rwkv4", "fp32"), ("rwkv5", "fp32"), ("rwkv6", "fp32"), ("rwkv6", "bf16")]
)


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("cache")


def trained(folder: Path, cache: Path, *words: str) -> Path:
    """The run directory of a fresh run."""
    paths = [f"paths.runs={folder}", f"paths.cache={cache}"]
    assert run.main([*WORDS, *paths, *words]) == 0
    (found,) = folder.glob("*-s0-*")
    return found


def result(folder: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((folder / "result.json").read_text())
    return found


def losses(folder: Path) -> list[float]:
    return [float(row["loss"]) for row in csv.DictReader((folder / "metrics.csv").open())]


def weights(folder: Path) -> dict[str, Tensor]:
    return load_file(folder / "checkpoints" / "last" / "model.safetensors")


def accuracies(folder: Path) -> list[tuple[int, float]]:
    return [(point["step"], point["accuracy"]) for point in result(folder)["curve"]]


@ROWS
def test_replays_give_the_bits_of_single_launches(
    tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch, recurrence: str, precision: str
) -> None:
    """Losses, points while training and weights; so the capture also leaves the model as it was."""
    words = [f"recurrence={recurrence}", f"hardware.precision={precision}"]
    replayed = trained(tmp_path / "graph", cache, *words)
    monkeypatch.setattr(graphs.Steps, "capture", lambda self: 0.01)
    launched = trained(tmp_path / "single", cache, *words)
    assert result(replayed)["training"] == {"tune": "graph"}
    operator = {"rwkv4": "wkv4", "rwkv5": "wkv5", "rwkv6": "wkv6"}[recurrence]
    assert result(replayed)["kernels"][operator] == "triton"
    assert len(losses(replayed)) == 12 and losses(replayed) == losses(launched)
    assert [step for step, _ in accuracies(replayed)] == [4, 8]
    assert accuracies(replayed) == accuracies(launched)
    found, wanted = weights(replayed), weights(launched)
    assert all(torch.equal(tensor, wanted[name]) for name, tensor in found.items())


@ROWS
def test_a_graph_trains_as_the_ordinary_loop(
    tmp_path: Path, cache: Path, recurrence: str, precision: str
) -> None:
    """To rounding: longer padding, a fused optimizer and single-precision rates are all that differs."""
    words = [f"recurrence={recurrence}", f"hardware.precision={precision}"]
    graph = trained(tmp_path / "graph", cache, *words)
    loop = trained(tmp_path / "loop", cache, *words, "hardware.graph=never")
    assert result(loop)["training"] == {"tune": "eager: asked for"}
    bound = 2e-4 if precision == "fp32" else 2e-2
    assert losses(graph) == pytest.approx(losses(loop), rel=bound)


def test_a_step_that_waits_for_the_device_trains_one_by_one(
    tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    loop = trained(tmp_path / "loop", cache, "hardware.graph=never")
    hidden = VisualRWKV.hidden

    def waiting(model: VisualRWKV, batch: Any) -> Tensor:
        x = hidden(model, batch)
        float(x.detach().sum())
        return x

    monkeypatch.setattr(VisualRWKV, "hidden", waiting)
    found = trained(tmp_path / "waiting", cache)
    assert result(found)["training"]["tune"].startswith("eager: ")
    # Nothing of the attempt is left: the same bits as a run that never tried.
    assert losses(found) == losses(loop)
    words = ["hardware.graph=always", f"paths.runs={tmp_path / 'always'}", f"paths.cache={cache}"]
    assert run.main([*WORDS, *words]) == 1


@pytest.mark.parametrize(("graph", "stop"), [("always", 8), ("never", 6)])
def test_a_stopped_run_goes_on_to_the_bit(
    tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch, graph: str, stop: int
) -> None:
    """Asked to stop while step 5 is saved: captured steps look up at the next point, others a step later."""
    words = [f"hardware.graph={graph}", "checkpoint.every=5", "hardware.precision=bf16"]
    whole = trained(tmp_path / "whole", cache, *words)
    write = checkpoint.write

    def asked(folder: Path, *parts: Any, **files: Any) -> None:
        write(folder, *parts, **files)
        if folder.name == "step-00000005":
            signal.raise_signal(signal.SIGTERM)

    with monkeypatch.context() as patch:
        patch.setattr(checkpoint, "write", asked)
        with pytest.raises(SystemExit) as end:
            trained(tmp_path / "stopped", cache, *words)
    assert end.value.code == 75
    stopped = trained(tmp_path / "stopped", cache, *words)
    assert result(stopped)["resumed_from"] == [stop]
    assert (stopped / "metrics.csv").read_text() == (whole / "metrics.csv").read_text()
    assert accuracies(stopped) == accuracies(whole)
    found, wanted = weights(stopped), weights(whole)
    assert all(torch.equal(tensor, wanted[name]) for name, tensor in found.items())


@pytest.mark.parametrize("lanes", [1, 2])
def test_rows_that_share_a_gpu_give_what_each_gives_alone(tmp_path: Path, cache: Path, lanes: int) -> None:
    """In a process each, or in one process on streams of their own."""
    paths = [f"paths.runs={tmp_path / 'both'}", f"paths.cache={cache}", f"hardware.lanes={lanes}"]
    assert run.main([*WORDS, *paths, "-m", "scan=uni,2d", "hardware.parallel=2"]) == 0
    for scan in ("uni", "2d"):
        alone = trained(tmp_path / scan, cache, f"scan={scan}")
        found, wanted = weights(tmp_path / "both" / alone.name), weights(alone)
        assert all(torch.equal(tensor, wanted[name]) for name, tensor in found.items())
