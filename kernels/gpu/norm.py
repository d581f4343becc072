"""Group norm of each head times its gate, on a GPU.

Statistics are formed in float32 from a head's channels in registers (the mean first, then the centred
squares), and formed again in the backward pass instead of being kept. Gradients of weight and bias are
summed per program in float32 and added by a second step in fixed order: no atomics. Definition:
kernels/norm.py.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.gpu.lerp import parts
from kernels.gpu.ops import Function, Launch, operator

from .launch import cdiv, kernel, power_of_two

TOKENS = 8
CHANNELS = 256
"""A tile: so many tokens of so many channels (whole heads)."""


@triton.jit
def _normed(y, N, NP: tl.constexpr, eps):
    """((y - mean) / deviation over the last axis, 1 / deviation); padding of the axis stays zero."""
    real = (tl.arange(0, NP) < N)[None, None, :]
    centred = tl.where(real, y - (tl.sum(y, axis=2) / N)[:, :, None], 0.0)
    scale = 1.0 / tl.sqrt(tl.sum(centred * centred, axis=2) / N + eps)
    return centred * scale[:, :, None], scale


@kernel
@triton.jit
def _head_norm(y, gate, weight, bias, out, rows, H, N, eps, TB: tl.constexpr, HB: tl.constexpr,
               NP: tl.constexpr):  # fmt: skip
    row = tl.program_id(0) * TB + tl.arange(0, TB)
    channel = (tl.program_id(1) * HB + tl.arange(0, HB))[:, None] * N + tl.arange(0, NP)[None, :]  # [HB, NP]
    real = (channel < H * N) & (tl.arange(0, NP) < N)[None, :]
    inside = (row < rows)[:, None, None] & real[None, :, :]
    at = row.to(tl.int64)[:, None, None] * (H * N) + channel[None, :, :]
    normed, _ = _normed(tl.load(y + at, mask=inside, other=0.0).to(tl.float32), N, NP, eps)
    w = tl.load(weight + channel, mask=real, other=0.0).to(tl.float32)[None, :, :]
    b = tl.load(bias + channel, mask=real, other=0.0).to(tl.float32)[None, :, :]
    g = tl.load(gate + at, mask=inside, other=0.0).to(tl.float32)
    result = (normed * w + b) * g / (1.0 + tl.exp(-g))
    tl.store(out + at, result.to(out.dtype.element_ty), mask=inside)


@kernel
@triton.jit
def _head_norm_grad(dout, y, gate, weight, bias, dy, dgate, dweight, dbias, rows, H, N, eps, turns,
                    TB: tl.constexpr, HB: tl.constexpr, NP: tl.constexpr):  # fmt: skip
    channel = (tl.program_id(1) * HB + tl.arange(0, HB))[:, None] * N + tl.arange(0, NP)[None, :]  # [HB, NP]
    real = (channel < H * N) & (tl.arange(0, NP) < N)[None, :]
    w = tl.load(weight + channel, mask=real, other=0.0).to(tl.float32)[None, :, :]
    b = tl.load(bias + channel, mask=real, other=0.0).to(tl.float32)[None, :, :]
    sum_w = tl.zeros((TB, HB, NP), tl.float32)
    sum_b = tl.zeros((TB, HB, NP), tl.float32)
    for turn in range(turns):
        row = (tl.program_id(0) * turns + turn) * TB + tl.arange(0, TB)
        inside = (row < rows)[:, None, None] & real[None, :, :]
        at = row.to(tl.int64)[:, None, None] * (H * N) + channel[None, :, :]
        normed, scale = _normed(tl.load(y + at, mask=inside, other=0.0).to(tl.float32), N, NP, eps)
        g = tl.load(gate + at, mask=inside, other=0.0).to(tl.float32)
        d = tl.load(dout + at, mask=inside, other=0.0).to(tl.float32)
        s = 1.0 / (1.0 + tl.exp(-g))
        dg = d * (normed * w + b) * s * (1.0 + g * (1.0 - s))
        tl.store(dgate + at, dg.to(dgate.dtype.element_ty), mask=inside)
        d *= g * s  # gradient of the norm's output
        sum_w += d * normed
        sum_b += d
        d *= w
        mean = (tl.sum(d, axis=2) / N)[:, :, None]
        along = (tl.sum(d * normed, axis=2) / N)[:, :, None]
        d = (d - mean - normed * along) * scale[:, :, None]
        tl.store(dy + at, d.to(dy.dtype.element_ty), mask=inside)
    at = tl.program_id(0).to(tl.int64) * (H * N) + channel
    tl.store(dweight + at, tl.sum(sum_w, axis=0), mask=real)
    tl.store(dbias + at, tl.sum(sum_b, axis=0), mask=real)


def _launch(y: Tensor, tokens: int) -> tuple[int, int, dict[str, Any]]:
    """(rows, tiles across the heads, tile) of y [B, T, H, N]."""
    batch, time, heads, size = y.shape
    padded = power_of_two(size)
    group = max(1, min(CHANNELS // padded, power_of_two(heads)))
    tile = {"N": size, "TB": tokens, "HB": group, "NP": padded, "num_warps": 4}
    return batch * time, cdiv(heads, group), tile


def _forward(y: Tensor, gate: Tensor, weight: Tensor, bias: Tensor, eps: float, dtype: torch.dtype) -> Tensor:
    y, gate, weight, bias = (t.contiguous() for t in (y, gate, weight, bias))
    rows, tiles, tile = _launch(y, TOKENS)
    out = torch.empty_like(gate, dtype=dtype)
    grid = (cdiv(rows, TOKENS), tiles)
    _head_norm[grid](y, gate, weight, bias, out, rows, y.shape[2], eps=eps, **tile)
    return out


def _forward_fake(
    y: Tensor, gate: Tensor, weight: Tensor, bias: Tensor, eps: float, dtype: torch.dtype
) -> Tensor:
    return gate.new_empty(gate.shape, dtype=dtype)


def _backward(
    dout: Tensor, y: Tensor, gate: Tensor, weight: Tensor, bias: Tensor, eps: float
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients of y, gate, weight and bias."""
    dout, y, gate, weight, bias = (t.contiguous() for t in (dout, y, gate, weight, bias))
    rows, tiles, tile = _launch(y, TOKENS)
    programs, turns = parts(rows, TOKENS, tiles)
    dy, dgate = torch.empty_like(y), torch.empty_like(gate)
    sums = torch.empty(2, programs, weight.shape[0], dtype=torch.float32, device=y.device)
    _head_norm_grad[(programs, tiles)](
        dout, y, gate, weight, bias, dy, dgate, sums[0], sums[1], rows, y.shape[2], eps=eps, turns=turns,
        **tile,
    )  # fmt: skip
    dweight, dbias = sums.sum(1).unbind()
    return dy, dgate, dweight.to(weight.dtype, copy=True), dbias.to(bias.dtype, copy=True)


