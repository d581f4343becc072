"""The forward kernels of WKV-5 and WKV-6. The algebra is in docs/kernels.md; letters as there.

One program walks the chunks of one segment of one head with the state in registers, as S [V, K].
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
    mm_left,
    mm_right,
    over_time,
    span,
    square,
    square_t,
    store_tile,
)


@triton.jit
def decays(w_base, row, n, stride, N: tl.constexpr, L: tl.constexpr, STATIC: tl.constexpr):
    """The chunk's log decays as given [L, N] (steps from n on: 0), a [N] row repeated for RWKV-5."""
    if STATIC:
        t = row + tl.arange(0, L)
        once = tl.load(w_base + tl.arange(0, N)).to(tl.float32)
        return tl.where((t < n)[:, None], once[None, :], 0.0)
    else:
        return load_tile(w_base, row, n, stride, N, L)


@triton.jit
def suffix(w, row, n, i, j, N: tl.constexpr, L: tl.constexpr, STATIC: tl.constexpr, SPLIT: tl.constexpr):
    """Sum of the log2 decays after each step, to the end of the chunk [L, N]."""
    if STATIC:
        after = tl.maximum(tl.minimum(n - row, L) - 1 - tl.arange(0, L), 0).to(tl.float32)
        return after[:, None] * (tl.min(w, 0) * LOG2E)[None, :]
    else:
        return over_time(j > i, w, w.dtype == tl.bfloat16, SPLIT) * LOG2E


@triton.jit
def prefix(w, row, i, j, N: tl.constexpr, L: tl.constexpr, STATIC: tl.constexpr, SPLIT: tl.constexpr):
    """Sum of the log2 decays before each step, from the start of the chunk [L, N]."""
    if STATIC:
        return tl.arange(0, L).to(tl.float32)[:, None] * (tl.min(w, 0) * LOG2E)[None, :]
    else:
        return over_time(j < i, w, w.dtype == tl.bfloat16, SPLIT) * LOG2E


@triton.jit
def mild(total, r, LIMIT: tl.constexpr):
    """Whether no channel decays by more than 2^-LIMIT in the chunk, so that one reference serves all pairs."""
    return (tl.min(total, 0) > -LIMIT) & (tl.max(tl.max(tl.abs(r), 1), 0) < 1.0e12)


@triton.jit
def doubling(r, k, w, i, j, L: tl.constexpr, LEVELS: tl.constexpr, SPLIT: tl.constexpr):
    """Scores of all pairs i > j for any decays: every exponent is a sum of log decays, so never above 0."""
    scores = tl.zeros((L, L), tl.float32)
    step = tl.arange(0, L)
    for level in range(LEVELS):
        right = ((step >> level) & 1) == 1
        between = over_time(level_sum(i, j, level), w, w.dtype == tl.bfloat16, SPLIT) * LOG2E
        x = tl.where(right[:, None], r, k) * tl.exp2(between)  # [L, K]
        scores += tl.where(level_pairs(i, j, level), mm(x, tl.trans(x), SPLIT), 0.0)
    return scores


@triton.jit(do_not_specialize=["T", "per_segment", "slots"])
def forward(
    r, k, v, w, u, y, state, final, chunks, carry, cu, lengths, table,
    T, H, per_segment, slots, segments,
    r_b, r_t, r_h, k_b, k_t, k_h, v_b, v_t, v_h, w_b, w_t, w_h,
    N: tl.constexpr, L: tl.constexpr, LEVELS: tl.constexpr, LIMIT: tl.constexpr, STATIC: tl.constexpr,
    PACKED: tl.constexpr, HAS_LEN: tl.constexpr, HAS_STATE: tl.constexpr, CARRY: tl.constexpr,
    SAVE: tl.constexpr, SPLIT: tl.constexpr,
):  # fmt: skip
    """Outputs and final state; with SAVE the state at the start of each chunk, for the backward pass."""
    head = tl.program_id(0)
    program = tl.program_id(1)
    if PACKED and CARRY:
        seq = tl.load(table + 2 * program)
        segment = tl.load(table + 2 * program + 1)
        if segment < 0:
            return
    else:
        seq = program // segments
        segment = program % segments
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
    y_at = y + (b * T + first) * y_t + head * N
    own = (seq.to(tl.int64) * H + head) * (N * N)
    if CARRY:
        s = tl.load(carry + (program.to(tl.int64) * H + head) * (N * N) + square(N))
    elif HAS_STATE:
        s = tl.load(state + own + square_t(N))
    else:
        s = tl.zeros((N, N), tl.float32)  # [V, K]
    bonus = tl.load(u + head * N + tl.arange(0, N)).to(tl.float32)
    i = tl.arange(0, L)[:, None]
    j = tl.arange(0, L)[None, :]
    for c in range(begin, end):
        row = c * L
        rt = load_tile(r_at, row, n, r_t, N, L).to(tl.float32)
        kt = load_tile(k_at, row, n, k_t, N, L).to(tl.float32)
        vt = load_tile(v_at, row, n, v_t, N, L)
        wt = decays(w_at, row, n, w_t, N, L, STATIC)
        if SAVE:
            tl.store(chunks + ((slot + c) * H + head) * (N * N) + square(N), s)
        total = tl.sum(wt.to(tl.float32), 0) * LOG2E  # [K]
        after = suffix(wt, row, n, i, j, N, L, STATIC, SPLIT)
        key = kt * tl.exp2(after)
        diagonal = tl.sum(rt * kt * bonus[None, :], 1)  # [L]
        fade = tl.exp2(total)
        if mild(total, rt, LIMIT):
            # One reference, the end of the chunk: query 2^-(what follows), key 2^(what follows), state faded.
            query = rt * tl.exp2(-(after + wt.to(tl.float32) * LOG2E))
            scores = mm(query, tl.trans(key), SPLIT)
            seen = s * fade[None, :]
        else:
            query = rt * tl.exp2(prefix(wt, row, i, j, N, L, STATIC, SPLIT))
            scores = doubling(rt, kt, wt, i, j, L, LEVELS, SPLIT)
            seen = s
        scores = tl.where(i > j, scores, 0.0) + tl.where(i == j, diagonal[:, None], 0.0)
        out = mm_right(scores, vt, SPLIT) + mm(query, tl.trans(seen), SPLIT)
        store_tile(y_at, row, n, y_t, out, N, L)
        s = s * fade[None, :] + mm_left(tl.trans(vt), key, SPLIT)
    if end == n_chunks:
        tl.store(final + own + square_t(N), s)


