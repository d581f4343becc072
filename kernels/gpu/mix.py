"""Data-dependent token shift of RWKV-6 on a GPU: five mixes from low-rank shares, in one kernel.

The shares s_i = m_i + low_i W_i are formed where they are used, from rank-wide rows on the tensor cores: the
five [B, T, D] tensors of shares are never written, in neither pass. Gradients of m and W are summed per
program in float32 and added by a second step in fixed order: no atomics. Definition: kernels/mix.py.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.gpu.lerp import flat, parts, previous
from kernels.gpu.ops import Function, Launch, operator

from .launch import cdiv, kernel, power_of_two

TILE = {"TB": 64, "DT": 64, "num_warps": 8}
GRAD_TILE = {"TB": 64, "DT": 64, "num_warps": 8, "num_stages": 1}
LOW_TILE = {"TB": 64, "DT": 64, "num_warps": 8, "num_stages": 2}
WEIGHT_TILE = {"TB": 64, "DT": 64, "num_warps": 4, "num_stages": 3}
FLOAT32_TILE = {"TB": 32, "DT": 32, "num_warps": 4, "num_stages": 1}
"""All passes for float32 factors: exact float32 products run without tensor cores."""


@triton.jit
def _shares(low, w2, maa, row, col, i: tl.constexpr, rows, D, R: tl.constexpr, RP: tl.constexpr,
            EXACT: tl.constexpr):  # fmt: skip
    """Shares m_i + low_i W_i of a tile, float32 [TB, DT]."""
    r = tl.arange(0, RP)
    at = row.to(tl.int64)[:, None] * (5 * R) + i * R + r[None, :]
    left = tl.load(low + at, mask=(row < rows)[:, None] & (r < R)[None, :], other=0.0)  # [TB, RP]
    fits = (r < R)[:, None] & (col < D)[None, :]
    right = tl.load(w2 + (i * R + r)[:, None] * D + col[None, :], mask=fits, other=0.0)  # [RP, DT]
    mean = tl.load(maa + i * D + col, mask=col < D, other=0.0).to(tl.float32)
    return tl.dot(left, right, input_precision=EXACT) + mean[None, :]


@kernel
@triton.jit
def _mix6(x, before, low, w2, maa, o0, o1, o2, o3, o4, rows, T, D, R: tl.constexpr, RP: tl.constexpr,
          HAS_BEFORE: tl.constexpr, EXACT: tl.constexpr, TB: tl.constexpr, DT: tl.constexpr):  # fmt: skip
    outs = (o0, o1, o2, o3, o4)
    row = tl.program_id(0) * TB + tl.arange(0, TB)
    col = tl.program_id(1) * DT + tl.arange(0, DT)
    inside = (row < rows)[:, None] & (col < D)[None, :]
    at = row.to(tl.int64)[:, None] * D + col[None, :]
    now = tl.load(x + at, mask=inside, other=0.0).to(tl.float32)
    change = previous(x, before, row, row % T, col, inside, T, D, HAS_BEFORE) - now
    for i in tl.static_range(5):
        out = now + change * _shares(low, w2, maa, row, col, i, rows, D, R, RP, EXACT)
        tl.store(outs[i] + at, out.to(outs[i].dtype.element_ty), mask=inside)


@kernel
@triton.jit
def _mix6_grad(g0, g1, g2, g3, g4, low, w2, maa, dx, dbefore, rows, T, D, R: tl.constexpr,
               RP: tl.constexpr, HAS_BEFORE: tl.constexpr, EXACT: tl.constexpr, TB: tl.constexpr,
               DT: tl.constexpr):  # fmt: skip
    """dx and d before of one tile: what a token gives to itself and to the token after it."""
    grads = (g0, g1, g2, g3, g4)
    row = tl.program_id(0) * TB + tl.arange(0, TB)
    col = tl.program_id(1) * DT + tl.arange(0, DT)
    step = row % T
    inside = (row < rows)[:, None] & (col < D)[None, :]
    later = inside & (step < T - 1)[:, None]
    at = row.to(tl.int64)[:, None] * D + col[None, :]
    own = tl.zeros((TB, DT), tl.float32)
    back = tl.zeros((TB, DT), tl.float32)
    for i in tl.static_range(5):
        grad = tl.load(grads[i] + at, mask=inside, other=0.0).to(tl.float32)
        gone = grad * _shares(low, w2, maa, row, col, i, rows, D, R, RP, EXACT)
        own += grad - gone
        back += gone
        after = tl.load(grads[i] + at + D, mask=later, other=0.0).to(tl.float32)
        own += after * _shares(low, w2, maa, row + 1, col, i, rows, D, R, RP, EXACT)
    tl.store(dx + at, own.to(dx.dtype.element_ty), mask=inside)
    if HAS_BEFORE:
        first = (row // T).to(tl.int64)[:, None] * D + col[None, :]
        tl.store(dbefore + first, back.to(dbefore.dtype.element_ty), mask=inside & (step == 0)[:, None])


@kernel
@triton.jit
def _mix6_low_grad(g0, g1, g2, g3, g4, x, before, w2, dlow, rows, T, D, R: tl.constexpr, RP: tl.constexpr,
                   HAS_BEFORE: tl.constexpr, EXACT: tl.constexpr, TB: tl.constexpr,
                   DT: tl.constexpr):  # fmt: skip
    """d low_i = (grad_i * change) W_i^T: one program owns TB tokens and walks D."""
    grads = (g0, g1, g2, g3, g4)
    row = tl.program_id(0) * TB + tl.arange(0, TB)
    step = row % T
    r = tl.arange(0, RP)
    sums = (tl.zeros((TB, RP), tl.float32),) * 5
    for first in range(0, D, DT):
        col = first + tl.arange(0, DT)
        inside = (row < rows)[:, None] & (col < D)[None, :]
        at = row.to(tl.int64)[:, None] * D + col[None, :]
        now = tl.load(x + at, mask=inside, other=0.0).to(tl.float32)
        change = previous(x, before, row, step, col, inside, T, D, HAS_BEFORE) - now
        fits = (r < R)[:, None] & (col < D)[None, :]
        new = ()
        for i in tl.static_range(5):
            grad = tl.load(grads[i] + at, mask=inside, other=0.0).to(tl.float32) * change
            right = tl.load(w2 + (i * R + r)[:, None] * D + col[None, :], mask=fits, other=0.0)  # [RP, DT]
            part = tl.dot(grad.to(right.dtype), tl.trans(right), sums[i], input_precision=EXACT)
            new = new + (part,)  # type: ignore[assignment]
        sums = new  # type: ignore[assignment]
    for i in tl.static_range(5):
        at = row.to(tl.int64)[:, None] * (5 * R) + i * R + r[None, :]
        inside = (row < rows)[:, None] & (r < R)[None, :]
        tl.store(dlow + at, sums[i].to(dlow.dtype.element_ty), mask=inside)


@kernel
@triton.jit
def _mix6_weight_grad(g0, g1, g2, g3, g4, x, before, low, dmaa, dw2, rows, T, D, turns,
                      R: tl.constexpr, RP: tl.constexpr, HAS_BEFORE: tl.constexpr, EXACT: tl.constexpr,
                      TB: tl.constexpr, DT: tl.constexpr):  # fmt: skip
    """This program's part of d m_i and d W_i: it owns DT channels of turns * TB tokens of one output."""
    i = tl.program_id(0)  # the fastest axis: the five programs that read the same x run together
    part = tl.program_id(1)
    col = tl.program_id(2) * DT + tl.arange(0, DT)
    r = tl.arange(0, RP)
    source = g0
    if i == 1:
        source = g1
    elif i == 2:
        source = g2
    elif i == 3:
        source = g3
    elif i == 4:
        source = g4
    shares = tl.zeros((TB, DT), tl.float32)
    weights = tl.zeros((RP, DT), tl.float32)
    for turn in range(turns):
        row = (part * turns + turn) * TB + tl.arange(0, TB)
        inside = (row < rows)[:, None] & (col < D)[None, :]
        at = row.to(tl.int64)[:, None] * D + col[None, :]
        now = tl.load(x + at, mask=inside, other=0.0).to(tl.float32)
        change = previous(x, before, row, row % T, col, inside, T, D, HAS_BEFORE) - now
        grad = tl.load(source + at, mask=inside, other=0.0).to(tl.float32) * change
        where = row.to(tl.int64)[:, None] * (5 * R) + i * R + r[None, :]
        left = tl.load(low + where, mask=(row < rows)[:, None] & (r < R)[None, :], other=0.0)  # [TB, RP]
        shares += grad
        weights = tl.dot(tl.trans(left), grad.to(left.dtype), weights, input_precision=EXACT)
    at = part.to(tl.int64) * 5 + i
    tl.store(dmaa + at * D + col, tl.sum(shares, axis=0), mask=col < D)
    where = (at * R + r)[:, None] * D + col[None, :]
    tl.store(dw2 + where, weights, mask=(r < R)[:, None] & (col < D)[None, :])


