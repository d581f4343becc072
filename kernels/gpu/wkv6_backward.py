"""The backward kernel of WKV-5 and WKV-6: gradients of r, k, w and u.

A program has BK key channels of one head and one chunk: given the gradient of the scores, dy v',
everything here is separate for each key channel, and given the state before the chunk and the gradient of the
state after it, for each chunk. Both were saved by the walks of wkv6_forward.py, which also make the gradients
of v and of the initial state. Letters and derivation: docs/kernels.md.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .launch import kernel
from .tiles import (
    LOG2E,
    diagonal_of,
    level_pairs,
    level_sum,
    load_tile,
    mm,
    mm_both,
    mm_left,
    over_time,
    store_tile,
)
from .wkv6_forward import bounded, decays, place, prefix, suffix


@triton.jit
def load_chunk(
    r, k, v, w, dy, row, n, b, first, head, cut, H, T,
    r_b, r_t, r_h, k_b, k_t, k_h, v_b, v_t, v_h, w_b, w_t, w_h,
    N: tl.constexpr, BK: tl.constexpr, L: tl.constexpr, STATIC: tl.constexpr,
):  # fmt: skip
    """r, k, w [L, BK] of the key channels from `cut` on, v and dy [L, N] whole."""
    rt = load_tile(r + b * r_b + first * r_t + head * r_h + cut, row, n, r_t, BK, L).to(tl.float32)
    kt = load_tile(k + b * k_b + first * k_t + head * k_h + cut, row, n, k_t, BK, L).to(tl.float32)
    vt = load_tile(v + b * v_b + first * v_t + head * v_h, row, n, v_t, N, L)
    wt = decays(w + b * w_b + first * w_t + head * w_h + cut, row, n, w_t, BK, L, STATIC)
    dyt = load_tile(dy + (b * T + first) * (H * N) + head * N, row, n, H * N, N, L)
    return rt, kt, vt, wt, dyt


@triton.jit
def store_decay(dw, at, part, dwt, row, n, y_t, BK: tl.constexpr, L: tl.constexpr, STATIC: tl.constexpr):
    """The decay's gradient per token, or (RWKV-5) its sum over the chunk."""
    if STATIC:
        live = (row + tl.arange(0, L) < n)[:, None]
        tl.store(dw + part, tl.sum(tl.where(live, dwt, 0.0), 0))
    else:
        store_tile(dw + at, row, n, y_t, dwt, BK, L)


