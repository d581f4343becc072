"""Token shift with constant mixes on a GPU: the previous token is read by index, no shifted copy exists.

n outputs x + (previous - x) * s_i with shares s_i [D]. Gradients of the shares are summed per program in
float32 and added by a second step in fixed order: no atomics, the same bits on every run. Definition:
kernels/mix.py.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.gpu.ops import Function, Launch, operator

from .launch import cdiv, kernel

TILE = {"TB": 16, "DT": 128, "num_warps": 4}
GRAD_TILE = {"TB": 8, "DT": 128, "num_warps": 4}
PROGRAMS = 1024
"""A pass with partial sums is cut into about this many programs: some eight for each multiprocessor."""


@triton.jit
def previous(x, before, row, step, col, inside, T, D, HAS_BEFORE: tl.constexpr):
    """Token before each row's, float32 [TB, DT]; `before` [B, D] or zeros in front of the first."""
    at = row.to(tl.int64)[:, None] * D + col[None, :]
    found = tl.load(x + at - D, mask=inside & (step > 0)[:, None], other=0.0).to(tl.float32)
    if HAS_BEFORE:
        first = (row // T).to(tl.int64)[:, None] * D + col[None, :]
        found += tl.load(before + first, mask=inside & (step == 0)[:, None], other=0.0).to(tl.float32)
    return found


@kernel
@triton.jit
def _lerp(x, before, shares, o0, o1, o2, o3, rows, T, D, N: tl.constexpr, CURRENT: tl.constexpr,
          HAS_BEFORE: tl.constexpr, TB: tl.constexpr, DT: tl.constexpr):  # fmt: skip
    outs = (o0, o1, o2, o3)
    row = tl.program_id(0) * TB + tl.arange(0, TB)
    col = tl.program_id(1) * DT + tl.arange(0, DT)
    inside = (row < rows)[:, None] & (col < D)[None, :]
    at = row.to(tl.int64)[:, None] * D + col[None, :]
    now = tl.load(x + at, mask=inside, other=0.0).to(tl.float32)
    change = previous(x, before, row, row % T, col, inside, T, D, HAS_BEFORE) - now
    for i in tl.static_range(N):
        share = tl.load(shares + i * D + col, mask=col < D, other=0.0).to(tl.float32)
        if CURRENT:
            share = 1.0 - share
        out = now + change * share[None, :]
        tl.store(outs[i] + at, out.to(outs[i].dtype.element_ty), mask=inside)


@kernel
@triton.jit
def _lerp_grad(g0, g1, g2, g3, x, before, shares, dx, dbefore, partial, rows, T, D, turns,
               N: tl.constexpr, CURRENT: tl.constexpr, HAS_BEFORE: tl.constexpr, TB: tl.constexpr,
               DT: tl.constexpr):  # fmt: skip
    grads = (g0, g1, g2, g3)
    col = tl.program_id(1) * DT + tl.arange(0, DT)
    start = tl.program_id(0) * turns * TB
    sums = (tl.zeros((TB, DT), tl.float32),) * N
    for turn in range(turns):
        row = start + turn * TB + tl.arange(0, TB)
        step = row % T
        inside = (row < rows)[:, None] & (col < D)[None, :]
        later = inside & (step < T - 1)[:, None]
        at = row.to(tl.int64)[:, None] * D + col[None, :]
        now = tl.load(x + at, mask=inside, other=0.0).to(tl.float32)
        change = previous(x, before, row, step, col, inside, T, D, HAS_BEFORE) - now
        own = tl.zeros((TB, DT), tl.float32)
        back = tl.zeros((TB, DT), tl.float32)
        new = ()
        for i in tl.static_range(N):
            share = tl.load(shares + i * D + col, mask=col < D, other=0.0).to(tl.float32)
            if CURRENT:
                share = 1.0 - share
            grad = tl.load(grads[i] + at, mask=inside, other=0.0).to(tl.float32)
            next_grad = tl.load(grads[i] + at + D, mask=later, other=0.0).to(tl.float32)
            own += grad + (next_grad - grad) * share[None, :]
            back += grad * share[None, :]
            new = new + (sums[i] + grad * change,)  # type: ignore[assignment]
        sums = new
        tl.store(dx + at, own.to(dx.dtype.element_ty), mask=inside)
        if HAS_BEFORE:
            first = (row // T).to(tl.int64)[:, None] * D + col[None, :]
            tl.store(dbefore + first, back.to(dbefore.dtype.element_ty), mask=inside & (step == 0)[:, None])
    for i in tl.static_range(N):
        where = (tl.program_id(0).to(tl.int64) * N + i) * D + col
        tl.store(partial + where, tl.sum(sums[i], axis=0), mask=col < D)


def flat(x: Tensor) -> tuple[int, int, int]:
    """(rows B*T, T, D) of x [B, T, D]."""
    return x.shape[0] * x.shape[1], x.shape[1], x.shape[2]


def parts(rows: int, tile: int, others: int) -> tuple[int, int]:
    """(programs over rows, turns of `tile` rows each) where `others` programs share every row."""
    turns = cdiv(cdiv(rows, tile), max(1, PROGRAMS // others))
    return cdiv(rows, tile * turns), turns


def four(tensors: list[Tensor]) -> list[Tensor]:
    """The tensors, the first one repeated up to four: a kernel has a fixed number of arguments."""
    return tensors + tensors[:1] * (4 - len(tensors))


def _forward(
    x: Tensor, before: Tensor | None, shares: Tensor, current: bool, dtype: torch.dtype
) -> list[Tensor]:
    x, shares = x.contiguous(), shares.contiguous()
    before = None if before is None else before.contiguous()
    rows, time, width = flat(x)
    outs = [torch.empty_like(x, dtype=dtype) for _ in shares]
    grid = (cdiv(rows, TILE["TB"]), cdiv(width, TILE["DT"]))
    _lerp[grid](
        x, before, shares, *four(outs), rows, time, width, N=len(outs), CURRENT=current,
        HAS_BEFORE=before is not None, **TILE,
    )  # fmt: skip
    return outs


def _forward_fake(
    x: Tensor, before: Tensor | None, shares: Tensor, current: bool, dtype: torch.dtype
) -> list[Tensor]:
    return [x.new_empty(x.shape, dtype=dtype) for _ in range(shares.shape[0])]


def _backward(
    grads: list[Tensor], x: Tensor, before: Tensor | None, shares: Tensor, current: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of x, before (empty without one) and shares."""
    x, shares = x.contiguous(), shares.contiguous()
    before = None if before is None else before.contiguous()
    grads = [g.contiguous() for g in grads]
    rows, time, width = flat(x)
    tiles = cdiv(width, GRAD_TILE["DT"])
    programs, turns = parts(rows, GRAD_TILE["TB"], tiles)
    dx = torch.empty_like(x)
    dbefore = torch.empty_like(before) if before is not None else x.new_empty(0)
    partial = torch.empty(programs, len(grads), width, dtype=torch.float32, device=x.device)
    _lerp_grad[(programs, tiles)](
        *four(grads), x, before, shares, dx, dbefore, partial, rows, time, width, turns, N=len(grads),
        CURRENT=current, HAS_BEFORE=before is not None, **GRAD_TILE,
    )  # fmt: skip
    dshares = partial.sum(0)
    return dx, dbefore, (-dshares if current else dshares).to(shares.dtype)


def _backward_fake(
    grads: list[Tensor], x: Tensor, before: Tensor | None, shares: Tensor, current: bool
) -> tuple[Tensor, Tensor, Tensor]:
    dbefore = x.new_empty(0) if before is None else before.new_empty(before.shape)
    return x.new_empty(x.shape), dbefore, shares.new_empty(shares.shape)


def _keep(ctx: Any, inputs: Any, output: Any) -> None:
    x, before, shares, ctx.current, _ = inputs
    ctx.save_for_backward(x, before, shares)


def _gradients(ctx: Any, run: Function, grads: list[Tensor]) -> tuple[Any, ...]:
    x, before, shares = ctx.saved_tensors
    dx, dbefore, dshares = run(grads, x, before, shares, ctx.current)
    return dx, None if before is None else dbefore, dshares, None, None


_call = operator(
    "lerp",
    Launch(
        _forward,
        _forward_fake,
        "(Tensor x, Tensor? before, Tensor shares, bool current, ScalarType dtype) -> Tensor[]",
    ),
    Launch(
        _backward,
        _backward_fake,
        "(Tensor[] grads, Tensor x, Tensor? before, Tensor shares, bool current) -> (Tensor, Tensor, Tensor)",
    ),
    keep=_keep,
    gradients=_gradients,
)


def lerp(x: Tensor, before: Tensor | None, shares: Tensor, current: bool, dtype: torch.dtype) -> list[Tensor]:
    """x [B, T, D], before [B, D] or None, shares [n, D], n up to 4 -> n tensors [B, T, D] of `dtype`."""
    return _call(x, before, shares, current, dtype)