def _tile(chosen: dict[str, int], low: Tensor) -> dict[str, int]:
    return FLOAT32_TILE if low.dtype == torch.float32 else chosen


def _constants(low: Tensor, before: Tensor | None) -> dict[str, Any]:
    rank = low.shape[-1] // 5
    padded = max(16, power_of_two(rank))
    return {"R": rank, "RP": padded, "HAS_BEFORE": before is not None, "EXACT": "ieee"}


def _forward(
    x: Tensor, before: Tensor | None, low: Tensor, w2: Tensor, maa: Tensor, dtype: torch.dtype
) -> list[Tensor]:
    x, low, w2, maa = (t.contiguous() for t in (x, low, w2, maa))
    before = None if before is None else before.contiguous()
    rows, time, width = flat(x)
    outs = [torch.empty_like(x, dtype=dtype) for _ in range(5)]
    tile = _tile(TILE, low)
    grid = (cdiv(rows, tile["TB"]), cdiv(width, tile["DT"]))
    _mix6[grid](x, before, low, w2, maa, *outs, rows, time, width, **_constants(low, before), **tile)
    return outs


def _forward_fake(
    x: Tensor, before: Tensor | None, low: Tensor, w2: Tensor, maa: Tensor, dtype: torch.dtype
) -> list[Tensor]:
    return [x.new_empty(x.shape, dtype=dtype) for _ in range(5)]


