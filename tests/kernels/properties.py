"""What every backend has to satisfy, for one operator and one kind of input each; see the callers."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import partial
from itertools import pairwise

import torch
from torch import Tensor

import kernels

from .cases import Case, error, make, run, run_packed

BOUNDS = {torch.float64: 1e-13, torch.float32: 1e-5, torch.float16: 2.6e-4, torch.bfloat16: 1.8e-3}
"""Largest relative error (Frobenius norm) of every output and gradient by the sequences' type."""


@dataclass(frozen=True)
class Target:
    """What is under test: r, k, v in `dtype`; the others in float32 (`whole`: log_w and u in `dtype` too)."""

    backend: str
    device: str
    dtype: torch.dtype
    size: int = 16
    heads: int = 2
    whole: bool = False

    @property
    def others(self) -> torch.dtype:
        return self.dtype if self.whole or self.dtype == torch.float64 else torch.float32

    def make(
        self, op: str, regime: str, time: int, *, state: bool = True, lengths: tuple[int, ...] = ()
    ) -> Case:
        case = make(op, regime, time, state=state, batch=len(lengths) or 2, heads=self.heads, size=self.size)
        case.lengths = torch.tensor(lengths) if lengths else None
        if self.whole:
            case.inputs["log_w"] = case.inputs["log_w"].to(self.dtype).double()
        return case.to(self.device)

    def run(self, case: Case) -> dict[str, Tensor]:
        return run(case, self.backend, self.others, self.dtype)

    def bound(self, op: str, name: str, wanted: Tensor) -> float:
        """Of the result `name`; in a small tensor, what rounding the exact numbers costs if that is more."""
        bound = BOUNDS[self.dtype]
        if op == "wkv4" and self.dtype == torch.bfloat16 and name != "y":
            bound = 5e-3
        rounded = self.whole or name in ("y", "dr", "dk", "dv")
        floor = error(wanted.to(self.dtype).double(), wanted) if rounded else 0.0
        return max(bound, 1.02 * floor)


def wanted(case: Case) -> dict[str, Tensor]:
    """Float64: the definition, or its chunked form where a loop over many steps would take long."""
    longest = 8 if case.to_y.is_cuda else 200
    return run(case, "reference" if case.to_y.shape[1] <= longest else "torch", torch.float64)


