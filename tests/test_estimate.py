"""How long runs take: the arithmetic, and that measuring a run leaves no trace in it."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from tests.helpers import make_batch, small_model
from toolkit import estimate, job, run, stages
from toolkit.contracts import Batch
from toolkit.lit import adamw
from toolkit.schema import StageConf


def test_durations_in_words() -> None:
    words = {0.2: "1 s", 89: "89 s", 91: "2 min", 5300: "88 min", 12_000: "3 h 20 min", 90_000: "25 h"}
    assert {seconds: estimate.duration(seconds) for seconds in words} == words
    assert estimate.duration(5 * 86_400) == "5 days"


def test_rows_share_workers_in_order() -> None:
    assert estimate.span([], [], 3) == 0
    assert estimate.span([4.0], [5.0, 1.0], 2) == 5.0
    assert estimate.span([], [2.0, 2.0, 2.0], 2) == 4.0
    assert estimate.span([10.0, 1.0], [3.0, 3.0], 2) == 10.0
    # Rows on a GPU get in each other's way: thirty of 18 s at once are no 18 s.
    assert estimate.span([18.0] * 30, [], 30, gpus=1) == pytest.approx(540 / estimate.OVERLAP)
    assert estimate.span([18.0] * 30, [], 30, gpus=30) == 18.0


def sized(*, steps: int, width: int, batch: int = 8) -> dict[str, Any]:
    stage = {"steps": steps, "epochs": 0.0, "global_batch": batch}
    return {"stages": {"tune": stage}, "model": {"d_model": width, "n_layer": 2}}


def test_a_row_is_scaled_by_samples_and_parameters() -> None:
    here = sized(steps=100, width=64)
    assert estimate.scaled(3.0, here, sized(steps=300, width=64)) == pytest.approx(9.0)
    assert estimate.scaled(3.0, here, sized(steps=100, width=128, batch=16)) == pytest.approx(24.0)


def test_the_line_before_training() -> None:
    found = estimate.forecast(0.25, [1600, 3200], 640, batch=16)
    assert (found.training, found.evaluation) == (75.0, 5.0)
    line = estimate.told(found, steps=300, questions=640, where="2 CPU threads")
    assert line == "about 80 s on 2 CPU threads: 300 steps of 0.25 s, then 640 questions"
    line = estimate.told(found, steps=300, questions=640, where="x", rows=2, rest=160.0)
    assert line.endswith("640 questions; about 4 min with the 2 rows after it")
    guessed = estimate.forecast(0.01, [16], 0, batch=16, measured=False)
    assert "computed from the model's size as 10.0 ms" in estimate.told(
        guessed, steps=1, questions=0, where="x"
    )


def test_a_step_that_takes_all_patience_is_called_once() -> None:
    calls: list[int] = []
    estimate.measure(lambda: calls.append(1), wait=lambda: None, patience=0.0)
    assert len(calls) == 1
    calls.clear()
    assert estimate.measure(lambda: calls.append(1), wait=lambda: None, patience=10.0) < 1.0
    assert len(calls) == 6


def test_what_is_tried_is_put_back() -> None:
    model = nn.Sequential(nn.Linear(3, 3), nn.BatchNorm1d(3), nn.Dropout())
    model[1].eval()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    states = (random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state())
    with estimate.unchanged(model):
        model.train()
        model(torch.randn(4, 3)).sum().backward()
        random.random(), np.random.rand()
        assert model[0].weight.grad is not None
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    assert model.training and not model[1].training and model[0].weight.grad is None
    assert random.getstate() == states[0] and np.random.get_state()[1].tolist() == states[1]
    assert torch.equal(torch.get_rng_state(), states[2])


def test_a_step_is_measured_with_its_optimizer_or_computed(monkeypatch: pytest.MonkeyPatch) -> None:
    model, stage = small_model(), StageConf()
    seen: list[int] = []
    before = [p.detach().clone() for p in model.parameters()]

    def batch_of(samples: int) -> Batch:
        return make_batch(model, [(3, 5, 2)] * samples)

    def loss_of(batch: Batch) -> Tensor:
        seen.append(len(batch.ids))
        return model.logits(batch).square().mean()

    def optimizer(parameters: list[nn.Parameter]) -> torch.optim.Optimizer:
        seen.append(-len(parameters))
        return adamw(parameters, stage=stage)

    given: Any = (model, loss_of, batch_of, 6)
    seconds, measured = estimate.training_step(*given, optimizer=optimizer, accumulate=2)
    assert measured and seconds > 0 and set(seen) == {1, 4, 6, -len(before)}
    assert all(torch.equal(p, b) and p.grad is None for p, b in zip(model.parameters(), before, strict=True))
    # Slow steps: the first size that takes long stands for all; one sample that would is computed.
    seen.clear()
    monkeypatch.setattr(estimate, "measure", lambda step, *, wait: [step(), 1.0][1])
    found = estimate.training_step(*given, optimizer=optimizer, accumulate=2)
    assert found == (1.0 * 6 * 2 + 1.0, True) and set(seen) == {1, -len(before)}
    seen.clear()
    monkeypatch.setattr(estimate, "PATIENCE", 0.0)
    seconds, measured = estimate.training_step(*given, optimizer=optimizer, accumulate=2)
    assert seconds > 0 and not measured and not seen


WORDS = [
    "encoder=conv",
    "data.limit=12",
    "stages.tune.steps=4",
    "stages.tune.warmup=0",
    "stages.tune.global_batch=8",
    "eval.limit=4",
    "hardware.device=cpu",
    "hardware.meant_for=gpu",
]


def test_measuring_changes_no_bit_of_a_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """The same weights, measured and not; what is told comes before training."""
    pytest.importorskip("easy_vqa", reason="easy-VQA comes with the demo extra")
    found = []
    monkeypatch.setattr(stages, "_SECONDS", {})
    for name in ("measured", "not"):
        words = [*WORDS, f"paths.runs={tmp_path / name}", f"paths.cache={tmp_path / 'cache'}"]
        with caplog.at_level("INFO", logger="toolkit"):
            assert run.main(words) == 0
        (folder,) = (tmp_path / name).glob("*-s0-*")
        found.append(load_file(folder / "checkpoints" / "last" / "model.safetensors"))
        monkeypatch.setattr(job, "step_seconds", lambda *task: (0.5, True))
    assert len(stages._SECONDS) == 1
    assert found[0].keys() == found[1].keys()
    assert all(torch.equal(tensor, found[1][name]) for name, tensor in found[0].items())
    told = [m for m in caplog.messages if "meant for a GPU" in m or m.startswith(("about", "tune"))]
    assert told[0].startswith("hardware.device=cpu: this scale is meant for a GPU; scale=")
    assert told[1].startswith("about ") and "4 steps of " in told[1] and told[2].startswith("tune 4/4")
    assert "4 steps of 0.50 s, then 4 questions" in told[4]
