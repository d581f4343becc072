"""Progress as plain lines, for logs and pipes: one short line every few seconds, no escape codes."""

from __future__ import annotations

import logging
import sys
import time
from typing import Any

import lightning as L
from lightning.pytorch.callbacks import RichProgressBar

from toolkit.estimate import duration

log = logging.getLogger("toolkit.train")

INTERVAL = 10.0
"""Seconds between two plain lines."""


class Ticker:
    """`features train 1,280/4,000`: what else takes time, at its start and every INTERVAL seconds."""

    def __init__(self, name: str, total: int) -> None:
        self.name, self.total = name, total
        self.spoke = time.monotonic()
        log.info("%s 0/%s", name, f"{total:,}")

    def __call__(self, done: int, total: int = 0) -> None:
        if time.monotonic() - self.spoke >= INTERVAL:
            self.spoke = time.monotonic()
            log.info("%s %s/%s", self.name, f"{done:,}", f"{self.total:,}")


def say(
    name: str, step: int, steps: int, loss: float, seconds: float, *, after: float = 0.0, start: int = 0
) -> None:
    """`tune 500/2000  loss 0.521  24.1 steps/s  62 s left, 12 min in all`: a stage, after so many seconds.

    after: what follows the stage (later stages, evaluation, other rows of a sweep), in steps of this stage.
    start: steps of it that an earlier process did.
    """
    speed = max(step - start, 1) / max(seconds, 1e-9)
    left = f"{(steps - step) / speed:.0f} s left"
    if after:
        left += f", {duration((steps - step + after) / speed)} in all"
    log.info("%s %d/%d  loss %.3f  %.1f steps/s  %s", name, step, steps, loss, speed, left)


class PlainProgress(L.Callback):
    """`tune 500/2000  loss 0.521  24.1 steps/s  62 s left`, every INTERVAL seconds and at the end."""

    def __init__(self, name: str, *, after: float = 0.0, start: int = 0) -> None:
        self.name, self.after, self.start = name, after, start

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self.began = self.spoke = time.monotonic()

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        now, step, steps = time.monotonic(), trainer.global_step, trainer.max_steps
        if trainer.is_global_zero and (now - self.spoke >= INTERVAL or step == steps) and step:
            self.spoke = now
            loss = float(trainer.callback_metrics["loss"])  # of the whole step
            say(self.name, step, steps, loss, now - self.began, after=self.after, start=self.start)


class StageBar(RichProgressBar):
    """Lightning's rich bar, headed by the stage's name (an epoch number says nothing here)."""

    def __init__(self, name: str) -> None:
        super().__init__(leave=True)
        self.name = name

    def _get_train_description(self, current_epoch: int) -> str:
        return self.name

    def get_metrics(
        self, trainer: L.Trainer, pl_module: L.LightningModule
    ) -> dict[str, int | str | float | dict[str, float]]:
        shown = super().get_metrics(trainer, pl_module)
        return {key: value for key, value in shown.items() if key != "v_num"}


def bar(name: str, *, after: float = 0.0, start: int = 0) -> L.Callback:
    """A rich bar on a terminal, plain lines elsewhere. after, start: see `say`."""
    if sys.stdout.isatty():
        return StageBar(f"{name} from step {start:,}" if start else name)
    return PlainProgress(name, after=after, start=start)
