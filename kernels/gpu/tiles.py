"""Tile helpers of the WKV-5/6 kernels: loading, products of the wanted exactness, sums over time.

Products. With SPLIT (bfloat16 inputs) a float32 operand is written as the sum of two bfloat16 numbers and
the product as two or three tensor-core products: relative error about 2^-16, where one bfloat16 product has
2^-9 and tf32 2^-11 (truncated). Inputs as they were given are exact in one part. Without SPLIT (float32 and
float16 inputs) operands are float32 and a product is `tf32x3`, about 2^-21.

Sums over time are products with a 0/1 matrix, so a sum over any interval is formed directly and never as a
difference of two longer sums: decays of e^-10000 beside decays of 1 cost no digits.
"""

from __future__ import annotations

import triton
import triton.language as tl

LOG2E = tl.constexpr(1.4426950408889634)

NARROW = tl.constexpr(32)
"""Width of a right-hand side whose two parts go side by side into one product of twice the width.

Besides saving products: with Triton 3.6's assembler, Hopper matrix instructions on 32-column shared tiles
read outside shared memory in kernels as large as ours.
"""


@triton.jit
def span(cu, lengths, seq, T, PACKED: tl.constexpr, HAS_LEN: tl.constexpr):
    """(row of the batch, first step, number of steps) of sequence `seq`."""
    if PACKED:
        first = tl.load(cu + seq).to(tl.int64)
        return seq * 0, first, (tl.load(cu + seq + 1).to(tl.int64) - first).to(tl.int32)
    elif HAS_LEN:
        return seq, (seq * 0).to(tl.int64), tl.load(lengths + seq).to(tl.int32)
    else:
        return seq, (seq * 0).to(tl.int64), seq * 0 + T


@triton.jit
def load_tile(base, row, n, stride, N: tl.constexpr, L: tl.constexpr):
    """Rows row..row+L of a [T, N] array with `stride` elements between rows; zeros from row n on."""
    t = row + tl.arange(0, L)
    where = t.to(tl.int64)[:, None] * stride + tl.arange(0, N)[None, :]
    return tl.load(base + where, mask=(t < n)[:, None], other=0.0)  # [L, N]


@triton.jit
def store_tile(base, row, n, stride, x, N: tl.constexpr, L: tl.constexpr):
    """The inverse of `load_tile`."""
    t = row + tl.arange(0, L)
    where = t.to(tl.int64)[:, None] * stride + tl.arange(0, N)[None, :]
    tl.store(base + where, x.to(base.dtype.element_ty), mask=(t < n)[:, None])


@triton.jit
def square(cut, N: tl.constexpr, BV: tl.constexpr):
    """Offsets of value channels cut..cut+BV, a [BV, K] tile, in a [V][K] buffer."""
    return (cut + tl.arange(0, BV))[:, None] * N + tl.arange(0, N)[None, :]


@triton.jit
def square_t(cut, N: tl.constexpr, BV: tl.constexpr):
    """The same in a public [K][V] state."""
    return (cut + tl.arange(0, BV))[:, None] + tl.arange(0, N)[None, :] * N


@triton.jit
def parts(x):
    """float32 x as the sum of two bfloat16 tiles: its upper half as it stands, and the rest, rounded.

    Cutting, not rounding: conversions of single numbers are slow instructions, and these need none.
    """
    bits = x.to(tl.uint32, bitcast=True)
    rest = x - (bits & 0xFFFF0000).to(tl.float32, bitcast=True)
    return (bits >> 16).to(tl.uint16).to(tl.bfloat16, bitcast=True), rest.to(tl.bfloat16)


@triton.jit
def beside(high, low):
    """Two [M, N] tiles side by side, [M, 2N]."""
    both = tl.permute(tl.join(high, low), (0, 2, 1))  # [M, 2, N]
    return tl.reshape(both, (high.shape[0], 2 * high.shape[1]))


