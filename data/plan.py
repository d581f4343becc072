"""Which sample is trained when: pure functions of (manifest hash, seed, epoch, step).

Neither shards nor workers nor ranks enter the order, so nothing has to divide, and a run continues
at any step in constant time.
"""

from __future__ import annotations

import hashlib
import json
from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np
from numpy.typing import NDArray

Ints = NDArray[np.int64]
Floats = NDArray[np.float32]


def epoch_order(
    n: int, *, manifest_hash: str, seed: int, epoch: int, block: int = 64, window: int = 8
) -> Ints:
    """A permutation of range(n), [n].

    Blocks of `block` neighbours are put in random order, then items are shuffled inside windows of
    `window` blocks, so reads stay near each other. block=1 is a full shuffle.
    Only raw generator output and stable sorting are used: both are the same in every numpy version.
    """
    if block < 1 or window < 1:
        raise ValueError(f"block={block} and window={window} must be at least 1")
    draw = _generator(manifest_hash, seed, epoch)
    if block == 1:
        return _sorted_by(draw.random_raw(n))
    blocks = _sorted_by(draw.random_raw(-(-n // block)))
    order = (blocks[:, None] * block + np.arange(block)).reshape(-1)  # [blocks * block]
    order = order[order < n]
    which_window = np.arange(n, dtype=np.uint64) // np.uint64(block * window)
    # The window number in the high bits keeps every item inside its window.
    ranks = (which_window << np.uint64(32)) | (draw.random_raw(n) >> np.uint64(32))
    return order[_sorted_by(ranks)]


def _generator(manifest_hash: str, seed: int, epoch: int) -> np.random.Philox:
    return keyed(f"order:{manifest_hash}:{seed}:{epoch}")


def keyed(name: str) -> np.random.Philox:
    """A counter-based generator of its own for every name."""
    digest = hashlib.sha256(name.encode()).digest()
    return np.random.Philox(key=int.from_bytes(digest[:16], "little"))


def _sorted_by(values: NDArray[np.uint64]) -> Ints:
    return np.argsort(values, kind="stable").astype(np.int64)


@lru_cache(maxsize=4)
def _cached_order(n: int, manifest_hash: str, seed: int, epoch: int, block: int, window: int) -> Ints:
    order = epoch_order(n, manifest_hash=manifest_hash, seed=seed, epoch=epoch, block=block, window=window)
    order.setflags(write=False)
    return order


class Resumable(ABC):
    """A data order whose only state is the number of the next step: no ranks, workers or random state."""

    @property
    @abstractmethod
    def steps_per_epoch(self) -> int: ...

    @abstractmethod
    def describe(self) -> dict[str, Any]:
        """All that the order depends on, as JSON values."""

    @property
    def identity(self) -> str:
        """Names the order: two of one identity give the same batches at every step."""
        text = json.dumps(self.describe(), sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()[:16]

    def state(self, t: int) -> dict[str, Any]:
        """Where a loader stands before global step t, as JSON."""
        epoch, step = divmod(t, self.steps_per_epoch)
        return {"plan": self.identity, "epoch": epoch, "step": step}

    def resume(self, state: Mapping[str, Any]) -> int:
        """The global step of a state; ValueError if it is another plan's."""
        if state["plan"] != self.identity:
            raise ValueError(
                f"the checkpoint stands in the data order {state['plan']}, this run's is {self.identity}: "
                "data, seed, batch size, shares or order options differ; use the checkpoint's, or start anew"
            )
        return int(state["epoch"]) * self.steps_per_epoch + int(state["step"])


class Steps(Resumable):
    """What every global step trains.

    n: samples of an epoch. global_batch: slots of a step, shared equally by the ranks.
    """

    n: int
    global_batch: int

    @abstractmethod
    def step(self, t: int) -> tuple[Ints, Floats]:
        """(items [B], weights [B]) of global step t, counted from 0 over all epochs."""

    def items(self, t: int) -> Ints:
        """The samples of global step t."""
        return self.step(t)[0]

    @property
    def steps_per_epoch(self) -> int:
        return -(-self.n // self.global_batch)

    def rank_part(self, t: int, rank: int, world: int) -> tuple[Ints, Floats]:
        """The contiguous part of step t that one of `world` ranks takes, each [B / world]."""
        part = rank_slice(self.global_batch, rank, world)
        items, weights = self.step(t)
        return items[part], weights[part]


def rank_slice(slots: int, rank: int, world: int) -> slice:
    """The contiguous part of a step's slots that a rank takes; ValueError if they cannot be shared."""
    share = divided(slots, world, what="global_batch", over="ranks")
    if not 0 <= rank < world:
        raise ValueError(f"rank {rank} is not one of {world} ranks, which count from 0")
    return slice(rank * share, (rank + 1) * share)


def filled(items: Ints, slots: int) -> tuple[Ints, Floats]:
    """(items [slots], weights [slots]): what is missing is filled with repeats at weight 0."""
    weights = np.zeros(slots, dtype=np.float32)
    weights[: len(items)] = 1
    return np.resize(items, slots), weights


@dataclass(frozen=True)
class Plan(Steps):
    """Items of every global step. Step t of an epoch takes positions [t*B, (t+1)*B) of its order.

    The last step of an epoch is filled with repeats of its own items at weight 0.
    """

    n: int
    global_batch: int
    seed: int
    manifest_hash: str
    block: int = 64
    window: int = 8

    def __post_init__(self) -> None:
        if self.n < 1:
            raise ValueError("the split has no examples, so there is nothing to plan")
        if self.global_batch < 1:
            raise ValueError(f"global_batch={self.global_batch} must be at least 1")

    def step(self, t: int) -> tuple[Ints, Floats]:
        epoch, within = divmod(t, self.steps_per_epoch)
        order = _cached_order(self.n, self.manifest_hash, self.seed, epoch, self.block, self.window)
        items = order[within * self.global_batch : (within + 1) * self.global_batch]
        return filled(items, self.global_batch)

    def describe(self) -> dict[str, Any]:
        return {"order": 1, **vars(self)}


def divided(total: int, parts: int, *, what: str, over: str) -> int:
    """total / parts; raises ValueError naming the nearest numbers that divide if it is not whole."""
    if parts >= 1 and total % parts == 0:
        return total // parts
    near = [str(d) for d in sorted(sorted(divisors(total), key=lambda d: abs(d - parts))[:2])]
    raise ValueError(
        f"{what}={total} cannot be shared equally over {parts} {over}: "
        f"use {' or '.join(near)} {over}, or another {what}"
    )


def divisors(total: int) -> list[int]:
    """The numbers that divide `total`, ascending."""
    return [d for d in range(1, total + 1) if total % d == 0]
