"""Saves the state of a run at the ends of optimizer steps: every so often, and when it is asked to stop."""

from __future__ import annotations

import dataclasses
import logging
import shutil
import signal
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import lightning as L
import torch
from lightning.pytorch.loggers import Logger

import kernels
from toolkit import checkpoint, ranks, resume, stopping
from toolkit.resume import Point
from toolkit.rundir import run_id, versions
from toolkit.stages import Stage, Task
from toolkit.state import generators, moments_of

log = logging.getLogger("toolkit.train")

_NOTHING, _SAVE, _STOP, _INTERRUPT = range(4)


def _of(sent: int) -> int:
    """What a signal asks for."""
    if not sent:
        return _NOTHING
    return _INTERRUPT if sent == signal.SIGINT else _STOP


class Saver:
    """When and what is saved.

    modes: how each stage ran so far, filled by the run as it trains. resumed_from: the steps from which it
    went on so far. point: the checkpoint that the run goes on from, None for one that begins. Rank 0 writes;
    every rank calls `reached` after the same steps.
    """

    def __init__(
        self,
        task: Task,
        stages: Sequence[Stage],
        *,
        parts: list[str],
        logger: list[Logger],
        point: Point | None,
    ) -> None:
        self.task, self.stages, self.parts, self.logger, self.point = task, stages, parts, logger, point
        self.modes: dict[str, str] = dict(point.facts["training"]) if point else {}
        self.every = task.conf.checkpoint.every
        self.resumed_from = [*point.facts["resumed_from"], point.step] if point else []
        self.before = float(point.facts["seconds"]) if point else 0.0
        self.streamed_out = self._streamed = int(point.facts["streamed_out"]) if point else 0
        self._began = self._spoke = time.monotonic()
        self._last = point.step if point else 0
        if point and ranks.main():
            task.run.note("running", step=point.step, resumed_from=self.resumed_from)

    def due(self, stage: Stage, step: int) -> bool:
        """Whether a checkpoint is wanted after this step of a stage, whatever the clock says."""
        return bool(self.every) and not (stage.first_step + step) % self.every

    def reached(self, stage: Stage, step: int, optimizer: torch.optim.Optimizer) -> None:
        """After `step` steps of a stage: saves if it is time, or ends the run if it was asked to stop.

        Raises SystemExit(75) or KeyboardInterrupt after saving, on every rank; ValueError if it cannot save.
        """
        wish = max(one for (one,) in ranks.numbers(self._wish(stage, step)))
        if wish == _NOTHING:
            return
        total = stage.first_step + step
        if total != self._last:
            for one in self.logger:
                one.save()
            files = resume.contents(self.task.run, self.stages)
            counts = ranks.numbers(sum(s.feed.left_out for s in self.stages if not resume.planned(s)))
            self.streamed_out = self._streamed + sum(count for (count,) in counts)
            if ranks.main():
                self._save(stage, step, optimizer, files)
            self._last, self._spoke = total, time.monotonic()
        if wish > _SAVE:
            log.info("stopped after step %s; the same command goes on from there", f"{total:,}")
            self._end(wish)

    def finish(self, facts: dict[str, Any]) -> None:
        """After the last step: writes weights and facts, which replace the checkpoints.

        Ends the run on every rank if one of them was asked to stop meanwhile.
        """
        run = self.task.run
        if ranks.main():
            weights = {checkpoint.WEIGHTS: checkpoint.weights_of(self.task.model, self.parts)}
            # For a run that is stopped after this: what its result tells of the training.
            told = {**facts, "seconds_before": self.seconds, "kernels": kernels.chosen()}
            held = {"parts": self.parts, "frozen": checkpoint.frozen_of(self.task.model, self.parts)}
            self._write(run.weights, weights, {**held, **told}, {})
            run.note("running", step=facts["steps"])
            resume.drop(run)
        ranks.barrier()
        self._end(max(one for (one,) in ranks.numbers(_of(stopping.asked()))))

    def _end(self, wish: int) -> None:
        if wish > _SAVE:
            ranks.barrier()
            stopping.end(signal.SIGINT if wish == _INTERRUPT else signal.SIGTERM)

    def wanted(self, stage: Stage, step: int) -> bool:
        """Whether this rank would have `reached` save or end the run."""
        return self._wish(stage, step) != _NOTHING

    def _wish(self, stage: Stage, step: int) -> int:
        if stage is self.stages[-1] and step == stage.steps:  # the weights of the end are about to be saved
            return _NOTHING
        if stopping.asked():
            return _of(stopping.asked())
        minutes = self.task.conf.checkpoint.minutes
        late = ranks.main() and minutes > 0 and time.monotonic() - self._spoke >= 60 * minutes
        return _SAVE if late or self.due(stage, step) else _NOTHING

    def _save(
        self, stage: Stage, step: int, optimizer: torch.optim.Optimizer, files: Mapping[str, bytes]
    ) -> None:
        run, model, total = self.task.run, self.task.model, stage.first_step + step
        began = time.monotonic()
        folder = run.weights.parent / f"step-{total:08d}"
        random, python = generators()
        weights = checkpoint.weights_of(model, self.parts)
        state = {**moments_of(model, optimizer), **random}
        held = {"parts": self.parts, "frozen": checkpoint.frozen_of(model, self.parts)}
        facts = {**held, **self._facts(stage, step), "python": python}
        tensors = {checkpoint.WEIGHTS: weights, resume.STATE: state}
        self._write(folder, tensors, facts, files)
        self._drop(total)
        run.note("running", step=total, resumed_from=self.resumed_from)
        log.info("saved after step %s, %.1f s", f"{total:,}", time.monotonic() - began)

    def _write(
        self, folder: Path, tensors: Mapping[str, Any], facts: dict[str, Any], files: Mapping[str, bytes]
    ) -> None:
        try:
            checkpoint.write(folder, tensors, facts, files=files)
        except OSError as error:
            kept = f"goes on from step {self._last:,}" if self._last else "begins anew"
            raise ValueError(
                f"{folder} cannot be written: {error}; make room or let it be written, and start the same "
                f"command again: it {kept}"
            ) from error

    def _facts(self, stage: Stage, step: int) -> dict[str, Any]:
        asked = dataclasses.asdict(self.task.conf)
        return {
            "run": run_id(asked),
            "asked": asked,
            "stage": stage.name,
            "step": step,
            "total": stage.first_step + step,
            **resume.told_of(self.task, list(self.stages)),
            "training": self.modes,
            "ranks": ranks.world(),
            "streamed_out": self.streamed_out,
            "seconds": self.seconds,
            "resumed_from": self.resumed_from,
            "versions": versions(),
        }

    @property
    def seconds(self) -> float:
        """Seconds of training so far, those before the run was stopped with them."""
        return round(self.before + time.monotonic() - self._began, 1)

    def _drop(self, newest: int) -> None:
        """Keeps the newest checkpoints; later ones than the newest were damaged."""
        keep = self.task.conf.checkpoint.keep
        known = [folder for folder in resume.saved(self.task.run) if folder.name <= f"step-{newest:08d}"]
        for folder in {*resume.saved(self.task.run)} - {*known[-keep:]}:
            shutil.rmtree(folder, ignore_errors=True)

    def begin(self, stage: Stage, optimizer: torch.optim.Optimizer) -> None:
        """Before the first step of a stage: puts back what the checkpoint holds, once."""
        if self.point is not None:
            resume.put(self.point, stage.name, self.task.model, optimizer)
            self.point = None