def _backward(
    grads: list[Tensor], x: Tensor, before: Tensor | None, low: Tensor, w2: Tensor, maa: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gradients of x, before (empty without one), low, w2 and maa."""
    x, low, w2, maa = (t.contiguous() for t in (x, low, w2, maa))
    before = None if before is None else before.contiguous()
    grads = [g.contiguous() for g in grads]
    rows, time, width = flat(x)
    constants = _constants(low, before)
    dx, dlow = torch.empty_like(x), torch.empty_like(low)
    dbefore = torch.empty_like(before) if before is not None else x.new_empty(0)
    tile = _tile(GRAD_TILE, low)
    grid = (cdiv(rows, tile["TB"]), cdiv(width, tile["DT"]))
    _mix6_grad[grid](*grads, low, w2, maa, dx, dbefore, rows, time, width, **constants, **tile)
    tile = _tile(LOW_TILE, low)
    _mix6_low_grad[(cdiv(rows, tile["TB"]),)](
        *grads, x, before, w2, dlow, rows, time, width, **constants, **tile
    )
    dmaa, dw2 = _weights(grads, x, before, low, constants)
    return dx, dbefore, dlow, dw2.to(w2.dtype), dmaa.to(maa.dtype)


def _weights(
    grads: list[Tensor], x: Tensor, before: Tensor | None, low: Tensor, constants: dict[str, Any]
) -> tuple[Tensor, Tensor]:
    """Gradients of maa [5, D] and w2 [5, rank, D], float32."""
    rows, time, width = flat(x)
    tile = _tile(WEIGHT_TILE, low)
    columns = cdiv(width, tile["DT"])
    programs, turns = parts(rows, tile["TB"], 5 * columns)
    dmaa = torch.empty(programs, 5, width, dtype=torch.float32, device=x.device)
    dw2 = torch.empty(programs, 5, constants["R"], width, dtype=torch.float32, device=x.device)
    _mix6_weight_grad[(5, programs, columns)](
        *grads, x, before, low, dmaa, dw2, rows, time, width, turns, **constants, **tile
    )
    return dmaa.sum(0), dw2.sum(0)


def _backward_fake(
    grads: list[Tensor], x: Tensor, before: Tensor | None, low: Tensor, w2: Tensor, maa: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    dbefore = x.new_empty(0) if before is None else before.new_empty(before.shape)
    dx, dlow, dw2, dmaa = (t.new_empty(t.shape) for t in (x, low, w2, maa))
    return dx, dbefore, dlow, dw2, dmaa


def _keep(ctx: Any, inputs: Any, output: Any) -> None:
    ctx.save_for_backward(*inputs[:5])


def _gradients(ctx: Any, run: Function, grads: list[Tensor]) -> tuple[Any, ...]:
    saved = ctx.saved_tensors  # once: activation checkpointing gives them away as they are read
    dx, dbefore, *rest = run(grads, *saved)
    return (dx, None if saved[1] is None else dbefore, *rest, None)


_call = operator(
    "mix6",
    Launch(
        _forward,
        _forward_fake,
        "(Tensor x, Tensor? before, Tensor low, Tensor w2, Tensor maa, ScalarType dtype) -> Tensor[]",
    ),
    Launch(
        _backward,
        _backward_fake,
        "(Tensor[] grads, Tensor x, Tensor? before, Tensor low, Tensor w2,"
        " Tensor maa) -> (Tensor, Tensor, Tensor, Tensor, Tensor)",
    ),
    keep=_keep,
    gradients=_gradients,
)


def mix6(
    x: Tensor, before: Tensor | None, low: Tensor, w2: Tensor, maa: Tensor, dtype: torch.dtype
) -> list[Tensor]:
    """x [B,T,D], before [B,D], low [B,T,5*rank], w2 [5,rank,D], maa [5,D] -> five [B,T,D] of `dtype`."""
    return _call(x, before, low, w2, maa, dtype)
