"""One token, in place, in Triton: the recurrences with what surrounds them, and the token shifts.

Each kernel holds what it needs in registers and touches every byte once; at B = 1 its time is the launch
and one trip to memory. The arithmetic is float32 whatever the inputs are. Tensors are contiguous.

The kernels may be launched before their predecessor in the stream has ended (`one_token.early`).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
import triton
import triton.language as tl
from torch import Tensor

from .launch import cdiv, kernel, power_of_two
from .one_token import await_results, options, tanh

if TYPE_CHECKING:
    from kernels.step import Ending, Late, LowRank, Norm

# Warps of a program that holds one head's state, by head size (padded to a power of two).
_HEAD_WARPS = {16: 1, 32: 2, 64: 4, 128: 8}
# A ddlerp program makes one of the five mixes: for one row and 128 columns up to this many rows, else for 16
# rows, the smallest tensor-core tile, and 64 columns. Row by row a sample's bits do not depend on the others;
# with eight rows that costs 0.67 against 0.61 ms for a token of 32 layers of 2,560 on an H100.
_SINGLE = 8
_CHANNELS = 256  # channels of an RWKV-4 program


@kernel
@triton.jit
def _wkv4_kernel(
    k, v, log_w, base, u, state, gate, y, width,
    LOG_W: tl.constexpr, BASE: tl.constexpr, GATE: tl.constexpr, BLOCK: tl.constexpr, EARLY: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(1).to(tl.int64)
    d = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = d < width
    w = tl.zeros([BLOCK], tl.float32)
    if LOG_W:
        w = tl.load(log_w + d, mask=inside, other=0).to(tl.float32)
    if BASE:
        w = -tl.exp(tl.load(base + d, mask=inside, other=0).to(tl.float32) + w)
    bonus = tl.load(u + d, mask=inside, other=0).to(tl.float32)
    await_results(EARLY)
    at = row * width + d
    place = state + row * 3 * width + d
    a = tl.load(place, mask=inside, other=0)
    b = tl.load(place + width, mask=inside, other=1)
    p = tl.load(place + 2 * width, mask=inside, other=0)
    key = tl.load(k + at, mask=inside, other=0).to(tl.float32)
    value = tl.load(v + at, mask=inside, other=0).to(tl.float32)
    top = tl.maximum(p, bonus + key)
    old, new = tl.exp(p - top), tl.exp(bonus + key - top)
    out = (old * a + new * value) / (old * b + new)
    if GATE:
        out *= tl.sigmoid(tl.load(gate + at, mask=inside, other=0).to(tl.float32))
    tl.store(y + at, out.to(y.dtype.element_ty), mask=inside)
    top = tl.maximum(p + w, key)
    old, new = tl.exp(p + w - top), tl.exp(key - top)
    tl.store(place, old * a + new * value, mask=inside)
    tl.store(place + width, old * b + new, mask=inside)
    tl.store(place + 2 * width, top, mask=inside)


@kernel
@triton.jit
def _head_kernel(
    r, k, v, log_w, base, u, state, gate, weight, bias, y, low, rank, eps, heads,
    N: tl.constexpr, BLOCK: tl.constexpr,
    LOG_W: tl.constexpr,  # 0: none, 1: per channel, 2: per token and channel, 3: low [B, R] log_w [R, H * N]
    RANK: tl.constexpr, BASE: tl.constexpr, END: tl.constexpr, EARLY: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)  # b * H + h
    head = row % heads
    n = tl.arange(0, BLOCK)
    inside = n < N
    at, per = row * N + n, head * N + n
    w = tl.zeros([BLOCK], tl.float32)
    if BASE:
        w = tl.load(base + per, mask=inside, other=0).to(tl.float32)
    bonus = tl.load(u + per, mask=inside, other=0).to(tl.float32)
    j = tl.arange(0, RANK)
    if LOG_W == 3:
        spot = log_w + j[:, None] * (heads * N) + per[None, :]
        up = tl.load(spot, mask=(j < rank)[:, None] & inside[None, :], other=0)  # [RANK, BLOCK]
    if END:
        scale = tl.load(weight + per, mask=inside, other=0).to(tl.float32)
        offset = tl.load(bias + per, mask=inside, other=0).to(tl.float32)
    await_results(EARLY)
    square = inside[:, None] & inside[None, :]
    place = state + row * N * N + n[:, None] * N + n[None, :]  # rows: keys, columns: values
    s = tl.load(place, mask=square, other=0)
    query = tl.load(r + at, mask=inside, other=0).to(tl.float32)
    key = tl.load(k + at, mask=inside, other=0).to(tl.float32)
    value = tl.load(v + at, mask=inside, other=0).to(tl.float32)
    if END:
        g = tl.load(gate + at, mask=inside, other=0).to(tl.float32)
    if LOG_W == 2:
        w += tl.load(log_w + at, mask=inside, other=0).to(tl.float32)
    if LOG_W == 1:
        w += tl.load(log_w + per, mask=inside, other=0).to(tl.float32)
    if LOG_W == 3:
        l = tl.load(low + row // heads * rank + j, mask=j < rank, other=0)  # noqa: E741
        shift = tl.sum(l[:, None].to(tl.float32) * up.to(tl.float32), 0)
        w += shift.to(low.dtype.element_ty).to(tl.float32)  # rounded as any product
    if BASE:
        w = -tl.exp(w)
    tl.store(place, s * tl.exp(w)[:, None] + key[:, None] * value[None, :], mask=square)
    out = tl.sum(query[:, None] * s, 0) + tl.sum(query * bonus * key, 0) * value
    if END:
        mean = tl.sum(out, 0) / N  # beyond N, v and the state are zero, and so is out
        centred = tl.where(inside, out - mean, 0)
        out = centred * tl.rsqrt(tl.sum(centred * centred, 0) / N + eps) * scale + offset
        out *= g * tl.sigmoid(g)
    tl.store(y + at, out.to(y.dtype.element_ty), mask=inside)


@triton.jit
def _shares(mixes, d, inside, OF_PREVIOUS: tl.constexpr):
    """How much of the previous token a mix takes."""
    share = tl.load(mixes + d, mask=inside, other=0).to(tl.float32)
    return share if OF_PREVIOUS else 1 - share


@kernel
@triton.jit
def _norm_shift_kernel(
    x, value, gate, weight, bias, previous, m0, m1, m2, m3, out, change_to, eps, width, step,
    MIXES: tl.constexpr, LATE: tl.constexpr, GATE: tl.constexpr, OF_PREVIOUS: tl.constexpr,
    KEEP: tl.constexpr, BLOCK: tl.constexpr, EARLY: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    d = tl.arange(0, BLOCK)
    inside = d < width
    at = row * width + d
    # All loads come before the first store: a store that might alias would make them wait for each other.
    scale = tl.load(weight + d, mask=inside, other=0).to(tl.float32)
    offset = tl.load(bias + d, mask=inside, other=0).to(tl.float32)
    s0 = _shares(m0, d, inside, OF_PREVIOUS) if MIXES > 0 else scale
    s1 = _shares(m1, d, inside, OF_PREVIOUS) if MIXES > 1 else scale
    s2 = _shares(m2, d, inside, OF_PREVIOUS) if MIXES > 2 else scale
    s3 = _shares(m3, d, inside, OF_PREVIOUS) if MIXES > 3 else scale
    await_results(EARLY)
    now = tl.load(x + at, mask=inside, other=0).to(tl.float32)
    before = tl.load(previous + at, mask=inside, other=0).to(tl.float32)
    if LATE:
        add = tl.load(value + at, mask=inside, other=0).to(tl.float32)
        if GATE:
            add *= tl.sigmoid(tl.load(gate + at, mask=inside, other=0).to(tl.float32))
        rounded = (now + add).to(x.dtype.element_ty)
        tl.store(x + at, rounded, mask=inside)
        now = rounded.to(tl.float32)
    mean = tl.sum(now, 0) / width
    centred = tl.where(inside, now - mean, 0)
    now = centred * tl.rsqrt(tl.sum(centred * centred, 0) / width + eps) * scale + offset
    kept = now.to(previous.dtype.element_ty)
    now = kept.to(tl.float32)
    tl.store(previous + at, kept, mask=inside)
    change = before - now
    if KEEP:
        tl.store(change_to + at, change, mask=inside)
    kind: tl.constexpr = out.dtype.element_ty
    if MIXES > 0:
        tl.store(out + at, (now + change * s0).to(kind), mask=inside)
    if MIXES > 1:
        tl.store(out + step + at, (now + change * s1).to(kind), mask=inside)
    if MIXES > 2:
        tl.store(out + 2 * step + at, (now + change * s2).to(kind), mask=inside)
    if MIXES > 3:
        tl.store(out + 3 * step + at, (now + change * s3).to(kind), mask=inside)


@triton.jit
def _one_of(mix, m0, m1, m2, m3, m4, d, inside):
    """The fixed share of mix number `mix` for the channels d."""
    fixed = tl.load(m0 + d, mask=inside & (mix == 0), other=0).to(tl.float32)
    fixed += tl.load(m1 + d, mask=inside & (mix == 1), other=0).to(tl.float32)
    fixed += tl.load(m2 + d, mask=inside & (mix == 2), other=0).to(tl.float32)
    fixed += tl.load(m3 + d, mask=inside & (mix == 3), other=0).to(tl.float32)
    return fixed + tl.load(m4 + d, mask=inside & (mix == 4), other=0).to(tl.float32)


@kernel
@triton.jit
def _ddlerp_kernel(
    x, delta, low, weight, m0, m1, m2, m3, m4, out, batch, width, rank,
    RANK: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr, EARLY: tl.constexpr,
):  # fmt: skip
    d = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    mix = tl.program_id(1)
    j = tl.arange(0, RANK)
    spot = weight + (mix * rank + j)[:, None] * width + d[None, :]
    w = tl.load(spot, mask=(j < rank)[:, None] & (d < width)[None, :], other=0)  # [RANK, BLOCK]
    fixed = _one_of(mix, m0, m1, m2, m3, m4, d, d < width)
    await_results(EARLY)
    if ROWS == 1:
        row = tl.program_id(2).to(tl.int64)
        inside = d < width
        at = row * width + d
        l = tl.load(low + row * (5 * rank) + mix * rank + j, mask=j < rank, other=0)  # noqa: E741
        l = tanh(l.to(tl.float32)).to(w.dtype).to(tl.float32)  # noqa: E741
        share = tl.sum(l[:, None] * w.to(tl.float32), 0) + fixed
    else:
        rows = (tl.program_id(2) * ROWS + tl.arange(0, ROWS)).to(tl.int64)
        alive = rows < batch
        inside = alive[:, None] & (d < width)[None, :]
        at = rows[:, None] * width + d[None, :]
        spot = low + rows[:, None] * (5 * rank) + mix * rank + j[None, :]
        l = tl.load(spot, mask=alive[:, None] & (j < rank)[None, :], other=0)  # noqa: E741
        l = tanh(l.to(tl.float32)).to(w.dtype)  # noqa: E741
        share = tl.dot(l, w, input_precision="ieee") + fixed[None, :]
    now = tl.load(x + at, mask=inside, other=0).to(tl.float32)
    change = tl.load(delta + at, mask=inside, other=0)
    y = (now + change * share).to(out.dtype.element_ty)
    tl.store(out + mix.to(tl.int64) * batch * width + at, y, mask=inside)


def _or(x: Tensor | None, other: Tensor) -> Tensor:
    """A contiguous tensor for a pointer argument; `other` where the kernel reads none."""
    return other if x is None else x.contiguous()


def wkv4_step(
    k: Tensor,
    v: Tensor,
    log_w: Tensor | None,
    base: Tensor | None,
    u: Tensor,
    state: Tensor,
    gate: Tensor | None,
) -> Tensor:
    """As `kernels.step.wkv4_step_`."""
    k, v, u = k.contiguous(), v.contiguous(), u.contiguous()
    y = torch.empty_like(k)
    batch, width = k.shape
    _wkv4_kernel[(cdiv(width, _CHANNELS), batch)](
        k, v, _or(log_w, u), _or(base, u), u, state, _or(gate, k), y, width,
        LOG_W=log_w is not None, BASE=base is not None, GATE=gate is not None, BLOCK=_CHANNELS, **options(2),
    )  # fmt: skip
    return y


def wkv5_step(
    r: Tensor,
    k: Tensor,
    v: Tensor,
    log_w: Tensor | LowRank | None,
    base: Tensor | None,
    u: Tensor,
    state: Tensor,
    ending: Ending | None,
) -> Tensor:
    """As `kernels.step.wkv5_step_`; with log_w [B,H,N] or of low rank as `wkv6_step_`."""
    r, k, v, u = r.contiguous(), k.contiguous(), v.contiguous(), u.contiguous()
    y = torch.empty_like(r)
    batch, heads, size = r.shape
    block = max(16, power_of_two(size))
    weight, bias, eps, gate = ending or (u, u, 0.0, r)
    low, rank, kind, made = u, 1, 0, False
    if isinstance(log_w, tuple):
        low, rank, kind = log_w.low.contiguous(), log_w.low.shape[1], 3
        matrix = log_w.weight.to(low.dtype).contiguous()
        made, log_w = matrix is not log_w.weight, matrix
    elif log_w is not None:
        kind = log_w.dim() - 1
    _head_kernel[(batch * heads,)](
        r, k, v, _or(log_w, u), _or(base, u), u, state, gate.contiguous(), weight, bias, y, low, rank, eps,
        heads, N=size, BLOCK=block, LOG_W=kind, RANK=max(16, power_of_two(rank)),
        BASE=base is not None, END=ending is not None, **options(_HEAD_WARPS[block], ahead=not made),
    )  # fmt: skip
    return y


wkv6_step = wkv5_step


def norm_shift_step(
    x: Tensor,
    late: Late | None,
    norm: Norm,
    previous: Tensor,
    mixes: Sequence[Tensor],
    of_previous: bool,
    dtype: torch.dtype,
    keep: bool,
) -> tuple[Tensor, Tensor | None]:
    """As `kernels.step.norm_shift_step_`."""
    batch, width = x.shape
    out = torch.empty(len(mixes), batch, width, dtype=dtype, device=x.device)
    change = torch.empty(x.shape, dtype=torch.float32, device=x.device) if keep else None
    value, gate = late or (None, None)
    shares = [*mixes, *(4 * [norm.weight])][:4]
    _norm_shift_kernel[(batch,)](
        x, _or(value, x), _or(gate, x), norm.weight, norm.bias, previous, *shares, out,
        _or(change, x), norm.eps, width, batch * width,
        MIXES=len(out), LATE=value is not None, GATE=gate is not None, OF_PREVIOUS=of_previous,
        KEEP=keep, BLOCK=power_of_two(width), **options(8 if width > 1024 else 4),
    )  # fmt: skip
    return out, change


def ddlerp_step(
    x: Tensor, delta: Tensor, low: Tensor, weight: Tensor, mixes: Sequence[Tensor], dtype: torch.dtype
) -> Tensor:
    """As `kernels.step.ddlerp_step`."""
    batch, width = x.shape
    rank = weight.shape[1]
    out = torch.empty(5, batch, width, dtype=dtype, device=x.device)
    # The product runs in low's type, as the matrix product before it did.
    matrix = weight.to(low.dtype).contiguous()
    rows, block = (1, 128) if batch <= _SINGLE else (16, 64)
    _ddlerp_kernel[(cdiv(width, block), 5, cdiv(batch, rows))](
        x, delta, low.contiguous(), matrix, *mixes, out, batch, width, rank,
        RANK=max(16, power_of_two(rank)), ROWS=rows, BLOCK=block,
        **options(4, ahead=matrix is weight),
    )  # fmt: skip
    return out
