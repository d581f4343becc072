"""The stages of a run before they train: data and plan, steps as a CUDA graph or not, how long it takes."""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from data.batch import collate
from data.loader import train_loader
from data.policy import Counted, Guarded
from toolkit import estimate, feed, graphs, resident
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

    dataset: samples under the policy for damaged ones (data.policy). plan: their order, a data.plan.Steps.
    apart: the same data once more, for what is tried before; what it counts and keeps is not training's.
    """

    name: str
    conf: StageConf
    dataset: Any
    apart: Any
    plan: Any
    steps: int
    first_step: int

    @property
    def samples(self) -> int:
        return self.steps * self.conf.global_batch

    def loader(self, hardware: HardwareConf, *, pin_memory: bool = False) -> Counted:
        """Micro batches of all steps."""
        loader = train_loader(
            self.dataset,
            self.plan,
            start_step=0,
            end_step=self.steps,
            micro=micro_batch(self.conf, hardware, name=self.name),
            workers=hardware.workers,
            pin_memory=pin_memory,
        )
        return Counted(loader, self.plan, first_step=0, report=self.dataset.report)

    def first(self, samples: int) -> Batch:
        """A batch of so many samples of the first step, from the data kept apart."""
        items, _ = self.plan.step(0)
        read = self.apart.__getitems__([(int(j), 1.0) for j in items[:samples]])
        return collate(read, features=self.apart.features)


def planned(task: Task) -> list[Stage]:
    """Every stage in its order."""
    stages: list[Stage] = []
    for name, stage in task.conf.stages.items():
        dataset = _dataset(task, name)
        first = stages[-1].first_step + stages[-1].steps if stages else 0
        plan = feed.order(task.conf, task.corpus, name, n_image=task.model.n_image)
        steps = stage_steps(stage, len(dataset), name=name)
        stages.append(Stage(name, stage, dataset, _dataset(task, name), plan, steps, first))
    return stages


def _dataset(task: Task, name: str) -> Guarded:
    splits = feed.splits(task.conf, name)
    made: Any = feed.samples(task.conf, task.corpus, name, task.model, task.features)
    strict = any(task.corpus.policy(split) == "strict" for split in splits)
    report = task.run.path / f"left_out-{'+'.join(splits)}.jsonl"
    return Guarded(made, policy="strict" if strict else "tolerant", report=report)


def captured(task: Task, stage: Stage) -> tuple[graphs.Steps | None, float, str]:
    """(steps as a CUDA graph, seconds of one, "graph"), or (None, 0, "eager: " and why)."""
    conf = task.conf
    why = graphs.obstacle(conf.hardware, stage.conf, stage.apart.features, task.device)
    if not why:
        try:
            steps = graphs.Steps(
                task.model,
                resident.load(stage.apart, task.device),
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
        size = micro_batch(stage.conf, conf.hardware, name=stage.name)
        _SECONDS[arm] = estimate.training_step(
            task.model,
            partial(_loss, task.model, conf),
            lambda samples: to_device(stage.first(samples), task.device),
            size,
            optimizer=partial(adamw, stage=stage.conf),
            accumulate=stage.conf.global_batch // size,
        )
    return _SECONDS[arm]


def _loss(model: VisualRWKV, conf: RunConf, batch: Batch) -> Tensor:
    cast = conf.hardware.precision == "bf16"
    with torch.autocast(batch.ids.device.type, torch.bfloat16) if cast else nullcontext():
        return lm_loss(model(batch, l2=conf.loss.l2), reduction=conf.loss.reduction)


def questions(task: Task, steps: int) -> int:
    """Questions that a run answers: at its end, and at the points while it trains."""
    wanted = task.conf.eval
    whole = len(task.corpus.readers[wanted.split].examples.record)
    last = min(wanted.limit or whole, whole)
    points = (steps - 1) // wanted.every if wanted.every else 0
    return last + points * min(wanted.every_limit or last, whole)


def announce(
    task: Task,
    stages: Sequence[Stage],
    seconds: float,
    *,
    measured: bool,
) -> tuple[estimate.Forecast, float]:
    """Says how long the run, and the rows of its sweep after it, will take; seconds: a first stage's step.

    Returns the forecast of the run and the seconds of those rows.
    """
    steps = stages[-1].first_step + stages[-1].steps
    asked = questions(task, steps)
    samples = [stage.samples for stage in stages]
    batch = stages[0].conf.global_batch
    found = estimate.forecast(seconds, samples, asked, batch=batch, measured=measured)
    mine = dataclasses.asdict(task.conf)
    rest = sum(estimate.scaled(found.total, mine, other) for other in estimate.QUEUE)
    where = place(task.device)
    line = estimate.told(
        found, steps=steps, questions=asked, where=where, rows=len(estimate.QUEUE), rest=rest
    )
    log.info("%s", line)
    return found, rest


def place(device: torch.device) -> str:
    """`2 CPU threads`, or the GPU's name."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    threads = torch.get_num_threads()
    return f"{threads} CPU thread{'s' * (threads > 1)}"


def warn_without_gpu(hardware: HardwareConf, device: torch.device) -> None:
    """Says that sizes meant for a GPU are about to be trained without one."""
    if hardware.meant_for == "gpu" and device.type == "cpu":
        why = "hardware.device=cpu" if hardware.device == "cpu" else "no GPU found"
        log.warning("%s: this scale is meant for a GPU; scale=tiny is meant for a few CPU cores", why)