def compare(target: Target, op: str, found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    """Every entry by itself; the message lists all errors."""
    assert found.keys() == expected.keys()
    errors = {name: error(found[name], x) for name, x in expected.items()}
    bad = [n for n, e in errors.items() if not e <= target.bound(op, n, expected[n])]
    assert not bad, f"{op} {target}: {bad} over the bound; " + ", ".join(
        f"{n} {e:.2e}" for n, e in errors.items()
    )


def check_values(target: Target, op: str, regime: str, time: int, *, state: bool = True) -> None:
    """Output, final state and every gradient against float64."""
    case = target.make(op, regime, time, state=state)
    compare(target, op, target.run(case), wanted(case))


def check_lengths(
    target: Target, op: str, time: int, lengths: tuple[int, ...], *, state: bool = True
) -> None:
    """Padding holds NaN or Inf, reaches nothing, and comes back as zeros."""
    case = target.make(op, "mixed", time, state=state, lengths=lengths)
    expected = wanted(case)
    assert case.lengths is not None
    padded = torch.arange(time, device=target.device) >= case.lengths[:, None]
    sequences = [n for n, x in case.inputs.items() if x.dim() >= 3 and n != "state"]
    for fill in (float("nan"), float("inf")):
        for name in sequences:
            case.inputs[name][padded] = fill
        # Where the output is not read, its gradient holds anything too.
        found = target.run(replace(case, to_y=case.to_y.masked_fill(_along(padded, case.to_y), 7e4)))
        compare(target, op, found, expected)
        for name in ("y", *(f"d{n}" for n in sequences)):
            assert not found[name][padded].any(), name


def _along(padded: Tensor, like: Tensor) -> Tensor:
    return padded.view(*padded.shape, *[1] * (like.dim() - 2)).expand_as(like)


def check_packed(
    target: Target,
    op: str,
    lengths: tuple[int, ...],
    *,
    state: bool = True,
    index: torch.dtype = torch.int32,
) -> None:
    """Packed sequences give what each gives by itself."""
    case = target.make(op, "mixed", max(lengths), state=state, lengths=lengths)
    found = run_packed(case, target.backend, target.others, target.dtype, index=index)
    compare(target, op, found, wanted(case))


def check_pieces(target: Target, op: str, regime: str, cuts: tuple[int, ...]) -> None:
    """Cut at `cuts` with the state carried: what one pass gives, gradients through all pieces."""
    case = target.make(op, regime, cuts[-1])
    leaves = leaves_of(target, case)
    now, ys = leaves["state"], []
    for start, stop in pairwise((0, *cuts)):
        part = {n: x[:, start:stop] if x.dim() >= 3 else x for n, x in leaves.items() if n != "state"}
        y, now = getattr(kernels, op)(**part, state=now, backend=target.backend)
        ys.append(y)
    y = torch.cat(ys, 1)
    ((y.double() * case.to_y).sum() + (now.double() * case.to_state).sum()).backward()
    found = {"y": y, "last": now} | {f"d{n}": x.grad for n, x in leaves.items()}
    # Gradients of a slice are added into the whole in the slice's own type: exact, as slices do not meet.
    compare(target, op, {n: x.detach().double() for n, x in found.items()}, wanted(case))


def leaves_of(target: Target, case: Case) -> dict[str, Tensor]:
    """The inputs in the target's types, to be differentiated."""
    kinds = dict.fromkeys(case.inputs, target.others) | dict.fromkeys("rkv", target.dtype)
    if target.dtype != torch.float64:
        kinds["state"] = torch.float32
    return {n: x.to(kinds[n], copy=True).requires_grad_() for n, x in case.inputs.items()}


def check_same_bits(target: Target, op: str, time: int, lengths: tuple[int, ...] = ()) -> None:
    """Two runs agree to the last bit; so does the one without gradients, which keeps nothing for them."""
    case = target.make(op, "typical", time, lengths=lengths)
    first, second = target.run(case), target.run(case)
    for name, x in first.items():
        assert torch.equal(x, second[name]), name
    leaves = leaves_of(target, case)
    with torch.no_grad():
        y, last = getattr(kernels, op)(**leaves, lengths=case.lengths, backend=target.backend)
    assert torch.equal(y.double(), first["y"]) and torch.equal(last.double(), first["last"])


def check_strides(target: Target, op: str, time: int) -> None:
    """Inputs stored [B,H,T,N] (wkv4: [T,B,D]), or as a part of wider rows, change nothing; Triton: no bit."""
    case = target.make(op, "typical", time)
    expected = target.run(case)
    for store in (_transposed, _part):
        found = run(case, target.backend, target.others, target.dtype, store=store)
        compare(target, op, found, expected)
        if target.backend == "triton":
            assert all(torch.equal(x, expected[name]) for name, x in found.items()), store.__name__


def _transposed(x: Tensor) -> Tensor:
    if x.dim() < 3:
        return x
    one, other = (1, 2) if x.dim() == 4 else (0, 1)
    return x.transpose(one, other).contiguous().transpose(one, other)


def _part(x: Tensor) -> Tensor:
    return torch.cat((x, x + 1, x), -1)[..., : x.shape[-1]]


def check_extremes(target: Target, op: str, time: int) -> None:
    """Finite numbers for log_w in [-1e4, 0] and large inputs; the right ones where they are not huge."""
    for low in (-1e4, 0.0):
        for scale in (1.0, 4.0 if target.dtype == torch.float16 else 1e4):
            case = target.make(op, "mixed", time)
            w = case.inputs["log_w"]
            w[...] = low
            w[..., ::3] = 0.0
            if w.dim() == 4:
                w[:, 1::2] *= 0.5
            for name in "rkv":
                if name in case.inputs:
                    case.inputs[name] = (case.inputs[name] * scale).bfloat16().double()
            found = target.run(case)
            assert all(bool(x.isfinite().all()) for x in found.values()), (low, scale)
            if scale == 1:
                if op == "wkv4":  # equal keys without decay tie for the maximum: no gradient to compare
                    case.to_state = torch.zeros_like(case.to_state)
                compare(target, op, target.run(case), wanted(case))


def check_one_result(target: Target, op: str, time: int) -> None:
    """The gradient of the output alone and of the final state alone."""
    case = target.make(op, "typical", time)
    for part in (0, 1):
        projection = (case.to_y, case.to_state)[part]
        grads = []
        for leaves, backend in (
            (leaves_of(target, case), target.backend),
            ({n: x.clone().requires_grad_() for n, x in case.inputs.items()}, "reference"),
        ):
            result = getattr(kernels, op)(**leaves, backend=backend)[part]
            loss = (result.double() * projection).sum()
            found = torch.autograd.grad(loss, list(leaves.values()), materialize_grads=True)
            grads.append({f"d{n}": x.double() for n, x in zip(leaves, found, strict=True)})
        compare(target, op, *grads)


def check_compiled(target: Target, op: str, lengths: tuple[int, ...], *, packed: bool, compiler: str) -> None:
    """torch.compile without a graph break gives the same bits."""
    case = target.make(op, "typical", max(lengths), lengths=lengths)
    expected = run_packed(case, target.backend, target.others, target.dtype) if packed else target.run(case)
    torch.compiler.reset()
    plain = getattr(kernels, op)
    compiled = torch.compile(lambda **inputs: plain(**inputs), fullgraph=True, backend=compiler)
    call = partial(run_packed if packed else run, call=compiled)
    found = call(case, target.backend, target.others, target.dtype)
    torch.compiler.reset()
    for name, x in found.items():
        assert torch.equal(x, expected[name]), name


def check_types(target: Target, op: str) -> None:
    """y in the sequences' type, the state in float32, every gradient in its input's own type."""
    case = target.make(op, "typical", 9)
    leaves = leaves_of(target, case)
    y, last = getattr(kernels, op)(**leaves, backend=target.backend)
    assert y.dtype == target.dtype and last.dtype == torch.float32
    (y.double().sum() + last.sum()).backward()
    for name, x in leaves.items():
        assert x.grad is not None and x.grad.dtype == x.dtype, name
