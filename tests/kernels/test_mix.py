"""Token shift and its mixes: the definition, state, types, errors; all layer kernels in the interpreter."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import Tensor

from kernels.mix import lerp, mix6

from . import layer_cases
from .layer_cases import NAMES, layers


def stepped(x: Tensor, before: Tensor | None, shares: Tensor) -> Tensor:
    """The definition, one token after another; shares [D] or [B, T, D]."""
    shares = shares.expand_as(x)
    previous = torch.zeros_like(x[:, 0]) if before is None else before
    found = []
    for t in range(x.shape[1]):
        found.append((1 - shares[:, t]) * x[:, t] + shares[:, t] * previous)
        previous = x[:, t]
    return torch.stack(found, 1)


@pytest.mark.parametrize("state", [False, True])
@pytest.mark.parametrize("time", [1, 2, 7])
def test_lerp_is_its_definition(time: int, state: bool) -> None:
    x, before = torch.randn(2, time, 6).double(), torch.randn(2, 6).double() if state else None
    shares = [torch.rand(6).double(), torch.rand(1, 1, 6).double(), torch.rand(6).double()]
    for current in (False, True):
        found = lerp(x, before, shares, current=current)
        assert len(found) == 3
        for y, s in zip(found, shares, strict=True):
            torch.testing.assert_close(y, stepped(x, before, 1 - s if current else s))


@pytest.mark.parametrize("state", [False, True])
@pytest.mark.parametrize("time", [1, 5])
def test_mix6_is_its_definition(time: int, state: bool) -> None:
    x, before = torch.randn(2, time, 6).double(), torch.randn(2, 6).double() if state else None
    low, w2 = torch.randn(2, time, 5 * 3).double(), torch.randn(5, 3, 6).double()
    means = [torch.rand(6).double() for _ in range(5)]
    for i, y in enumerate(mix6(x, before, low, w2, means)):
        shares = means[i] + low[..., 3 * i : 3 * i + 3] @ w2[i]
        torch.testing.assert_close(y, stepped(x, before, shares))


@pytest.mark.parametrize("name", ["lerp-previous", "lerp-current", "mix6"])
def test_pieces_are_one_pass(name: str) -> None:
    layer = layers(2, 9, 2, 4)[name]
    whole = layer.call(layer.inputs, None)
    x, pieces, before = layer.inputs["x"], [], layer.inputs["before"]
    for piece in (slice(0, 1), slice(1, 6), slice(6, 9)):
        given = layer.inputs | {"x": x[:, piece], "before": before}
        given |= {"low": layer.inputs["low"][:, piece]} if name == "mix6" else {}
        pieces.append(layer.call(given, None))
        before = x[:, piece][:, -1]
    for i, y in enumerate(whole):
        torch.testing.assert_close(torch.cat([p[i] for p in pieces], 1), y)


@pytest.mark.parametrize("name", NAMES)
def test_gradients_in_float64(name: str) -> None:
    layer = layers(2, 4, 2, 3)[name]
    names = list(layer.inputs)
    leaves = [x.requires_grad_() for x in layer.inputs.values()]

    def call(*given: Tensor) -> tuple[Tensor, ...]:
        return tuple(layer.call(dict(zip(names, given, strict=True)), None))

    assert torch.autograd.gradcheck(call, leaves, fast_mode=True)


@pytest.mark.parametrize("name", NAMES)
def test_narrow_types_are_computed_wide_and_rounded_once(name: str) -> None:
    layer = layers(2, 9, 2, 16)[name]
    wanted = layer_cases.run(layer, "torch", torch.float64)
    for weights in (torch.bfloat16, torch.float32):
        if name.startswith("add_norm") and weights == torch.float32:
            continue  # torch's LayerNorm wants one type
        found = layer_cases.run(layer, "torch", torch.bfloat16, weights=weights)
        wide = name == "log_decay"
        assert found["y0"].dtype == (torch.float32 if wide else torch.bfloat16)
        layer_cases.assert_close({"y0": found["y0"]}, {"y0": wanted["y0"]}, 1e-6 if wide else 4e-3)


@pytest.mark.parametrize("name", NAMES)
def test_types_under_autocast(name: str) -> None:
    """What feeds matrix products has autocast's type; sums, LayerNorms and decays stay in float32."""
    layer = layers(2, 3, 2, 4)[name]
    inputs = {n: x.float() for n, x in layer.inputs.items()}
    with torch.autocast("cpu", torch.bfloat16):
        kinds = {y.dtype for y in layer.call(inputs, None)}
    float32 = name.startswith("add_norm") or name in ("log_decay", "sigmoid_gate")
    assert kinds == {torch.float32 if float32 else torch.bfloat16}


@pytest.mark.parametrize(
    ("call", "says"),
    [
        (lambda x: lerp(x[0], None, [x[0, 0]]), r"lerp: x has shape \[3, 4\]; expected \[B, T, D\]"),
        (lambda x: lerp(x, x[:1, 0], [x[0, 0]]), r"before has shape \[1, 4\]; expected \[B, D\] = \[2, 4\]"),
        (lambda x: lerp(x, None, [x[0, 0, :3]]), r"shares have \[3\] elements; expected D = 4"),
        (lambda x: lerp(x, None, []), "0 shares; give one to four"),
        (lambda x: mix6(x, None, x, x, [x[0, 0]] * 5), r"w2 has shape \[2, 3, 4\]; expected \[5, rank, 4\]"),
        (
            lambda x: mix6(x, None, x, torch.zeros(5, 2, 4), [x[0, 0]] * 5),
            r"low has shape \[2, 3, 4\]; expected \[B, T, 5 \* rank\] = \[2, 3, 10\]",
        ),
        (
            lambda x: mix6(x, None, torch.zeros(2, 3, 10), torch.zeros(5, 2, 4), [x[0, 0]] * 4),
            "shares must be five tensors of D = 4 elements",
        ),
    ],
)
def test_wrong_arguments_are_told(call: object, says: str) -> None:
    with pytest.raises(ValueError, match=says):
        call(torch.zeros(2, 3, 4))  # type: ignore[operator]


def test_triton_kernels_in_the_interpreter() -> None:
    pytest.importorskip("triton", reason="Triton is not installed here")
    file = Path(__file__).with_name("interpreted_layers.py")
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", str(file)]
    done = subprocess.run(
        command, env=os.environ | {"TRITON_INTERPRET": "1"}, capture_output=True, text=True, timeout=600
    )
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-2000:]
    assert "passed" in done.stdout


@pytest.mark.gpu
@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize(
    ("dtype", "weights", "bound"),
    [
        (torch.bfloat16, torch.bfloat16, 4e-3),
        (torch.bfloat16, torch.float32, 4e-3),
        (torch.float16, torch.float32, 1e-3),
        (torch.float32, torch.float32, 1e-5),
    ],
)
def test_triton_on_a_gpu(name: str, dtype: torch.dtype, weights: torch.dtype, bound: float) -> None:
    for shape in ((2, 150, 4, 64), (3, 1, 2, 32), (1, 70, 5, 26)):
        layer = layers(*shape)[name]
        wanted = layer_cases.run(layer, "torch", torch.float64)
        found = layer_cases.run(layer, "triton", dtype, weights=weights, device="cuda")
        layer_cases.assert_close(found, wanted, bound)
        again = layer_cases.run(layer, "triton", dtype, weights=weights, device="cuda")
        layer_cases.assert_same_bits(found, again)