def _backward_fake(
    dout: Tensor, y: Tensor, gate: Tensor, weight: Tensor, bias: Tensor, eps: float
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    dy, dgate, dweight, dbias = (t.new_empty(t.shape) for t in (y, gate, weight, bias))
    return dy, dgate, dweight, dbias


def _keep(ctx: Any, inputs: Any, output: Any) -> None:
    *tensors, ctx.eps, _ = inputs
    ctx.save_for_backward(*tensors)


def _gradients(ctx: Any, run: Function, dout: Tensor) -> tuple[Any, ...]:
    found = run(dout, *ctx.saved_tensors, ctx.eps)
    return (*found, None, None)


_call = operator(
    "head_norm",
    Launch(
        _forward,
        _forward_fake,
        "(Tensor y, Tensor gate, Tensor weight, Tensor bias, float eps, ScalarType dtype) -> Tensor",
    ),
    Launch(
        _backward,
        _backward_fake,
        "(Tensor dout, Tensor y, Tensor gate, Tensor weight, Tensor bias,"
        " float eps) -> (Tensor, Tensor, Tensor, Tensor)",
    ),
    keep=_keep,
    gradients=_gradients,
)


def head_norm(
    y: Tensor, gate: Tensor, weight: Tensor, bias: Tensor, eps: float, dtype: torch.dtype
) -> Tensor:
    """y [B, T, H, N], gate [B, T, H*N], weight and bias [H*N] -> [B, T, H*N] of `dtype`."""
    return _call(y, gate, weight, bias, eps, dtype)
