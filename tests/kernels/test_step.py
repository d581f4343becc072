"""Single steps: equal to the whole-sequence operators token by token, in place, on every backend."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

import kernels
from kernels.step import (
    Ending,
    Late,
    LowRank,
    Norm,
    ddlerp_step,
    norm_shift_step_,
    wkv4_step_,
    wkv5_step_,
    wkv6_step_,
)

INTERPRETED = os.environ.get("TRITON_INTERPRET", "") == "1"
STEPS: dict[str, Any] = {"wkv4": wkv4_step_, "wkv5": wkv5_step_, "wkv6": wkv6_step_}


class Target(NamedTuple):
    """Where a step runs, and how far it may be from the same step in float64."""

    backend: str
    device: str
    dtype: torch.dtype
    near: float


PLAIN = Target("torch", "cpu", torch.float64, 1e-12)
TRITON = [
    Target("triton", "cuda", torch.float32, 2e-6),
    Target("triton", "cuda", torch.bfloat16, 1.8e-3),
    Target("triton", "cuda", torch.float16, 4e-4),
]
if INTERPRETED:
    TRITON = [t._replace(device="cpu") for t in TRITON if t.dtype != torch.bfloat16]
gpu = () if INTERPRETED else (pytest.mark.gpu,)
targets = pytest.mark.parametrize(
    "target", [PLAIN, *(pytest.param(t, marks=gpu, id=f"triton-{t.dtype}") for t in TRITON)]
)


def close(found: Tensor, wanted: Tensor, near: float) -> None:
    """Relative Frobenius error at most `near`, or what rounding the exact few numbers costs, a tenth more."""
    assert found.shape == wanted.shape
    size = wanted.norm().clamp(min=1e-30)
    error = (found.cpu().double() - wanted).norm() / size
    rounding = (wanted.to(found.dtype).double() - wanted).norm() / size
    assert float(error) <= max(near, 1.1 * float(rounding)), float(error)


def given(target: Target, x: Tensor) -> tuple[Tensor, Tensor]:
    """x in the target's type and place, and the same rounded values in float64."""
    there = x.to(target.dtype)
    return there.to(target.device).clone(), there.double()


def parameter(target: Target, x: Tensor) -> tuple[Tensor, Tensor]:
    """A parameter or state: float32, or float64 for float64."""
    there = x.to(torch.float64 if target.dtype == torch.float64 else torch.float32)
    return there.to(target.device).clone(), there.double()


@targets
@pytest.mark.parametrize("op", STEPS)
@pytest.mark.parametrize("size", [64, 24])
def test_steps_equal_one_pass(op: str, size: int, target: Target) -> None:
    """Five tokens against the reference operator in float64, from a given state."""
    torch.manual_seed(1)
    batch, time, shape = 2, 5, (3 * size,) if op == "wkv4" else (3, size)
    rows = [given(target, torch.randn(batch, time, *shape)) for _ in range(2 if op == "wkv4" else 3)]
    per = (batch, time, *shape) if op == "wkv6" else shape
    log_w, log_w64 = parameter(target, -torch.exp(torch.randn(*per) - 2))
    u, u64 = parameter(target, torch.randn(*shape))
    start = torch.rand(batch, 3, *shape) if op == "wkv4" else torch.randn(batch, *shape, size)
    state, state64 = parameter(target, start)
    wanted, last = getattr(kernels, op)(*(r[1] for r in rows), log_w64, u64, state64, backend="reference")
    place = state.data_ptr()
    for t in range(time):
        w = log_w[:, t] if op == "wkv6" else log_w
        y = STEPS[op](*(r[0][:, t] for r in rows), w, u, state, backend=target.backend)
        assert y.dtype == target.dtype
        close(y, wanted[:, t], target.near)
    assert state.data_ptr() == place
    close(state, last, max(2e-6, 1e-12))


