"""Numbers: the closed forms, the torch backend against the float64 reference, every gradient by itself."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch
from torch import Tensor

import kernels
from kernels import chunked

from .cases import OPS, REGIMES, assert_close, error, make, run

pytestmark = pytest.mark.usefixtures("nan_memory")
TIMES = (1, 2, 7, 16, 33, 64, 130)


def closed_form_4(k: Tensor, v: Tensor, log_w: Tensor, u: Tensor) -> Tensor:
    y = torch.zeros_like(k)
    for t in range(k.shape[1]):
        weights = [torch.exp((t - 1 - i) * log_w + k[:, i]) for i in range(t)] + [torch.exp(u + k[:, t])]
        y[:, t] = sum(w * v[:, i] for i, w in enumerate(weights)) / sum(weights)
    return y


def closed_form_6(
    r: Tensor, k: Tensor, v: Tensor, log_w: Tensor, u: Tensor, state: Tensor
) -> tuple[Tensor, Tensor]:
    batch, time, heads, _ = r.shape
    y, last = torch.zeros_like(r), torch.zeros_like(state)
    for b in range(batch):
        for h in range(heads):
            for t in range(time + 1):
                total = log_w[b, :t, h].sum(0).exp()[:, None] * state[b, h]
                for s in range(t):
                    decay = log_w[b, s + 1 : t, h].sum(0).exp()
                    total = total + (decay * k[b, s, h])[:, None] * v[b, s, h][None]
                if t == time:
                    last[b, h] = total
                else:
                    here = (u[h] * k[b, t, h])[:, None] * v[b, t, h][None]
                    y[b, t, h] = r[b, t, h] @ (here + total)
    return y, last


@pytest.mark.parametrize("backend", ["reference", "torch"])
def test_wkv4_is_its_sums(backend: str) -> None:
    args = make("wkv4", "typical", 5, state=False).inputs
    y, last = kernels.wkv4(**args, backend=backend)
    torch.testing.assert_close(y, closed_form_4(**args), rtol=1e-12, atol=1e-12)
    k, w = args["k"], args["log_w"]
    den = sum(torch.exp((4 - i) * w + k[:, i]) for i in range(5))
    torch.testing.assert_close(last[:, 1] * last[:, 2].exp(), den, rtol=1e-12, atol=0)
    level = torch.stack([(4 - i) * w + k[:, i] for i in range(5)]).amax(0)
    torch.testing.assert_close(last[:, 2], level, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("backend", ["reference", "torch"])
@pytest.mark.parametrize("op", ["wkv5", "wkv6"])
def test_matrix_states_are_their_sums(op: str, backend: str) -> None:
    args = make(op, "typical", 5).inputs
    y, last = getattr(kernels, op)(**args, backend=backend)
    wanted = closed_form_6(**args | {"log_w": args["log_w"].expand_as(args["r"])})
    torch.testing.assert_close((y, last), wanted, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("time", TIMES)
@pytest.mark.parametrize("regime", REGIMES)
@pytest.mark.parametrize("op", OPS)
def test_torch_is_the_reference(op: str, regime: str, time: int) -> None:
    for state in (False, True):
        case = make(op, regime, time, state=state)
        wanted = run(case, "reference", torch.float64)
        assert_close(run(case, "torch", torch.float64), wanted, 2e-14)
        assert_close(run(case, "torch", torch.float32), wanted, 6e-6)


@pytest.mark.parametrize("state", [False, True])
@pytest.mark.parametrize("regime", REGIMES)
@pytest.mark.parametrize("op", OPS)
def test_padding_does_not_matter(op: str, regime: str, state: bool) -> None:
    case = make(op, regime, 37, state=state, batch=4)
    case.lengths = torch.tensor([37, 20, 1, 0])
    wanted = run(case, "reference", torch.float64)
    padded = torch.arange(37) >= case.lengths[:, None]
    for fill in (float("nan"), float("inf")):
        for name, x in case.inputs.items():
            if x.dim() >= 3 and name != "state":
                x[padded] = fill
        for backend in ("reference", "torch"):
            found = run(case, backend, torch.float64)
            assert_close(found, wanted, 2e-14)
            for name in found:
                if name == "y" or (found[name].shape[:2] == padded.shape and name not in ("last", "dstate")):
                    assert bool((found[name][padded] == 0).all()), name


@pytest.mark.parametrize("op", OPS)
def test_lengths_are_shorter_calls(op: str) -> None:
    case = make(op, "typical", 21)
    lengths = torch.tensor([21, 9])
    call = getattr(kernels, op)
    y, last = call(**case.inputs, lengths=lengths)
    for b, n in enumerate(lengths.tolist()):
        own = {
            name: x[b : b + 1] if name == "state" else x[b : b + 1, :n] if x.dim() >= 3 else x
            for name, x in case.inputs.items()
        }
        alone, end = call(**own)
        torch.testing.assert_close(y[b : b + 1, :n], alone, rtol=1e-12, atol=1e-12)
        torch.testing.assert_close(last[b : b + 1], end, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("size", [8, 16, 32, 64, 128])
@pytest.mark.parametrize("op", ["wkv5", "wkv6"])
def test_head_sizes(op: str, size: int) -> None:
    case = make(op, "mixed", 70, heads=1, size=size)
    assert_close(run(case, "torch", torch.float32), run(case, "reference", torch.float64), 6e-6)


@pytest.mark.parametrize("base", [1, 2, 4, 8, 16])
def test_every_base_block(base: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(chunked, "_plan", lambda log_w: (16, base))
    for op in ("wkv5", "wkv6"):
        case = make(op, "typical", 35)
        assert_close(run(case, "torch", torch.float64), run(case, "reference", torch.float64), 2e-14)


def test_plan_reads_the_decays() -> None:
    mild, harsh = torch.full((1, 48, 1, 32), -0.1), torch.full((1, 48, 1, 32), -3.0)
    assert chunked._plan(mild) == (48, 48)
    assert chunked._plan(harsh) == (16, 4)
    harsh[0, 47] = -100.0
    assert chunked._plan(harsh) == (16, 1)


@pytest.mark.parametrize(("dtype", "bound"), [(torch.bfloat16, 2.4e-3), (torch.float16, 3.5e-4)])
@pytest.mark.parametrize("regime", REGIMES)
@pytest.mark.parametrize("op", OPS)
def test_half_precision_rounds_only_once(op: str, regime: str, dtype: torch.dtype, bound: float) -> None:
    case = make(op, regime, 64)
    found = run(case, "torch", torch.float32, dtype)
    wanted = run(case, "reference", torch.float64)
    assert_close(found, wanted, bound)
    assert error(found["last"], wanted["last"]) < 6e-6


@pytest.mark.parametrize("op", OPS)
def test_one_step_without_gradients(op: str) -> None:
    for state in (False, True):
        case = make(op, "mixed", 1, state=state)
        with torch.no_grad():
            y, last = getattr(kernels, op)(**case.inputs, backend="torch")
            wanted = getattr(kernels, op)(**case.inputs, backend="reference")
        torch.testing.assert_close((y, last), wanted, rtol=1e-13, atol=1e-13)


@pytest.mark.parametrize("spread", [1.0, 20.0, 80.0])
def test_wkv4_with_large_and_wide_keys(spread: float) -> None:
    case = make("wkv4", "mixed", 50, state=False)
    case.inputs["k"] = case.inputs["k"] * spread + 60
    wanted = run(case, "reference", torch.float64)
    assert all(bool(x.isfinite().all()) for x in wanted.values())
    assert_close(run(case, "torch", torch.float64), wanted, 1e-12)


@pytest.mark.parametrize("time", [1, 4, 19])
@pytest.mark.parametrize("op", OPS)
def test_gradcheck(op: str, time: int) -> None:
    case = make(op, "typical", time, batch=1, heads=1, size=3 if op != "wkv4" else 4)
    leaves = [x.requires_grad_() for x in case.inputs.values()]
    assert torch.autograd.gradcheck(lambda *a: getattr(kernels, op)(*a, backend="torch"), leaves)


@pytest.mark.parametrize("backend", ["reference", "torch"])
@pytest.mark.parametrize("op", OPS)
def test_one_call_two_calls_token_by_token(op: str, backend: str) -> None:
    case = make(op, "typical", 40)
    call = getattr(kernels, op)
    whole = run(case, backend, torch.float64)
    for cuts in ([0, 23, 40], list(range(41))):
        leaves = {name: x.detach().clone().requires_grad_() for name, x in case.inputs.items()}
        now, ys = leaves["state"], []
        for start, stop in pairwise(cuts):
            part = {n: x[:, start:stop] if x.dim() >= 3 else x for n, x in leaves.items() if n != "state"}
            y, now = call(**part, state=now, backend=backend)
            ys.append(y)
        y = torch.cat(ys, 1)
        ((y * case.to_y).sum() + (now * case.to_state).sum()).backward()
        found = {"y": y.detach(), "last": now.detach()} | {f"d{n}": x.grad for n, x in leaves.items()}
        assert_close(found, whole, 2e-14)


@pytest.mark.parametrize("op", OPS)
def test_memory_layout_does_not_matter(op: str) -> None:
    case = make(op, "typical", 33)
    wanted = run(case, "torch", torch.float64)
    for name, x in case.inputs.items():
        case.inputs[name] = torch.stack((x, x + 1), -1)[..., 0]  # every second element
    assert not case.inputs["k"].is_contiguous()
    assert_close(run(case, "torch", torch.float64), wanted, 1e-14)


@pytest.mark.parametrize("op", OPS)
def test_gradient_of_the_output_or_of_the_state_alone(op: str) -> None:
    case = make(op, "typical", 20)
    for part in (0, 1):
        grads = []
        for backend in ("reference", "torch"):
            leaves = [x.clone().requires_grad_() for x in case.inputs.values()]
            result = getattr(kernels, op)(*leaves, backend=backend)[part]
            projection = (case.to_y, case.to_state)[part]
            grads.append(torch.autograd.grad((result * projection).sum(), leaves, materialize_grads=True))
        for found, wanted in zip(*grads, strict=True):
            assert error(found, wanted) < 2e-14


@pytest.mark.parametrize("time", [1, 33])
@pytest.mark.parametrize("op", OPS)
def test_autocast_does_not_reach_inside(op: str, time: int) -> None:
    case = make(op, "typical", time)
    wanted = run(case, "torch", torch.float32)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = run(case, "torch", torch.float32)
    assert_close(found, wanted, 1e-7)
