"""Loaders over a plan: training by global step, evaluation in order. Their only state is the step."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from typing import Any

import torch
from torch.utils.data import DataLoader, Sampler

from data.batch import collate
from data.dataset import Examples, Slot
from data.plan import Plan, divided, divisors
from toolkit.contracts import Batch


class StepSampler(Sampler[list[Slot]]):
    """Micro batches of one rank for the global steps start_step, ..., end_step - 1, in order.

    A step gives share / micro batches, where share = plan.global_batch / world; micro=0 takes the
    whole share at once. Raises ValueError if something does not divide.
    """

    def __init__(
        self, plan: Plan, *, start_step: int, end_step: int, rank: int = 0, world: int = 1, micro: int = 0
    ) -> None:
        share = divided(plan.global_batch, world, what="global_batch", over="ranks")
        if micro and share % micro:
            near = [str(d) for d in divisors(share) if d <= max(micro, 1)][-1:]
            raise ValueError(
                f"hardware.micro_batch={micro} does not divide the {share} samples of a rank and step; "
                f"use {near[0]}, or 0 for all at once"
            )
        self._plan, self._rank, self._world = plan, rank, world
        self._steps = range(start_step, end_step)
        self._micro = micro or share
        self.per_step = share // self._micro

    def __len__(self) -> int:
        return len(self._steps) * self.per_step

    def __iter__(self) -> Iterator[list[Slot]]:
        for t in self._steps:
            items, weights = self._plan.rank_part(t, self._rank, self._world)
            slots = list(zip(items.tolist(), weights.tolist(), strict=True))
            for start in range(0, len(slots), self._micro):
                yield slots[start : start + self._micro]


def train_loader(
    examples: Examples,
    plan: Plan,
    *,
    start_step: int,
    end_step: int,
    rank: int = 0,
    world: int = 1,
    micro: int = 0,
    workers: int = 0,
    multiple: int = 1,
    pin_memory: bool = False,
) -> DataLoader[Batch]:
    """Batches of global steps start_step to end_step - 1 for one rank; see StepSampler, collate."""
    if plan.n != len(examples):
        raise ValueError(f"the plan is for {plan.n:,} examples, the data set has {len(examples):,}")
    sampler = StepSampler(plan, start_step=start_step, end_step=end_step, rank=rank, world=world, micro=micro)
    return _loader(examples, sampler, workers=workers, multiple=multiple, pin_memory=pin_memory)


def eval_loader(
    examples: Examples,
    *,
    batch: int,
    limit: int = 0,
    rank: int = 0,
    world: int = 1,
    workers: int = 0,
    multiple: int = 1,
    pin_memory: bool = False,
) -> DataLoader[Batch]:
    """The first `limit` examples (0: all) once each and in order; a rank takes a contiguous part."""
    n = min(limit or len(examples), len(examples))
    part = range(n * rank // world, n * (rank + 1) // world)
    slots = [(j, 1.0) for j in part]
    batches = [slots[start : start + batch] for start in range(0, len(slots), batch)]
    return _loader(examples, batches, workers=workers, multiple=multiple, pin_memory=pin_memory)


def _loader(
    examples: Examples, batches: Any, *, workers: int, multiple: int, pin_memory: bool
) -> DataLoader[Any]:
    # A generator of its own: making an iterator must not draw from the global random state.
    generator = torch.Generator()
    generator.manual_seed(0)
    return DataLoader(
        examples,
        batch_sampler=batches,
        num_workers=workers,
        collate_fn=partial(collate, features=examples.features, multiple=multiple),
        generator=generator,
        pin_memory=pin_memory,
    )
