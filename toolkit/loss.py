"""The training loss: cross entropy over answer tokens in the original's two reductions, and its L2 term."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from kernels.cross_entropy import linear_cross_entropy
from toolkit.contracts import Whole

L2_FACTOR = 1e-4
"""Weight of the L2 term, as in RWKV-LM."""


@dataclass(frozen=True)
class Answers:
    """Where labels are to be predicted, before the head: its logits are never held all at once.

    hidden: [R, D] states that the head reads. head: [V, D] its weight. targets: [R]. sample: [R], the
    row's sample in the batch. asked: [R], 0 for rows without a label, which the L2 term alone reads;
    None if all rows have one. counts: [B] labels of each sample. weight: [B], 0 for slots that only fill
    a batch. n_tokens: B * T of the batch they come from. l2: whether the L2 term acts on these rows.
    real: [R], 0 for rows that only fill a fixed shape, which the L2 term leaves out; None if there are none.
    """

    hidden: Tensor
    head: Tensor
    targets: Tensor
    sample: Tensor
    asked: Tensor | None
    counts: Tensor
    weight: Tensor
    n_tokens: int | Tensor
    l2: bool
    real: Tensor | None = None

    @property
    def logits(self) -> Tensor:
        """All logits, [R, V]: for tests and analysis."""
        return F.linear(self.hidden, self.head)


def lm_loss(answers: Answers, *, reduction: str, whole: Whole | None = None) -> Tensor:
    """Cross entropy in fp32 (or fp64), a scalar; the head is applied on the way.

    reduction "sample" (v6.0 and later, the paper's model): mean over each sample's answer tokens, then
    over samples. "batch" (v5.x): mean over all answer tokens. Source: Hou et al. 2025, tables 7 and 8.

    whole: the step that these answers are a part of. The sum of the losses of its parts is then the loss of
    the step as one batch, and so is the gradient, however it is cut into micro batches and over ranks.

    The L2 term keeps logits from drifting upwards (RWKV-LM's L2Wrap): it adds 1e-4 / (B T) * largest
    logit to the gradient at each row's largest logit, and its value is 0. Paper: the original's term
    ignores the upstream gradient, so it is not scaled down under gradient accumulation; ours is, like
    the loss.
    """
    rows = row_weights(answers, reduction=reduction, whole=whole)
    penalty = l2_weights(answers, rows, whole=whole) if answers.l2 else None
    return linear_cross_entropy(answers.hidden, answers.head, answers.targets, rows, penalty)


def l2_weights(answers: Answers, rows: Tensor, *, whole: Whole | None = None) -> Tensor:
    """Factor of each row's L2 term, [R], in the dtype of `rows`."""
    factor = L2_FACTOR / (whole.positions if whole else answers.n_tokens)
    if isinstance(factor, float):
        return torch.full_like(rows, factor)
    return (factor if answers.real is None else factor * answers.real).to(rows.dtype).expand_as(rows)


def row_weights(answers: Answers, *, reduction: str, whole: Whole | None = None) -> Tensor:
    """Factor of each row's cross entropy in the loss, [R]."""
    kind = torch.float64 if answers.hidden.dtype == torch.float64 else torch.float32
    if reduction == "batch":
        counts = torch.full_like(answers.counts[:1], whole.answers) if whole else answers.counts.sum()
    else:
        counts = answers.counts * (whole.samples if whole else len(answers.counts))
    share = answers.weight.to(kind) / counts.clamp(min=1)  # [B]
    rows = share.index_select(0, answers.sample)  # [R]
    return rows if answers.asked is None else rows * answers.asked
