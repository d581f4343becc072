"""Pointwise formulas beside the recurrences: the log decay, the squared ReLU, the receptance gate.

Computed in float32 (float64 for float64 inputs) and rounded once; each one kernel forward and one back.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .dispatch import pick, register
from .mix import activation_dtype, unfit, wide

__all__ = ["log_decay", "relu_squared", "sigmoid_gate"]


def log_decay(base: Tensor, shift: Tensor | None = None, *, backend: str | None = None) -> Tensor:
    """-exp(base + shift) in float32 (or float64), whatever the activations are: exp of a bf16 value drifts.

    base: the decay parameter (D elements). shift [B, T, D] -> [B, T, D]; None (RWKV-4 and 5) -> base's shape.
    """
    if shift is None:
        return -torch.exp(wide(base))
    if base.numel() != shift.shape[-1]:
        raise ValueError(f"log_decay: base has {base.numel()} elements but shift is {list(shift.shape)}")
    run = pick("log_decay", backend, shift.device, unfit(base, shift))
    return run(base.reshape(-1), shift)


def relu_squared(x: Tensor, *, backend: str | None = None) -> Tensor:
    """relu(x)^2, any shape, in the type that a matrix product gives it (So et al. 2021, arXiv 2109.08668)."""
    return pick("relu_squared", backend, x.device, unfit(x))(x, activation_dtype(x))


def sigmoid_gate(gate: Tensor, x: Tensor, *, backend: str | None = None) -> Tensor:
    """sigmoid(gate) * x of one shape, in x's type."""
    if gate.shape != x.shape:
        raise ValueError(f"sigmoid_gate: gate has shape {list(gate.shape)} but x has {list(x.shape)}")
    return pick("sigmoid_gate", backend, x.device, unfit(gate, x))(gate, x, x.dtype)


def _log_decay(base: Tensor, shift: Tensor) -> Tensor:
    return -torch.exp(wide(base) + wide(shift))


def _relu_squared(x: Tensor, dtype: torch.dtype) -> Tensor:
    positive = torch.relu(wide(x))
    return (positive * positive).to(dtype)


def _sigmoid_gate(gate: Tensor, x: Tensor, dtype: torch.dtype) -> Tensor:
    return (torch.sigmoid(wide(gate)) * wide(x)).to(dtype)


for _name, _plain in (
    ("log_decay", _log_decay),
    ("relu_squared", _relu_squared),
    ("sigmoid_gate", _sigmoid_gate),
):
    register(_name, reference=_plain, torch=_plain, triton=f"kernels.gpu.pointwise:{_name}")
