"""The stages of a run before they train: data and plan, steps as a CUDA graph or not, how long it takes."""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Iterable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from toolkit import estimate, feed, graphs, ranks, resident
from toolkit.contracts import Batch
from toolkit.corpus import Corpus
from toolkit.lit import adamw, to_device
from toolkit.loss import lm_loss
from toolkit.model import VisualRWKV
from toolkit.rundir import RunDir, run_id
from toolkit.schema import HardwareConf, RunConf, StageConf
from toolkit.train import micro_batch, stage_steps

log = logging.getLogger("toolkit.train")

_SECONDS: dict[str, tuple[float, bool]] = {}
"""What a step of an arm took in this process: rows of a sweep that differ in their seed are measured once."""


@dataclass(frozen=True)
class Task:
    """What every step of training reads."""

    conf: RunConf
    run: RunDir
    corpus: Corpus
    model: VisualRWKV
    features: dict[str, Any]
    device: torch.device


@dataclass(frozen=True)
class Stage:
    """One stage, ready to train. first_step: optimizer steps of the stages before it.

    start: steps of it that were done before the run was stopped; it goes on with the next one.
    """

    name: str
    conf: StageConf
    feed: feed.Feed
    steps: int
    first_step: int
    start: int = 0

    @property
    def samples(self) -> int:
        """Samples still to train."""
        return (self.steps - self.start) * self.conf.global_batch

    @property
    def plan(self) -> Any:
        """The order of the samples; its state is the number of the next step."""
        return self.feed.plan

    def loader(
        self,
        hardware: HardwareConf,
        *,
        rank: int = 0,
        world: int = 1,
        pin_memory: bool = False,
    ) -> Iterable[Batch]:
        """Micro batches of the steps that are not done, for one of `world` ranks."""
        return self.feed.loader(
            start_step=self.start,
            end_step=self.steps,
            rank=rank,
            world=world,
            micro=hardware.micro_batch,
            workers=hardware.workers,
            pin_memory=pin_memory,
        )

    def accumulate(self, hardware: HardwareConf, *, world: int = 1) -> int:
        """Micro batches of a rank and step."""
        return self.feed.per_step(world=world, micro=hardware.micro_batch)


def planned(task: Task) -> list[Stage]:
    """Every stage in its order."""
    stages: list[Stage] = []
    for name, stage in task.conf.stages.items():
        made = feed.feed(task.conf, task.corpus, name, task.model, task.features, task.run.path)
        first = stages[-1].first_step + stages[-1].steps if stages else 0
        steps = stage_steps(stage, made.per_epoch, name=name)
        stages.append(Stage(name, stage, made, steps, first))
    return stages


def captured(task: Task, stage: Stage) -> tuple[graphs.Steps | None, float, str]:
    """(steps as a CUDA graph, seconds of one, "graph"), or (None, 0, "eager: " and why)."""
    conf = task.conf
    why = graphs.obstacle(conf.hardware, stage.conf, stage.feed.features, task.device, order=stage.feed.eager)
    if not why:
        try:
            steps = graphs.Steps(
                task.model,
                resident.load(stage.feed.apart, task.device, key=stage.feed.key),
                stage.plan,
                stage=stage.conf,
                loss=conf.loss,
                steps=stage.steps,
                bf16=conf.hardware.precision == "bf16",
            )
            return steps, steps.capture(), "graph"
        except (graphs.Capture, resident.Unfit) as error:
            why = graphs.refused(conf.hardware, str(error))
    return None, 0.0, f"eager: {why}"


def step_seconds(task: Task, stage: Stage) -> tuple[float, bool]:
    """(seconds of an optimizer step of a stage, whether it was measured); see estimate.training_step."""
    conf = task.conf
    asked = {**dataclasses.asdict(conf), "seed": 0}
    arm = f"{run_id(asked)} {task.device} {torch.get_num_threads()} {conf.hardware.micro_batch}"
    if arm not in _SECONDS:
        parts = stage.accumulate(conf.hardware, world=ranks.world())
        size = stage.conf.global_batch // (parts * ranks.world())
        if not stage.conf.tokens:
            size = micro_batch(stage.conf, conf.hardware, name=stage.name)
        _SECONDS[arm] = estimate.training_step(
            task.model,
            partial(_loss, task.model, conf),
            lambda samples: to_device(stage.feed.first(samples), task.device),
            max(1, size),
            optimizer=partial(adamw, stage=stage.conf),
            accumulate=parts,
        )
    return _SECONDS[arm]


def _loss(model: VisualRWKV, conf: RunConf, batch: Batch) -> Tensor:
    cast = conf.hardware.precision == "bf16"
    with torch.autocast(batch.ids.device.type, torch.bfloat16) if cast else nullcontext():
        return lm_loss(model(batch, l2=conf.loss.l2), reduction=conf.loss.reduction)


def questions(task: Task, steps: int, *, start: int = 0) -> int:
    """Questions that a run answers from step `start` on: at its end, and at the points while it trains."""
    wanted = task.conf.eval
    whole = len(task.corpus.readers[wanted.split].examples.record)
    last = min(wanted.limit or whole, whole)
    points = (steps - 1) // wanted.every - start // wanted.every if wanted.every else 0
    return last + points * min(wanted.every_limit or last, whole)


def announce(
    task: Task,
    stages: Sequence[Stage],
    seconds: float,
    *,
    measured: bool,
) -> tuple[estimate.Forecast, float]:
    """Says how long the run, and the rows of its sweep after it, will take.

    stages: those with steps left to do; seconds: a step of the first. Returns the forecast of the run and the
    seconds of those rows.
    """
    begin, end = stages[0].first_step + stages[0].start, stages[-1].first_step + stages[-1].steps
    asked = questions(task, end, start=begin)
    samples = [stage.samples for stage in stages]
    batch = stages[0].conf.global_batch
    found = estimate.forecast(seconds, samples, asked, batch=batch, measured=measured)
    mine = dataclasses.asdict(task.conf)
    rest = sum(estimate.scaled(found.total, mine, other) for other in estimate.QUEUE)
    where = place(task.device)
    line = estimate.told(
        found, steps=end - begin, questions=asked, where=where, rows=len(estimate.QUEUE), rest=rest
    )
    log.info("%s", line)
    return found, rest


def place(device: torch.device) -> str:
    """`2 CPU threads`, or the GPU's name, each on so many ranks if there are several."""
    many = f"{ranks.world()} ranks of " if ranks.world() > 1 else ""
    if device.type == "cuda":
        return many + torch.cuda.get_device_name(device)
    threads = torch.get_num_threads()
    return f"{many}{threads} CPU thread{'s' * (threads > 1)}"


def warn_without_gpu(hardware: HardwareConf, device: torch.device) -> None:
    """Says that sizes meant for a GPU are about to be trained without one."""
    if hardware.meant_for == "gpu" and device.type == "cpu":
        why = "hardware.device=cpu" if hardware.device == "cpu" else "no GPU found"
        log.warning("%s: this scale is meant for a GPU; scale=tiny is meant for a few CPU cores", why)