class StepEnds(L.Callback):
    """What a stage tells a saver: each optimizer step that is done and logged.

    A Trainer's callback, to come after all others; captured steps call `begin` and `reached` themselves.
    """

    def __init__(self, saver: Saver, stage: Stage) -> None:
        self.saver, self.stage, self.seen = saver, stage, stage.start

    def due(self, step: int) -> bool:
        """Whether a checkpoint is wanted after this step, whatever the clock says."""
        return self.saver.due(self.stage, step)

    def wanted(self, step: int) -> bool:
        """Whether `reached` would save or end the run now."""
        return self.saver.wanted(self.stage, step)

    def begin(self, optimizer: torch.optim.Optimizer) -> None:
        """As `Saver.begin`."""
        self.saver.begin(self.stage, optimizer)

    def reached(self, step: int, optimizer: torch.optim.Optimizer) -> None:
        """As `Saver.reached`."""
        self.saver.reached(self.stage, step, optimizer)

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """After the loader's iterator was made and the Trainer has put its signal handlers in place."""
        stopping.listen()
        # What the Trainer restores from a checkpoint of its own; the loader is at its place already.
        loop = trainer.fit_loop.epoch_loop
        loop._batches_that_stepped = self.stage.start
        loop.automatic_optimization.optim_progress.optimizer.step.total.completed = self.stage.start
        self.begin(trainer.optimizers[0])

    def on_train_batch_start(
        self, trainer: L.Trainer, pl_module: L.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        # Not at the end of a batch, when the Trainer has not yet logged it.
        if trainer.global_step > self.seen:
            self.seen = trainer.global_step
            self.reached(self.seen, trainer.optimizers[0])

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """After the last step of a stage."""
        self.reached(trainer.global_step, trainer.optimizers[0])
