"""What every backend has to satisfy, for the torch backend and the reference on the CPU."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from . import properties
from .cases import OPS
from .properties import Target

pytestmark = pytest.mark.usefixtures("nan_memory")
TORCH = Target("torch", "cpu", torch.float32)
TARGETS = {
    "torch-fp32": TORCH,
    "torch-fp64": replace(TORCH, dtype=torch.float64),
    "reference-fp32": replace(TORCH, backend="reference"),
}
each_op = pytest.mark.parametrize("op", OPS)
each_target = pytest.mark.parametrize("target", TARGETS.values(), ids=TARGETS)


@pytest.mark.parametrize("cuts", [(1, 17), (16, 40), (7, 8, 33), (20, 36, 37)])
@each_target
@each_op
def test_pieces_are_one_pass(op: str, target: Target, cuts: tuple[int, ...]) -> None:
    properties.check_pieces(target, op, "mixed", cuts)


@each_target
@each_op
def test_padding_does_not_matter(op: str, target: Target) -> None:
    properties.check_lengths(target, op, 37, (37, 20, 1, 0))


@each_target
@each_op
def test_packed_is_separate(op: str, target: Target) -> None:
    properties.check_packed(target, op, (7, 1, 0, 36), state=False)


@each_target
@each_op
def test_the_same_bits_twice(op: str, target: Target) -> None:
    case = target.make(op, "typical", 37, lengths=(37, 20))
    first, second = target.run(case), target.run(case)
    assert all(torch.equal(x, second[name]) for name, x in first.items())


@each_target
@each_op
def test_memory_layout_does_not_matter(op: str, target: Target) -> None:
    properties.check_strides(target, op, 33)


@each_target
@each_op
def test_extreme_decays_and_large_inputs(op: str, target: Target) -> None:
    properties.check_extremes(target, op, 19)


@each_op
def test_types(op: str) -> None:
    for dtype in (torch.float32, torch.float16, torch.bfloat16):
        for whole in (False, True):
            properties.check_types(replace(TORCH, dtype=dtype, whole=whole), op)
