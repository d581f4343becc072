"""The Triton kernels on a GPU, in every type, against float64."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor

import kernels

from . import properties
from .cases import OPS, REGIMES, error, make
from .properties import Target

pytestmark = [pytest.mark.gpu, pytest.mark.usefixtures("nan_memory")]
MATRIX = ("wkv5", "wkv6")
BF16 = Target("triton", "cuda", torch.bfloat16, size=64)
TARGETS = {
    "bf16": BF16,
    "bf16-whole": replace(BF16, whole=True),
    "fp16": replace(BF16, dtype=torch.float16),
    "fp32": replace(BF16, dtype=torch.float32),
}
BARE = {"bf16": BF16, "fp32": TARGETS["fp32"]}
each_op = pytest.mark.parametrize("op", OPS)
each_target = pytest.mark.parametrize("target", TARGETS.values(), ids=TARGETS)
each_bare = pytest.mark.parametrize("target", BARE.values(), ids=BARE)


@pytest.mark.parametrize("regime", REGIMES)
@each_target
@each_op
def test_values(op: str, target: Target, regime: str) -> None:
    for time in (33, 128, 201):
        properties.check_values(target, op, regime, time)


@pytest.mark.parametrize("regime", REGIMES)
@each_op
def test_short_and_without_state(op: str, regime: str) -> None:
    for time in (1, 2, 64, 65):
        for state in (False, True):
            properties.check_values(BF16, op, regime, time, state=state)


@pytest.mark.parametrize("size", [16, 32, 128])
@each_bare
@pytest.mark.parametrize("op", MATRIX)
def test_head_sizes(op: str, target: Target, size: int) -> None:
    properties.check_values(replace(target, size=size), op, "mixed", 130)


@pytest.mark.parametrize("regime", ["near_one", "mixed"])
@each_bare
@each_op
def test_long_sequences(op: str, target: Target, regime: str) -> None:
    """Cut into segments that run at once, as there are too few heads to fill the device."""
    properties.check_values(target, op, regime, 1501)


@each_bare
@each_op
def test_long_packed_sequences(op: str, target: Target) -> None:
    properties.check_packed(target, op, (1100, 0, 301, 64, 1), state=False)


@each_target
@each_op
def test_padding_does_not_matter(op: str, target: Target) -> None:
    properties.check_lengths(target, op, 150, (150, 64, 1, 0, 129))


@each_target
@each_op
def test_packed_is_separate(op: str, target: Target) -> None:
    properties.check_packed(target, op, (7, 1, 0, 130, 64))
    properties.check_packed(target, op, (65, 3), state=False, index=torch.int64)


@pytest.mark.parametrize("cuts", [(1, 130), (64, 130), (63, 130), (31, 127, 200), (64, 128, 192)])
@each_bare
@each_op
def test_pieces_are_one_pass(op: str, target: Target, cuts: tuple[int, ...]) -> None:
    properties.check_pieces(target, op, "typical", cuts)


@each_target
@each_op
def test_the_same_bits_twice(op: str, target: Target) -> None:
    properties.check_same_bits(target, op, 130)
    properties.check_same_bits(target, op, 130, (130, 20, 64))
    properties.check_same_bits(target, op, 1000)


@each_target
@each_op
def test_memory_layout_does_not_matter(op: str, target: Target) -> None:
    properties.check_strides(target, op, 70)


@each_target
@each_op
def test_extreme_decays_and_large_inputs(op: str, target: Target) -> None:
    properties.check_extremes(target, op, 130)


@each_bare
@each_op
def test_gradient_of_the_output_or_of_the_state_alone(op: str, target: Target) -> None:
    properties.check_one_result(target, op, 70)


@each_target
@each_op
def test_types(op: str, target: Target) -> None:
    properties.check_types(target, op)


@each_op
def test_auto_takes_triton_and_tells_of_fallbacks(op: str) -> None:
    assert kernels.backends()["triton"] == ""
    for dtype, size, recorded in (
        (torch.bfloat16, 64, "triton"),
        (torch.float64, 64, "torch (not triton: the inputs are float64 and the kernels compute in float32)"),
        (torch.float32, 24, "torch (not triton: the head size is 24, not one of 16, 32, 64, 128)"),
    ):
        inputs = make(op, "typical", 5, size=size, state=False).to("cuda").inputs
        kernels.reset_chosen()
        getattr(kernels, op)(**{n: x.to(dtype) for n, x in inputs.items()})
        wanted = "triton" if op == "wkv4" and size == 24 else recorded
        assert kernels.chosen() == {op: wanted}


def tail(op: str, inputs: dict[str, Tensor], rows: slice) -> dict[str, Tensor]:
    """What the last of `rows` has at its end: outputs, gradients of k and v, final state."""
    leaves = {n: x.detach()[rows].requires_grad_() if x.dim() > 2 else x for n, x in inputs.items()}
    y, last = getattr(kernels, op)(**leaves, backend="triton")
    y.backward(leaves["v"].detach())
    found = {"y": y.detach(), "dk": leaves["k"].grad, "dv": leaves["v"].grad}
    return {n: x[-1, -300:].double() for n, x in found.items()} | {"last": last[-1].detach().double()}


@each_op
def test_offsets_beyond_32_bits(op: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two rows, the second one wholly behind 2^31 elements: it equals itself alone."""
    monkeypatch.undo()  # filling this much memory with NaN takes longer than the test
    if torch.cuda.mem_get_info()[0] < 55 << 30:
        pytest.skip("needs 55 GiB of free GPU memory")
    shape = (4096,) if op == "wkv4" else (64, 64)
    x = torch.empty(2, 2**31 // 4096 + 70, *shape, dtype=torch.bfloat16, device="cuda").uniform_(-1, 1)
    decay = -torch.rand(shape, device="cuda") - 0.01
    inputs = dict.fromkeys("kv" if op == "wkv4" else "rkv", x)
    inputs |= {"u": decay + 1, "log_w": x.abs().neg_() if op == "wkv6" else decay}
    alone, both = tail(op, inputs, slice(1, 2)), tail(op, inputs, slice(0, 2))
    torch.cuda.empty_cache()
    for name, wanted in alone.items():
        assert error(both[name], wanted) < 4e-3, name
