"""The head and its cross entropy in one operator that never holds all logits.

    linear_cross_entropy(h, weight, targets, row_weights, penalty)

Rows are taken in blocks: a block's logits h_b W' are turned into their own gradient g in place, and
dh_b = g W and dW += g' h_b follow at once, so that one block of logits is all there is. The gradients are
made in the forward pass and only multiplied by the upstream gradient in the backward pass.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from .checks import check_device
from .dispatch import choose, function, register

_OP = "linear_cross_entropy"
_FLOATS = (torch.bfloat16, torch.float16, torch.float32, torch.float64)
_BLOCK = 1 << 24  # logits in a block: 256 rows of 65,536


def linear_cross_entropy(
    h: Tensor,
    weight: Tensor,
    targets: Tensor,
    row_weights: Tensor,
    penalty: Tensor | None = None,
    *,
    rows: int = 0,
    backend: str | None = None,
) -> Tensor:
    """sum_m row_weights_m * cross entropy of row m's logits h_m W': a scalar in float32 (or float64).

    h [M, D], weight W [V, D], targets [M] long (not read where the row's weight is 0), row_weights and
    penalty [M] float. penalty adds penalty_m * largest logit to the gradient at row m's largest logit (in
    equal parts where several share it) and nothing to the value: RWKV-LM's L2Wrap, for which it is
    1e-4 / (B T). Like the loss, that term scales with the upstream gradient.
    Under autocast the products run in its dtype and dW is summed in float32; softmax and loss are always
    float32 or wider. Gradients reach h and weight, once differentiable.
    rows: rows in a block (0: chosen by shape). Raises ValueError for wrong shapes, dtypes or devices.
    """
    compute = _check(h, weight, targets, row_weights, penalty)
    learn = torch.is_grad_enabled()
    needs = (learn and h.requires_grad, learn and weight.requires_grad)
    unfit = "the kernel does not compute in float64" if compute == torch.float64 else ""
    kernel = function(_OP, choose(_OP, backend, h.device, unfit))
    arguments = (h, weight, targets, row_weights, penalty, compute, needs, rows)
    if torch.is_autocast_enabled(h.device.type):
        with torch.autocast(h.device.type, enabled=False):
            return kernel(*arguments)
    return kernel(*arguments)


def _check(
    h: Tensor, weight: Tensor, targets: Tensor, row_weights: Tensor, penalty: Tensor | None
) -> torch.dtype:
    """The dtype of the products, once all arguments fit."""
    for name, x in (("h", h), ("weight", weight)):
        if x.dim() != 2 or x.dtype not in _FLOATS:
            raise ValueError(
                f"{_OP}: {name} is {x.dtype} of shape {list(x.shape)}; expected floats [rows, D]"
            )
    if h.shape[1] != weight.shape[1]:
        raise ValueError(f"{_OP}: h has rows of {h.shape[1]} but weight of {weight.shape[1]}")
    if targets.dtype != torch.int64:
        raise ValueError(f"{_OP}: targets is {targets.dtype}; use int64")
    for name, one in (("targets", targets), ("row_weights", row_weights), ("penalty", penalty)):
        if one is not None and (one.dim() != 1 or len(one) != len(h)):
            raise ValueError(f"{_OP}: {name} has shape {list(one.shape)}; expected [M] = [{len(h)}]")
    for name, other in (
        ("weight", weight),
        ("targets", targets),
        ("row_weights", row_weights),
        ("penalty", penalty),
    ):
        if other is not None:
            check_device(_OP, name, other, h)
    if torch.is_autocast_enabled(h.device.type) and torch.float64 not in (h.dtype, weight.dtype):
        return torch.get_autocast_dtype(h.device.type)
    if h.dtype != weight.dtype:
        raise ValueError(
            f"{_OP}: h is {h.dtype} but weight is {weight.dtype}; cast one of them or use autocast"
        )
    return h.dtype


def blocks(n_rows: int, most: int) -> Iterator[slice]:
    """Row blocks of nearly equal size, none above `most`: a short last block would waste a product."""
    count = max(1, -(-n_rows // most))
    for i in range(count):
        yield slice(n_rows * i // count, n_rows * (i + 1) // count)


def product_into(out: Tensor, a: Tensor, b: Tensor, *, add: bool, alpha: float = 1.0) -> None:
    """out = alpha a b, or out += alpha a b; a wider `out` is summed in its own dtype where torch can."""
    beta = 1 if add else 0
    if out.dtype == a.dtype:
        torch.addmm(out, a, b, beta=beta, alpha=alpha, out=out)
    elif out.is_cuda and out.dtype == torch.float32:
        torch.addmm(out, a, b, out_dtype=torch.float32, beta=beta, alpha=alpha, out=out)
    elif add:
        out.add_(a @ b, alpha=alpha)
    else:
        torch.mul(a @ b, alpha, out=out)


def plain(
    h: Tensor,
    weight: Tensor,
    targets: Tensor,
    row_weights: Tensor,
    penalty: Tensor | None,
    compute: torch.dtype,
    needs: tuple[bool, bool],
    rows: int,
) -> Tensor:
    """All logits at once and autograd's own gradients: the definition."""
    logits = F.linear(h.to(compute), weight.to(compute))
    wide = logits if compute == torch.float64 else logits.float()  # [M, V]
    at = torch.where(row_weights != 0, targets, 0)
    loss = (F.cross_entropy(wide, at, reduction="none") * row_weights.to(wide.dtype)).sum()
    if penalty is None:
        return loss
    term = (wide.amax(dim=-1).square() * penalty.to(wide.dtype)).sum() / 2
    return loss + (term - term.detach())


