"""Residual sum, reordering of the rows and LayerNorm in one pass over a row, on a GPU.

The permutation between two layers' scans costs the reading of an index: each program gathers its row where
it stands, and in the backward pass puts its row where it came from (an index that is a permutation writes
every row once: no atomics). Statistics are formed again in the backward pass instead of being kept; gradients
of weight and bias are summed per program in float32 and added by a second step in fixed order. Definition:
kernels/norm.py.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.gpu.ops import Function, Launch, operator

from .launch import cdiv, kernel, power_of_two

PROGRAMS = 528
"""Programs of the backward pass: four for each multiprocessor of an H100."""


@kernel
@triton.jit
def _add_norm(x, y, index, weight, bias, total, out, D, eps, HAS_Y: tl.constexpr, HAS_INDEX: tl.constexpr,
              DP: tl.constexpr):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    source = row
    if HAS_INDEX:
        source = tl.load(index + row)
    col = tl.arange(0, DP)
    real = col < D
    value = tl.load(x + source * D + col, mask=real, other=0.0).to(tl.float32)
    if HAS_Y:
        value += tl.load(y + source * D + col, mask=real, other=0.0).to(tl.float32)
    kept = value.to(total.dtype.element_ty)
    tl.store(total + row * D + col, kept, mask=real)
    value = kept.to(tl.float32)  # the norm reads what later layers read
    centred = tl.where(real, value - tl.sum(value, axis=0) / D, 0.0)
    scale = 1.0 / tl.sqrt(tl.sum(centred * centred, axis=0) / D + eps)
    w = tl.load(weight + col, mask=real, other=0.0).to(tl.float32)
    b = tl.load(bias + col, mask=real, other=0.0).to(tl.float32)
    tl.store(out + row * D + col, (centred * scale * w + b).to(out.dtype.element_ty), mask=real)


@kernel
@triton.jit
def _add_norm_grad(dtotal, dout, total, index, weight, dx, dy, dweight, dbias, rows, D, eps, turns,
                   HAS_TOTAL: tl.constexpr, HAS_INDEX: tl.constexpr, SPLIT: tl.constexpr,
                   DP: tl.constexpr):  # fmt: skip
    col = tl.arange(0, DP)
    real = col < D
    w = tl.load(weight + col, mask=real, other=0.0).to(tl.float32)
    sum_w = tl.zeros((DP,), tl.float32)
    sum_b = tl.zeros((DP,), tl.float32)
    first = tl.program_id(0).to(tl.int64) * turns
    for row in range(first, tl.minimum(first + turns, rows)):
        target = row
        if HAS_INDEX:
            target = tl.load(index + row)
        value = tl.load(total + row * D + col, mask=real, other=0.0).to(tl.float32)
        d = tl.load(dout + row * D + col, mask=real, other=0.0).to(tl.float32)
        centred = tl.where(real, value - tl.sum(value, axis=0) / D, 0.0)
        scale = 1.0 / tl.sqrt(tl.sum(centred * centred, axis=0) / D + eps)
        normed = centred * scale
        sum_w += d * normed
        sum_b += d
        d *= w
        d = (d - tl.sum(d, axis=0) / D - normed * (tl.sum(d * normed, axis=0) / D)) * scale
        if HAS_TOTAL:
            d += tl.load(dtotal + row * D + col, mask=real, other=0.0).to(tl.float32)
        tl.store(dx + target * D + col, d.to(dx.dtype.element_ty), mask=real)
        if SPLIT:
            tl.store(dy + target * D + col, d.to(dy.dtype.element_ty), mask=real)
    at = tl.program_id(0).to(tl.int64) * D + col
    tl.store(dweight + at, sum_w, mask=real)
    tl.store(dbias + at, sum_b, mask=real)


def _warps(width: int, per_thread: int) -> int:
    """Warps of a row of `width` (a power of two) channels."""
    return min(16, max(1, width // (32 * per_thread)))


def _flags(index: Tensor | None, width: int) -> dict[str, Any]:
    return {"HAS_INDEX": index is not None, "DP": power_of_two(width)}


def _forward(
    x: Tensor, y: Tensor | None, index: Tensor | None, weight: Tensor, bias: Tensor, eps: float,
    total_dtype: torch.dtype, dtype: torch.dtype,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """(the reordered sum, its norm)."""
    x, weight, bias = (t.contiguous() for t in (x, weight, bias))
    y = None if y is None else y.contiguous()
    index = None if index is None else index.contiguous()
    width = x.shape[-1]
    total, out = torch.empty_like(x, dtype=total_dtype), torch.empty_like(x, dtype=dtype)
    flags = _flags(index, width)
    _add_norm[(x.numel() // width,)](
        x, y, index, weight, bias, total, out, width, eps, HAS_Y=y is not None, **flags,
        num_warps=_warps(flags["DP"], 16),
    )  # fmt: skip
    return total, out


def _forward_fake(
    x: Tensor, y: Tensor | None, index: Tensor | None, weight: Tensor, bias: Tensor, eps: float,
    total_dtype: torch.dtype, dtype: torch.dtype,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    return x.new_empty(x.shape, dtype=total_dtype), x.new_empty(x.shape, dtype=dtype)


def _backward(
    dtotal: Tensor | None, dout: Tensor, total: Tensor, index: Tensor | None, weight: Tensor, eps: float,
    x_dtype: torch.dtype, y_dtype: torch.dtype,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """Gradients of x, of y where it has another type than x (else empty: the same), weight and bias."""
    dout, total, weight = (t.contiguous() for t in (dout, total, weight))
    dtotal = None if dtotal is None else dtotal.contiguous()
    index = None if index is None else index.contiguous()
    width = total.shape[-1]
    rows = total.numel() // width
    turns = cdiv(rows, PROGRAMS)
    programs = cdiv(rows, turns)
    split = x_dtype != y_dtype
    dx = torch.empty_like(total, dtype=x_dtype)
    dy = torch.empty_like(total, dtype=y_dtype) if split else total.new_empty(0)
    sums = torch.empty(2, programs, width, dtype=torch.float32, device=total.device)
    flags = _flags(index, width)
    _add_norm_grad[(programs,)](
        dtotal, dout, total, index, weight, dx, dy, sums[0], sums[1], rows, width, eps, turns,
        HAS_TOTAL=dtotal is not None, SPLIT=split, **flags, num_warps=_warps(flags["DP"], 8),
    )  # fmt: skip
    dweight, dbias = sums.sum(1).unbind()
    return dx, dy, dweight.to(weight.dtype, copy=True), dbias.to(weight.dtype, copy=True)


def _backward_fake(
    dtotal: Tensor | None, dout: Tensor, total: Tensor, index: Tensor | None, weight: Tensor, eps: float,
    x_dtype: torch.dtype, y_dtype: torch.dtype,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    dx = total.new_empty(total.shape, dtype=x_dtype)
    dy = total.new_empty(total.shape, dtype=y_dtype) if x_dtype != y_dtype else total.new_empty(0)
    return dx, dy, weight.new_empty(weight.shape), weight.new_empty(weight.shape)


def _keep(ctx: Any, inputs: Any, output: Any) -> None:
    x, y, index, weight, bias, ctx.eps, *_ = inputs
    ctx.has_y = y is not None
    ctx.dtypes = (x.dtype, x.dtype if y is None else y.dtype, bias.dtype)
    ctx.save_for_backward(output[0], index, weight)
    ctx.set_materialize_grads(False)


def _gradients(ctx: Any, run: Function, dtotal: Tensor | None, dout: Tensor | None) -> tuple[Any, ...]:
    total, index, weight = ctx.saved_tensors
    x_dtype, y_dtype, bias_dtype = ctx.dtypes
    if dout is None:
        dout = torch.zeros_like(total)
    dx, dy, dweight, dbias = run(dtotal, dout, total, index, weight, ctx.eps, x_dtype, y_dtype)
    dy = (dx if x_dtype == y_dtype else dy) if ctx.has_y else None
    return dx, dy, None, dweight, dbias.to(bias_dtype), None, None, None


_call = operator(
    "add_norm",
    Launch(
        _forward,
        _forward_fake,
        "(Tensor x, Tensor? y, Tensor? index, Tensor weight, Tensor bias, float eps,"
        " ScalarType total_dtype, ScalarType dtype) -> (Tensor, Tensor)",
    ),
    Launch(
        _backward,
        _backward_fake,
        "(Tensor? dtotal, Tensor dout, Tensor total, Tensor? index, Tensor weight, float eps,"
        " ScalarType x_dtype, ScalarType y_dtype) -> (Tensor, Tensor, Tensor, Tensor)",
    ),
    keep=_keep,
    gradients=_gradients,
)


def add_norm(
    x: Tensor, y: Tensor | None, index: Tensor | None, weight: Tensor, bias: Tensor, eps: float,
    total_dtype: torch.dtype, dtype: torch.dtype,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """x, y [B, T, D], index [B*T] -> (the reordered sum of `total_dtype`, its norm of `dtype`), [B, T, D]."""
    return _call(x, y, index, weight, bias, eps, total_dtype, dtype)
