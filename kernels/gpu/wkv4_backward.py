"""Triton kernels of RWKV-4's backward pass; see wkv4_forward.py for programs, segments, slots and marks.

With states scaled by their running maximum p, one step is S' = lam S + enter (v, 1) with lam and enter in
[0, 1], and so is its gradient G = lam G' + (what y adds): no exponent of its own, nothing to overflow. A
program walks its segment from the back in groups of C rows: states forward from the group's mark, kept in
registers, then gradients backward. Between segments G is linear: G_start = own + product of lam * G_end.
No gradient passes through p itself (a choice of scale) but what a caller sends to the final p (PASS_P),
which goes to the step that set it.
"""

import triton
import triton.language as tl

from .launch import kernel
from .wkv4_forward import (
    DENSE,
    LENGTHS,
    LOG2E,
    PACKED,
    advance,
    below,
    final_segment,
    inside,
    invert,
    load_rows,
    load_state,
    mix,
    place,
    slots_of,
    store3,
    zero_rows,
)

__all__ = ["DENSE", "LENGTHS", "PACKED", "add_parts", "backward", "combine_backward"]


@triton.jit
def steps_back(
    ks, vs, dys, a, b, mark_p, end_p, g0, g1, dp, keep, dw, du, w, u, dk, dv, left, okay,
    D: tl.constexpr, C: tl.constexpr, MASKED: tl.constexpr, LOCAL: tl.constexpr, PASS_P: tl.constexpr,
):  # fmt: skip
    """A group of C rows from its mark (a, b, mark_p); G = (g0, g1) comes in scaled by end_p."""
    ref = tl.maximum(mark_p, ks[0].to(tl.float32) * LOG2E)
    p = mark_p - ref
    as_, bs, ps, lams, enters = (), (), (), (), ()
    for i in tl.static_range(C):
        as_, bs, ps = as_ + (a,), bs + (b,), ps + (p,)  # type: ignore[assignment]
        k, v = ks[i].to(tl.float32), vs[i].to(tl.float32)
        a, b, p, lam, enter = advance(k, v, a, b, p, w, -ref, i, left, MASKED)
        lams, enters = lams + (lam,), enters + (enter,)  # type: ignore[assignment]
    scale = tl.exp2(p - (end_p - ref))  # two roundings of one exponent
    g0, g1 = g0 * scale, g1 * scale
    part_w, part_u = tl.zeros(dw.shape, tl.float32), tl.zeros(dw.shape, tl.float32)
    for i in tl.static_range(C - 1, -1, -1):
        k, v, dy = ks[i].to(tl.float32), vs[i].to(tl.float32), dys[i].to(tl.float32)
        old, new = mix(k, ps[i], u - ref)
        inverse = invert(old * bs[i] + new)
        y = (old * as_[i] + new * v) * inverse
        dnum = dy * inverse
        kept0, kept1 = lams[i] * g0, lams[i] * g1
        if not LOCAL:
            own = new * dnum
            gain = own * (v - y)
            part_u += gain
            slope = enters[i] * (g0 * v + g1) + gain
            flow = kept0 * as_[i] + kept1 * bs[i]
            live = okay
            if PASS_P:
                slope += tl.where(enters[i] >= 1.0, dp, 0.0)
                dp = tl.where(enters[i] >= 1.0, 0.0, dp)
                flow += dp
            if MASKED:
                flow = tl.where(i < left, flow, 0.0)
                live = below(i, left, okay)
            part_w += flow
            tl.store(dk + i * D, slope.to(dk.dtype.element_ty), mask=live)
            tl.store(dv + i * D, (own + enters[i] * g0).to(dv.dtype.element_ty), mask=live)
        if LOCAL and PASS_P:
            keep = tl.where(enters[i] >= 1.0, 0.0, keep)
        g0 = kept0 + old * dnum
        g1 = kept1 - old * dnum * y
    return g0, g1, dp, keep, dw + part_w, du + part_u