class _Blocks(torch.autograd.Function):
    """The block algorithm in PyTorch operators, for every device."""

    @staticmethod
    def forward(
        ctx: Any,
        h: Tensor,
        weight: Tensor,
        targets: Tensor,
        row_weights: Tensor,
        penalty: Tensor | None,
        compute: torch.dtype,
        needs: tuple[bool, bool],
        rows: int,
    ) -> Tensor:
        w = weight.to(compute)
        dh = torch.empty_like(h, memory_format=torch.contiguous_format) if needs[0] else None
        dw = torch.empty_like(weight, memory_format=torch.contiguous_format) if needs[1] else None
        losses = []
        for b in blocks(len(h), rows or max(1, _BLOCK // len(weight))):
            h_b = h[b].to(compute)
            p_b = None if penalty is None else penalty[b]
            loss, g = _loss_and_gradient(h_b @ w.t(), targets[b], row_weights[b], p_b, any(needs))
            losses.append(loss)
            if dh is not None:
                product_into(dh[b], g, w, add=False)
            if dw is not None:
                product_into(dw, g.t(), h_b, add=b.start > 0)
        ctx.save_for_backward(dh, dw)
        return torch.stack(losses).sum()

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor | None, ...]:
        dh, dw = ctx.saved_tensors
        scaled = (None if x is None else x * upstream.to(x.dtype) for x in (dh, dw))
        return (*scaled, None, None, None, None, None, None)


def _loss_and_gradient(
    logits: Tensor, targets: Tensor, row_weights: Tensor, penalty: Tensor | None, need: bool
) -> tuple[Tensor, Tensor]:
    """A block's loss, a scalar, and the gradient of its logits in their dtype (unused if not `need`)."""
    x = logits if logits.dtype == torch.float64 else logits.float()  # [R, V]
    w = row_weights.to(x.dtype).unsqueeze(1)  # [R, 1]
    at = torch.where(row_weights != 0, targets, 0).unsqueeze(1)  # [R, 1]
    log_p = torch.log_softmax(x, dim=1)
    loss = -(log_p.gather(1, at) * w).sum()
    if not need:
        return loss, logits
    g = log_p.exp_().mul_(w)
    g.scatter_(1, at, g.gather(1, at) - w)
    if penalty is not None:
        top = x.amax(dim=1, keepdim=True)
        ties = x == top
        share = penalty.to(x.dtype).unsqueeze(1) * top / ties.sum(dim=1, keepdim=True)
        g.add_(torch.where(ties, share, 0.0))
    return loss, g.to(logits.dtype)


register(_OP, reference=plain, torch=_Blocks.apply, triton="kernels.gpu.cross_entropy:linear_cross_entropy")
