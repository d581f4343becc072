"""The forward kernels of WKV-5 and WKV-6. The algebra is in docs/kernels.md; letters as there.

One program walks the chunks of one segment of one head with the state in registers, as S [V, K].
"""

from __future__ import annotations

import triton
import triton.language as tl

from .launch import kernel
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
def place(slot, cu, lengths, table, T, slots, PACKED: tl.constexpr, HAS_LEN: tl.constexpr):
    """(row of the batch, first step of the sequence, its steps, the chunk) of a chunk slot."""
    if PACKED:
        seq = tl.load(table + 2 * slot)
        c = tl.load(table + 2 * slot + 1)
    else:
        seq = slot // slots
        c = slot % slots
    b, first, n = span(cu, lengths, seq, T, PACKED, HAS_LEN)
    return b.to(tl.int64), first, n, c


@kernel
@triton.jit(do_not_specialize=["T", "H", "slots"])
def strong_scores(
    r, k, w, scores, flags, cu, lengths, table, T, H, slots,
    r_b, r_t, r_h, k_b, k_t, k_h, w_b, w_t, w_h,
    N: tl.constexpr, L: tl.constexpr, LEVELS: tl.constexpr, LEAF: tl.constexpr, LIMIT: tl.constexpr,
    STATIC: tl.constexpr, PACKED: tl.constexpr, HAS_LEN: tl.constexpr, KNOWN: tl.constexpr,
    SPLIT: tl.constexpr,
):  # fmt: skip
    """Flags the chunks in which a channel decays by more than 2^-LIMIT and makes their scores, for any decay.

    Steps i > j meet at the lowest level at which one block of 2^(level+1) holds both: i then looks back to
    the block's middle and j ahead to it, so every exponent is a sum of log decays and never above 0. Blocks
    of 2^LEAF steps that decay by less than the limit take one reference, as mild chunks do. KNOWN: the flags
    are given.
    """
    head = tl.program_id(0)
    b, first, n, c = place(tl.program_id(1), cu, lengths, table, T, slots, PACKED, HAS_LEN)
    row = c * L
    if (c < 0) | (row >= n):
        return
    where = tl.program_id(1).to(tl.int64) * H + head
    w_at = w + b * w_b + first * w_t + head * w_h
    if KNOWN:
        if tl.load(flags + where) == 0:
            return
    wt = decays(w_at, row, n, w_t, N, L, STATIC)
    if KNOWN:
        strong = row < n
    else:
        strong = tl.min(tl.sum(wt.to(tl.float32), 0), 0) * LOG2E < -LIMIT
        tl.store(flags + where, strong.to(tl.int32))
    if strong:
        i = tl.arange(0, L)[:, None]
        j = tl.arange(0, L)[None, :]
        step = tl.arange(0, L)
        rt = load_tile(r + b * r_b + first * r_t + head * r_h, row, n, r_t, N, L).to(tl.float32)
        kt = load_tile(k + b * k_b + first * k_t + head * k_h, row, n, k_t, N, L).to(tl.float32)
        leaf = (i >> LEAF) == (j >> LEAF)
        after = over_time(leaf & (j > i), wt, wt.dtype == tl.bfloat16, SPLIT) * LOG2E
        ahead = -(after + wt.to(tl.float32) * LOG2E)
        lowest = LEAF
        found = tl.zeros((L, L), tl.float32)
        if tl.max(tl.max(ahead, 1), 0) < LIMIT:
            found += tl.where(
                leaf & (i > j), mm(bounded(rt * tl.exp2(ahead)), tl.trans(kt * tl.exp2(after)), SPLIT), 0.0
            )
        else:
            lowest = 0
        for level in range(lowest, LEVELS):
            between = over_time(level_sum(i, j, level), wt, wt.dtype == tl.bfloat16, SPLIT) * LOG2E
            right = ((step >> level) & 1) == 1
            x = tl.where(right[:, None], rt, kt) * tl.exp2(between)  # [L, K]
            found += tl.where(level_pairs(i, j, level), mm(x, tl.trans(x), SPLIT), 0.0)
        tl.store(scores + where * (L * L) + i * L + j, found)


@triton.jit
def bounded(x):
    """Keeps a product of a huge input and a scale finite: infinity times a vanished key would be NaN."""
    return tl.minimum(tl.maximum(x, -3.0e38), 3.0e38)


