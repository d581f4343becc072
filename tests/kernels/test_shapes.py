"""Shapes, lengths and cuts drawn by hypothesis: whatever they are, float64 is met."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from . import properties
from .cases import OPS, REGIMES
from .properties import Target

pytest.importorskip("hypothesis", reason="hypothesis comes with the test extra")
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

pytestmark = pytest.mark.usefixtures("nan_memory")
each_op = pytest.mark.parametrize("op", OPS)
# The same examples every time, and no timing: a test that fails must fail again.
few = settings(
    max_examples=12,
    deadline=None,
    derandomize=True,
    database=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
regimes = st.sampled_from(tuple(REGIMES))
times = st.integers(1, 70)
flags = st.booleans()
rows = st.lists(st.integers(0, 70), min_size=1, max_size=4).filter(any).map(tuple)
cuts = st.sets(st.integers(1, 70), min_size=1, max_size=3).map(lambda x: tuple(sorted(x)))
TORCH = Target("torch", "cpu", torch.float32)
TRITON = Target("triton", "cuda", torch.float32)


@each_op
@few
@given(regime=regimes, time=times, state=flags, heads=st.integers(1, 3), size=st.integers(1, 20))
def test_any_shape(op: str, regime: str, time: int, state: bool, heads: int, size: int) -> None:
    target = replace(TORCH, heads=heads, size=size)
    properties.check_values(target, op, regime, time, state=state)


@each_op
@few
@given(lengths=rows, state=flags, packed=flags)
def test_any_lengths(op: str, lengths: tuple[int, ...], state: bool, packed: bool) -> None:
    lengths_(TORCH, op, lengths, state, packed)


@each_op
@few
@given(regime=regimes, where=cuts)
def test_any_cuts(op: str, regime: str, where: tuple[int, ...]) -> None:
    properties.check_pieces(TORCH, op, regime, where)


@pytest.mark.gpu
@each_op
@few
@given(regime=regimes, time=st.integers(1, 200), state=flags, heads=st.integers(1, 3))
def test_any_shape_on_the_gpu(op: str, regime: str, time: int, state: bool, heads: int) -> None:
    properties.check_values(replace(TRITON, heads=heads), op, regime, time, state=state)


@pytest.mark.gpu
@each_op
@few
@given(lengths=rows, state=flags, packed=flags)
def test_any_lengths_on_the_gpu(op: str, lengths: tuple[int, ...], state: bool, packed: bool) -> None:
    lengths_(TRITON, op, lengths, state, packed)


@pytest.mark.gpu
@each_op
@few
@given(regime=regimes, where=cuts)
def test_any_cuts_on_the_gpu(op: str, regime: str, where: tuple[int, ...]) -> None:
    properties.check_pieces(TRITON, op, regime, where)


def lengths_(target: Target, op: str, lengths: tuple[int, ...], state: bool, packed: bool) -> None:
    """As a padded batch, or packed."""
    if packed:
        properties.check_packed(target, op, lengths, state=state)
    else:
        properties.check_lengths(target, op, max(lengths), lengths, state=state)
