"""Norms with what stands beside them: head norm with its gate, residual sum with reordering and LayerNorm.

    head_norm(y, gate, weight, bias, eps)       group norm of each head, times silu(gate)
    add_norm(x, late, weight, bias, eps)        (x + late, its LayerNorm), rows reordered on the way
    reorder(x, index)                           the reordering alone

Statistics are computed in float32 (float64 for float64 inputs), results rounded once.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from .dispatch import pick, register
from .mix import activation_dtype, unfit, wide

__all__ = ["add_norm", "head_norm", "reorder"]

_LARGEST = 16384  # channels of one row or head that the Triton kernels hold in registers


def head_norm(
    y: Tensor, gate: Tensor, weight: Tensor, bias: Tensor, eps: float, *, backend: str | None = None
) -> Tensor:
    """silu(gate) * (group norm of each head's N channels): y [B,T,H,N], gate [B,T,H*N] -> [B,T,H*N].

    weight, bias: [H*N]. The result has the type that a matrix product gives it (autocast's, or the
    gate's). Source: Peng et al. 2024 (arXiv 2404.05892), equation 9.
    """
    if y.dim() != 4:
        raise ValueError(f"head_norm: y has shape {list(y.shape)}; expected [B, T, H, N]")
    width = y.shape[2] * y.shape[3]
    if list(gate.shape) != [*y.shape[:2], width] or weight.numel() != width or bias.numel() != width:
        found = [list(t.shape) for t in (gate, weight, bias)]
        wanted = f"[{y.shape[0]}, {y.shape[1]}, {width}], [{width}] and [{width}]"
        raise ValueError(f"head_norm: gate, weight and bias have shapes {found}; expected {wanted}")
    why = unfit(y, gate, weight) or ("the head size is too large" if y.shape[3] > 1024 else "")
    run = pick("head_norm", backend, y.device, why)
    return run(y, gate, weight, bias, eps, activation_dtype(gate))


def add_norm(
    x: Tensor,
    late: Tensor | None,
    weight: Tensor,
    bias: Tensor,
    eps: float,
    *,
    index: Tensor | None = None,
    backend: str | None = None,
) -> tuple[Tensor, Tensor]:
    """(s, LayerNorm(s)) of s = x + late, rows taken in the order of `index`.

    x, late [B, T, D] (late None: nothing to add); weight, bias [D]; index [B*T] long, a permutation of
    the rows of the flattened sequence, or None. s has the wider type of x and late, the norm s's own or,
    under autocast, float32 as torch's LayerNorm.
    """
    _check_rows("add_norm", x, index)
    if late is not None and late.shape != x.shape:
        raise ValueError(f"add_norm: late has shape {list(late.shape)} but x has {list(x.shape)}")
    if list(weight.shape) != [x.shape[-1]] or list(bias.shape) != [x.shape[-1]]:
        found = [list(weight.shape), list(bias.shape)]
        raise ValueError(f"add_norm: weight and bias have shapes {found}; expected [D] = [{x.shape[-1]}]")
    total = x.dtype if late is None else torch.promote_types(x.dtype, late.dtype)
    autocast = total != torch.float64 and torch.is_autocast_enabled(x.device.type)
    why = unfit(x, weight) or (f"rows of {x.shape[-1]} channels" if x.shape[-1] > _LARGEST else "")
    run = pick("add_norm", backend, x.device, why)
    return run(x, late, index, weight, bias, eps, total, torch.float32 if autocast else total)


def _check_rows(op: str, x: Tensor, index: Tensor | None) -> None:
    """`x` is [B, T, D] and `index` None or long, of as many rows."""
    if x.dim() != 3:
        raise ValueError(f"{op}: x has shape {list(x.shape)}; expected [B, T, D]")
    rows = x.shape[0] * x.shape[1]
    if index is not None and (index.dtype != torch.int64 or list(index.shape) != [rows]):
        found = f"{index.dtype} of shape {list(index.shape)}"
        raise ValueError(f"{op}: index is {found}; expected torch.int64 [B*T] = [{rows}]")


class _Reorder(torch.autograd.Function):
    """Rows of x [R, D] in the order of a permutation; the gradient's rows go back where they came from.

    Autograd's own backward of an index is a scatter-add, whose atomics are not reproducible on a GPU.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, index: Tensor) -> Tensor:
        ctx.save_for_backward(index)
        return x.index_select(0, index)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        (index,) = ctx.saved_tensors
        return torch.empty_like(grad).index_copy(0, index, grad), None


def reorder(x: Tensor, index: Tensor) -> Tensor:
    """x [B, T, D] with the rows of its flattened sequence in the order of index [B*T], a permutation."""
    _check_rows("reorder", x, index)
    moved: Tensor = _Reorder.apply(x.flatten(0, 1), index)
    return moved.view(x.shape)


def _head_norm(
    y: Tensor, gate: Tensor, weight: Tensor, bias: Tensor, eps: float, dtype: torch.dtype
) -> Tensor:
    """The definition of `head_norm` in plain PyTorch."""
    batch, time, heads, size = y.shape
    rows = wide(y).reshape(batch * time, heads * size)
    normed = F.group_norm(rows, heads, wide(weight), wide(bias), eps).view(gate.shape)
    return (normed * F.silu(wide(gate))).to(dtype)


def _add_norm(
    x: Tensor, late: Tensor | None, index: Tensor | None, weight: Tensor, bias: Tensor, eps: float,
    total: torch.dtype, dtype: torch.dtype,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """The definition of `add_norm` in plain PyTorch."""
    kept = (x if late is None else x + late).to(total)
    if index is not None:
        kept = reorder(kept, index)
    rows = wide(kept)
    normed = F.layer_norm(rows, rows.shape[-1:], weight.to(rows.dtype), bias.to(rows.dtype), eps)
    return kept, normed.to(dtype)


register("head_norm", reference=_head_norm, torch=_head_norm, triton="kernels.gpu.norm:head_norm")
register("add_norm", reference=_add_norm, torch=_add_norm, triton="kernels.gpu.add_norm:add_norm")
