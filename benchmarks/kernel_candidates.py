"""A form of the WKV-5/6 walk that is not in use: `benchmarks.tune_kernels --apart` times it.

The states one after the other, then every chunk's outputs at once. What follows from chunk to chunk is the
state alone, two of the walk's six products; apart from them the outputs of all chunks are independent, so
that `outputs` fills a GPU however few heads there are. It reads the states that the backward pass needs
anyway. Letters and algebra: docs/kernels.md.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.gpu import wkv6
from kernels.gpu.tiles import (
    LOG2E,
    load_tile,
    mm,
    mm_left,
    mm_right,
    span,
    square,
    square_t,
    store_tile,
)
from kernels.gpu.wkv6_forward import bounded, decays, place, prefix, suffix

NAMES = ("states", "outputs")


def install(*, values: int) -> None:
    """Puts it in the place of the walk. values: value channels of a `states` program."""
    launched: Any = wkv6  # where tune_kernels watches and limits them
    for kernel in (states, outputs):
        setattr(launched, kernel.fn.__name__, kernel)

    def walk(
        go: Any, r: Tensor, k: Tensor, x: Tensor, w: Tensor, u: Tensor, y: Tensor, state: Tensor | None,
        final: Tensor, chunks: Tensor | None, scores: Tensor, flags: Tensor, carry: Tensor | None,
        cu: Tensor | None, lengths: Tensor | None, *, reverse: bool = False,
    ) -> None:  # fmt: skip
        time, heads = r.shape[1:3]
        p, n, size = go.plan, go.n, min(values, go.n)
        if chunks is None:
            chunks = torch.empty(go.slots, heads, n, n, dtype=torch.float32, device=r.device)
        asked = r if reverse else k
        launched.states[(heads * (n // size), go.grid[1])](
            asked, x, w, state, final, chunks, carry, cu, lengths, go.table,
            time, heads, p.per_segment, p.slots, p.segments, *wkv6._strides(asked, x, w),
            N=n, BV=size, L=go.tiles.chunk, **go.flags, HAS_STATE=state is not None, CARRY=go.carried,
            REVERSE=reverse, num_warps=4, num_stages=2,
        )  # fmt: skip
        launched.outputs[(heads * (n // go.tiles.values), go.slots)](
            r, k, x, w, u.contiguous(), y, chunks, scores, flags, cu, lengths, go.chunk_table,
            time, heads, p.slots, *wkv6._strides(r, k, x, w),
            N=n, BV=go.tiles.values, L=go.tiles.chunk, **go.flags, REVERSE=reverse, num_warps=4, num_stages=1,
        )  # fmt: skip

    launched._walk = walk


@triton.jit(do_not_specialize=["T", "H", "per_segment", "slots", "segments"])
def states(
    a, x, w, state, final, chunks, carry, cu, lengths, table,
    T, H, per_segment, slots, segments,
    a_b, a_t, a_h, x_b, x_t, x_h, w_b, w_t, w_h,
    N: tl.constexpr, BV: tl.constexpr, L: tl.constexpr, STATIC: tl.constexpr, PACKED: tl.constexpr,
    HAS_LEN: tl.constexpr, HAS_STATE: tl.constexpr, CARRY: tl.constexpr, REVERSE: tl.constexpr,
    SPLIT: tl.constexpr,
):  # fmt: skip
    """The state before each chunk, and the final one. Arguments as those of `walk` and `local`.

    Forward: a is k, x is v. REVERSE: the state's gradient behind each chunk, a is r, x is dy.
    """
    slices: tl.constexpr = N // BV
    head = tl.program_id(0) // slices
    cut = tl.program_id(0) % slices * BV
    program = tl.program_id(1)
    if PACKED and CARRY:
        seq = tl.load(table + 2 * program)
        segment = tl.load(table + 2 * program + 1)
    else:
        seq = program // segments
        segment = program % segments
    if segment < 0:
        return
    b, first, n = span(cu, lengths, seq, T, PACKED, HAS_LEN)
    n_chunks = tl.cdiv(n, L)
    begin = segment * per_segment
    end = tl.minimum(begin + per_segment, n_chunks)
    if (begin >= end) & (segment > 0):
        return
    slot = seq.to(tl.int64) * slots
    if PACKED:
        slot = first // L + seq
    b = b.to(tl.int64)
    a_at = a + b * a_b + first * a_t + head * a_h
    x_at = x + b * x_b + first * x_t + head * x_h + cut
    w_at = w + b * w_b + first * w_t + head * w_h
    own = (seq.to(tl.int64) * H + head) * (N * N) + square_t(cut, N, BV)
    if CARRY:
        s = tl.load(carry + (program.to(tl.int64) * H + head) * (N * N) + square(cut, N, BV))
    elif HAS_STATE:
        s = tl.load(state + own)
    else:
        s = tl.zeros((BV, N), tl.float32)  # [V, K]
    i = tl.arange(0, L)[:, None]
    j = tl.arange(0, L)[None, :]
    for step in range(begin, end):
        c = step
        if REVERSE:
            c = begin + end - 1 - step
        row = c * L
        at = load_tile(a_at, row, n, a_t, N, L).to(tl.float32)
        xt = load_tile(x_at, row, n, x_t, BV, L)
        wt = decays(w_at, row, n, w_t, N, L, STATIC)
        tl.store(chunks + ((slot + c) * H + head) * (N * N) + square(cut, N, BV), s)
        if REVERSE:
            weighted = at * tl.exp2(prefix(wt, row, i, j, N, L, STATIC, SPLIT))
        else:
            weighted = at * tl.exp2(suffix(wt, row, n, i, j, N, L, STATIC, SPLIT))
        fade = tl.exp2(tl.sum(wt.to(tl.float32), 0) * LOG2E)[None, :]
        s = mm_left(tl.trans(xt), weighted, SPLIT, s * fade)
    last = begin == 0 if REVERSE else end == n_chunks
    if last:
        tl.store(final + own, s)


@triton.jit(do_not_specialize=["T", "H", "slots"])
def outputs(
    r, k, x, w, u, y, chunks, scores, flags, cu, lengths, table, T, H, slots,
    r_b, r_t, r_h, k_b, k_t, k_h, x_b, x_t, x_h, w_b, w_t, w_h,
    N: tl.constexpr, BV: tl.constexpr, L: tl.constexpr, STATIC: tl.constexpr, PACKED: tl.constexpr,
    HAS_LEN: tl.constexpr, REVERSE: tl.constexpr, SPLIT: tl.constexpr,
):  # fmt: skip
    """Outputs of one chunk from the state before it; REVERSE: gradients of v from the one behind."""
    slices: tl.constexpr = N // BV
    head = tl.program_id(0) // slices
    cut = tl.program_id(0) % slices * BV
    b, first, n, c = place(tl.program_id(1), cu, lengths, table, T, slots, PACKED, HAS_LEN)
    row = c * L
    if (c < 0) | (row >= n):
        return
    where = tl.program_id(1).to(tl.int64) * H + head
    i = tl.arange(0, L)[:, None]
    j = tl.arange(0, L)[None, :]
    rt = load_tile(r + b * r_b + first * r_t + head * r_h, row, n, r_t, N, L).to(tl.float32)
    kt = load_tile(k + b * k_b + first * k_t + head * k_h, row, n, k_t, N, L).to(tl.float32)
    xt = load_tile(x + b * x_b + first * x_t + head * x_h + cut, row, n, x_t, BV, L)
    wt = decays(w + b * w_b + first * w_t + head * w_h, row, n, w_t, N, L, STATIC)
    bonus = tl.load(u + head * N + tl.arange(0, N)).to(tl.float32)
    before = prefix(wt, row, i, j, N, L, STATIC, SPLIT)
    diagonal = tl.sum(tl.where(before < 1.0e30, rt * kt * bonus[None, :], 0.0), 1)  # [L], as in `walk`
    query = rt * tl.exp2(before)
    key = kt * tl.exp2(suffix(wt, row, n, i, j, N, L, STATIC, SPLIT))
    strong = tl.load(flags + where) != 0
    if strong:
        at = where * (L * L) + (j * L + i if REVERSE else i * L + j)
        found = tl.load(scores + at)
    else:
        lead = bounded(query * tl.exp2(tl.sum(wt.to(tl.float32), 0) * -LOG2E)[None, :])
        if REVERSE:
            found = mm(key, tl.trans(lead), SPLIT)
        else:
            found = mm(lead, tl.trans(key), SPLIT)
    found = tl.where(j > i if REVERSE else i > j, found, tl.where(i == j, diagonal[:, None], 0.0))
    out = mm_right(found, xt, SPLIT)
    s = tl.load(chunks + where * (N * N) + square(cut, N, BV))  # [V, K]
    if REVERSE:
        out = mm(key, tl.trans(s), SPLIT, out)
    else:
        out = mm(query, tl.trans(s), SPLIT, out)
    store_tile(y + (b * T + first) * (H * N) + head * N + cut, row, n, H * N, out, BV, L)
