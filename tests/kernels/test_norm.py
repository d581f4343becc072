"""Norms and pointwise formulas against their definitions; blocks on a GPU."""

from __future__ import annotations

import pytest
import torch

import kernels
from kernels.norm import add_norm, head_norm, reorder
from kernels.pointwise import log_decay, relu_squared, sigmoid_gate
from toolkit import register
from toolkit.trunk import Block

from .cases import error


def test_head_norm_is_its_definition() -> None:
    y, gate = torch.randn(2, 3, 4, 8).double(), torch.randn(2, 3, 32).double()
    weight, bias = torch.randn(32).double(), torch.randn(32).double()
    mean = y.mean(-1, keepdim=True)
    variance = (y - mean).square().mean(-1, keepdim=True)
    normed = ((y - mean) / (variance + 64e-5).sqrt()).flatten(2) * weight + bias
    found = head_norm(y, gate, weight, bias, 64e-5)
    torch.testing.assert_close(found, normed * gate / (1 + torch.exp(-gate)))


@pytest.mark.parametrize("late", [False, True])
@pytest.mark.parametrize("moved", [False, True])
def test_add_norm_is_its_definition(late: bool, moved: bool) -> None:
    x, y = torch.randn(2, 5, 6).double(), torch.randn(2, 5, 6).double() if late else None
    weight, bias = torch.randn(6).double(), torch.randn(6).double()
    index = torch.randperm(10) if moved else None
    total, normed = add_norm(x, y, weight, bias, 1e-5, index=index)
    wanted = (x if y is None else x + y).flatten(0, 1)
    wanted = (wanted if index is None else wanted[index]).view(x.shape)
    assert torch.equal(total, wanted)
    centred = wanted - wanted.mean(-1, keepdim=True)
    scale = (centred.square().mean(-1, keepdim=True) + 1e-5).sqrt()
    torch.testing.assert_close(normed, centred / scale * weight + bias)


@pytest.mark.parametrize("weights", [torch.float32, torch.bfloat16])
def test_add_norm_in_half_precision_is_computed_in_single(weights: torch.dtype) -> None:
    x, weight, bias = torch.randn(2, 3, 4).bfloat16(), torch.randn(4).to(weights), torch.randn(4).to(weights)
    wanted = torch.nn.functional.layer_norm(x.float(), (4,), weight.float(), bias.float())
    total, normed = add_norm(x, None, weight, bias, 1e-5)
    assert total.dtype == torch.bfloat16 and torch.equal(normed, wanted.bfloat16())
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(add_norm(x, None, weight, bias, 1e-5)[1], wanted)
    wide = add_norm(x.float(), None, weight, bias, 1e-5)[1]
    assert torch.equal(wide, wanted)


def test_reorder_and_back() -> None:
    x, index = torch.randn(2, 5, 3, requires_grad=True), torch.randperm(10)
    moved = reorder(x, index)
    assert torch.equal(moved.flatten(0, 1), x.flatten(0, 1)[index])
    (gradient,) = torch.autograd.grad(moved, x, moved.detach())
    assert torch.equal(gradient, x.detach())


def test_pointwise_formulas_are_their_definitions() -> None:
    x, y, base = torch.randn(2, 3, 8), torch.randn(2, 3, 8), torch.randn(2, 4)
    torch.testing.assert_close(relu_squared(x), torch.where(x > 0, x * x, 0.0))
    torch.testing.assert_close(sigmoid_gate(x, y), y / (1 + torch.exp(-x)))
    torch.testing.assert_close(log_decay(base, x), -torch.exp(base.flatten() + x))
    assert torch.equal(log_decay(base), -torch.exp(base))
    assert log_decay(base.bfloat16()).dtype == torch.float32
    assert log_decay(base.double()).dtype == torch.float64


def test_wrong_arguments_are_told() -> None:
    x = torch.zeros(2, 3, 4)
    with pytest.raises(ValueError, match=r"head_norm: y has shape \[2, 3, 4\]; expected \[B, T, H, N\]"):
        head_norm(x, x, x[0, 0], x[0, 0], 1e-5)
    with pytest.raises(
        ValueError, match=r"head_norm: gate, weight and bias have shapes .*expected \[2, 3, 4\]"
    ):
        head_norm(x.view(2, 3, 2, 2), x[:1], x[0, 0], x[0, 0], 1e-5)
    with pytest.raises(ValueError, match=r"add_norm: late has shape \[1, 3, 4\] but x has \[2, 3, 4\]"):
        add_norm(x, x[:1], x[0, 0], x[0, 0], 1e-5)
    with pytest.raises(ValueError, match=r"add_norm: weight and bias .*expected \[D\] = \[4\]"):
        add_norm(x, None, x[0, 0, :3], x[0, 0], 1e-5)
    for index in (torch.arange(5), torch.arange(6.0), torch.arange(7)):
        with pytest.raises(ValueError, match=r"add_norm: index is .*; expected torch.int64 \[B\*T\] = \[6\]"):
            add_norm(x, None, x[0, 0], x[0, 0], 1e-5, index=index)
        with pytest.raises(ValueError, match="reorder: index is "):
            reorder(x, index)
    with pytest.raises(ValueError, match=r"add_norm: x has shape \[3, 4\]; expected \[B, T, D\]"):
        add_norm(x[0], None, x[0, 0], x[0, 0], 1e-5)
    with pytest.raises(ValueError, match=r"sigmoid_gate: gate has shape \[1, 3, 4\] but x has \[2, 3, 4\]"):
        sigmoid_gate(x[:1], x)
    with pytest.raises(ValueError, match=r"log_decay: base has 3 elements but shift is \[2, 3, 4\]"):
        log_decay(x[0, 0, :3], x)


@pytest.mark.gpu
@pytest.mark.parametrize("name", ["rwkv4", "rwkv5", "rwkv6"])
@pytest.mark.parametrize("autocast", [False, True])
def test_a_block_on_a_gpu(name: str, autocast: bool) -> None:
    """Compiled without a graph break; no wait for the device in forward or backward; the CPU's numbers."""
    register.discover()
    torch.manual_seed(0)
    block = Block(register.bind("recurrence", {"name": name, "d_ffn": 256})(128, 2), 1, 128).cuda()
    for parameter in block.parameters():
        parameter.data += 0.05 * torch.randn_like(parameter)
    x, late = (torch.randn(2, 70, 128, device="cuda", requires_grad=True) for _ in range(2))
    index = torch.randperm(140, device="cuda")

    def run(block: torch.nn.Module, cast: bool) -> list[torch.Tensor]:
        with torch.autocast("cuda", torch.bfloat16, enabled=cast):
            y, more, _, _ = block(x, late, None, None, None, index)
        gradients = torch.autograd.grad((y * more.float()).sum(), [x, late, *block.parameters()])
        return [y.detach(), more.detach(), *gradients]

    with kernels.use("torch"):
        wanted = run(block, False)
    torch.cuda.set_sync_debug_mode("error")
    try:
        eager = run(block, autocast)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    compiled = run(torch.compile(block, fullgraph=True), autocast)
    bound = 6e-2 if autocast else 1e-3
    for found in (eager, compiled):
        for one, other in zip(found, wanted, strict=True):
            assert error(one.double(), other.double()) < bound
