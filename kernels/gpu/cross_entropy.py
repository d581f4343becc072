"""Linear cross entropy on a GPU: one kernel turns a block of logits into its gradient in place.

The three products of a block stay with cuBLAS, which no kernel of ours would beat; what is fused is all
between them. One program reads a row of logits twice (running maximum, sum and number of maxima; then the
gradient, mostly from L2) and writes it once: 6 bytes a logit in bf16 instead of the 26 or so of a float32
copy, log-softmax, its backward pass and the casts.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.cross_entropy import blocks, product_into

from .launch import cdiv, kernel, power_of_two

_ROW_BLOCK = 8192  # logits a program holds at a time: 16 in each of 512 threads
_SCALE_BLOCK = 8192
# Summing into dW reads and writes all of it once per block, 1 GiB for 65,536 x 2,048 in float32: that is as
# long as the block's products at 512 rows, an eighth at 4,096. Forward and backward of 16,384 rows took
# 27.6 ms on an H100 in blocks of 1,024 rows, 22.5 of 2,048 and 21.8 of 4,096 (512 MiB of logits in bf16).
_LOGITS = 4096 * 65536


@kernel
@triton.jit
def _rows(
    x_ptr,
    target_ptr,
    weight_ptr,
    penalty_ptr,
    loss_ptr,
    stride,
    n_columns,
    boost,
    GRADIENT: tl.constexpr,
    PENALTY: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """One row [V]: its weighted loss, and its logits overwritten by boost times their gradient."""
    row = tl.program_id(0).to(tl.int64)
    x_ptr += row * stride
    target = tl.load(target_ptr + row)
    weight = tl.load(weight_ptr + row).to(tl.float32)
    known = (target >= 0) & (target < n_columns)
    # A target outside the vocabulary makes the loss NaN: an error without asking the host.
    at_target = tl.load(x_ptr + target, mask=known, other=float("nan")).to(tl.float32)
    columns = tl.arange(0, BLOCK)
    top = float("-inf")
    total = 0.0
    ties = 0.0
    for start in range(0, n_columns, BLOCK):
        inside = start + columns < n_columns
        x = tl.load(x_ptr + start + columns, mask=inside, other=float("-inf")).to(tl.float32)
        new = tl.maximum(top, tl.max(x, 0))
        total = total * tl.exp(top - new) + tl.sum(tl.exp(x - new), 0)
        if PENALTY:
            ties = tl.where(new > top, 0.0, ties) + tl.sum(tl.where(x == new, 1.0, 0.0), 0)
        top = new
    # Differences to the maximum first: a sum like top + log(total) would round what exp then magnifies.
    loss = weight * (top - at_target + tl.log(total))
    tl.store(loss_ptr + row, tl.where(weight != 0, loss, 0.0))
    if GRADIENT:
        scale = weight / total
        share = 0.0
        if PENALTY:
            share = tl.load(penalty_ptr + row).to(tl.float32) * top / ties
        for start in range(0, n_columns, BLOCK):
            inside = start + columns < n_columns
            x = tl.load(x_ptr + start + columns, mask=inside, other=float("-inf")).to(tl.float32)
            g = tl.exp(x - top) * scale - tl.where(start + columns == target, weight, 0.0)
            if PENALTY:
                g += tl.where(x == top, share, 0.0)
            g *= boost
            tl.store(x_ptr + start + columns, g.to(x_ptr.dtype.element_ty), mask=inside)


@kernel
@triton.jit
def _scale(x_ptr, factor_ptr, n, BLOCK: tl.constexpr):
    """x [n] *= factor in place; nothing is read or written where the factor is 1."""
    factor = tl.load(factor_ptr).to(tl.float32)
    if factor != 1.0:
        at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
        x = tl.load(x_ptr + at, mask=at < n).to(tl.float32) * factor
        tl.store(x_ptr + at, x.to(x_ptr.dtype.element_ty), mask=at < n)


@torch.library.custom_op("visualrwkv::linear_cross_entropy", mutates_args=())
def _forward(
    h: Tensor,
    weight: Tensor,
    targets: Tensor,
    row_weights: Tensor,
    penalty: Tensor | None,
    compute: torch.dtype,
    need_h: bool,
    need_weight: bool,
    rows: int,
) -> tuple[Tensor, Tensor, Tensor]:
    """(loss, dh [M, D] in h's dtype, dW [V, D] in weight's dtype); a gradient nobody needs is [0]."""
    n_rows, n_columns = len(h), len(weight)
    targets, row_weights = targets.contiguous(), row_weights.contiguous()
    penalty = None if penalty is None else penalty.contiguous()
    h_c, w_c = h.to(compute), weight.to(compute)
    dh = h.new_empty(h.shape if need_h else 0)
    cuts = list(blocks(n_rows, rows or max(128, _LOGITS // n_columns)))
    dw = weight.new_empty(weight.shape if need_weight else 0, dtype=_sum_dtype(weight, len(cuts)))
    most = max(cut.stop - cut.start for cut in cuts)
    # Rows begin on 16 bytes whatever V is: cuBLAS and the kernel both want that.
    logits = h.new_empty((most, -(-n_columns // 8) * 8), dtype=compute)[:, :n_columns]
    losses = row_weights.new_empty(n_rows, dtype=torch.float32)
    # fp16 gradients of 1/M each would underflow; the products take the factor out again.
    boost = 2.0 ** (n_rows - 1).bit_length() if compute == torch.float16 else 1.0
    for cut in cuts:
        x = logits[: cut.stop - cut.start]
        product_into(x, h_c[cut], w_c.t(), add=False)
        p = None if penalty is None else penalty[cut]
        _launch(x, targets[cut], row_weights[cut], p, losses[cut], boost, need_h or need_weight)
        if need_h:
            product_into(dh[cut], x, w_c, add=False, alpha=1 / boost)
        if need_weight:
            product_into(dw, x.t(), h_c[cut], add=cut.start > 0, alpha=1 / boost)
    return losses.sum(), dh, dw.to(weight.dtype)


def _sum_dtype(weight: Tensor, n_blocks: int) -> torch.dtype:
    """float32 for sums over blocks: rounding a bf16 dW once per block costs as many rounding errors."""
    return torch.float32 if n_blocks > 1 else weight.dtype


def _launch(
    x: Tensor,
    targets: Tensor,
    row_weights: Tensor,
    penalty: Tensor | None,
    losses: Tensor,
    boost: float,
    gradient: bool,
) -> None:
    if not len(x):
        return
    block = min(_ROW_BLOCK, power_of_two(x.shape[1]))
    _rows[(len(x),)](
        x,
        targets,
        row_weights,
        row_weights if penalty is None else penalty,
        losses,
        x.stride(0),
        x.shape[1],
        boost,
        GRADIENT=gradient,
        PENALTY=penalty is not None,
        BLOCK=block,
        num_warps=16 if block > 2048 else 4,
    )


@_forward.register_fake
def _(
    h: Tensor,
    weight: Tensor,
    targets: Tensor,
    row_weights: Tensor,
    penalty: Tensor | None,
    compute: torch.dtype,
    need_h: bool,
    need_weight: bool,
    rows: int,
) -> tuple[Tensor, Tensor, Tensor]:
    loss = h.new_empty((), dtype=torch.float32)
    return loss, h.new_empty(h.shape if need_h else 0), weight.new_empty(weight.shape if need_weight else 0)


def _keep(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor]) -> None:
    _, dh, dw = output
    ctx.mark_non_differentiable(dh, dw)
    ctx.set_materialize_grads(False)  # zeros for dh and dW would be as large as they are
    ctx.save_for_backward(dh, dw)
    ctx.needs = inputs[6:8]


def _backward(ctx: Any, upstream: Tensor | None, *_: None) -> tuple[Tensor | None, ...]:
    """Scales in place: dW is the largest tensor here, and a second one would be the peak.

    A second walk through the same graph (retain_graph) is refused by autograd's own version check.
    """
    found: list[Tensor | None] = [None] * 9
    for i, (x, need) in enumerate(zip(ctx.saved_tensors, ctx.needs, strict=True)):
        if need and upstream is not None:
            found[i] = _scaled(x, upstream)
    return tuple(found)


def _scaled(x: Tensor, factor: Tensor) -> Tensor:
    if type(x) is not Tensor:  # being traced by torch.compile, which reuses memory on its own
        return x * factor.to(x.dtype)
    if x.numel():
        grid = (cdiv(x.numel(), _SCALE_BLOCK),)
        _scale[grid](x, factor, x.numel(), BLOCK=_SCALE_BLOCK, num_warps=8)
    torch.autograd.graph.increment_version(x)
    return x


_forward.register_autograd(_backward, setup_context=_keep)


def linear_cross_entropy(
    h: Tensor,
    weight: Tensor,
    targets: Tensor,
    row_weights: Tensor,
    penalty: Tensor | None,
    compute: torch.dtype,
    needs: tuple[bool, bool],
    rows: int,
) -> Tensor:
    """The `triton` backend of `kernels.cross_entropy.linear_cross_entropy`."""
    loss, _, _ = _forward(h, weight, targets, row_weights, penalty, compute, *needs, rows)
    return loss