@kernel
@triton.jit(do_not_specialize=["T", "H", "slots"])
def backward(
    r, k, v, w, u, dy, dr, dk, dw, du, chunks, dchunks, cu, lengths, table,
    T, H, slots,
    r_b, r_t, r_h, k_b, k_t, k_h, v_b, v_t, v_h, w_b, w_t, w_h,
    N: tl.constexpr, BK: tl.constexpr, L: tl.constexpr, STATIC: tl.constexpr,
    PACKED: tl.constexpr, HAS_LEN: tl.constexpr, SPLIT: tl.constexpr,
):  # fmt: skip
    """dr, dk, dw per token; du (and dw of RWKV-5) as one row per chunk, to be added up.

    A program has one chunk. All chunks are taken for mild; what comes out for strong ones means nothing and
    is overwritten by `backward_strong`, which runs next. A branch for them would cost the others registers.
    """
    slices: tl.constexpr = N // BK
    head = tl.program_id(0) // slices
    cut = tl.program_id(0) % slices * BK
    y_t = H * N
    i = tl.arange(0, L)[:, None]
    j = tl.arange(0, L)[None, :]
    square = tl.arange(0, N)[:, None] * N + cut + tl.arange(0, BK)[None, :]
    bonus = tl.load(u + head * N + cut + tl.arange(0, BK)).to(tl.float32)[None, :]
    b, first, n, c = place(tl.program_id(1), cu, lengths, table, T, slots, PACKED, HAS_LEN)
    row = c * L
    where = tl.program_id(1).to(tl.int64) * H + head
    rt, kt, vt, wt, dyt = load_chunk(
        r, k, v, w, dy, row, n, b, first, head, cut, H, T,
        r_b, r_t, r_h, k_b, k_t, k_h, v_b, v_t, v_h, w_b, w_t, w_h, N, BK, L, STATIC,
    )  # fmt: skip
    s = tl.load(chunks + where * (N * N) + square)  # [V, BK]
    ds = tl.load(dchunks + where * (N * N) + square)  # [V, BK]
    at = (b * T + first) * y_t + head * N + cut
    part = where * N + cut + tl.arange(0, BK)
    # In this order few tiles live at once. The gradient of the scores is formed twice, once transposed:
    # two exact products are cheaper than a transposition.
    after = suffix(wt, row, n, i, j, BK, L, STATIC, SPLIT)
    ahead = -(after + wt.to(tl.float32) * LOG2E)  # decay from each step on [L, BK]
    query = bounded(rt * tl.exp2(ahead))
    key = kt * tl.exp2(after)
    s *= tl.exp2(tl.sum(wt.to(tl.float32), 0) * LOG2E)[None, :]
    dquery = mm_left(dyt, s, SPLIT)
    dtotal = tl.sum(s * ds, 0) + tl.sum(query * dquery, 0)
    dscores = mm_both(dyt, tl.trans(vt), SPLIT)
    ddiagonal = diagonal_of(dscores, i, j)  # [L, 1]
    tl.store(du + part, tl.sum(ddiagonal * rt * kt, 0))
    dquery += mm(tl.where(i > j, dscores, 0.0), key, SPLIT)
    drt = dquery * tl.exp2(ahead) + ddiagonal * kt * bonus
    store_tile(dr + at, row, n, y_t, drt, BK, L)
    from_query = query * dquery
    dscores_t = tl.where(j > i, mm_both(vt, tl.trans(dyt), SPLIT), 0.0)
    dkey = mm_left(vt, ds, SPLIT) + mm(dscores_t, query, SPLIT)
    dkt = dkey * tl.exp2(after) + ddiagonal * rt * bonus
    store_tile(dk + at, row, n, y_t, dkt, BK, L)
    change = key * dkey - from_query
    if STATIC:
        # The sum of a running sum: each step counts as often as live steps follow it, without a product.
        live = tl.maximum(tl.minimum(n - row, L), 0)
        follow = tl.maximum(live - 1 - tl.arange(0, L), 0).to(tl.float32)[:, None]
        total = tl.sum(change * follow - from_query, 0) + live.to(tl.float32) * dtotal
        tl.store(dw + part, tl.where(live > 0, total, 0.0))  # a slot without a chunk has no states
    else:
        dwt = dtotal[None, :] - from_query + over_time(j < i, change, False, SPLIT)
        store_tile(dw + at, row, n, y_t, dwt, BK, L)


