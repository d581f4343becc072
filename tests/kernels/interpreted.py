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
from .cases import OPS, REGIMES
from .properties import Target

pytestmark = pytest.mark.usefixtures("nan_memory")
FLOAT = Target("triton", "cpu", torch.float32, heads=1)
HALF = replace(FLOAT, dtype=torch.float16)
MATRIX = ("wkv5", "wkv6")
each_op = pytest.mark.parametrize("op", OPS)


@each_op
def test_triton_ran(op: str) -> None:
    kernels.reset_chosen()
    properties.check_types(FLOAT, op)
    assert kernels.chosen() == {op: "triton"}


@pytest.mark.parametrize("regime", REGIMES)
@each_op
def test_values(op: str, regime: str) -> None:
    properties.check_values(FLOAT, op, regime, 67)


@each_op
def test_values_in_half_precision(op: str) -> None:
    properties.check_values(HALF, op, "mixed", 67)


@pytest.mark.parametrize("time", [1, 31])
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
    properties.check_lengths(FLOAT, op, 66, (66, 1, 0))


@each_op
def test_packed_is_separate(op: str) -> None:
    properties.check_packed(HALF, op, (7, 1, 0, 34), state=False, index=torch.int64)


@pytest.mark.parametrize("cuts", [(1, 66), (64, 66), (23, 40, 66)])
@each_op
def test_pieces_are_one_pass(op: str, cuts: tuple[int, ...]) -> None:
    properties.check_pieces(FLOAT, op, "typical", cuts)


@each_op
def test_long_sequences_in_segments(op: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """With short segments, as otherwise only long sequences are cut."""
    from kernels.gpu import wkv4, wkv6

    monkeypatch.setattr(wkv4, "plan", lambda samples, time, width: wkv4.Plan(32, 16, 16, 32, 1))
    monkeypatch.setattr(wkv6, "SHORTEST", 1)
    time = 40 if op == "wkv4" else 150
    properties.check_packed(FLOAT, op, (time // 2, 0, time))


@each_op
def test_the_same_bits_twice(op: str) -> None:
    properties.check_same_bits(HALF, op, 17, (17, 9))


@each_op
def test_memory_layout_does_not_matter(op: str) -> None:
    properties.check_strides(replace(FLOAT, heads=2), op, 9)


@each_op
def test_extreme_decays_and_large_inputs(op: str) -> None:
    properties.check_extremes(FLOAT, op, 9)


@each_op
def test_gradient_of_the_output_or_of_the_state_alone(op: str) -> None:
    properties.check_one_result(FLOAT, op, 20)


@pytest.mark.parametrize(("op", "packed"), [("wkv4", True), ("wkv5", False), ("wkv6", False), ("wkv6", True)])
def test_compiled_without_a_graph_break(op: str, packed: bool) -> None:
    properties.check_compiled(FLOAT, op, (9, 3), packed=packed, compiler="aot_eager")
