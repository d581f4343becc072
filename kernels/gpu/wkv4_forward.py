"""Triton kernels of RWKV-4's forward pass, and the pieces its backward pass shares.

A program owns a block of channels over one segment of one sample's time and walks it row by row, the state
in registers, the next rows' loads under way. One segment a sample needs one launch. With more, a first
launch finds every segment's own state from nothing (LOCAL), `combine_forward` chains them, and the second
launch of `forward` starts from the results.

Inside, exponents are base 2 and relative to a reference R near the running maximum, renewed every few rows:
subtracting a slow decay from a large exponent again and again would round it away.
A segment has a slot: dense, slot = sample * segments + segment; packed, sequence i starts at slot
cu_i // length + i, which leaves room for each sequence's last, shorter segment; empty slots do nothing.
Marks are the states (a, b, p base 2) every C rows of a sample, which the backward pass starts from.
"""

import triton
import triton.language as tl

from .launch import kernel

DENSE: tl.constexpr = tl.constexpr(0)
LENGTHS: tl.constexpr = tl.constexpr(1)
PACKED: tl.constexpr = tl.constexpr(2)
LOG2E: tl.constexpr = tl.constexpr(1.4426950408889634)
LN2: tl.constexpr = tl.constexpr(0.6931471805599453)
EMPTY: tl.constexpr = tl.constexpr(-1e38)


@triton.jit
def find_sequence(x, sizes, count, length):
    """The sequence i whose slots or marks, from cu_i // length + i on, hold x; `count` for the tail."""
    seen = 0
    for at in range(0, count + 1, 128):
        i = at + tl.arange(0, 128)
        first = tl.load(sizes + i, mask=i <= count, other=0).to(tl.int64) // length + i
        seen += tl.sum(((i <= count) & (first <= x)).to(tl.int32), 0)
    return seen - 1


