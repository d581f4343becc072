"""Evaluation while training: at which steps, and that the model is left as it was."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

from torch import nn

from toolkit.curve import Probe, read
from toolkit.metrics import Prediction


def train(probe: Probe, module: Any, steps: int, *, micro: int = 1) -> None:
    """What a trainer calls: once per micro batch, its step counted when the optimizer has stepped."""
    for batch in range(steps * micro):
        trainer: Any = SimpleNamespace(global_step=(batch + 1) // micro)
        probe.on_train_batch_end(trainer, module, None, None, batch)


def test_points_at_every_so_many_steps_of_all_stages_but_not_at_the_end(tmp_path: Path) -> None:
    module = nn.Sequential(nn.Dropout(), nn.Linear(2, 2))
    module[1].eval()  # a frozen part stays as it is

    def score() -> list[Prediction]:
        module.eval()
        return [Prediction("0", "?", "edge", "red", "red", 0), Prediction("1", "?", "edge", "red", "blue", 1)]

    file = tmp_path / "accuracy.jsonl"
    assert read(file) == []
    for first, last, steps in ((0, 0, 4), (4, 9, 5)):
        train(Probe(file, every=3, first_step=first, last_step=last, score=score), module, steps, micro=2)
        assert module.training and module[0].training and not module[1].training
        module.train()
        module[1].eval()
    assert [point["step"] for point in read(file)] == [3, 6]
    assert [point["accuracy"] for point in read(file)] == [0.5, 0.5]
    assert read(file)[0]["by_kind"]["edge"]["n"] == 2
