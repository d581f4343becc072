"""Random arguments of every operator, in the five decay regimes, and one run with all gradients."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

import kernels

OPS = ("wkv4", "wkv5", "wkv6")
# x of decay = exp(-exp(x)), uniform in the range
REGIMES = {
    "near_one": (-9.0, -7.0),
    "typical": (-6.0, -1.0),
    "strong": (0.0, 1.6),
    "extreme": (2.0, 4.0),
    "mixed": (-9.0, 4.0),
}


@dataclass
class Case:
    """Arguments by name, in call order, and the projections that make the loss."""

    op: str
    inputs: dict[str, Tensor]
    to_y: Tensor
    to_state: Tensor
    lengths: Tensor | None = None
    borders: Tensor | None = None

    def to(self, device: str) -> Case:
        """The same case on another device."""
        moved = {n: x.to(device) for n, x in self.inputs.items()}
        sizes = (None if x is None else x.to(device) for x in (self.lengths, self.borders))
        return Case(self.op, moved, self.to_y.to(device), self.to_state.to(device), *sizes)


def make(
    op: str, regime: str, time: int, *, state: bool = True, batch: int = 2, heads: int = 2, size: int = 8
) -> Case:
    """A seeded case in float64; values are representable in bfloat16 (wkv4's log_w: in
    float32), so that casting changes nothing."""
    rng = torch.Generator().manual_seed(1000 * time + 10 * OPS.index(op) + list(REGIMES).index(regime))

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=rng).bfloat16().double()

    low, high = REGIMES[regime]
    shape = {"wkv4": (heads * size,), "wkv5": (heads, size), "wkv6": (batch, time, heads, size)}[op]
    log_w = -torch.exp(torch.rand(*shape, generator=rng) * (high - low) + low)
    # RWKV-4's maximum p has no gradient at a tie k_i + n log_w = k_j: coarse numbers would make ties.
    log_w = log_w.double() if op == "wkv4" else log_w.bfloat16().double()
    if op == "wkv4":
        width = heads * size
        inputs = {"k": 2 * normal(batch, time, width), "v": normal(batch, time, width)}
        inputs |= {"log_w": log_w, "u": normal(width)}
        start = torch.stack((normal(batch, width), normal(batch, width).abs() + 0.1, normal(batch, width)), 1)
        to_y, to_state = normal(batch, time, width), normal(batch, 3, width)
    else:
        inputs = {name: normal(batch, time, heads, size) for name in "rkv"}
        inputs |= {"log_w": log_w, "u": normal(heads, size)}
        start = normal(batch, heads, size, size)
        to_y, to_state = normal(batch, time, heads, size), normal(batch, heads, size, size)
    if state:
        inputs["state"] = start.float().double()
    return Case(op, inputs, to_y, to_state)


def as_it_is(x: Tensor) -> Tensor:
    return x


def run(
    case: Case,
    backend: str,
    dtype: torch.dtype,
    sequence_dtype: torch.dtype | None = None,
    *,
    store: Callable[[Tensor], Tensor] = as_it_is,
    call: Callable[..., tuple[Tensor, Tensor]] | None = None,
) -> dict[str, Tensor]:
    """Output `y`, final state `last` and the gradient `d<name>` of every input, all float64.

    `sequence_dtype` casts r, k and v alone (mixed precision); states are never kept in less than float32.
    `store` lays an input out in memory; `call` stands in for the operator. The loss reads outputs and
    final state.
    """
    leaves = {}
    for name, x in case.inputs.items():
        kind = sequence_dtype if sequence_dtype is not None and name in "rkv" else dtype
        if name == "state" and dtype != torch.float64:
            kind = torch.float32
        leaves[name] = store(x.detach().to(kind, copy=True)).detach().requires_grad_()
    sizes = {"lengths": case.lengths, "cu_seqlens": case.borders}
    y, last = (call or getattr(kernels, case.op))(**leaves, **sizes, backend=backend)
    loss = (y.double() * case.to_y).sum() + (last.double() * case.to_state).sum()
    loss.backward()
    found = {"y": y.detach().double(), "last": last.detach().double()}
    for name, x in leaves.items():
        assert x.grad is not None, name
        found[f"d{name}"] = x.grad.double()
    return found


def run_packed(
    case: Case,
    backend: str,
    dtype: torch.dtype,
    sequence_dtype: torch.dtype | None = None,
    *,
    index: torch.dtype = torch.int64,
    call: Callable[..., tuple[Tensor, Tensor]] | None = None,
) -> dict[str, Tensor]:
    """`run` with the batch handed over packed; the results come back padded with zeros, as `run`'s."""
    assert case.lengths is not None
    sequences = [name for name, x in case.inputs.items() if x.dim() >= 3 and name != "state"]
    live = torch.arange(case.to_y.shape[1]) < case.lengths.cpu()[:, None]  # [B, T]
    live = live.to(case.to_y.device)
    packed = Case(case.op, dict(case.inputs), case.to_y[live][None], case.to_state)
    for name in sequences:
        packed.inputs[name] = case.inputs[name][live][None]
    packed.borders = F.pad(case.lengths.cumsum(0), (1, 0)).to(index)
    found = run(packed, backend, dtype, sequence_dtype, call=call)
    for name in ("y", *(f"d{name}" for name in sequences)):
        padded = torch.zeros_like(case.to_y)
        padded[live] = found[name][0]
        found[name] = padded
    return found


def error(found: Tensor, wanted: Tensor) -> float:
    """Relative Frobenius error; absolute where the wanted value is (nearly) zero."""
    scale = wanted.norm().clamp_min(1e-6 * wanted.numel() ** 0.5)
    return float((found - wanted).norm() / scale)


def assert_close(found: dict[str, Tensor], wanted: dict[str, Tensor], bound: float) -> None:
    """Every entry by itself; the message lists all errors."""
    assert found.keys() == wanted.keys()
    errors = {name: error(found[name], wanted[name]) for name in wanted}
    bad = {name: e for name, e in errors.items() if not e <= bound}
    assert not bad, f"over {bound:g}: {bad}; all: {errors}"
