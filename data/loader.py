"""Loaders over a plan: training by global step, evaluation in order. Their only state is the step."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Iterator, Sequence
from functools import partial
from math import ceil
from typing import TYPE_CHECKING, Any, Protocol

import torch
from torch.utils.data import DataLoader, Sampler

from data.batch import collate
from data.dataset import Sample, Slot
from data.failed import Failed, Fallible, passed, raised
from data.packing import Packed
from data.plan import Steps, divided, divisors
from toolkit.contracts import Batch

if TYPE_CHECKING:
    from data.features import FeatureTable


class StepSampler(Sampler[list[Slot]]):
    """Micro batches of one rank for the global steps start_step, ..., end_step - 1, in order.

    A step gives share / micro batches, where share = plan.global_batch / world; micro=0 takes the
    whole share at once. Raises ValueError if something does not divide.
    """

    def __init__(
        self, plan: Steps, *, start_step: int, end_step: int, rank: int = 0, world: int = 1, micro: int = 0
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


def per_step(plan: Steps | Packed, *, world: int = 1, micro: int = 0) -> int:
    """Micro batches of a rank and global step of `train_loader`."""
    return _sampler(plan, 0, 0, rank=0, world=world, micro=micro).per_step


class GroupSampler(Sampler[list[Slot]]):
    """The groups of one rank as micro batches, for global steps start_step to end_step - 1 of a packing."""

    def __init__(
        self, plan: Packed, *, start_step: int, end_step: int, rank: int = 0, world: int = 1
    ) -> None:
        self.per_step = divided(plan.groups, world, what="groups", over="ranks")
        self._plan, self._rank, self._world = plan, rank, world
        self._steps = range(start_step, end_step)

    def __len__(self) -> int:
        return len(self._steps) * self.per_step

    def __iter__(self) -> Iterator[list[Slot]]:
        for t in self._steps:
            for items, weight in self._plan.rank_part(t, self._rank, self._world):
                yield [(item, weight) for item in items.tolist()]


class Readable(Protocol):
    """What a loader reads: samples by slot, and the feature cache that holds their pictures, if any."""

    features: FeatureTable | None

    def __len__(self) -> int: ...

    def __getitem__(self, item: Slot) -> Sample: ...


def train_loader(
    examples: Readable,
    plan: Steps | Packed,
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
    """Batches of global steps start_step to end_step - 1 for one rank; see StepSampler, collate.

    Every rank gets the same number of batches, in the plan's order whatever the number of workers.
    A `Packed` plan gives its groups as micro batches, and `micro` must be 0.
    """
    if plan.n != len(examples):
        raise ValueError(f"the plan is for {plan.n:,} examples, the data set has {len(examples):,}")
    sampler = _sampler(plan, start_step, end_step, rank=rank, world=world, micro=micro)
    return _loader(examples, sampler, workers=workers, multiple=multiple, pin_memory=pin_memory)


def _sampler(
    plan: Steps | Packed, start_step: int, end_step: int, *, rank: int, world: int, micro: int
) -> StepSampler | GroupSampler:
    if not isinstance(plan, Packed):
        return StepSampler(
            plan, start_step=start_step, end_step=end_step, rank=rank, world=world, micro=micro
        )
    if micro:
        raise ValueError(
            f"hardware.micro_batch={micro}: groups within a token budget are micro batches already; use 0"
        )
    return GroupSampler(plan, start_step=start_step, end_step=end_step, rank=rank, world=world)


def eval_loader(
    examples: Readable,
    *,
    batch: int,
    limit: int = 0,
    rank: int = 0,
    world: int = 1,
    workers: int = 0,
    multiple: int = 1,
    pin_memory: bool = False,
) -> DataLoader[Batch]:
    """The first `limit` examples (0: all) once each and in order; a rank takes a contiguous part.

    Batches are as even as can be, `batch` at most: what is built for one size serves nearly all of them.
    """
    n = min(limit or len(examples), len(examples))
    part = range(n * rank // world, n * (rank + 1) // world)
    slots = [(j, 1.0) for j in part]
    size = ceil(len(slots) / max(1, ceil(len(slots) / batch)))
    batches = [slots[start : start + size] for start in range(0, len(slots), max(1, size))]
    return _loader(examples, batches, workers=workers, multiple=multiple, pin_memory=pin_memory)


def heedless(worker: int) -> None:
    """Leaves signals that go to all processes of a run to the one that trains, which needs its workers.

    SIGTERM from that process itself ends a worker, as torch has it: Python sends one as it ends, and waits.
    """
    for name in {"SIGINT", "SIGUSR1"} & {*dir(signal)}:
        signal.signal(getattr(signal, name), signal.SIG_IGN)
    if hasattr(signal, "sigwaitinfo"):  # where there is none, torch's own handler stays
        signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
        threading.Thread(target=_heed, args=[os.getppid()], daemon=True).start()


def _heed(trainer: int) -> None:
    while signal.sigwaitinfo({signal.SIGTERM}).si_pid != trainer:
        pass
    os._exit(0)


class _Loader(DataLoader[Any]):
    """A loader that raises the errors of its workers as they were."""

    def __iter__(self) -> Any:
        return raised(super().__iter__())


def _collated(samples: Sequence[Sample] | Failed, **options: Any) -> Any:
    return samples if isinstance(samples, Failed) else passed(lambda: collate(samples, **options))


def _loader(
    examples: Readable, batches: Any, *, workers: int, multiple: int, pin_memory: bool
) -> DataLoader[Any]:
    # A generator of its own: making an iterator must not draw from the global random state.
    generator = torch.Generator()
    generator.manual_seed(0)
    return _Loader(
        Fallible(examples),
        batch_sampler=batches,
        num_workers=workers,
        collate_fn=partial(_collated, features=examples.features, multiple=multiple),
        generator=generator,
        worker_init_fn=heedless,
        pin_memory=pin_memory,
    )
