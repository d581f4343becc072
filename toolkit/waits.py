"""How long each training step waits for its batch: rows of `waits.csv`, two curves, a summary in the result.

metrics.csv holds nothing that a clock gives, so that equal runs have equal files; hence a file of their own.
"""

from __future__ import annotations

import csv
from collections.abc import Iterable, Iterator
from pathlib import Path
from time import perf_counter
from typing import Any

import lightning as L
import numpy as np
from lightning.pytorch.loggers import TensorBoardLogger

COLUMNS = ("step", "data_wait_ms", "step_ms")


class Waits(L.Callback):
    """Notes for each optimizer step the milliseconds in the loader and in all, over its micro batches.

    file: rows are appended. first_step: optimizer steps of earlier stages. every: steps between two writes
    and points in TensorBoard (`data_wait_ms`, their mean, and `data_wait_p95_ms`). The clock is the host's:
    a GPU works on while the host waits, so a wait is the most that the GPU can have been idle. A step ends
    before evaluations that follow it. Of several ranks, the first one's are kept.
    """

    def __init__(self, file: Path, *, first_step: int, every: int) -> None:
        self.file, self.first_step, self.every = file, first_step, every
        self._done = 0
        self._began: float | None = None  # of the step that is under way
        self._waited = 0.0
        self._rows: list[tuple[int, float, float]] = []

    def timed(self, loader: Iterable[Any]) -> Timed:
        """The loader, watched."""
        return Timed(loader, self)

    def waited(self, began: float, ended: float) -> None:
        """Adds a wait, in the clock's seconds, to the step under way."""
        self._began = began if self._began is None else self._began
        self._waited += ended - began

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._done = trainer.global_step

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if trainer.global_step == self._done or self._began is None:
            return
        self._done = trainer.global_step
        took = perf_counter() - self._began
        self._rows.append((self.first_step + self._done - 1, 1e3 * self._waited, 1e3 * took))
        self._began, self._waited = None, 0.0
        if len(self._rows) == self.every:
            self._write(trainer)

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._write(trainer)

    def on_exception(
        self, trainer: L.Trainer, pl_module: L.LightningModule, exception: BaseException
    ) -> None:
        self._write(trainer)

    def _write(self, trainer: L.Trainer) -> None:
        rows, self._rows = self._rows, []
        if not rows or not trainer.is_global_zero:
            return
        with self.file.open("a", encoding="utf-8", newline="") as file:
            if not file.tell():
                file.write(",".join(COLUMNS) + "\n")
            file.writelines(f"{step},{wait:.3f},{took:.3f}\n" for step, wait, took in rows)
        waits = [wait for _, wait, _ in rows]
        point = {
            "data_wait_ms": float(np.mean(waits)),
            "data_wait_p95_ms": float(np.percentile(waits, 95)),
        }
        for logger in trainer.loggers:
            if isinstance(logger, TensorBoardLogger):
                logger.log_metrics(point, step=rows[-1][0])


class Timed:
    """A loader whose every batch is waited for under a clock."""

    def __init__(self, loader: Iterable[Any], waits: Waits) -> None:
        self._loader, self._waits = loader, waits

    def __len__(self) -> int:
        loader: Any = self._loader
        return len(loader)

    def __iter__(self) -> Iterator[Any]:
        batches = iter(self._loader)
        while True:
            began = perf_counter()
            try:
                batch = next(batches)
            except StopIteration:
                return
            self._waits.waited(began, perf_counter())
            yield batch


def summary(file: Path) -> dict[str, float]:
    """What the result tells of the waits: over the steps in the file, a step that was repeated at its last.

    steps: how many; 0, and every other value 0, where all steps were captured and had their data on the GPU.
    mean_ms, p95_ms: of the waits. share: of the time of all steps. p95_share: p95_ms of the median step.
    """
    rows: dict[int, tuple[float, float]] = {}
    if file.exists():
        with file.open(encoding="utf-8", newline="") as opened:
            for row in csv.DictReader(opened):
                rows[int(row["step"])] = (float(row["data_wait_ms"]), float(row["step_ms"]))
    if not rows:
        return {"steps": 0, "mean_ms": 0.0, "p95_ms": 0.0, "share": 0.0, "p95_share": 0.0}
    waits, took = np.array(list(rows.values())).T
    p95 = float(np.percentile(waits, 95))
    return {
        "steps": len(rows),
        "mean_ms": round(float(waits.mean()), 3),
        "p95_ms": round(p95, 3),
        "share": round(float(waits.sum() / took.sum()), 5),
        "p95_share": round(p95 / float(np.median(took)), 5),
    }
