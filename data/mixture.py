"""Several sources in fixed shares: which sample of which source, a pure function of the step."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np

from data.plan import Floats, Ints, Steps, epoch_order

PERIOD = 1000
"""Shares are rounded to whole samples of this many; every PERIOD consecutive samples hold them exactly."""


@dataclass(frozen=True)
class Source:
    """One source of a mixture. name is for messages; share is relative to the others' shares."""

    name: str
    n: int
    manifest_hash: str
    share: float


@dataclass(frozen=True)
class Mixture(Steps):
    """Steps that mix sources. Item numbers count through all sources, in the order given.

    Every source is walked in its own epochs, each a permutation of it, as often as its share asks for.
    There is no tail: an epoch of the mixture is as many samples as all sources hold together.
    """

    sources: tuple[Source, ...]
    global_batch: int
    seed: int
    block: int = 64
    window: int = 8

    def __post_init__(self) -> None:
        empty = [s.name for s in self.sources if s.n < 1]
        if empty or not self.sources:
            raise ValueError(f"source {empty[0]} has no examples" if empty else "a mixture needs a source")
        if self.global_batch < 1:
            raise ValueError(f"global_batch={self.global_batch} must be at least 1")
        quotas(self.sources)

    @cached_property
    def n(self) -> int:  # type: ignore[override]
        return sum(source.n for source in self.sources)

    @cached_property
    def _pattern(self) -> tuple[Ints, Ints, Ints]:
        """(source of each slot of a period, how often it came before in the period, quota per source)."""
        quota = np.array(quotas(self.sources))
        which = interleaved(quota)  # [PERIOD]
        seen = np.cumsum(which[:, None] == np.arange(len(quota)), axis=0)  # [PERIOD, sources]
        return which, seen[np.arange(PERIOD), which] - 1, quota

    @cached_property
    def _orders(self) -> dict[int, dict[int, Ints]]:
        """Source -> epoch -> order, the two newest epochs of each."""
        return {k: {} for k in range(len(self.sources))}

    def step(self, t: int) -> tuple[Ints, Floats]:
        which, before, quota = self._pattern
        period, slot = np.divmod(np.arange(t * self.global_batch, (t + 1) * self.global_batch), PERIOD)
        chosen = which[slot]  # [B]
        turn = period * quota[chosen] + before[slot]  # [B], how often the source was chosen before
        items = np.empty(self.global_batch, dtype=np.int64)
        start = 0
        for k, source in enumerate(self.sources):
            mine = chosen == k
            items[mine] = start + self._items(k, turn[mine])
            start += source.n
        return items, np.ones(self.global_batch, dtype=np.float32)

    def _items(self, k: int, turn: Ints) -> Ints:
        """Which samples a source gives on these turns."""
        epoch, place = np.divmod(turn, self.sources[k].n)
        found = np.empty(len(turn), dtype=np.int64)
        for e in np.unique(epoch).tolist():
            found[epoch == e] = self._order(k, e)[place[epoch == e]]
        return found

    def _order(self, k: int, epoch: int) -> Ints:
        kept, source = self._orders[k], self.sources[k]
        if epoch not in kept:
            if len(kept) > 1:
                del kept[min(kept)]
            kept[epoch] = epoch_order(
                source.n,
                manifest_hash=source.manifest_hash,
                seed=self.seed,
                epoch=epoch,
                block=self.block,
                window=self.window,
            )
        return kept[epoch]

    def describe(self) -> dict[str, Any]:
        held = [
            [s.n, s.manifest_hash, quota] for s, quota in zip(self.sources, quotas(self.sources), strict=True)
        ]
        rest = {name: getattr(self, name) for name in ("global_batch", "seed", "block", "window")}
        return {"mixture": 1, "sources": held, **rest}


def quotas(sources: Sequence[Source]) -> list[int]:
    """Samples of each source among PERIOD, by largest remainder; their sum is PERIOD.

    Raises ValueError for a share that is no positive number, and for one that rounds to nothing.
    """
    wrong = [s for s in sources if not (s.share > 0 and math.isfinite(s.share))]
    if wrong:
        raise ValueError(f"the share of {wrong[0].name} is {wrong[0].share:g}; a share is a number above 0")
    total = sum(s.share for s in sources)
    exact = [PERIOD * s.share / total for s in sources]
    found = [int(value) for value in exact]
    by_rest = sorted(range(len(exact)), key=lambda k: found[k] - exact[k])
    for k in by_rest[: PERIOD - sum(found)]:
        found[k] += 1
    for source, quota in zip(sources, found, strict=True):
        if not quota:
            raise ValueError(
                f"the share of {source.name} is less than 1 in {PERIOD:,} samples; raise it or leave it out"
            )
    return found


def interleaved(quota: Ints) -> Ints:
    """The source of each of sum(quota) slots, every source spread as evenly as it goes."""
    slots = int(quota.sum())
    given, found = np.zeros(len(quota)), np.empty(slots, dtype=np.int64)
    for p in range(slots):
        k = int(np.argmax(quota * (p + 1) / slots - given))
        given[k] += 1
        found[p] = k
    return found
