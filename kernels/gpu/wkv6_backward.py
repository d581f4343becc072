"""The backward kernel of WKV-5 and WKV-6: one walk over the chunks from the last to the first.

It holds the gradient of the state in registers, reads the state at each chunk's start as the forward pass
saved it, and forms all gradients of a chunk at once. Letters and derivation: docs/kernels.md.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .tiles import (
    LOG2E,
    level_pairs,
    level_sum,
    load_tile,
    mm,
    mm_both,
    mm_left,
    mm_right,
    over_time,
    over_time_grad,
    span,
    square,
    square_t,
    store_tile,
)
from .wkv6_forward import decays, mild, prefix, suffix


@triton.jit(do_not_specialize=["T", "per_segment", "slots"])
def backward(
    r, k, v, w, u, dy, dfinal, dr, dk, dv, dw, du, dstate, chunks, carry, cu, lengths, table,
    T, H, per_segment, slots, segments,
    r_b, r_t, r_h, k_b, k_t, k_h, v_b, v_t, v_h, w_b, w_t, w_h,
    N: tl.constexpr, L: tl.constexpr, LEVELS: tl.constexpr, LIMIT: tl.constexpr, STATIC: tl.constexpr,
    PACKED: tl.constexpr, HAS_LEN: tl.constexpr, HAS_FINAL: tl.constexpr, CARRY: tl.constexpr,
    SPLIT: tl.constexpr,
):  # fmt: skip
    """dr, dk, dv, dw per token; du (and dw of RWKV-5) as one [N] row per program, to be added up."""
    head = tl.program_id(0)
    program = tl.program_id(1)
    part = (program.to(tl.int64) * H + head) * N + tl.arange(0, N)
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
    r_at = r + b * r_b + first * r_t + head * r_h
    k_at = k + b * k_b + first * k_t + head * k_h
    v_at = v + b * v_b + first * v_t + head * v_h
    w_at = w + b * w_b + first * w_t + head * w_h
    y_t = H * N
    out = (b * T + first) * y_t + head * N
    own = (seq.to(tl.int64) * H + head) * (N * N)
    if CARRY:
        ds = tl.load(carry + (program.to(tl.int64) * H + head) * (N * N) + square(N))
    elif HAS_FINAL:
        ds = tl.load(dfinal + own + square_t(N))
    else:
        ds = tl.zeros((N, N), tl.float32)  # [V, K]
    bonus = tl.load(u + head * N + tl.arange(0, N)).to(tl.float32)
    du_sum = tl.zeros((N,), tl.float32)
    dw_sum = tl.zeros((N,), tl.float32)
    i = tl.arange(0, L)[:, None]
    j = tl.arange(0, L)[None, :]
    for back in range(begin, end):
        c = begin + end - 1 - back
        row = c * L
        live = (row + tl.arange(0, L) < n)[:, None]
        kt = load_tile(k_at, row, n, k_t, N, L).to(tl.float32)
        wt = decays(w_at, row, n, w_t, N, L, STATIC)
        vt = load_tile(v_at, row, n, v_t, N, L)
        dyt = load_tile(dy + out, row, n, y_t, N, L)
        rt = load_tile(r_at, row, n, r_t, N, L).to(tl.float32)
        s = tl.load(chunks + ((slot + c) * H + head) * (N * N) + square(N))  # [V, K]
        total = tl.sum(wt.to(tl.float32), 0) * LOG2E  # [K]
        after = suffix(wt, row, n, i, j, N, L, STATIC, SPLIT)
        faded = tl.exp2(after)
        key = kt * faded
        fade = tl.exp2(total)
        diagonal = tl.sum(rt * kt * bonus[None, :], 1)  # [L]
        ddiagonal = tl.sum(vt.to(tl.float32) * dyt.to(tl.float32), 1)[:, None]  # [L, 1]
        du_sum += tl.sum(ddiagonal * rt * kt, 0)
        # Gradient of the scores and its transpose: two exact products are cheaper than a transposition.
        dscores = tl.where(i > j, mm_both(dyt, tl.trans(vt), SPLIT), 0.0)
        dscores_t = tl.where(j > i, mm_both(vt, tl.trans(dyt), SPLIT), 0.0)
        dkey = mm_left(vt, ds, SPLIT)
        dvt = mm(key, tl.trans(ds), SPLIT)
        if mild(total, rt, LIMIT):
            faded_r = tl.exp2(-(after + wt.to(tl.float32) * LOG2E))
            query = rt * faded_r
            scores_t = tl.where(j > i, mm(key, tl.trans(query), SPLIT), 0.0)
            seen = s * fade[None, :]
            dquery = mm(dscores, key, SPLIT) + mm_left(dyt, seen, SPLIT)
            dkey += mm(dscores_t, query, SPLIT)
            ds += mm_left(tl.trans(dyt), query, SPLIT)
            from_query = query * dquery
            dwt = over_time_grad(j < i, key * dkey - from_query, SPLIT) - from_query
            dwt += tl.sum(seen * ds, 0)[None, :]
            ds = ds * fade[None, :]
            drt = dquery * faded_r
            dkt = dkey * faded
        else:
            faded_r = tl.exp2(prefix(wt, row, i, j, N, L, STATIC, SPLIT))
            query = rt * faded_r
            dquery = mm_left(dyt, s, SPLIT)
            dwt = over_time_grad(j < i, key * dkey, SPLIT) + over_time_grad(j > i, query * dquery, SPLIT)
            ds = ds * fade[None, :]
            dwt += tl.sum(s * ds, 0)[None, :]
            ds += mm_left(tl.trans(dyt), query, SPLIT)
            drt = dquery * faded_r
            dkt = dkey * faded
            scores_t = tl.zeros((L, L), tl.float32)
            step = tl.arange(0, L)
            for level in range(LEVELS):
                right = (((step >> level) & 1) == 1)[:, None]
                between = over_time(level_sum(i, j, level), wt, wt.dtype == tl.bfloat16, SPLIT) * LOG2E
                weight = tl.exp2(between)
                x = tl.where(right, rt, kt) * weight  # [L, K]
                pairs = level_pairs(i, j, level)
                pairs_t = level_pairs(j, i, level)
                scores_t += tl.where(pairs_t, mm(x, tl.trans(x), SPLIT), 0.0)
                both = tl.where(pairs, dscores, 0.0) + tl.where(pairs_t, dscores_t, 0.0)
                dx = mm(both, x, SPLIT)
                drt += tl.where(right, dx * weight, 0.0)
                dkt += tl.where(right, 0.0, dx * weight)
                dwt += over_time_grad(level_sum(j, i, level), x * dx, SPLIT)
        scores_t += tl.where(i == j, diagonal[:, None], 0.0)
        dvt += mm_right(scores_t, dyt, SPLIT)
        drt += ddiagonal * kt * bonus[None, :]
        dkt += ddiagonal * rt * bonus[None, :]
        store_tile(dr + out, row, n, y_t, drt, N, L)
        store_tile(dk + out, row, n, y_t, dkt, N, L)
        store_tile(dv + out, row, n, y_t, dvt, N, L)
        if STATIC:
            dw_sum += tl.sum(tl.where(live, dwt, 0.0), 0)
        else:
            store_tile(dw + out, row, n, y_t, dwt, N, L)
    tl.store(du + part, du_sum)
    if STATIC:
        tl.store(dw + part, dw_sum)
    if not CARRY:
        tl.store(dstate + own + square_t(N), ds)
