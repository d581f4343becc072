"""Batches of similar length, and groups within a token budget: pure functions of (plan, step)."""

from __future__ import annotations

import hashlib
from bisect import bisect_left, insort
from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate
from typing import Any, Literal

import numpy as np

from data.plan import Floats, Ints, Resumable, Steps, filled, keyed, rank_slice

Measure = Literal["padded", "tokens"]


@dataclass(frozen=True)
class Bucketed(Steps):
    """The steps of another plan, regrouped so that the samples of a step are about equally long.

    Within every `steps` steps the samples are sorted by length, cut into batches, and the batches
    put in random order. lengths: [n] of every item, in tokens or anything that grows with them.
    """

    inner: Steps
    lengths: Ints
    steps: int
    seed: int

    def __post_init__(self) -> None:
        if self.steps < 1:
            raise ValueError(f"a bucket of {self.steps} steps holds nothing; use 1 or more")
        if len(self.lengths) != self.inner.n:
            raise ValueError(f"{len(self.lengths):,} lengths for {self.inner.n:,} samples")

    @property
    def n(self) -> int:  # type: ignore[override]
        return self.inner.n

    @property
    def global_batch(self) -> int:  # type: ignore[override]
        return self.inner.global_batch

    @cached_property
    def _kept(self) -> dict[int, list[tuple[Ints, Floats]]]:
        return {}

    def step(self, t: int) -> tuple[Ints, Floats]:
        epoch, within = divmod(t, self.steps_per_epoch)
        first = epoch * self.steps_per_epoch + within // self.steps * self.steps
        if first not in self._kept:
            if len(self._kept) > 1:
                del self._kept[min(self._kept)]
            self._kept[first] = self._window(
                first, min(first + self.steps, (epoch + 1) * self.steps_per_epoch)
            )
        return self._kept[first][t - first]

    def _window(self, first: int, end: int) -> list[tuple[Ints, Floats]]:
        parts = [self.inner.step(t) for t in range(first, end)]
        items = np.concatenate([i[w > 0] for i, w in parts])
        by_length = items[np.argsort(self.lengths[items], kind="stable")]
        size = self.global_batch
        batches = [filled(by_length[k * size : (k + 1) * size], size) for k in range(end - first)]
        draw = keyed(f"bucket:{self.inner.identity}:{self.seed}:{first}").random_raw(len(batches))
        return [batches[k] for k in np.argsort(draw, kind="stable")]

    def describe(self) -> dict[str, Any]:
        return {
            "bucketed": 1,
            "inner": self.inner.describe(),
            "lengths": _digest(self.lengths),
            "steps": self.steps,
            "seed": self.seed,
        }


@dataclass(frozen=True)
class Packing:
    """All samples of a source in groups that keep a token budget; a function of their lengths alone.

    measure: what a group's size is. "padded": samples x longest, what a padded batch holds in memory;
    "tokens": the sum of lengths. Samples of `near` neighbours in the data's order are packed together.
    Raises ValueError for a sample longer than the budget.
    """

    lengths: Ints
    budget: int
    measure: Measure = "padded"
    near: int = 8192

    def __post_init__(self) -> None:
        if self.near < 1 or not len(self.lengths):
            raise ValueError("packing needs samples, and near of at least 1")
        longest = int(np.argmax(self.lengths))
        if self.lengths[longest] > self.budget:
            raise ValueError(
                f"sample {longest:,} has {self.lengths[longest]:,} tokens, more than the budget of "
                f"{self.budget:,} tokens a group; raise the budget or take the sample out"
            )

    @cached_property
    def packs(self) -> list[Ints]:
        """All groups: every sample is in exactly one."""
        found = []
        for start in range(0, len(self.lengths), self.near):
            part = self.lengths[start : start + self.near]
            pack = _padded_packs if self.measure == "padded" else _token_packs
            found += [start + group for group in pack(part, self.budget)]
        return found

    def describe(self) -> dict[str, Any]:
        rest = {name: getattr(self, name) for name in ("budget", "measure", "near")}
        return {"lengths": _digest(self.lengths), **rest}


@dataclass(frozen=True)
class Packed(Resumable):
    """Steps of groups that keep a token budget: `order` is a plan over the groups' numbers.

    packings: of each source; sample and group numbers count through all of them. The groups are the same in
    every epoch, their order is not. A step whose groups run out is filled with repeats at weight 0.
    """

    packings: tuple[Packing, ...]
    order: Steps

    def __post_init__(self) -> None:
        if self.order.n != len(self.packs):
            raise ValueError(f"the plan is for {self.order.n:,} groups, there are {len(self.packs):,}")

    @property
    def n(self) -> int:
        """Number of samples."""
        return sum(len(packing.lengths) for packing in self.packings)

    @property
    def groups(self) -> int:
        """Groups of a step."""
        return self.order.global_batch

    @cached_property
    def packs(self) -> list[Ints]:
        """All groups of all sources."""
        starts = accumulate((len(packing.lengths) for packing in self.packings), initial=0)
        parts = zip(starts, self.packings, strict=False)
        return [start + group for start, packing in parts for group in packing.packs]

    @property
    def steps_per_epoch(self) -> int:
        return self.order.steps_per_epoch

    def step(self, t: int) -> list[tuple[Ints, float]]:
        """(items, weight) of each of `groups` groups of global step t."""
        chosen, weights = self.order.step(t)
        return [(self.packs[g], w) for g, w in zip(chosen.tolist(), weights.tolist(), strict=True)]

    def rank_part(self, t: int, rank: int, world: int) -> list[tuple[Ints, float]]:
        """The groups of step t that one of `world` ranks takes."""
        return self.step(t)[rank_slice(self.groups, rank, world)]

    def items(self, t: int) -> Ints:
        return np.concatenate([items for items, _ in self.step(t)])

    def describe(self) -> dict[str, Any]:
        held = [packing.describe() for packing in self.packings]
        return {"packed": 1, "packings": held, "order": self.order.describe()}


def _padded_packs(lengths: Ints, budget: int) -> list[Ints]:
    """Groups of neighbours by length, as large as samples x longest <= budget allows."""
    order = np.argsort(-lengths, kind="stable")
    found, start = [], 0
    while start < len(order):
        size = max(1, budget // max(1, int(lengths[order[start]])))
        found.append(order[start : start + size])
        start += size
    return found


def _token_packs(lengths: Ints, budget: int) -> list[Ints]:
    """Best fit by falling length: a sample goes to the fullest group that still takes it."""
    groups: list[list[int]] = []
    with_room: dict[int, list[int]] = {}
    rooms: list[int] = []  # the keys of with_room, ascending
    for item in np.argsort(-lengths, kind="stable").tolist():
        size = int(lengths[item])
        at = bisect_left(rooms, size)
        if at == len(rooms):
            groups.append([])
            group, room = len(groups) - 1, budget
        else:
            room = rooms[at]
            group = with_room[room].pop()
            if not with_room[room]:
                del with_room[room], rooms[at]
        groups[group].append(item)
        left = room - size
        if left not in with_room:
            insort(rooms, left)
        with_room.setdefault(left, []).append(group)
    return [np.array(group, dtype=np.int64) for group in groups]


def _digest(lengths: Ints) -> str:
    return hashlib.sha256(np.ascontiguousarray(lengths, dtype="<i8").tobytes()).hexdigest()[:16]
