"""Pointwise formulas around the recurrences on a GPU, each with its backward pass in one kernel.

Definitions: kernels/pointwise.py. Everything is computed in float32 and rounded once.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.gpu.lerp import parts
from kernels.gpu.ops import Function, Launch, operator

from .launch import cdiv, kernel

BLOCK = {"BLOCK": 2048, "num_warps": 4}
TILE = {"TB": 16, "DT": 128, "num_warps": 4}


@kernel
@triton.jit
def _relu_squared(x, out, n, BLOCK: tl.constexpr):
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    value = tl.maximum(tl.load(x + at, mask=at < n, other=0.0).to(tl.float32), 0.0)
    tl.store(out + at, (value * value).to(out.dtype.element_ty), mask=at < n)


@kernel
@triton.jit
def _relu_squared_grad(dout, x, dx, n, BLOCK: tl.constexpr):
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    value = tl.maximum(tl.load(x + at, mask=at < n, other=0.0).to(tl.float32), 0.0)
    d = tl.load(dout + at, mask=at < n, other=0.0).to(tl.float32)
    tl.store(dx + at, (2.0 * value * d).to(dx.dtype.element_ty), mask=at < n)


@kernel
@triton.jit
def _sigmoid_gate(gate, x, out, n, BLOCK: tl.constexpr):
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    g = tl.load(gate + at, mask=at < n, other=0.0).to(tl.float32)
    value = tl.load(x + at, mask=at < n, other=0.0).to(tl.float32)
    tl.store(out + at, (value / (1.0 + tl.exp(-g))).to(out.dtype.element_ty), mask=at < n)


@kernel
@triton.jit
def _sigmoid_gate_grad(dout, gate, x, dgate, dx, n, BLOCK: tl.constexpr):
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    g = tl.load(gate + at, mask=at < n, other=0.0).to(tl.float32)
    value = tl.load(x + at, mask=at < n, other=0.0).to(tl.float32)
    d = tl.load(dout + at, mask=at < n, other=0.0).to(tl.float32)
    s = 1.0 / (1.0 + tl.exp(-g))
    tl.store(dx + at, (d * s).to(dx.dtype.element_ty), mask=at < n)
    tl.store(dgate + at, (d * value * s * (1.0 - s)).to(dgate.dtype.element_ty), mask=at < n)


@kernel
@triton.jit
def _log_decay(base, shift, out, rows, D, TB: tl.constexpr, DT: tl.constexpr):
    row = tl.program_id(0) * TB + tl.arange(0, TB)
    col = tl.program_id(1) * DT + tl.arange(0, DT)
    inside = (row < rows)[:, None] & (col < D)[None, :]
    at = row.to(tl.int64)[:, None] * D + col[None, :]
    start = tl.load(base + col, mask=col < D, other=0.0).to(tl.float32)
    value = tl.load(shift + at, mask=inside, other=0.0).to(tl.float32) + start[None, :]
    tl.store(out + at, -tl.exp(value), mask=inside)


@kernel
@triton.jit
def _log_decay_grad(dout, out, dshift, partial, rows, D, turns, TB: tl.constexpr, DT: tl.constexpr):
    col = tl.program_id(1) * DT + tl.arange(0, DT)
    sums = tl.zeros((TB, DT), tl.float32)
    for turn in range(turns):
        row = (tl.program_id(0) * turns + turn) * TB + tl.arange(0, TB)
        inside = (row < rows)[:, None] & (col < D)[None, :]
        at = row.to(tl.int64)[:, None] * D + col[None, :]
        d = tl.load(dout + at, mask=inside, other=0.0).to(tl.float32)
        d *= tl.load(out + at, mask=inside, other=0.0)
        tl.store(dshift + at, d.to(dshift.dtype.element_ty), mask=inside)
        sums += d
    tl.store(partial + tl.program_id(0).to(tl.int64) * D + col, tl.sum(sums, axis=0), mask=col < D)


def _blocks(x: Tensor) -> tuple[int]:
    return (cdiv(x.numel(), BLOCK["BLOCK"]),)


def _relu_forward(x: Tensor, dtype: torch.dtype) -> Tensor:
    x = x.contiguous()
    out = torch.empty_like(x, dtype=dtype)
    _relu_squared[_blocks(x)](x, out, x.numel(), **BLOCK)
    return out


def _relu_forward_fake(x: Tensor, dtype: torch.dtype) -> Tensor:
    return x.new_empty(x.shape, dtype=dtype)


def _relu_backward(dout: Tensor, x: Tensor) -> Tensor:
    dout, x = dout.contiguous(), x.contiguous()
    dx = torch.empty_like(x)
    _relu_squared_grad[_blocks(x)](dout, x, dx, x.numel(), **BLOCK)
    return dx


def _relu_backward_fake(dout: Tensor, x: Tensor) -> Tensor:
    return x.new_empty(x.shape)


def _relu_keep(ctx: Any, inputs: Any, output: Any) -> None:
    ctx.save_for_backward(inputs[0])


def _relu_gradients(ctx: Any, run: Function, dout: Tensor) -> tuple[Any, ...]:
    return run(dout, *ctx.saved_tensors), None


_relu_call = operator(
    "relu_squared",
    Launch(_relu_forward, _relu_forward_fake, "(Tensor x, ScalarType dtype) -> Tensor"),
    Launch(_relu_backward, _relu_backward_fake, "(Tensor dout, Tensor x) -> Tensor"),
    keep=_relu_keep,
    gradients=_relu_gradients,
)


def _gate_forward(gate: Tensor, x: Tensor, dtype: torch.dtype) -> Tensor:
    gate, x = gate.contiguous(), x.contiguous()
    out = torch.empty_like(x, dtype=dtype)
    _sigmoid_gate[_blocks(x)](gate, x, out, x.numel(), **BLOCK)
    return out


def _gate_forward_fake(gate: Tensor, x: Tensor, dtype: torch.dtype) -> Tensor:
    return x.new_empty(x.shape, dtype=dtype)


def _gate_backward(dout: Tensor, gate: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
    """Gradients of gate and x."""
    dout, gate, x = dout.contiguous(), gate.contiguous(), x.contiguous()
    dgate, dx = torch.empty_like(gate), torch.empty_like(x)
    _sigmoid_gate_grad[_blocks(x)](dout, gate, x, dgate, dx, x.numel(), **BLOCK)
    return dgate, dx


def _gate_backward_fake(dout: Tensor, gate: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
    return gate.new_empty(gate.shape), x.new_empty(x.shape)


def _gate_keep(ctx: Any, inputs: Any, output: Any) -> None:
    ctx.save_for_backward(*inputs[:2])


def _gate_gradients(ctx: Any, run: Function, dout: Tensor) -> tuple[Any, ...]:
    return (*run(dout, *ctx.saved_tensors), None)


_gate_call = operator(
    "sigmoid_gate",
    Launch(_gate_forward, _gate_forward_fake, "(Tensor gate, Tensor x, ScalarType dtype) -> Tensor"),
    Launch(_gate_backward, _gate_backward_fake, "(Tensor dout, Tensor gate, Tensor x) -> (Tensor, Tensor)"),
    keep=_gate_keep,
    gradients=_gate_gradients,
)


def _grid(shift: Tensor) -> tuple[int, int, int]:
    """(rows, D, tiles across D) of shift [..., D]."""
    width = shift.shape[-1]
    return shift.numel() // width, width, cdiv(width, TILE["DT"])


def _decay_forward(base: Tensor, shift: Tensor) -> Tensor:
    base, shift = base.contiguous(), shift.contiguous()
    rows, width, tiles = _grid(shift)
    out = torch.empty_like(shift, dtype=torch.float32)
    _log_decay[(cdiv(rows, TILE["TB"]), tiles)](base, shift, out, rows, width, **TILE)
    return out


def _decay_forward_fake(base: Tensor, shift: Tensor) -> Tensor:
    return shift.new_empty(shift.shape, dtype=torch.float32)


def _decay_backward(dout: Tensor, out: Tensor, base: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Gradients of base and shift: both are d out * out."""
    dout, out = dout.contiguous(), out.contiguous()
    rows, width, tiles = _grid(out)
    programs, turns = parts(rows, TILE["TB"], tiles)
    dshift = torch.empty_like(out, dtype=dtype)
    partial = torch.empty(programs, width, dtype=torch.float32, device=out.device)
    _log_decay_grad[(programs, tiles)](dout, out, dshift, partial, rows, width, turns, **TILE)
    return partial.sum(0).to(base.dtype), dshift


