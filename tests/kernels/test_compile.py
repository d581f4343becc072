"""torch.compile goes through the dispatch without a graph break, and what it traced is recorded."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest
import torch
from torch import Tensor

import kernels
from kernels import dispatch, reference
from tests.helpers import component, randomise
from toolkit.trunk import Block

from . import properties
from .cases import OPS, make
from .properties import Target


@pytest.fixture(autouse=True)
def fresh() -> Iterator[None]:
    torch.compiler.reset()
    kernels.reset_chosen()
    yield
    torch.compiler.reset()
    kernels.reset_chosen()


@torch.library.custom_op("visualrwkv_tests::twice", mutates_args=())
def twice(x: Tensor) -> Tensor:
    return 2 * x


twice.register_fake(torch.empty_like)
twice.register_autograd(lambda ctx, grad: 2 * grad)


def custom(*inputs: Tensor | None) -> tuple[Tensor, Tensor]:
    """Stands for a Triton backend: a custom operator with its arguments (k, v, log_w, u, state ...)."""
    k, v, *_, state, _, _ = inputs
    assert k is not None and v is not None and state is not None
    return twice(k + v), state + 1


def compiled(op: str, backend: str | None, compiler: str) -> Callable[..., tuple[Tensor, Tensor]]:
    def call(**inputs: Tensor) -> tuple[Tensor, Tensor]:
        return getattr(kernels, op)(**inputs, backend=backend)

    return torch.compile(call, fullgraph=True, backend=compiler)


@pytest.mark.parametrize("compiler", ["eager", "aot_eager"])
@pytest.mark.parametrize("op", OPS)
def test_the_dispatch_is_traced_whole(op: str, compiler: str) -> None:
    inputs = {n: x.requires_grad_() for n, x in make(op, "typical", 3).inputs.items()}
    sizes = {"lengths": torch.tensor([3, 2])}
    y, last = compiled(op, "reference", compiler)(**inputs, **sizes)
    assert kernels.chosen() == {op: "reference"}
    wanted = getattr(kernels, op)(**inputs, **sizes, backend="reference")
    torch.testing.assert_close((y, last), wanted, rtol=1e-12, atol=1e-12)
    found = torch.autograd.grad(y.sum() + last.sum(), list(inputs.values()))
    expected = torch.autograd.grad(wanted[0].sum() + wanted[1].sum(), list(inputs.values()))
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("compiler", ["eager", "aot_eager"])
def test_a_custom_operator_loaded_while_tracing(compiler: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dispatch, "_no_triton", lambda device: "")
    monkeypatch.setitem(dispatch._TABLE["wkv4"], "triton", f"{__name__}:custom")
    case = make("wkv4", "typical", 3)
    case.lengths = torch.tensor([3, 2])
    inputs = {n: x.float().requires_grad_() for n, x in case.inputs.items()}
    with torch.autocast("cpu", torch.bfloat16):
        y, last = compiled("wkv4", "triton", compiler)(**inputs, lengths=case.lengths)
    assert kernels.chosen() == {"wkv4": "triton"}
    torch.testing.assert_close(y, 2 * (inputs["k"] + inputs["v"]))
    torch.testing.assert_close(last, inputs["state"] + 1)
    y.sum().backward()
    assert inputs["k"].grad is not None and bool((inputs["k"].grad == 2).all())


def test_compiled_code_follows_the_default(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(dispatch._TABLE["wkv6"], "torch", lambda *inputs: reference.wkv6(*inputs))
    inputs = make("wkv6", "typical", 2).inputs
    call = compiled("wkv6", None, "eager")
    for name in ("reference", "torch", "reference"):
        with kernels.use(name):
            call(**inputs)
    assert kernels.chosen() == {"wkv6": "reference,torch"}


@pytest.mark.parametrize("recurrence", ["rwkv4", "rwkv5", "rwkv6"])
def test_a_block_is_traced_whole(recurrence: str) -> None:
    torch.manual_seed(0)
    block = Block(component("recurrence", recurrence)(32, 4), 1, 32)
    randomise(block)
    x, sizes = torch.randn(2, 4, 32, requires_grad=True), torch.tensor([4, 3])
    index = torch.tensor([2, 0, 1, 3, 4, 6, 5, 7])
    parameters = [x, *block.parameters()]
    found = []
    with kernels.use("reference"):
        for call in (block, torch.compile(block, fullgraph=True, backend="aot_eager")):
            y, more, (time_state, channel_state), _ = call(x, x.flip(0), lengths=sizes, index=index)
            loss = (y + more).square().sum() + time_state[1].sum() + channel_state.sum()
            found.append([y, more, *time_state, channel_state, *torch.autograd.grad(loss, parameters)])
    torch.testing.assert_close(*found)


@pytest.mark.gpu
@pytest.mark.parametrize("compiler", ["aot_eager", "inductor"])
@pytest.mark.parametrize("op", OPS)
def test_triton_compiles_without_a_graph_break(op: str, compiler: str) -> None:
    target = Target("triton", "cuda", torch.bfloat16, size=64)
    properties.check_compiled(target, op, (90, 33), packed=compiler == "aot_eager", compiler=compiler)
    assert kernels.chosen() == {op: "triton"}
