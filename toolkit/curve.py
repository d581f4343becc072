"""Accuracy over training: evaluation at fixed steps, kept in the run directory line by line."""

from __future__ import annotations

import json
import logging
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import lightning as L
from torch import nn

from toolkit import ranks
from toolkit.metrics import Prediction, summary

log = logging.getLogger("toolkit.train")


class Probe(L.Callback):
    """Scores the model every `every` optimizer steps and appends a line to `file`.

    first_step: optimizer steps of earlier stages. last_step: the run's last, which the closing evaluation
    scores; 0 for a stage that is not the last. score: the predictions of the model as it is. start: steps of
    this stage that an earlier process did and scored. The modes of the modules are put back and no random
    number is drawn: training is the same with and without.
    """

    def __init__(
        self,
        file: Path,
        *,
        every: int,
        first_step: int,
        last_step: int,
        score: Callable[[], list[Prediction]],
        start: int = 0,
    ) -> None:
        self.file = file
        self.every = every
        self.first_step = first_step
        self.last_step = last_step
        self.score = score
        self.done = first_step + start

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        self.visit(trainer.global_step, pl_module)

    def visit(self, steps: int, model: nn.Module) -> None:
        """Scores the model after so many optimizer steps of this stage, if a point is due."""
        step = self.first_step + steps
        if step == self.done or step % self.every or step == self.last_step:
            return
        self.done = step
        training = [module for module in model.modules() if module.training]
        began = time.monotonic()
        scores = summary(self.score())
        for module in training:
            module.training = True
        point = {"step": step, "seconds": round(time.monotonic() - began, 2), **scores}
        if not ranks.main():
            return
        with self.file.open("a", encoding="utf-8") as file:
            file.write(json.dumps(point) + "\n")
        log.info("step %d: accuracy %.2f %% on %d questions", step, 100 * scores["accuracy"], scores["n"])


def read(file: Path) -> list[dict[str, Any]]:
    """The points of a run, steps rising; none if it was not asked for them."""
    lines: Sequence[str] = file.read_text(encoding="utf-8").splitlines() if file.exists() else []
    return [json.loads(line) for line in lines]
