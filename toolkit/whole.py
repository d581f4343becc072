"""Whole steps: each micro batch learns what all micro batches of its step, on all ranks, amount to."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import count, islice

from toolkit import ranks
from toolkit.contracts import Batch, Whole
from toolkit.model import asked_for


@dataclass(frozen=True)
class WholeSteps:
    """A loader whose batches carry `Batch.whole`. parts: micro batches that a step has on each rank.

    The micro batches of a step are read before the first of them is trained. doing: what the ranks are told
    if reading or training a step fails, with the step's number after it; first: the number of the first one.
    """

    loader: Iterable[Batch]
    parts: int
    doing: str
    first: int = 0

    def __len__(self) -> int:
        return len(self.loader)  # type: ignore[arg-type]  # as long as what it wraps, if that has a length

    def __iter__(self) -> Iterator[Batch]:
        batches = iter(self.loader)
        for step in count(self.first):
            ranks.doing(f"{self.doing}, step {step}")
            step_parts = list(islice(batches, self.parts))
            if not step_parts:
                return
            whole = total(step_parts)
            for part in step_parts:
                yield replace(part, whole=whole)


def total(parts: Sequence[Batch]) -> Whole:
    """The sums over the micro batches of a step on every rank; an exchange if there are several."""
    samples = sum(len(part.weight) for part in parts)
    answers = sum(int(asked_for(part).sum()) for part in parts)
    longest = max(part.ids.shape[1] for part in parts)
    found = ranks.numbers(samples, answers, longest)
    samples, answers = sum(one[0] for one in found), sum(one[1] for one in found)
    return Whole(samples, answers, samples * max(one[2] for one in found))
