"""Rows of a table by index, with a gradient that has the same bits on every run.

    embedding(ids, weight)

On a GPU recent versions of torch may add up the gradient of a table with few rows by atomics, so that equal
runs drift apart by rounding. Its sorted form adds in a fixed order; here one operator asks for it.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

__all__ = ["embedding"]


def embedding(ids: Tensor, weight: Tensor) -> Tensor:
    """weight [V, D] at ids [...] long -> [..., D]. The gradient reaches weight, once differentiable."""
    # CPUs add in order; traced code cannot change settings.
    if not ids.is_cuda or torch.compiler.is_compiling():
        return F.embedding(ids, weight)
    found: Tensor = _Embedding.apply(ids, weight)
    return found


class _Embedding(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, ids: Tensor, weight: Tensor) -> Tensor:
        ctx.save_for_backward(ids)
        ctx.n_rows = len(weight)
        return F.embedding(ids, weight)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[None, Tensor]:
        (ids,) = ctx.saved_tensors
        with in_fixed_order():
            return None, torch.ops.aten.embedding_dense_backward(grad, ids, ctx.n_rows, -1, False)


@contextmanager
def in_fixed_order() -> Iterator[None]:
    """Operators inside take their reproducible form where they have one; the settings are put back."""
    enabled = torch.are_deterministic_algorithms_enabled()
    warn_only = torch.is_deterministic_algorithms_warn_only_enabled()
    settings: Any = torch.utils.deterministic
    fill = settings.fill_uninitialized_memory
    torch.use_deterministic_algorithms(True, warn_only=True)
    settings.fill_uninitialized_memory = False  # it would write all scratch memory twice
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(enabled, warn_only=warn_only)
        settings.fill_uninitialized_memory = fill
