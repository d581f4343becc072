"""Random arguments of the operators around the recurrences, one run with all gradients, and its checks."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from kernels.mix import lerp, mix6
from kernels.norm import add_norm, head_norm
from kernels.pointwise import log_decay, relu_squared, sigmoid_gate

from .cases import error

Leaves = dict[str, Tensor]


@dataclass
class Layer:
    """An operator's arguments by name, float64, and the call; `names` of weights start with `w_`."""

    inputs: Leaves
    call: Callable[[Leaves, str | None], list[Tensor]]


def _rows(batch: int, time: int, width: int) -> tuple[Callable[..., Tensor], Tensor]:
    rng = torch.Generator().manual_seed(1000 * batch + 10 * time + width)

    def normal(*shape: int) -> Tensor:
        """Values that bfloat16 holds, so that casting changes nothing."""
        return torch.randn(*shape, generator=rng).bfloat16().double()

    return normal, torch.randperm(batch * time, generator=rng)


def layers(batch: int, time: int, heads: int, size: int, *, before: bool = True) -> dict[str, Layer]:
    """Every operator on [batch, time, heads * size]."""
    width, rank = heads * size, 12
    normal, index = _rows(batch, time, width)
    state = {"before": normal(batch, width)} if before else {}
    x, y = normal(batch, time, width), normal(batch, time, width)
    shares = {f"w_{i}": normal(1, 1, width) for i in range(5)}
    two = {name: shares[name] for name in ("w_0", "w_1")}
    low = {"low": torch.tanh(normal(batch, time, 5 * rank)).bfloat16().double()}
    norm = {"w_weight": normal(width), "w_bias": normal(width)}

    def given(a: Leaves) -> list[Tensor]:
        return [a[name] for name in a if name[:2] == "w_" and name[2:].isdigit()]

    def mixed(a: Leaves, backend: str | None) -> list[Tensor]:
        return mix6(a["x"], a.get("before"), a["low"], a["w2"], given(a), backend=backend)

    def lerped(current: bool) -> Callable[[Leaves, str | None], list[Tensor]]:
        return lambda a, backend: lerp(a["x"], a.get("before"), given(a), current=current, backend=backend)

    def headed(a: Leaves, backend: str | None) -> list[Tensor]:
        y = a["y"].view(batch, time, heads, size)
        return [head_norm(y, a["x"], a["w_weight"], a["w_bias"], 64e-5, backend=backend)]

    def added(index: Tensor | None) -> Callable[[Leaves, str | None], list[Tensor]]:
        def call(a: Leaves, backend: str | None) -> list[Tensor]:
            at = None if index is None else index.to(a["x"].device)
            return [
                *add_norm(a["x"], a.get("y"), a["w_weight"], a["w_bias"], 1e-5, index=at, backend=backend)
            ]

        return call

    return {
        "lerp-previous": Layer({"x": x} | state | two, lerped(False)),
        "lerp-current": Layer({"x": x} | state | {n: shares[n] for n in list(shares)[:4]}, lerped(True)),
        "mix6": Layer({"x": x} | state | low | {"w2": normal(5, rank, width)} | shares, mixed),
        "head_norm": Layer({"x": 2 * x, "y": y + 1} | norm, headed),
        "add_norm": Layer({"x": x, "y": y} | norm, added(None)),
        "add_norm-moved": Layer({"x": x, "y": y} | norm, added(index)),
        "add_norm-alone": Layer({"x": x} | norm, added(index)),
        "relu_squared": Layer({"x": x}, lambda a, b: [relu_squared(a["x"], backend=b)]),
        "sigmoid_gate": Layer({"x": x, "y": y}, lambda a, b: [sigmoid_gate(a["x"], a["y"], backend=b)]),
        "log_decay": Layer(
            {"w_base": normal(width), "x": x}, lambda a, b: [log_decay(a["w_base"], a["x"], backend=b)]
        ),
    }


NAMES = tuple(layers(1, 1, 1, 2))


def run(
    layer: Layer,
    backend: str | None,
    dtype: torch.dtype,
    *,
    weights: torch.dtype | None = None,
    device: str = "cpu",
) -> Leaves:
    """Outputs `y0`, ... and the gradient `d<name>` of every input; `weights`: the type of parameters."""
    leaves = {}
    for name, value in layer.inputs.items():
        kind = weights if weights is not None and name.startswith("w_") else dtype
        leaves[name] = value.to(device=device, dtype=kind, copy=True).requires_grad_()
    outputs = layer.call(leaves, backend)
    rng = torch.Generator().manual_seed(5)
    seeds = [torch.randn(y.shape, generator=rng).bfloat16() for y in outputs]
    torch.autograd.backward(outputs, [s.to(y) for s, y in zip(seeds, outputs, strict=True)])
    found = {f"y{i}": y.detach() for i, y in enumerate(outputs)}
    for name, leaf in leaves.items():
        assert leaf.grad is not None, name
        assert leaf.grad.dtype == leaf.dtype, name
        found[f"d{name}"] = leaf.grad
    return found


def assert_close(found: Leaves, wanted: Leaves, bound: float) -> None:
    """Every entry by itself against float64; the message lists all errors."""
    assert found.keys() == wanted.keys()
    errors = {name: error(found[name].cpu().double(), wanted[name].double()) for name in wanted}
    bad = {name: e for name, e in errors.items() if not e <= bound}
    assert not bad, f"over {bound:g}: {bad}; all: {errors}"


def assert_same_bits(first: Leaves, second: Leaves) -> None:
    for name in first:
        assert torch.equal(first[name], second[name]), name