def _decay_backward_fake(
    dout: Tensor, out: Tensor, base: Tensor, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    return base.new_empty(base.shape), out.new_empty(out.shape, dtype=dtype)


def _decay_keep(ctx: Any, inputs: Any, output: Any) -> None:
    ctx.dtype = inputs[1].dtype
    ctx.save_for_backward(output, inputs[0])


def _decay_gradients(ctx: Any, run: Function, dout: Tensor) -> tuple[Any, ...]:
    return tuple(run(dout, *ctx.saved_tensors, ctx.dtype))


_decay_call = operator(
    "log_decay",
    Launch(_decay_forward, _decay_forward_fake, "(Tensor base, Tensor shift) -> Tensor"),
    Launch(
        _decay_backward,
        _decay_backward_fake,
        "(Tensor dout, Tensor out, Tensor base, ScalarType dtype) -> (Tensor, Tensor)",
    ),
    keep=_decay_keep,
    gradients=_decay_gradients,
)


def relu_squared(x: Tensor, dtype: torch.dtype) -> Tensor:
    """relu(x)^2 of any shape."""
    return _relu_call(x, dtype)


def sigmoid_gate(gate: Tensor, x: Tensor, dtype: torch.dtype) -> Tensor:
    """sigmoid(gate) * x of one shape."""
    return _gate_call(gate, x, dtype)


def log_decay(base: Tensor, shift: Tensor) -> Tensor:
    """-exp(base + shift), float32: base [D], shift [B, T, D]."""
    return _decay_call(base, shift)