@kernel
@triton.jit(do_not_specialize=["T", "H", "per_segment", "slots", "segments"])
def walk(
    r, k, x, w, u, y, state, final, chunks, scores, flags, carry, cu, lengths, table,
    T, H, per_segment, slots, segments,
    r_b, r_t, r_h, k_b, k_t, k_h, x_b, x_t, x_h, w_b, w_t, w_h,
    N: tl.constexpr, BV: tl.constexpr, L: tl.constexpr, LIMIT: tl.constexpr,
    STATIC: tl.constexpr, PACKED: tl.constexpr, HAS_LEN: tl.constexpr, HAS_STATE: tl.constexpr,
    CARRY: tl.constexpr, SAVE: tl.constexpr, REVERSE: tl.constexpr, SPLIT: tl.constexpr,
):  # fmt: skip
    """Outputs and final state; with SAVE the state before each chunk, for the backward pass.

    REVERSE: the same sum read backwards is the gradient of v: x is dy, y is dv, the state is its gradient
    (saved as it is behind each chunk; the last one belongs to the initial state), keys ask and queries are
    stored. One program has BV value channels.
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
    r_at = r + b * r_b + first * r_t + head * r_h
    k_at = k + b * k_b + first * k_t + head * k_h
    x_at = x + b * x_b + first * x_t + head * x_h + cut
    w_at = w + b * w_b + first * w_t + head * w_h
    y_at = y + (b * T + first) * (H * N) + head * N + cut
    own = (seq.to(tl.int64) * H + head) * (N * N) + square_t(cut, N, BV)
    if CARRY:
        s = tl.load(carry + (program.to(tl.int64) * H + head) * (N * N) + square(cut, N, BV))
    elif HAS_STATE:
        s = tl.load(state + own)
    else:
        s = tl.zeros((BV, N), tl.float32)  # [V, K]
    bonus = tl.load(u + head * N + tl.arange(0, N)).to(tl.float32)
    i = tl.arange(0, L)[:, None]
    j = tl.arange(0, L)[None, :]
    for step in range(begin, end):
        c = step
        if REVERSE:
            c = begin + end - 1 - step
        row = c * L
        where = (slot + c) * H + head
        rt = load_tile(r_at, row, n, r_t, N, L).to(tl.float32)
        kt = load_tile(k_at, row, n, k_t, N, L).to(tl.float32)
        xt = load_tile(x_at, row, n, x_t, BV, L)
        wt = decays(w_at, row, n, w_t, N, L, STATIC)
        strong = tl.load(flags + where) != 0
        if SAVE:
            tl.store(chunks + where * (N * N) + square(cut, N, BV), s)
        decay = tl.sum(wt.to(tl.float32), 0) * -LOG2E  # [K], the whole chunk's
        before = prefix(wt, row, i, j, N, L, STATIC, SPLIT)
        query = rt * tl.exp2(before)
        key = kt * tl.exp2(suffix(wt, row, n, i, j, N, L, STATIC, SPLIT))
        # Always true, this condition keeps the sum in the layout of the products: without it the [L, L] tile
        # that the sum goes into takes a turn through shared memory.
        diagonal = tl.sum(tl.where(before < 1.0e30, rt * kt * bonus[None, :], 0.0), 1)  # [L]
        if strong:
            at = where * (L * L) + (j * L + i if REVERSE else i * L + j)
            found = tl.load(scores + at)
        else:
            # One reference for all pairs, the end of the chunk. A huge query may leave the range, but no NaN.
            lead = bounded(query * tl.exp2(decay)[None, :])
            if REVERSE:
                found = mm(key, tl.trans(lead), SPLIT)
            else:
                found = mm(lead, tl.trans(key), SPLIT)
        found = tl.where(j > i if REVERSE else i > j, found, tl.where(i == j, diagonal[:, None], 0.0))
        out = mm_right(found, xt, SPLIT)
        fade = tl.exp2(-decay)[None, :]
        if REVERSE:
            out = mm(key, tl.trans(s), SPLIT, out)
            s = mm_left(tl.trans(xt), query, SPLIT, s * fade)
        else:
            out = mm(query, tl.trans(s), SPLIT, out)
            s = mm_left(tl.trans(xt), key, SPLIT, s * fade)
        store_tile(y_at, row, n, H * N, out, BV, L)
    last = begin == 0 if REVERSE else end == n_chunks
    if last:
        tl.store(final + own, s)


@kernel
@triton.jit(do_not_specialize=["T", "H", "per_segment", "segments"])
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
        s = mm_left(tl.trans(xt), weighted, SPLIT, s * tl.exp2(total)[None, :])
        all_of_it += total
    where = program.to(tl.int64) * H + head
    tl.store(carry + where * (N * N) + square(0, N, N), s)
    tl.store(fades + where * N + tl.arange(0, N), all_of_it)


@kernel
@triton.jit(do_not_specialize=["T", "H", "per_segment", "segments"])
def combine(
    carry, fades, start, cu, lengths, firsts, T, H, per_segment, segments,
    N: tl.constexpr, ROWS: tl.constexpr, L: tl.constexpr, PACKED: tl.constexpr, HAS_LEN: tl.constexpr,
    HAS_START: tl.constexpr, REVERSE: tl.constexpr,
):  # fmt: skip
    """Turns the segments' own states into the state each one starts from, in place, one after another.

    start: public state [K][V] the walk begins with (REVERSE: the final state's gradient, at the last one).
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