@triton.jit
def place(slot, sizes, batch, time, length, segments, C: tl.constexpr, MODE: tl.constexpr):
    """What a slot is: (sample of the tensors, state index, segment, first row, live rows, all rows,
    the sample's length, its first mark). State index >= batch: no sequence."""
    if MODE == PACKED:
        row = tl.full([], 0, tl.int64)
        state = find_sequence(slot, sizes, batch, length).to(tl.int64)
        begin = tl.load(sizes + state).to(tl.int64)
        end = tl.load(sizes + state + 1, mask=state < batch, other=time).to(tl.int64)
        segment = (slot - begin // length - state).to(tl.int64)
        total = end - begin
        marks = begin // C + state
        every = tl.minimum(tl.maximum(total - segment * length, 0), length)
        live = tl.where(state < batch, every, 0)
    else:
        row = (slot // segments).to(tl.int64)
        state = row
        segment = (slot % segments).to(tl.int64)
        begin = tl.full([], 0, tl.int64)
        every = tl.minimum(time - segment * length, length)
        total = tl.full([], 0, tl.int64) + time
        live = every
        if MODE == LENGTHS:
            total = tl.load(sizes + row).to(tl.int64)
            live = tl.minimum(tl.maximum(total - segment * length, 0), length)
        marks = row * ((time + C - 1) // C)
    return row, state, segment, begin + segment * length, live, every, total, marks


@triton.jit
def inside(col, D: tl.constexpr, BC: tl.constexpr):
    """Mask of the channels that exist; known to the compiler if all do."""
    okay = col < D
    if D % BC == 0:
        okay = tl.full([BC], True, tl.int1)
    return okay


@triton.jit
def below(i, left, okay):
    """okay where i < left. A vector comparison: the interpreter turns spread scalars into integers."""
    return okay & (tl.full(okay.shape, i, tl.int32) < left)


@triton.jit
def final_segment(total, length):
    return tl.maximum((total + length - 1) // length - 1, 0)


@triton.jit
def load_rows(ptr, STRIDE: tl.constexpr, left, okay, ROWS: tl.constexpr, WHOLE: tl.constexpr = False):
    """ROWS rows from ptr [BC] on as a tuple, zeros from row `left` on; WHOLE: all rows exist."""
    rows = ()
    for i in tl.static_range(ROWS):
        if WHOLE:
            rows = rows + (tl.load(ptr + i * STRIDE, mask=okay),)  # type: ignore[assignment]
        else:
            rows = rows + (tl.load(ptr + i * STRIDE, mask=below(i, left, okay), other=0.0),)  # type: ignore[assignment]
    return rows


@triton.jit
def load_state(state, index, D: tl.constexpr, col, okay):
    """(a, b, p) of one sample, natural exponent; the empty state for None."""
    a = tl.zeros(col.shape, tl.float32)
    b, p = a, a + EMPTY
    if state is not None:
        at = state + index * 3 * D + col
        a = tl.load(at, mask=okay, other=0.0)
        b = tl.load(at + D, mask=okay, other=0.0)
        p = tl.maximum(tl.load(at + 2 * D, mask=okay, other=EMPTY), EMPTY)
    return a, b, p


@triton.jit
def store3(ptr, D: tl.constexpr, okay, x, y, z):
    tl.store(ptr, x, mask=okay)
    tl.store(ptr + D, y, mask=okay)
    tl.store(ptr + 2 * D, z, mask=okay)


@triton.jit
def zero_rows(ptr, STRIDE: tl.constexpr, first, end, okay):
    """Zeros into rows first..end-1 of ptr [BC]."""
    for i in range(first, end):
        tl.store(ptr + i * STRIDE, tl.zeros(ptr.shape, ptr.dtype.element_ty), mask=okay)


@triton.jit
def advance(k, v, a, b, p, w, shift, i, left, MASKED: tl.constexpr):
    """One step of the state: (a, b, p) after it, the factor of the old state, the weight of (v, 1).

    MASKED: rows from `left` on change nothing; their factor is 1 and their weight 0.
    """
    key = k * LOG2E + shift
    if MASKED:
        key, w = tl.where(i < left, key, -3e38), tl.where(i < left, w, 0.0)
    kept = p + w
    gap = key - kept
    small = tl.exp2(-tl.abs(gap))
    lam = tl.where(gap > 0, small, 1.0)
    enter = tl.where(gap > 0, 1.0, small)
    return lam * a + enter * v, lam * b + enter, tl.maximum(kept, key), lam, enter


@triton.jit
def mix(k, p, bonus):
    """Weights of the state and of the step's own value in y; `bonus` is u - R."""
    gap = k * LOG2E + bonus - p
    small = tl.exp2(-tl.abs(gap))
    return tl.where(gap > 0, small, 1.0), tl.where(gap > 0, 1.0, small)


@triton.jit
def invert(x):
    """1 / x for x of ordinary size; a division would also handle sizes at the ends of fp32's range."""
    root = tl.rsqrt(x)
    return root * root


@triton.jit
def steps(
    ks, vs, a, b, p, ref, w, u, y, marks, left, okay, D: tl.constexpr, C: tl.constexpr, U: tl.constexpr,
    MASKED: tl.constexpr, LOCAL: tl.constexpr,
):  # fmt: skip
    """U steps (those below `left` if MASKED): stores y and marks, returns the state and its reference."""
    first = ks[0].to(tl.float32) * LOG2E
    renewed = tl.maximum(ref + p, first)
    p += ref - renewed
    ref = renewed
    for i in tl.static_range(U):
        k, v = ks[i].to(tl.float32), vs[i].to(tl.float32)
        live = okay
        if MASKED:
            live = below(i, left, okay)
        if not LOCAL:
            if marks is not None and i % C == 0:
                store3(marks + (i // C) * 3 * D, D, live, a, b, ref + p)
            old, new = mix(k, p, u - ref)
            result = (old * a + new * v) * invert(old * b + new)
            tl.store(y + i * D, result.to(y.dtype.element_ty), mask=live)
        a, b, p, _lam, _enter = advance(k, v, a, b, p, w, -ref, i, left, MASKED)
    return a, b, p, ref


@kernel
@triton.jit
def forward(
    k, v, log_w, u, state, sizes, carry, y, last, marks, batch, time, length, segments, k_batch, v_batch,
    KT: tl.constexpr, VT: tl.constexpr, D: tl.constexpr, C: tl.constexpr, U: tl.constexpr, BC: tl.constexpr,
    MODE: tl.constexpr, LOCAL: tl.constexpr, CHAINED: tl.constexpr, FULL: tl.constexpr,
):  # fmt: skip
    """LOCAL: carry[slot] = the segment's own state. Else y, marks and, at a sample's end, `last`.

    CHAINED: start from carry[slot], not from the initial state. FULL: every segment is whole groups of U.
    """
    blocks: tl.constexpr = (D + BC - 1) // BC
    slot = (tl.program_id(0) // blocks).to(tl.int64)
    col = (tl.program_id(0) % blocks) * BC + tl.arange(0, BC)
    okay = inside(col, D, BC)
    row, index, segment, at, live, every, total, mark = place(
        slot, sizes, batch, time, length, segments, C, MODE
    )
    if LOCAL:  # nobody needs what the last segment adds
        live = tl.where(segment >= final_segment(total, length), 0, live)
        at = tl.where(live > 0, at, 0)  # rows that exist, for the first loads
    w = tl.load(log_w + col, mask=okay, other=0.0).to(tl.float32) * LOG2E
    bonus = tl.load(u + col, mask=okay, other=0.0).to(tl.float32) * LOG2E
    k += row * k_batch + at * KT + col
    v += row * v_batch + at * VT + col
    if not LOCAL:
        y += (row * time + at) * D + col
        if marks is not None:
            marks += (mark + segment * (length // C)) * 3 * D + col
    if LOCAL:
        a = tl.zeros([BC], tl.float32)
        b, p = a, a + EMPTY
    else:
        a, b, p = load_state(state, tl.minimum(index, batch - 1), D, col, okay)
    begin_a, begin_b, begin_p = a, b, p
    ref = p * LOG2E
    if CHAINED:
        spot = carry + slot * 3 * D + col
        a, b, ref = tl.load(spot, mask=okay), tl.load(spot + D, mask=okay), tl.load(spot + 2 * D, mask=okay)
    p = tl.zeros([BC], tl.float32)
    ks, vs = load_rows(k, KT, live, okay, U, FULL), load_rows(v, VT, live, okay, U, FULL)
    for i in range(0, (live + U - 1) // U):
        left = live - i * U
        further = tl.where(left > U, U, 0) if FULL else U  # the last group loads itself again
        k += further * KT
        v += further * VT
        next_ks = load_rows(k, KT, left - U, okay, U, FULL)
        next_vs = load_rows(v, VT, left - U, okay, U, FULL)
        a, b, p, ref = steps(ks, vs, a, b, p, ref, w, bonus, y, marks, left, okay, D, C, U, not FULL, LOCAL)
        ks, vs = next_ks, next_vs
        if not LOCAL:
            y += U * D
            if marks is not None:
                marks += (U // C) * 3 * D
    if LOCAL:
        store3(carry + slot * 3 * D + col, D, okay, a, b, ref + p)
    else:
        if MODE != DENSE:
            done = (live + U - 1) // U * U
            zero_rows(y, D, live - done, every - done, okay)
        if (index < batch) & (segment == final_segment(total, length)):
            p = tl.where(total > 0, (ref + p) * LN2, begin_p)
            a, b = tl.where(total > 0, a, begin_a), tl.where(total > 0, b, begin_b)
            store3(last + index * 3 * D + col, D, okay, a, b, p)


@kernel
@triton.jit
def combine_forward(
    log_w, state, sizes, carry, batch, time, length, segments, D: tl.constexpr, G: tl.constexpr,
    BC: tl.constexpr, MODE: tl.constexpr,
):  # fmt: skip
    """carry[slot]: from the segments' own states to the states they start from, G loads at a time."""
    blocks: tl.constexpr = (D + BC - 1) // BC
    index = (tl.program_id(0) // blocks).to(tl.int64)
    col = (tl.program_id(0) % blocks) * BC + tl.arange(0, BC)
    okay = col < D
    first, count = slots_of(index, sizes, time, length, segments, MODE)
    w = tl.load(log_w + col, mask=okay, other=0.0).to(tl.float32) * LOG2E * length
    a, b, p = load_state(state, index, D, col, okay)
    p *= LOG2E
    spot = carry + first * 3 * D + col
    for at in range(0, count, G):
        left = count - at
        own_a, own_b = load_rows(spot, 3 * D, left, okay, G), load_rows(spot + D, 3 * D, left, okay, G)
        own_p = load_rows(spot + 2 * D, 3 * D, left, okay, G)
        for i in tl.static_range(G):
            store3(spot + i * 3 * D, D, below(i, left, okay), a, b, p)
            kept = p + w
            p = tl.maximum(kept, own_p[i])
            old, new = tl.exp2(kept - p), tl.exp2(own_p[i] - p)
            a, b = old * a + new * own_a[i], old * b + new * own_b[i]
        spot += G * 3 * D


@triton.jit
def slots_of(index, sizes, time, length, segments, MODE: tl.constexpr):
    """A sample's first slot and how many slots it uses (an empty sample: one)."""
    if MODE == PACKED:
        begin = tl.load(sizes + index).to(tl.int64)
        first = begin // length + index
        total = tl.load(sizes + index + 1).to(tl.int64) - begin
    else:
        first = index * segments
        total = tl.full([], 0, tl.int64) + time
        if MODE == LENGTHS:
            total = tl.load(sizes + index).to(tl.int64)
    return first, final_segment(total, length) + 1