@targets
@pytest.mark.parametrize("op", STEPS)
def test_the_decay_from_its_parameter_and_what_follows(op: str, target: Target) -> None:
    torch.manual_seed(2)
    batch, shape = 3, (70,) if op == "wkv4" else (2, 35)
    width = 70
    rows = [given(target, torch.randn(batch, *shape)) for _ in range(5)]
    base, base64 = parameter(target, torch.randn(*shape) - 2)
    u, u64 = parameter(target, torch.randn(*shape))
    weight, weight64 = parameter(target, torch.randn(width))
    bias, bias64 = parameter(target, torch.randn(width))
    gate, gate64 = rows[4][0].view(batch, width), rows[4][1].view(batch, width)
    start = torch.rand(batch, 3, *shape) if op == "wkv4" else torch.randn(batch, *shape, shape[-1])
    state, state64 = parameter(target, start)
    if op == "wkv4":
        k, v = rows[0], rows[1]
        y64 = wkv4_step_(k[1], v[1], -torch.exp(base64), u64, state64) * torch.sigmoid(gate64)
        y = wkv4_step_(k[0], v[0], None, u, state, base=base, gate=gate, backend=target.backend)
    else:
        (r, r64), (k, k64), (v, v64), (w, w64) = rows[:4]
        raw = base64 + w64 if op == "wkv6" else base64
        y64 = STEPS[op](r64, k64, v64, -torch.exp(raw), u64, state64).flatten(1)
        y64 = (F.group_norm(y64, 2, weight64, bias64, 64e-5) * F.silu(gate64)).view(batch, *shape)
        ending = Ending(weight, bias, 64e-5, gate)
        shift = w if op == "wkv6" else None
        y = STEPS[op](r, k, v, shift, u, state, base=base, ending=ending, backend=target.backend)
    close(y, y64, target.near)
    close(state, state64, 2e-6)


@targets
def test_a_decay_of_low_rank_is_multiplied_in_the_step(target: Target) -> None:
    torch.manual_seed(8)
    batch, heads, size, rank = 2, 3, 24, 10
    r, k, v = (given(target, torch.randn(batch, heads, size))[0] for _ in range(3))
    low, _ = given(target, torch.randn(batch, rank))
    weight, _ = given(target, 0.2 * torch.randn(rank, heads * size))
    base, u = (parameter(target, torch.randn(heads, size))[0] for _ in range(2))
    state, _ = parameter(target, torch.randn(batch, heads, size, size))
    other = state.clone()
    shift = (low.double() @ weight.double()).to(target.dtype).view(r.shape)
    y = wkv6_step_(r, k, v, LowRank(low, weight), u, state, base=base, backend=target.backend)
    wanted = wkv6_step_(r, k, v, shift, u, other, base=base, backend=target.backend)
    close(y, wanted.cpu().double(), 2 * target.near)
    close(state, other.cpu().double(), 2 * target.near)
    with pytest.raises(ValueError, match=r"log_w is a product of \[2, 10\] and \[9, 72\]; expected"):
        wkv6_step_(r, k, v, LowRank(low, weight[:-1]), u, state, base=base, backend=target.backend)


@targets
@pytest.mark.parametrize("of_previous", [False, True])
@pytest.mark.parametrize(
    ("late", "keep", "count"), [("none", False, 3), ("value", True, 1), ("gated", False, 4)]
)
def test_residual_norm_and_shift(
    late: str, keep: bool, count: int, of_previous: bool, target: Target
) -> None:
    torch.manual_seed(3)
    (x, x64), (before, before64) = (parameter(target, torch.randn(3, 50)) for _ in range(2))
    (value, value64), (gate, gate64) = (given(target, torch.randn(3, 50)) for _ in range(2))
    weight, bias = (parameter(target, torch.randn(50)) for _ in range(2))
    mixes = [parameter(target, torch.rand(1, 1, 50)) for _ in range(count)]
    add = None if late == "none" else Late(value, gate if late == "gated" else None)
    if late != "none":
        x64 = x64 + (value64 * torch.sigmoid(gate64) if late == "gated" else value64)
    n64 = F.layer_norm(x64, (50,), weight[1], bias[1], 1e-5)
    first, second = (n64, before64) if of_previous else (before64, n64)
    wanted = torch.stack([torch.lerp(first, second, m[1][0]) for m in mixes])
    mixed, change = norm_shift_step_(
        x,
        add,
        Norm(weight[0], bias[0], 1e-5),
        before,
        [m[0] for m in mixes],
        of_previous=of_previous,
        dtype=target.dtype,
        keep=keep,
        backend=target.backend,
    )
    assert mixed.dtype == target.dtype
    close(mixed, wanted, target.near)
    close(x, x64, 2e-6)
    close(before, n64, 2e-6)
    if change is None:
        assert not keep
    else:
        close(change, before64 - n64, 2e-6)


@targets
@pytest.mark.parametrize(("batch", "width", "rank"), [(1, 70, 8), (18, 64, 32)])
def test_data_dependent_shift(batch: int, width: int, rank: int, target: Target) -> None:
    torch.manual_seed(4)
    (x, x64), (delta, delta64) = (parameter(target, torch.randn(batch, width)) for _ in range(2))
    low, low64 = given(target, torch.randn(batch, 5 * rank))
    weight, weight64 = given(target, 0.1 * torch.randn(5, rank, width))
    mixes = [parameter(target, torch.rand(1, 1, width)) for _ in range(5)]
    shares = torch.tanh(low64).view(batch, 5, rank).transpose(0, 1) @ weight64
    wanted = torch.stack([x64 + delta64 * (m[1][0] + s) for m, s in zip(mixes, shares, strict=True)])
    mixed = ddlerp_step(
        x, delta, low, weight, [m[0] for m in mixes], dtype=target.dtype, backend=target.backend
    )
    close(mixed, wanted, 2 * target.near)