@triton.jit
def together(x):
    """The sum of the two halves of [M, 2N]: what a product with `beside` leaves to be done."""
    halves = tl.reshape(x, (x.shape[0], 2, x.shape[1] // 2))
    high, low = tl.split(tl.permute(halves, (0, 2, 1)))
    return high + low


@triton.jit
def diagonal_of(x, i, j):
    """The diagonal of [L, L] as [L, 1], folded first: it ends up in the layout of half as wide tiles."""
    return tl.sum(together(tl.where(i == j, x, 0.0)), 1)[:, None]


@triton.jit
def plus(x, acc):
    """x + acc, or x where acc is None."""
    if acc is None:
        return x
    else:
        return x + acc


@triton.jit
def mm(a, b, SPLIT: tl.constexpr, acc=None):
    """a @ b (+ acc) of two float32 tiles."""
    if SPLIT:
        ah, al = parts(a)
        bh, bl = parts(b)
        if b.shape[1] == NARROW:
            both = beside(bh, bl)
            return plus(together(tl.dot(ah, both, tl.dot(al, both))), acc)
        else:
            return tl.dot(ah, bh, tl.dot(ah, bl, tl.dot(al, bh, acc)))
    else:
        return tl.dot(a, b, acc, input_precision="tf32x3")


@triton.jit
def mm_left(a, b, SPLIT: tl.constexpr, acc=None):
    """a @ b (+ acc), a an input tile as it was given (exact in one part), b float32."""
    if SPLIT:
        bh, bl = parts(b)
        if b.shape[1] == NARROW:
            return plus(together(tl.dot(a, beside(bh, bl))), acc)
        else:
            return tl.dot(a, bh, tl.dot(a, bl, acc))
    else:
        return tl.dot(a.to(tl.float32), b, acc, input_precision="tf32x3")


@triton.jit
def mm_right(a, b, SPLIT: tl.constexpr):
    """a @ b, a float32, b an input tile as it was given."""
    if SPLIT:
        ah, al = parts(a)
        return tl.dot(ah, b, tl.dot(al, b))
    else:
        return tl.dot(a, b.to(tl.float32), input_precision="tf32x3")


@triton.jit
def mm_both(a, b, SPLIT: tl.constexpr):
    """a @ b of two input tiles."""
    if SPLIT:
        return tl.dot(a, b)
    else:
        return tl.dot(a.to(tl.float32), b.to(tl.float32), input_precision="tf32x3")


@triton.jit
def over_time(mask, x, EXACT: tl.constexpr, SPLIT: tl.constexpr):
    """mask @ x: for each row the sum of the rows of x that the boolean mask [L, L] picks.

    EXACT: x is bfloat16 as it was given; otherwise float32, with SPLIT in two parts. That is enough for log
    decays: an error of 2^-16 of the sum matters only where the sum is large, and there its weight has gone.
    """
    if SPLIT:
        m = mask.to(tl.bfloat16)
        if EXACT:
            if x.shape[1] == NARROW:
                return together(tl.dot(m, beside(x, tl.zeros_like(x))))
            else:
                return tl.dot(m, x)
        else:
            return mm_left(m, x, SPLIT)
    else:
        return tl.dot(mask.to(tl.float32), x.to(tl.float32), input_precision="tf32x3")


@triton.jit
def level_sum(i, j, level):
    """[L, L] mask of the doubling level: which decays lie between step i and the middle of its block.

    A block of 2^(level+1) steps has its middle behind its left half. A step of the right half looks back
    to the middle, one of the left half ahead to it.
    """
    same = (i >> (level + 1)) == (j >> (level + 1))
    right_i = ((i >> level) & 1) == 1
    right_j = ((j >> level) & 1) == 1
    return same & (right_i == right_j) & ((right_i & (j < i)) | ((right_i == 0) & (j > i)))


@triton.jit
def level_pairs(i, j, level):
    """[L, L] mask of the pairs whose lowest common block is at `level`: i in its right half, j left."""
    same = (i >> (level + 1)) == (j >> (level + 1))
    return same & (((i >> level) & 1) == 1) & (((j >> level) & 1) == 0)