@kernel
@triton.jit
def backward(
    dy, dlast, k, v, log_w, u, state, sizes, last, marks, carry, dk, dv, dstate, parts,
    batch, time, length, segments, k_batch, v_batch,
    KT: tl.constexpr, VT: tl.constexpr, D: tl.constexpr, C: tl.constexpr, BC: tl.constexpr,
    MODE: tl.constexpr, LOCAL: tl.constexpr, CHAINED: tl.constexpr, FULL: tl.constexpr,
    PASS_P: tl.constexpr,
):  # fmt: skip
    """LOCAL: carry[slot] = what the segment itself adds to G at its start, whether p passes, p at its start.

    Else dk, dv, the sums over the segment parts[slot] of log_w's and u's gradient, and, at a sample's start,
    dstate. CHAINED: G at the segment's end is carry[slot], else it comes from dlast.
    """
    blocks: tl.constexpr = (D + BC - 1) // BC
    slot = (tl.program_id(0) // blocks).to(tl.int64)
    col = (tl.program_id(0) % blocks) * BC + tl.arange(0, BC)
    okay = inside(col, D, BC)
    row, index, segment, at, live, every, total, mark = place(
        slot, sizes, batch, time, length, segments, C, MODE
    )
    if LOCAL:  # nobody is before the first segment
        live = tl.where(segment == 0, 0, live)
    known = tl.minimum(index, batch - 1)
    w = tl.load(log_w + col, mask=okay, other=0.0).to(tl.float32) * LOG2E
    bonus = tl.load(u + col, mask=okay, other=0.0).to(tl.float32) * LOG2E
    groups = (live + C - 1) // C
    marks += (mark + segment * (length // C)) * 3 * D + col
    final = final_segment(total, length)
    after = marks + (length // C) * 3 * D + 2 * D
    end_p = tl.load(after, mask=below(segment, final, okay), other=0.0)
    last_p = tl.load(last + known * 3 * D + 2 * D + col, mask=okay, other=0.0) * LOG2E
    end_p = tl.where(segment < final, end_p, last_p)
    zero = tl.zeros([BC], tl.float32)
    g0, g1, dp, keep, dw, du = zero, zero, zero, zero + 1.0, zero, zero
    if CHAINED:
        spot = carry + slot * 4 * D + col
        g0, g1, dp = tl.load(spot, mask=okay), tl.load(spot + D, mask=okay), tl.load(spot + 2 * D, mask=okay)
    elif not LOCAL and dlast is not None:
        g0, g1, dp = end_gradient(dlast, last, known, D, col, okay)
    at += groups * C
    if not LOCAL:
        dk += (row * time + at) * D + col
        dv += (row * time + at) * D + col
        if MODE != DENSE:
            zero_rows(dk, D, live - groups * C, every - groups * C, okay)
            zero_rows(dv, D, live - groups * C, every - groups * C, okay)
    before = tl.maximum(groups - 1, 0)
    at += (before - groups) * C
    k += row * k_batch + at * KT + col
    v += row * v_batch + at * VT + col
    dy += (row * time + at) * D + col
    marks += before * 3 * D
    left = live - before * C
    ks, vs = load_rows(k, KT, left, okay, C, FULL), load_rows(v, VT, left, okay, C, FULL)
    dys = load_rows(dy, D, left, okay, C, FULL)
    abp = load_rows(marks, D, left * 3, okay, 3, FULL)
    for i in range(0, groups):
        if not LOCAL:
            dk -= C * D
            dv -= C * D
        more = tl.where(i + 1 < groups, C, 0)  # the first group loads itself again, if FULL
        k, v, dy, marks = k - more * KT, v - more * VT, dy - more * D, marks - more // C * 3 * D
        next_ks, next_vs = load_rows(k, KT, more, okay, C, FULL), load_rows(v, VT, more, okay, C, FULL)
        next_dys = load_rows(dy, D, more, okay, C, FULL)
        next_abp = load_rows(marks, D, more * 3, okay, 3, FULL)
        g0, g1, dp, keep, dw, du = steps_back(
            ks, vs, dys, abp[0], abp[1], abp[2], end_p, g0, g1, dp, keep, dw, du, w, bonus, dk, dv, left,
            okay, D, C, not FULL, LOCAL, PASS_P,
        )  # fmt: skip
        end_p = abp[2]
        ks, vs, dys, abp = next_ks, next_vs, next_dys, next_abp
        left = live * 0 + C
    if LOCAL:
        spot = carry + slot * 4 * D + col
        store3(spot, D, okay, g0, g1, keep)
        tl.store(spot + 3 * D, end_p, mask=okay)  # by now the exponent at the segment's start
    else:
        tl.store(parts + slot * 2 * D + col, dw, mask=okay)
        tl.store(parts + slot * 2 * D + D + col, du, mask=okay)
        if dstate is not None:
            a, b, _p = load_state(state, known, D, col, okay)
            okay = below(index, batch, okay) & below(segment, 1, okay)
            store3(dstate + index * 3 * D + col, D, okay, g0, g1, g0 * a + g1 * b + dp)


@triton.jit
def end_gradient(dlast, last, index, D: tl.constexpr, col, okay):
    """Gradient of the final (a, b) and what is left for p once (a, b) have moved with it."""
    at = index * 3 * D + col
    g0, g1 = tl.load(dlast + at, mask=okay, other=0.0), tl.load(dlast + at + D, mask=okay, other=0.0)
    a, b = tl.load(last + at, mask=okay, other=0.0), tl.load(last + at + D, mask=okay, other=0.0)
    dp = tl.load(dlast + at + 2 * D, mask=okay, other=0.0)
    return g0, g1, dp - g0 * a - g1 * b


@kernel
@triton.jit
def combine_backward(
    dlast, log_w, sizes, last, carry, time, length, segments, D: tl.constexpr, G: tl.constexpr,
    BC: tl.constexpr, MODE: tl.constexpr,
):  # fmt: skip
    """carry[slot]: from what the segments themselves add to (G, dp) at their ends."""
    blocks: tl.constexpr = (D + BC - 1) // BC
    index = (tl.program_id(0) // blocks).to(tl.int64)
    col = (tl.program_id(0) % blocks) * BC + tl.arange(0, BC)
    okay = col < D
    first, count = slots_of(index, sizes, time, length, segments, MODE)
    total = count_rows(index, sizes, time, MODE)
    w = tl.load(log_w + col, mask=okay, other=0.0).to(tl.float32) * LOG2E
    g0 = tl.zeros([BC], tl.float32)
    g1, dp = g0, g0
    if dlast is not None:
        g0, g1, dp = end_gradient(dlast, last, index, D, col, okay)
    end_p = tl.load(last + index * 3 * D + 2 * D + col, mask=okay, other=0.0) * LOG2E
    rows = (total - (count - 1) * length).to(tl.float32)
    spot = carry + (first + count - 1) * 4 * D + col
    for at in range(0, count, G):
        left = count - at
        own0, own1 = load_rows(spot, -4 * D, left, okay, G), load_rows(spot + D, -4 * D, left, okay, G)
        keep = load_rows(spot + 2 * D, -4 * D, left, okay, G)
        start = load_rows(spot + 3 * D, -4 * D, left, okay, G)
        for i in tl.static_range(G):
            store3(spot - i * 4 * D, D, below(i, left, okay), g0, g1, dp)
            lam = tl.exp2(start[i] - end_p + w * rows)
            g0, g1, dp = own0[i] + lam * g0, own1[i] + lam * g1, keep[i] * dp
            end_p = start[i]
            rows = rows * 0.0 + length
        spot -= G * 4 * D


@triton.jit
def count_rows(index, sizes, time, MODE: tl.constexpr):
    """A sample's live rows."""
    total = tl.full([], 0, tl.int64) + time
    if MODE == LENGTHS:
        total = tl.load(sizes + index).to(tl.int64)
    if MODE == PACKED:
        total = tl.load(sizes + index + 1).to(tl.int64) - tl.load(sizes + index).to(tl.int64)
    return total


@kernel
@triton.jit
def add_parts(parts, dw, du, slots, D: tl.constexpr, G: tl.constexpr, BC: tl.constexpr):
    """The sums of parts [slots, 2, D] over slots, in a fixed order: dw, du [D]."""
    col = tl.program_id(0) * BC + tl.arange(0, BC)
    okay = col < D
    sum_w = tl.zeros([BC], tl.float32)
    sum_u = sum_w
    left = tl.full([], 0, tl.int64) + slots
    for _ in range(0, (slots + G - 1) // G):
        ws = load_rows(parts + col, 2 * D, left, okay, G)
        us = load_rows(parts + D + col, 2 * D, left, okay, G)
        parts += G * 2 * D
        left -= G
        part_w = tl.zeros([BC], tl.float32)
        part_u = part_w
        for i in tl.static_range(G):
            part_w += ws[i]
            part_u += us[i]
        sum_w += part_w
        sum_u += part_u
    tl.store(dw + col, sum_w.to(dw.dtype.element_ty), mask=okay)
    tl.store(du + col, sum_u.to(du.dtype.element_ty), mask=okay)
