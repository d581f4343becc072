"""The products of one token in one launch: as many programs as it takes to keep all of memory busy.

A program of an ordinary product holds a few whole rows of its matrix in registers, read in one go, and then
takes the samples one after another. The turned product, whose outputs lie side by side, has its own programs,
a few whole columns and one sample each. The sums are float32 and in a fixed order, so the bits of a sample do
not depend on the others.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.products import AFTER, plain

from .one_token import await_results, options, tanh

if TYPE_CHECKING:
    from kernels.products import Product

FEW = 8
"""Samples up to which the products of a token are one kernel."""

_WIDEST = 16384  # the longest row of a matrix that a program holds
_TILE = 8192  # numbers of a matrix that a program of 128 threads holds
_TURNED = 16384  # and of a turned one, of which there are few


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


@triton.jit(do_not_specialize=[f"{name}{i}" for name in ("out", "row") for i in range(4)] + ["row_turned"])
def _products(
    x, w0, w1, w2, w3, turned, y0, y1, y2, y3, y_turned, width, batch,
    out0, out1, out2, out3, across, row0, row1, row2, row3, row_turned,
    AFTER0: tl.constexpr, AFTER1: tl.constexpr, AFTER2: tl.constexpr, AFTER3: tl.constexpr,
    THEN: tl.constexpr, COUNT: tl.constexpr, BATCH: tl.constexpr, ROWS: tl.constexpr, WIDTH: tl.constexpr,
    TURNED: tl.constexpr, ACROSS: tl.constexpr, EARLY: tl.constexpr,
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
    j = (program - begin) * ROWS + tl.arange(0, ROWS)
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


def products_step(x: Tensor, products: Sequence[Product]) -> tuple[Tensor, ...]:
    """As `kernels.products.products_step`; the matrix library has more samples, and longer rows."""
    batch, width = x.shape[1:]
    if batch > FEW or width > _WIDEST:
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
    padded = triton.next_power_of_2(width)
    lines, columns = (max(1, min(16, size // padded)) for size in (_TILE, _TURNED))
    turned = len(straight) < len(products)
    programs = sum(triton.cdiv(products[i].width, lines) for i in straight)
    programs += triton.cdiv(products[side].width, columns) * batch if turned else 0
    _products[(programs,)](
        x, *weights, *(outputs[i] for i in places), width, batch,
        *(one.width for one in given), *(one.row for one in given),
        *(AFTER.index(one.then) for one in given),
        COUNT=len(straight), BATCH=batch, ROWS=lines, WIDTH=padded,
        TURNED=turned, ACROSS=columns, **options(4, ahead=not made),
    )  # fmt: skip
    return tuple(outputs)
