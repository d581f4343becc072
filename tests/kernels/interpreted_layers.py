"""The layer operators' Triton kernels in Triton's interpreter; `test_mix` runs this file.

By hand: TRITON_INTERPRET=1 python -m pytest tests/kernels/interpreted_layers.py
"""

from __future__ import annotations

from functools import partial

import pytest
import torch
from torch.utils.checkpoint import checkpoint

import kernels
from kernels.dispatch import use
from toolkit import register
from toolkit.trunk import Block

from . import layer_cases
from .layer_cases import NAMES, layers

pytestmark = pytest.mark.usefixtures("nan_memory")
SHAPES = {"plain": (2, 11, 3, 16), "one": (3, 1, 2, 8), "odd": (1, 70, 3, 26)}


@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
@pytest.mark.parametrize("name", NAMES)
def test_values_and_gradients(name: str, shape: tuple[int, int, int, int]) -> None:
    for before in (True, False):
        layer = layers(*shape, before=before)[name]
        wanted = layer_cases.run(layer, "torch", torch.float64)
        kernels.reset_chosen()
        found = layer_cases.run(layer, "triton", torch.float32)
        assert set(kernels.chosen().values()) == {"triton"}
        layer_cases.assert_close(found, wanted, 1e-6)


@pytest.mark.parametrize("name", NAMES)
def test_half_precision_with_wide_weights(name: str) -> None:
    layer = layers(2, 9, 2, 16)[name]
    wanted = layer_cases.run(layer, "torch", torch.float64)
    found = layer_cases.run(layer, "triton", torch.float16, weights=torch.float32)
    layer_cases.assert_close(found, wanted, 1e-3)


@pytest.mark.parametrize("name", NAMES)
def test_many_programs_share_a_sum(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Gradients of weights are added over programs, which only large shapes have otherwise."""
    from kernels.gpu import add_norm, lerp

    for module in (add_norm, lerp):
        monkeypatch.setattr(module, "PROGRAMS", 3)
    layer = layers(2, 37, 1, 16)[name]
    wanted = layer_cases.run(layer, "torch", torch.float64)
    found = layer_cases.run(layer, "triton", torch.float32)
    layer_cases.assert_close(found, wanted, 1e-6)
    layer_cases.assert_same_bits(found, layer_cases.run(layer, "triton", torch.float32))


def test_a_block_compiles_without_a_graph_break_and_can_be_computed_again() -> None:
    """Computed again in the backward pass: activation checkpointing, which gives a saved tensor out once."""
    register.discover()
    torch.manual_seed(0)
    block = Block(register.bind("recurrence", {"name": "rwkv6", "d_ffn": 32})(32, 2), 1, 32)
    x, late = torch.randn(2, 5, 32), torch.randn(2, 5, 32, requires_grad=True)
    index = torch.randperm(10)
    compiled = torch.compile(block, backend="aot_eager", fullgraph=True)
    found = []
    with use("triton"):
        for run in (block, compiled, partial(checkpoint, block, use_reentrant=False)):
            y, more, _, _ = run(x, late, None, None, None, index)
            gradients = torch.autograd.grad((y * more).sum(), [late, *block.parameters()])
            found.append([y, more, *gradients])
    for one, two, three in zip(*found, strict=True):
        torch.testing.assert_close(one, two)
        assert torch.equal(one, three)
