"""The model on a CUDA device: the CPU's numbers, the same bits twice, compiled, captured, a whole run."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import kernels
from tests.helpers import component, make_batch, randomise, small_model
from toolkit import register, run
from toolkit.lit import to_device
from toolkit.loss import lm_loss
from toolkit.trunk import Block

pytestmark = pytest.mark.gpu
register.discover()
OPERATORS = {"rwkv4": "wkv4", "rwkv5": "wkv5", "rwkv6": "wkv6"}
TEXTS = [(3, 5, 2), (0, 2, 1), (-1, 4, 3), (7, 1, 4)]


@pytest.mark.parametrize("recurrence", sorted(register.components("recurrence")))
@pytest.mark.parametrize("scan", ["uni", "2d", "hilbert"])
def test_logits_and_gradients_equal_the_cpu(recurrence: str, scan: str) -> None:
    model = small_model(recurrence=recurrence, scan=scan)
    batch = make_batch(model, TEXTS)
    expected = model.logits(batch).detach()
    lm_loss(model(batch, l2="answers"), reduction="sample").backward()
    gradients = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    model.cuda()
    kernels.reset_chosen()
    there = to_device(batch, torch.device("cuda"))
    torch.testing.assert_close(model.logits(there).detach().cpu(), expected, rtol=1e-3, atol=1e-4)
    lm_loss(model(there, l2="answers"), reduction="sample").backward()
    for name, parameter in model.named_parameters():
        if name in gradients:
            error = (parameter.grad.cpu() - gradients[name]).norm() / gradients[name].norm().clamp(min=1e-6)
            assert float(error) < 2e-3, name
    assert kernels.chosen()[OPERATORS[recurrence]] == "triton"


@pytest.mark.parametrize("recurrence", sorted(register.components("recurrence")))
def test_the_same_bits_twice_in_bf16(recurrence: str) -> None:
    model = small_model(recurrence=recurrence).cuda()
    batch = to_device(make_batch(model, TEXTS), torch.device("cuda"))
    found = []
    for _ in range(2):
        model.zero_grad()
        with torch.autocast("cuda", torch.bfloat16):
            loss = lm_loss(model(batch, l2="answers"), reduction="sample")
        loss.backward()
        found.append([loss.detach(), *(p.grad for p in model.parameters() if p.grad is not None)])
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))


def block_of(recurrence: str) -> Block:
    """A layer of 128 channels, head size 64, on the GPU; its parameters are random."""
    torch.manual_seed(0)
    block = Block(component("recurrence", recurrence)(128, 4), 1, 128)
    randomise(block)
    return block.cuda()


def results(block: nn.Module, inputs: tuple[Tensor, Tensor, Tensor | None, Tensor]) -> list[Tensor]:
    """Outputs, states and all gradients of one block in bfloat16 autocast; nothing is kept in `grad`.

    inputs: x and what is still to be added to it [B,T,D], lengths, the scan's rows [B*T].
    """
    x, late, lengths, index = inputs
    with torch.autocast("cuda", torch.bfloat16, cache_enabled=False):
        y, more, (time_state, channel_state), _ = block(x, late, lengths=lengths, index=index)
    loss = (y.float() + more.float()).square().sum() + time_state[1].sum()
    gradients = torch.autograd.grad(loss, [x, late, *block.parameters()])
    outputs = (y, more, *time_state, channel_state)
    return [*(t.detach() for t in outputs), *gradients]


def inputs_of(lengths: list[int] | None) -> tuple[Tensor, Tensor, Tensor | None, Tensor]:
    x, late = (torch.randn(2, 90, 128, device="cuda", requires_grad=True) for _ in range(2))
    sizes = None if lengths is None else torch.tensor(lengths, device="cuda")
    within = torch.stack([torch.randperm(90), 90 + torch.randperm(90)])
    return x, late, sizes, within.flatten().cuda()


def assert_alike(found: list[Tensor], wanted: list[Tensor], bound: float) -> None:
    for i, (a, b) in enumerate(zip(found, wanted, strict=True)):
        difference = (a.double() - b.double()).norm() / b.double().norm().clamp(min=1e-6)
        assert float(difference) <= bound, (i, list(b.shape), float(difference))


CASES = pytest.mark.parametrize(
    ("recurrence", "lengths"), [("rwkv4", None), ("rwkv5", None), ("rwkv6", None), ("rwkv6", [90, 33])]
)


@CASES
def test_a_block_compiles_without_a_graph_break(recurrence: str, lengths: list[int] | None) -> None:
    torch.compiler.reset()
    block, inputs = block_of(recurrence), inputs_of(lengths)
    wanted = results(block, inputs)
    kernels.reset_chosen()
    # Fused code rounds to bfloat16 in fewer places, if it is not told otherwise.
    compiled = torch.compile(block, fullgraph=True, options={"emulate_precision_casts": True})
    assert_alike(results(compiled, inputs), wanted, 2e-2)
    assert kernels.chosen()[OPERATORS[recurrence]] == "triton"
    torch.compiler.reset()


@CASES
def test_a_block_is_captured_in_a_cuda_graph(recurrence: str, lengths: list[int] | None) -> None:
    """Forward and backward pass; what is replayed reads the new input and the new lengths."""
    block, inputs = block_of(recurrence), inputs_of(None if lengths is None else [50, 90])
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(2):
            results(block, inputs)
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = results(block, inputs)
    with torch.no_grad():
        for mine, other in zip(inputs, inputs_of(lengths), strict=True):
            if mine is not None:
                mine.copy_(other)
    graph.replay()
    assert_alike([c.clone() for c in captured], results(block, inputs), 1e-3)


def test_a_whole_run_on_the_gpu(tmp_path: Path) -> None:
    pytest.importorskip("easy_vqa", reason="easy-VQA comes with the demo extra")
    words = [
        "recipe=quickstart",
        "data.limit=12",
        "stages.tune.steps=5",
        "stages.tune.warmup=0",
        "eval.limit=20",
    ]
    paths = [f"paths.runs={tmp_path / 'runs'}", f"paths.cache={tmp_path / 'cache'}"]
    assert run.main(["hardware.precision=bf16", "hardware.device=cuda", *words, *paths]) == 0
    (result,) = (tmp_path / "runs").glob("*/result.json")
    told = json.loads(result.read_text())
    assert told["device"] == "cuda" and told["kernels"]["wkv6"] == "triton"
    assert told["kernels"]["decode"] == "graph"