@pytest.mark.parametrize("target", [pytest.param(t, marks=gpu, id=f"triton-{t.dtype}") for t in TRITON])
def test_the_shift_of_a_sample_has_its_bits_alone_and_in_a_batch(target: Target) -> None:
    torch.manual_seed(9)
    (x, _), (delta, _) = (parameter(target, torch.randn(8, 200)) for _ in range(2))
    low, _ = given(target, torch.randn(8, 50))
    weight, _ = given(target, 0.1 * torch.randn(5, 10, 200))
    mixes = [parameter(target, torch.rand(200))[0] for _ in range(5)]
    together = ddlerp_step(x, delta, low, weight, mixes, dtype=target.dtype, backend="triton")
    for i in range(8):
        rows = (one[i : i + 1] for one in (x, delta, low))
        alone = ddlerp_step(*rows, weight, mixes, dtype=target.dtype, backend="triton")
        assert torch.equal(alone[:, 0], together[:, i])


def test_a_state_that_cannot_be_overwritten_is_refused() -> None:
    k = torch.randn(2, 4)
    state = torch.rand(2, 4, 3).transpose(1, 2)
    with pytest.raises(ValueError, match="state is not contiguous, and it is updated in place"):
        wkv4_step_(k, k, -torch.rand(4), torch.rand(4), state)


def test_wrong_shapes_and_missing_decay_are_refused() -> None:
    r, u, state = torch.randn(2, 3, 4), torch.randn(3, 4), torch.zeros(2, 3, 4, 4)
    with pytest.raises(
        ValueError, match=r"wkv5_step: per-token tensors of shapes .* all must be \[2, 3, 4\]"
    ):
        wkv5_step_(r, r[:1], r, -u.abs(), u, state)
    with pytest.raises(ValueError, match=r"wkv6_step: log_w has shape \[3, 4\]"):
        wkv6_step_(r, r, r, -u.abs(), u, state)
    with pytest.raises(
        ValueError, match=r"wkv5_step: log_w has shape \[2, 3, 4\]; expected \[H, N\] = \[3, 4\]"
    ):
        wkv5_step_(r, r, r, -r.abs(), u, state)
    with pytest.raises(ValueError, match=r"wkv6_step: base has shape \[4\]; expected \[H, N\] = \[3, 4\]"):
        wkv6_step_(r, r, r, -r.abs(), u, state, base=u[0])
    with pytest.raises(
        ValueError, match=r"wkv4_step: k is torch.float32 of shape \[2, 3, 4\]; expected floats"
    ):
        wkv4_step_(r, r, None, u[0], state, base=u[0])
    with pytest.raises(ValueError, match=r"norm_shift_step: mixes have shapes \[\[3\]\]; expected D = 4"):
        norm_shift_step_(
            u.clone(), None, Norm(u[0], u[0], 1e-5), u, [u[0, :3]], of_previous=True, dtype=torch.float32
        )
    with pytest.raises(
        ValueError, match=r"ddlerp_step: 5 mixes, low \[3, 10\], weight \[5, 2, 3\]; expected"
    ):
        ddlerp_step(u.clone(), u, torch.zeros(3, 10), torch.zeros(5, 2, 3), [u[0]] * 5, dtype=torch.float32)
    with pytest.raises(ValueError, match="needs log_w, or the decay's parameter"):
        wkv5_step_(r, r, r, None, u, state)
    with pytest.raises(ValueError, match="both must be contiguous"):
        norm_shift_step_(
            r[:, 0], None, Norm(u[0], u[0], 1e-5), u[:2], [u[0]], of_previous=True, dtype=torch.float32
        )


@pytest.mark.skipif(INTERPRETED, reason="this is the interpreter's own process")
@pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="Triton is not installed here")
def test_the_triton_steps_in_the_interpreter() -> None:
    """This file and `test_products`, in a process of its own: Triton reads TRITON_INTERPRET at its import."""
    files = [__file__, str(Path(__file__).with_name("test_products.py"))]
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-k", "triton-", *files]
    environment = {n: x for n, x in os.environ.items() if not n.startswith("PYTEST_")}
    environment |= {"TRITON_INTERPRET": "1", "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}
    root = Path(__file__).parents[2]
    done = subprocess.run(command, cwd=root, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-2000:]
    assert " passed" in done.stdout and "skipped" not in done.stdout