@triton.jit(do_not_specialize=["T", "per_segment"])
def local(
    a, x, w, carry, fades, cu, lengths, table,
    T, H, per_segment, segments,
    a_b, a_t, a_h, x_b, x_t, x_h, w_b, w_t, w_h,
    N: tl.constexpr, L: tl.constexpr, STATIC: tl.constexpr, PACKED: tl.constexpr, HAS_LEN: tl.constexpr,
    REVERSE: tl.constexpr, SPLIT: tl.constexpr,
):  # fmt: skip
    """What one segment adds to the state when it starts from zero, and its total decay.

    Forward: a is k, x is v. REVERSE: the gradient of the state, a is r, x is dy, walked from the end.
    """
    head = tl.program_id(0)
    program = tl.program_id(1)
    if PACKED:
        seq = tl.load(table + 2 * program)
        segment = tl.load(table + 2 * program + 1)
        if segment < 0:
            return
    else:
        seq = program // segments
        segment = program % segments
    b, first, n = span(cu, lengths, seq, T, PACKED, HAS_LEN)
    begin = segment * per_segment
    end = tl.minimum(begin + per_segment, tl.cdiv(n, L))
    if begin >= end:
        return
    b = b.to(tl.int64)
    a_at = a + b * a_b + first * a_t + head * a_h
    x_at = x + b * x_b + first * x_t + head * x_h
    w_at = w + b * w_b + first * w_t + head * w_h
    i = tl.arange(0, L)[:, None]
    j = tl.arange(0, L)[None, :]
    s = tl.zeros((N, N), tl.float32)  # [V, K]
    all_of_it = tl.zeros((N,), tl.float32)
    for c in range(begin, end):
        row = c * L
        if REVERSE:
            row = (begin + end - 1 - c) * L
        at = load_tile(a_at, row, n, a_t, N, L).to(tl.float32)
        xt = load_tile(x_at, row, n, x_t, N, L)
        wt = decays(w_at, row, n, w_t, N, L, STATIC)
        total = tl.sum(wt.to(tl.float32), 0) * LOG2E  # [K]
        if REVERSE:
            weighted = at * tl.exp2(prefix(wt, row, i, j, N, L, STATIC, SPLIT))
        else:
            weighted = at * tl.exp2(suffix(wt, row, n, i, j, N, L, STATIC, SPLIT))
        s = s * tl.exp2(total)[None, :] + mm_left(tl.trans(xt), weighted, SPLIT)
        all_of_it += total
    where = program.to(tl.int64) * H + head
    tl.store(carry + where * (N * N) + square(N), s)
    tl.store(fades + where * N + tl.arange(0, N), all_of_it)


@triton.jit(do_not_specialize=["T", "per_segment"])
def combine(
    carry, fades, start, end_state, cu, lengths, firsts, T, H, per_segment, segments,
    N: tl.constexpr, ROWS: tl.constexpr, L: tl.constexpr, PACKED: tl.constexpr, HAS_LEN: tl.constexpr,
    HAS_START: tl.constexpr, REVERSE: tl.constexpr,
):  # fmt: skip
    """Turns the segments' own states into the state each one starts from, in place, one segment after another.

    start: public state [K][V] the walk begins with (REVERSE: the final state's gradient). REVERSE also
    writes what comes out at the other end, the initial state's gradient, to end_state.
    """
    head = tl.program_id(0)
    seq = tl.program_id(1)
    rows = tl.program_id(2) * ROWS + tl.arange(0, ROWS)[:, None]  # value channels
    cols = tl.arange(0, N)[None, :]
    _, _, n = span(cu, lengths, seq, T, PACKED, HAS_LEN)
    count = tl.cdiv(tl.cdiv(n, L), per_segment)
    program = seq * segments
    if PACKED:
        program = tl.load(firsts + seq)
    own = (seq.to(tl.int64) * H + head) * (N * N)
    s = tl.zeros((ROWS, N), tl.float32)
    if HAS_START:
        s = tl.load(start + own + rows + cols * N)
    if count == 0:  # an empty sequence: its one program only passes the state on
        tl.store(carry + (program.to(tl.int64) * H + head) * (N * N) + rows * N + cols, s)
    for g in range(count):
        at = program + g
        if REVERSE:
            at = program + count - 1 - g
        where = at.to(tl.int64) * H + head
        mine = tl.load(carry + where * (N * N) + rows * N + cols)
        fade = tl.exp2(tl.load(fades + where * N + tl.arange(0, N)))
        tl.store(carry + where * (N * N) + rows * N + cols, s)
        s = s * fade[None, :] + mine
    if REVERSE:
        tl.store(end_state + own + rows + cols * N, s)
