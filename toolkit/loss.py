"""The training loss: cross entropy over answer tokens in the original's two reductions, and its L2 term."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

L2_FACTOR = 1e-4
"""Weight of the L2 term, as in RWKV-LM."""


@dataclass(frozen=True)
class Answers:
    """Logits where a label is to be predicted.

    logits: [M, V]. targets: [M]. sample: [M], the row's sample in the batch. weight: [B], 0 for slots
    that only fill a batch. n_tokens: B * T of the batch they come from. penalty: [R, V] logits that
    the L2 term acts on, None for none.
    """

    logits: Tensor
    targets: Tensor
    sample: Tensor
    weight: Tensor
    n_tokens: int
    penalty: Tensor | None


def lm_loss(answers: Answers, *, reduction: str) -> Tensor:
    """Cross entropy in fp32 (or fp64), a scalar.

    reduction "sample" (v6.0 and later, the paper's model): mean over each sample's answer tokens, then
    over samples. "batch" (v5.x): mean over all answer tokens. Source: Hou et al. 2025, tables 7 and 8.
    """
    logits = answers.logits if answers.logits.dtype == torch.float64 else answers.logits.float()
    each = F.cross_entropy(logits, answers.targets, reduction="none")  # [M]
    each = each * answers.weight.to(each.dtype)[answers.sample]
    if reduction == "batch":
        loss = each.sum() / max(1, each.numel())
    else:
        n = answers.weight.shape[0]
        counts = torch.bincount(answers.sample, minlength=n).clamp(min=1)  # [B]
        loss = (each / counts[answers.sample]).sum() / n
    return loss if answers.penalty is None else loss + l2_term(answers.penalty, answers.n_tokens)


def l2_term(logits: Tensor, n_tokens: int) -> Tensor:
    """Adds 1e-4 / (B T) * largest logit to the gradient at each row's largest logit; its value is 0.

    Keeps logits from drifting upwards (RWKV-LM's L2Wrap). Paper: the original's term ignores the
    upstream gradient, so it is not scaled down under gradient accumulation; ours is, like the loss.
    """
    largest = logits.amax(dim=-1) if logits.dtype == torch.float64 else logits.float().amax(dim=-1)
    penalty = largest.square().sum() * (L2_FACTOR / 2 / n_tokens)
    return penalty - penalty.detach()
