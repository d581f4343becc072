"""Which sample is trained when: pure functions of (manifest hash, seed, epoch, step).

Neither shards nor workers nor ranks enter the order, so nothing has to divide, and a run continues
at any step in constant time.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from functools import lru_cache

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
    digest = hashlib.sha256(f"order:{manifest_hash}:{seed}:{epoch}".encode()).digest()
    return np.random.Philox(key=int.from_bytes(digest[:16], "little"))


def _sorted_by(values: NDArray[np.uint64]) -> Ints:
    return np.argsort(values, kind="stable").astype(np.int64)


@lru_cache(maxsize=4)
def _cached_order(n: int, manifest_hash: str, seed: int, epoch: int, block: int, window: int) -> Ints:
    order = epoch_order(n, manifest_hash=manifest_hash, seed=seed, epoch=epoch, block=block, window=window)
    order.setflags(write=False)
    return order


@dataclass(frozen=True)
class Plan:
    """Items of every global step. Step t of an epoch takes positions [t*B, (t+1)*B) of its order."""

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

    @property
    def steps_per_epoch(self) -> int:
        return -(-self.n // self.global_batch)

    def step(self, t: int) -> tuple[Ints, Floats]:
        """(items [B], weights [B]) of global step t, counted from 0 over all epochs.

        The last step of an epoch is filled with repeats of its own items at weight 0.
        """
        epoch, within = divmod(t, self.steps_per_epoch)
        order = _cached_order(self.n, self.manifest_hash, self.seed, epoch, self.block, self.window)
        items = order[within * self.global_batch : (within + 1) * self.global_batch]
        weights = np.zeros(self.global_batch, dtype=np.float32)
        weights[: len(items)] = 1
        return np.resize(items, self.global_batch), weights

    def rank_part(self, t: int, rank: int, world: int) -> tuple[Ints, Floats]:
        """The contiguous part of step t that one of `world` ranks takes, each [B / world]."""
        share = divided(self.global_batch, world, what="global_batch", over="ranks")
        if not 0 <= rank < world:
            raise ValueError(f"rank {rank} is not one of {world} ranks, which count from 0")
        items, weights = self.step(t)
        part = slice(rank * share, (rank + 1) * share)
        return items[part], weights[part]


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
