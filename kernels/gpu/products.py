"""The products of one token in one launch: as many programs as it takes to keep all of memory busy.

For a few samples a program holds a few whole rows of its matrix in registers, read in one go, and takes
the samples one after another. The turned product, whose outputs lie side by side, has its own programs, a
few whole columns and one sample each. For more samples of 16-bit numbers a program walks along its rows, and
tensor cores multiply by all samples at once. The sums are float32 and in a fixed order, so within either way
the bits of a sample do not depend on the others.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.products import AFTER, plain

from .launch import cdiv, kernel, power_of_two
from .one_token import await_results, options, tanh

if TYPE_CHECKING:
    from kernels.products import Product

FEW = 8
"""Samples up to which the products of a token are one kernel, whatever the numbers are."""
MANY = 64
"""The same for 16-bit numbers."""

_WIDEST = 16384  # the longest row of a matrix that a program holds
_HELD = 8192  # numbers of a matrix that a program of 128 threads holds
_HELD_TURNED = 16384  # and of a turned one, of which there are few
# Samples that are faster one after another than as a tile of 16. 24 layers of 2,048 and the head, bf16, on an
# H100: a token of 1, 2, 3, 4 and 8 samples takes 1.39, 1.58, 1.83, 2.04 and 3.10 ms one after another, as a
# tile 1.71, 1.85, 1.85, 1.87 and 1.97; of 16, 32 and 64 samples 1.91, 2.42 and 2.89. The matrix library takes
# 2.40 to 2.64 up to 16 samples, then 2.87 and 3.31. Asking for the rows before the kernel before has ended
# (prefetch into L2) made no difference.
_ALONE = 3
# Samples, padded -> rows of a matrix a program, numbers of a row a turn, turns in flight, warps.
_TILES = {16: (16, 256, 6, 2), 32: (16, 256, 4, 2), 64: (32, 128, 4, 4)}
_NUMBERS = [f"{name}{i}" for name in ("out", "row") for i in range(4)] + ["row_turned"]


@triton.jit
def _followed(value, after):
    """What follows a product, by its number in AFTER."""
    above = tl.maximum(value, 0.0)
    return tl.where(after == 2, above * above, tl.where(after == 1, tanh(value), value))


@triton.jit
def _turned(
    x, w, y, block, sample, width, across, row, batch,
    THEN: tl.constexpr, WIDTH: tl.constexpr, ACROSS: tl.constexpr, EARLY: tl.constexpr,
):  # fmt: skip
    """y [B, across] of some columns for one sample: x[row] W, W [width, across]."""
    j = block * ACROSS + tl.arange(0, ACROSS)
    i = tl.arange(0, WIDTH)
    inside = (i < width)[:, None]
    spot = w + i[:, None] * across + j[None, :]
    tile = tl.load(spot, mask=inside & (j < across)[None, :], other=0)  # [WIDTH, ACROSS]
    await_results(EARLY)
    part = tl.load(x + (row * batch + sample).to(tl.int64) * width + i[:, None], mask=inside, other=0)
    total = tl.sum(part.to(tl.float32) * tile.to(tl.float32), 0)
    kind: tl.constexpr = y.dtype.element_ty
    value = _followed(total.to(kind).to(tl.float32), THEN)
    tl.store(y + sample.to(tl.int64) * across + j, value.to(kind), mask=j < across)


@triton.jit
def _chosen(
    program, w0, w1, w2, w3, y0, y1, y2, y3, out0, out1, out2, out3, row0, row1, row2, row3,
    AFTER0: tl.constexpr, AFTER1: tl.constexpr, AFTER2: tl.constexpr, AFTER3: tl.constexpr,
    COUNT: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """What a program works at: a matrix, its output, D_out, the row of x, what follows, and which rows."""
    w, y, out, row = w0, y0, out0, row0
    after = tl.full([], AFTER0, tl.int32)
    begin = tl.full([], 0, tl.int32)
    end = (out0 + ROWS - 1) // ROWS
    if COUNT > 1:
        if program >= end:
            w, y, out, row, begin = w1, y1, out1, row1, end
            after = tl.full([], AFTER1, tl.int32)
        end += (out1 + ROWS - 1) // ROWS
    if COUNT > 2:
        if program >= end:
            w, y, out, row, begin = w2, y2, out2, row2, end
            after = tl.full([], AFTER2, tl.int32)
        end += (out2 + ROWS - 1) // ROWS
    if COUNT > 3:
        if program >= end:
            w, y, out, row, begin = w3, y3, out3, row3, end
            after = tl.full([], AFTER3, tl.int32)
    return w, y, out, row, after, (program - begin) * ROWS + tl.arange(0, ROWS)


@kernel
@triton.jit(do_not_specialize=_NUMBERS)
def _products(
    x, w0, w1, w2, w3, turned, y0, y1, y2, y3, y_turned, width, batch,
    out0, out1, out2, out3, across, row0, row1, row2, row3, row_turned,
    AFTER0: tl.constexpr, AFTER1: tl.constexpr, AFTER2: tl.constexpr, AFTER3: tl.constexpr,
    THEN: tl.constexpr, COUNT: tl.constexpr, TURNED: tl.constexpr, EARLY: tl.constexpr,
    BATCH: tl.constexpr, ROWS: tl.constexpr, WIDTH: tl.constexpr, ACROSS: tl.constexpr,
):  # fmt: skip
    program = tl.program_id(0)
    if TURNED:
        blocks = (across + ACROSS - 1) // ACROSS
        if program < blocks * batch:
            _turned(
                x, turned, y_turned, program // batch, program % batch, width, across, row_turned, batch,
                THEN, WIDTH, ACROSS, EARLY,
            )  # fmt: skip
            return
        program -= blocks * batch
    w, y, out, row, after, j = _chosen(
        program, w0, w1, w2, w3, y0, y1, y2, y3, out0, out1, out2, out3, row0, row1, row2, row3,
        AFTER0, AFTER1, AFTER2, AFTER3, COUNT, ROWS,
    )  # fmt: skip
    i = tl.arange(0, WIDTH)
    spot = w + j[:, None].to(tl.int64) * width + i[None, :]
    tile = tl.load(spot, mask=(j < out)[:, None] & (i < width)[None, :], other=0)  # [ROWS, WIDTH]
    await_results(EARLY)
    kind: tl.constexpr = y.dtype.element_ty
    wide = tile.to(tl.float32)
    for sample in tl.static_range(BATCH):
        at = (row * batch + sample).to(tl.int64) * width
        # A row of two dimensions, in the layout of the matrix: nothing has to be moved between threads.
        part = tl.load(x + at + i[None, :], mask=(i < width)[None, :], other=0)
        value = tl.sum(wide * part.to(tl.float32), 1).to(kind).to(tl.float32)
        tl.store(y + sample * out.to(tl.int64) + j, _followed(value, after).to(kind), mask=j < out)


@triton.jit
def _tile(
    x, w, y, out, row, after, j, width, batch,
    TURNED: tl.constexpr, BATCH: tl.constexpr, STEP: tl.constexpr, STAGES: tl.constexpr, EARLY: tl.constexpr,
):  # fmt: skip
    """y [B, D_out] at columns j, of all samples: x[row] W by tensor cores, STEP numbers of a sum a turn."""
    await_results(EARLY)
    s = tl.arange(0, BATCH)[:, None]
    total = tl.zeros((BATCH, j.shape[0]), tl.float32)
    for begin in tl.range(0, width, STEP, num_stages=STAGES):
        i = begin + tl.arange(0, STEP)
        inside = i < width
        at = x + (row * batch + s).to(tl.int64) * width + i[None, :]
        part = tl.load(at, mask=(s < batch) & inside[None, :], other=0)  # [BATCH, STEP]
        spot = w + i[:, None].to(tl.int64) * out + j[None, :] if TURNED else (
            w + j[None, :].to(tl.int64) * width + i[:, None]
        )  # fmt: skip
        tile = tl.load(spot, mask=inside[:, None] & (j < out)[None, :], other=0)  # [STEP, ROWS]
        total = tl.dot(part, tile, total)
    kind: tl.constexpr = y.dtype.element_ty
    value = _followed(total.to(kind).to(tl.float32), after).to(kind)
    tl.store(y + s.to(tl.int64) * out + j[None, :], value, mask=(s < batch) & (j < out)[None, :])


@kernel
@triton.jit(do_not_specialize=_NUMBERS)
def _products_of_many(
    x, w0, w1, w2, w3, turned, y0, y1, y2, y3, y_turned, width, batch,
    out0, out1, out2, out3, across, row0, row1, row2, row3, row_turned,
    AFTER0: tl.constexpr, AFTER1: tl.constexpr, AFTER2: tl.constexpr, AFTER3: tl.constexpr,
    THEN: tl.constexpr, COUNT: tl.constexpr, TURNED: tl.constexpr, EARLY: tl.constexpr,
    BATCH: tl.constexpr, ROWS: tl.constexpr, STEP: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """The same, each program for all samples at once."""
    program = tl.program_id(0)
    if TURNED:
        blocks = (across + ROWS - 1) // ROWS
        if program < blocks:
            after = tl.full([], THEN, tl.int32)
            j = program * ROWS + tl.arange(0, ROWS)
            _tile(
                x, turned, y_turned, across, row_turned, after, j, width, batch,
                True, BATCH, STEP, STAGES, EARLY,
            )  # fmt: skip
            return
        program -= blocks
    w, y, out, row, after, j = _chosen(
        program, w0, w1, w2, w3, y0, y1, y2, y3, out0, out1, out2, out3, row0, row1, row2, row3,
        AFTER0, AFTER1, AFTER2, AFTER3, COUNT, ROWS,
    )  # fmt: skip
    _tile(x, w, y, out, row, after, j, width, batch, False, BATCH, STEP, STAGES, EARLY)


def products_step(x: Tensor, products: Sequence[Product]) -> tuple[Tensor, ...]:
    """As `kernels.products.products_step`; the matrix library has more samples, and longer float32 rows."""
    batch, width = x.shape[1:]
    together = x.dtype != torch.float32 and _ALONE < batch <= MANY
    if not together and (batch > FEW or width > _WIDEST):
        return plain(x, products)
    x = x.contiguous()
    outputs = [torch.empty(batch, one.width, dtype=x.dtype, device=x.device) for one in products]
    straight = [i for i, one in enumerate(products) if not one.turned]
    side = next((i for i, one in enumerate(products) if one.turned), 0)
    # Four places and one turned; those left over point to a product that is there, and are not read.
    places = [*[*straight, *(4 * [0])][:4], side]
    given = [products[i] for i in places]
    weights = [one.weight.to(x.dtype).contiguous() for one in given]
    made = any(weight is not one.weight for weight, one in zip(weights, given, strict=True))
    turned = len(straight) < len(products)
    lines, columns, sizes, warps = _sizes(batch, width, together)
    programs = sum(cdiv(products[i].width, lines) for i in straight)
    programs += cdiv(products[side].width, columns) * (1 if together else batch) if turned else 0
    (_products_of_many if together else _products)[(programs,)](
        x, *weights, *(outputs[i] for i in places), width, batch,
        *(one.width for one in given), *(one.row for one in given),
        *(AFTER.index(one.then) for one in given),
        COUNT=len(straight), TURNED=turned, **sizes, **options(warps, ahead=not made),
    )  # fmt: skip
    return tuple(outputs)


def _sizes(batch: int, width: int, together: bool) -> tuple[int, int, dict[str, int], int]:
    """Rows of a matrix a program, columns of the turned one, the sizes the kernel takes, and its warps."""
    if together:
        samples = max(16, power_of_two(batch))
        rows, step, stages, warps = _TILES[samples]
        return rows, rows, {"BATCH": samples, "ROWS": rows, "STEP": step, "STAGES": stages}, warps
    padded = power_of_two(width)
    lines, columns = (max(1, min(16, size // padded)) for size in (_HELD, _HELD_TURNED))
    return lines, columns, {"BATCH": batch, "ROWS": lines, "WIDTH": padded, "ACROSS": columns}, 4
