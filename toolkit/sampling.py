"""How the next token is chosen from logits [B, V]: greedy, or drawn after temperature, top-k and top-p.

Each sample draws with the same stream of uniform numbers, made on the CPU from the seed: a text does not
depend on the batch it was written in, nor on the device that draws.
"""

from __future__ import annotations

import dataclasses
import typing
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated

from toolkit.register import Range, split_annotation

if TYPE_CHECKING:
    from torch import Tensor


_DRAWS = 256
"""Numbers that are drawn at first for an answer."""


@dataclass(frozen=True)
class Sampling:
    """How an answer is written. The default takes the most likely token each time (greedy).

    max_new_tokens: the answer's largest length. temperature: divides the logits, 0 is greedy. top_k: the
    most likely tokens that are drawn from, 0 for all. top_p: of these, the smallest set of the most likely
    that holds this share of the probability. repetition_penalty: divides the positive and multiplies the
    negative logits of tokens that this answer already holds (Keskar et al. 2019, arXiv 1909.05858), 1 for
    none. seed: the same one gives the same text. Raises ValueError for values out of range.
    """

    max_new_tokens: Annotated[int, Range(1)] = 256
    temperature: Annotated[float, Range(0, 100)] = 0.0
    top_p: Annotated[float, Range(0, 1, open_low=True)] = 1.0
    top_k: Annotated[int, Range(0)] = 0
    repetition_penalty: Annotated[float, Range(0.01, 100)] = 1.0
    seed: Annotated[int, Range(0, 2**63 - 1)] = 0

    def __post_init__(self) -> None:
        hints = typing.get_type_hints(Sampling, include_extras=True)
        for field in dataclasses.fields(Sampling):
            kind, bounds = split_annotation(hints[field.name])
            value = getattr(self, field.name)
            number = isinstance(value, int if kind is int else (int, float)) and not isinstance(value, bool)
            if not number or not all(isinstance(b, Range) and b.holds(value) for b in bounds):
                wanted = f"{'a whole number' if kind is int else 'a number'}, {bounds[0]}"
                raise ValueError(
                    f"{field.name}={value!r}: must be {wanted}; write {field.name}={field.default}"
                )
        if self.greedy and (self.top_p, self.top_k) != (1.0, 0):
            raise ValueError(
                f"top_p={self.top_p:g} top_k={self.top_k}: without a temperature the most likely token is "
                "taken and neither changes anything; write temperature=1, or leave them out"
            )

    @property
    def greedy(self) -> bool:
        """Whether nothing is drawn."""
        return self.temperature == 0


class Picker:
    """Chooses the next token of each sample, remembering what it chose: logits [B, V] -> ids [B]."""

    def __init__(self, options: Sampling) -> None:
        self.options = options
        self._seen: Tensor | None = None
        self._draws: Tensor | None = None
        self._count = 0

    @property
    def plain(self) -> bool:
        """Whether it only takes the largest logit."""
        return self.options.greedy and self.options.repetition_penalty == 1

    def __call__(self, logits: Tensor) -> Tensor:
        options = self.options
        if options.repetition_penalty != 1:
            if self._seen is None:
                self._seen = logits.new_zeros(logits.shape).bool()
            logits = penalised(logits, self._seen, options.repetition_penalty)
        if options.greedy:
            token = logits.argmax(dim=-1)
        else:
            if self._draws is None or self._count == len(self._draws):
                # By what was written so far: the largest length may be far from what an answer needs.
                count = min(options.max_new_tokens, max(_DRAWS, 2 * self._count))
                self._draws = uniforms(options.seed, count).to(logits.device)
            probabilities, order = kept(logits, options.temperature, options.top_k, options.top_p)
            token = drawn(probabilities, order, self._draws[self._count])
        if self._seen is not None:
            self._seen.scatter_(1, token.unsqueeze(1), True)
        self._count += 1
        return token


def uniforms(seed: int, count: int) -> Tensor:
    """Numbers in [0, 1) that a seed stands for: [count] float64, the first ones alike for any count."""
    import torch

    draw = torch.Generator().manual_seed(seed)
    # One by one: drawing several at once may number them otherwise.
    return torch.cat([torch.rand(1, generator=draw, dtype=torch.float64) for _ in range(count)])


def penalised(logits: Tensor, seen: Tensor, penalty: float) -> Tensor:
    """logits [B, V] with those of `seen` [B, V] bool divided by the penalty if positive, else multiplied."""
    changed = (logits / penalty).where(logits > 0, logits * penalty)
    return changed.where(seen, logits)


def kept(logits: Tensor, temperature: float, top_k: int, top_p: float) -> tuple[Tensor, Tensor]:
    """(probabilities [B, V] float64, ids [B, V]), most likely first; 0 for what is not drawn from.

    Equal logits stand in the order of their ids, so a cut between them is the same everywhere. The token
    at which `top_p` is reached belongs to the set.
    """
    ranked, order = logits.sort(dim=-1, descending=True, stable=True)
    ranked = (ranked - ranked[:, :1]).double() / temperature  # never above 0, whatever the temperature
    if 0 < top_k < ranked.shape[-1]:
        ranked[:, top_k:] = -float("inf")
    probabilities = ranked.softmax(dim=-1)
    if top_p < 1:
        before = probabilities.cumsum(dim=-1) - probabilities
        probabilities = probabilities.masked_fill(before >= top_p, 0.0)
    return probabilities, order


def drawn(probabilities: Tensor, order: Tensor, uniform: Tensor) -> Tensor:
    """The id [B] at which the sum of probabilities [B, V] passes `uniform` ([] or [B, 1]) of their total.

    Summed by id: by rank, the rounding of another batch size would swap neighbours and change what is drawn.
    """
    sums = probabilities.new_zeros(probabilities.shape).scatter_(1, order, probabilities).cumsum(dim=-1)
    total = sums[:, -1:]
    passed = (sums <= uniform * total).sum(dim=-1, keepdim=True)  # [B, 1]
    last = (sums < total).sum(dim=-1, keepdim=True)  # rounding must not pass the last one kept
    return passed.minimum(last).squeeze(1)
