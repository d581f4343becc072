"""The Triton kernels in Triton's interpreter, on the CPU; `test_interpreter` runs this file.

By hand: TRITON_INTERPRET=1 python -m pytest tests/kernels/interpreted.py
Shapes are small, as a launch takes about 0.1 s, and types are float32 and float16: the interpreter computes
products of bfloat16 wrongly.
"""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

import kernels

from . import properties
from .cases import REGIMES
from .properties import Target

pytestmark = pytest.mark.usefixtures("nan_memory")
FLOAT = Target("triton", "cpu", torch.float32, heads=1)
HALF = replace(FLOAT, dtype=torch.float16)
MATRIX = ("wkv5", "wkv6")
OPS = MATRIX
each_op = pytest.mark.parametrize("op", OPS)


@each_op
def test_triton_ran(op: str) -> None:
    kernels.reset_chosen()
    properties.check_types(FLOAT, op)
    assert kernels.chosen() == {op: "triton"}


@pytest.mark.parametrize("regime", REGIMES)
@each_op
def test_values(op: str, regime: str) -> None:
    properties.check_values(FLOAT, op, regime, 70)


@pytest.mark.parametrize("regime", ["typical", "mixed"])
@each_op
def test_values_in_half_precision(op: str, regime: str) -> None:
    properties.check_values(HALF, op, regime, 70)


@pytest.mark.parametrize("time", [1, 2, 31, 64])
@each_op
def test_below_a_chunk(op: str, time: int) -> None:
    for state in (False, True):
        properties.check_values(FLOAT, op, "mixed", time, state=state)


@pytest.mark.parametrize("size", [32, 64, 128])
@pytest.mark.parametrize("op", MATRIX)
def test_head_sizes(op: str, size: int) -> None:
    properties.check_values(replace(FLOAT, size=size), op, "typical", 67)


@each_op
def test_padding_does_not_matter(op: str) -> None:
    properties.check_lengths(FLOAT, op, 37, (37, 20, 1, 0))
    properties.check_lengths(FLOAT, op, 66, (3, 66), state=False)


@each_op
def test_packed_is_separate(op: str) -> None:
    properties.check_packed(FLOAT, op, (7, 1, 0, 66))
    properties.check_packed(HALF, op, (3, 2), state=False, index=torch.int64)


@pytest.mark.parametrize("cuts", [(1, 70), (64, 70), (23, 64, 90)])
@each_op
def test_pieces_are_one_pass(op: str, cuts: tuple[int, ...]) -> None:
    properties.check_pieces(FLOAT, op, "typical", cuts)


@pytest.mark.parametrize("op", MATRIX)
def test_long_sequences_in_segments(op: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """With segments of one chunk, as only long sequences have otherwise."""
    from kernels.gpu import wkv6

    monkeypatch.setattr(wkv6, "SHORTEST", 1)
    properties.check_values(FLOAT, op, "typical", 150)
    properties.check_packed(FLOAT, op, (66, 0, 130), state=False)


@each_op
def test_the_same_bits_twice(op: str) -> None:
    properties.check_same_bits(FLOAT, op, 37)
    properties.check_same_bits(HALF, op, 66, (66, 20))


@each_op
def test_memory_layout_does_not_matter(op: str) -> None:
    properties.check_strides(replace(FLOAT, heads=2), op, 21)


@each_op
def test_extreme_decays_and_large_inputs(op: str) -> None:
    properties.check_extremes(FLOAT, op, 19)


@each_op
def test_gradient_of_the_output_or_of_the_state_alone(op: str) -> None:
    properties.check_one_result(FLOAT, op, 20)