@kernel
@triton.jit(do_not_specialize=["T", "H", "slots"])
def backward_strong(
    r, k, v, w, u, dy, dr, dk, dw, du, chunks, dchunks, flags, cu, lengths, table,
    T, H, slots,
    r_b, r_t, r_h, k_b, k_t, k_h, v_b, v_t, v_h, w_b, w_t, w_h,
    N: tl.constexpr, BK: tl.constexpr, L: tl.constexpr, LEVELS: tl.constexpr, LEAF: tl.constexpr,
    LIMIT: tl.constexpr, STATIC: tl.constexpr, PACKED: tl.constexpr, HAS_LEN: tl.constexpr,
    SPLIT: tl.constexpr,
):  # fmt: skip
    """The same of one chunk that `strong_scores` has flagged, by the same levels as there."""
    slices: tl.constexpr = N // BK
    head = tl.program_id(0) // slices
    cut = tl.program_id(0) % slices * BK
    where = tl.program_id(1).to(tl.int64) * H + head
    if tl.load(flags + where) == 0:
        return
    b, first, n, c = place(tl.program_id(1), cu, lengths, table, T, slots, PACKED, HAS_LEN)
    row = c * L
    y_t = H * N
    i = tl.arange(0, L)[:, None]
    j = tl.arange(0, L)[None, :]
    bonus = tl.load(u + head * N + cut + tl.arange(0, BK)).to(tl.float32)[None, :]
    rt, kt, vt, wt, dyt = load_chunk(
        r, k, v, w, dy, row, n, b, first, head, cut, H, T,
        r_b, r_t, r_h, k_b, k_t, k_h, v_b, v_t, v_h, w_b, w_t, w_h, N, BK, L, STATIC,
    )  # fmt: skip
    square = tl.arange(0, N)[:, None] * N + cut + tl.arange(0, BK)[None, :]
    s = tl.load(chunks + where * (N * N) + square)  # [V, BK]
    ds = tl.load(dchunks + where * (N * N) + square)  # [V, BK]
    at = (b * T + first) * y_t + head * N + cut
    part = where * N + cut + tl.arange(0, BK)
    drt = mm_left(dyt, s, SPLIT) * tl.exp2(prefix(wt, row, i, j, BK, L, STATIC, SPLIT))
    dkt = mm_left(vt, ds, SPLIT) * tl.exp2(suffix(wt, row, n, i, j, BK, L, STATIC, SPLIT))
    dwt = over_time(j < i, kt * dkt, False, SPLIT) + over_time(j > i, rt * drt, False, SPLIT)
    fade = tl.exp2(tl.sum(wt.to(tl.float32), 0) * LOG2E)[None, :]
    dwt += tl.sum(s * ds * fade, 0)[None, :]
    dscores = mm_both(dyt, tl.trans(vt), SPLIT)
    ddiagonal = diagonal_of(dscores, i, j)  # [L, 1]
    tl.store(du + part, tl.sum(ddiagonal * rt * kt, 0))
    dscores = tl.where(i > j, dscores, 0.0)
    dscores_t = tl.where(j > i, mm_both(vt, tl.trans(dyt), SPLIT), 0.0)
    leaf = (i >> LEAF) == (j >> LEAF)
    after = over_time(leaf & (j > i), wt, wt.dtype == tl.bfloat16, SPLIT) * LOG2E
    ahead = -(after + wt.to(tl.float32) * LOG2E)
    lowest = LEAF
    if tl.max(tl.max(ahead, 1), 0) < LIMIT:
        query = bounded(rt * tl.exp2(ahead))
        key = kt * tl.exp2(after)
        dquery = mm(tl.where(leaf, dscores, 0.0), key, SPLIT)
        dkey = mm(tl.where(leaf, dscores_t, 0.0), query, SPLIT)
        drt += dquery * tl.exp2(ahead)
        dkt += dkey * tl.exp2(after)
        from_query = query * dquery
        dwt += over_time(leaf & (j < i), key * dkey - from_query, False, SPLIT) - from_query
    else:
        lowest = 0
    step = tl.arange(0, L)
    for level in range(lowest, LEVELS):
        right = (((step >> level) & 1) == 1)[:, None]
        between = over_time(level_sum(i, j, level), wt, wt.dtype == tl.bfloat16, SPLIT) * LOG2E
        weight = tl.exp2(between)
        x = tl.where(right, rt, kt) * weight  # [L, BK]
        both = tl.where(level_pairs(i, j, level), dscores, 0.0)
        both += tl.where(level_pairs(j, i, level), dscores_t, 0.0)
        dx = mm(both, x, SPLIT)
        drt += tl.where(right, dx * weight, 0.0)
        dkt += tl.where(right, 0.0, dx * weight)
        dwt += over_time(level_sum(j, i, level), x * dx, False, SPLIT)
    store_tile(dr + at, row, n, y_t, drt + ddiagonal * kt * bonus, BK, L)
    store_tile(dk + at, row, n, y_t, dkt + ddiagonal * rt * bonus, BK, L)
    store_decay(dw, at, part, dwt, row, n, y_t, BK, L, STATIC)
