"""Linear cross entropy: every backend against its definition in float64, blocks, ties, skipped gradients."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
import torch
from torch import Tensor

from kernels.cross_entropy import blocks, linear_cross_entropy

Inputs = tuple[Tensor, Tensor, Tensor, Tensor, Tensor]


def inputs(m: int, d: int, v: int, *, dtype: torch.dtype = torch.float64, device: str = "cpu") -> Inputs:
    """h, weight, targets, row weights (some zero, their targets absent) and penalty, exactly as rounded."""
    draw = torch.Generator().manual_seed(m + d + v)
    h = torch.randn(m, d, generator=draw)
    weight = torch.randn(v, d, generator=draw) * (3 / d**0.5)
    targets = torch.randint(0, v, (m,), generator=draw)
    row_weights = torch.rand(m, generator=draw) / max(1, m)
    row_weights[::3], targets[::3] = 0.0, -100
    penalty = torch.rand(m, generator=draw) * 1e-2 / max(1, m)
    h, weight = h.to(device, dtype).requires_grad_(), weight.to(device, dtype).requires_grad_()
    return h, weight, targets.to(device), row_weights.to(device), penalty.to(device)


def results(args: Inputs, *, l2: bool, upstream: float = 1.0, **how: object) -> list[Tensor]:
    """loss, dh and dW of upstream * loss."""
    h, weight, targets, row_weights, penalty = args
    loss = linear_cross_entropy(h, weight, targets, row_weights, penalty if l2 else None, **how)
    return [loss.detach(), *torch.autograd.grad(loss * upstream, [h, weight])]


def exact(args: Inputs, *, l2: bool, upstream: float = 1.0) -> list[Tensor]:
    """`results` of the definition in float64 on the same rounded numbers."""
    h, weight = (x.detach().double().requires_grad_() for x in args[:2])
    wide = (h, weight, args[2], args[3].double(), args[4].double())
    return results(wide, l2=l2, upstream=upstream, backend="reference")


def worst(found: list[Tensor], wanted: list[Tensor]) -> float:
    """Largest relative Frobenius error."""
    pairs = zip(found, wanted, strict=True)
    return max(float((a.double() - b).norm() / b.norm().clamp(min=1e-30)) for a, b in pairs)


@pytest.mark.parametrize("l2", [False, True])
@pytest.mark.parametrize("rows", [0, 1, 4, 100])
def test_blocks_equal_the_definition(l2: bool, rows: int, nan_memory: None) -> None:
    args = inputs(13, 6, 37)
    found = results(args, l2=l2, upstream=0.25, rows=rows, backend="torch")
    assert worst(found, exact(args, l2=l2, upstream=0.25)) < 1e-12


def test_gradcheck_of_the_block_form() -> None:
    h, weight, targets, row_weights, _ = inputs(5, 3, 7)

    def loss(a: Tensor, b: Tensor) -> Tensor:
        return linear_cross_entropy(a, b, targets, row_weights.double(), rows=2, backend="torch")

    assert torch.autograd.gradcheck(loss, (h, weight))


def test_value_against_log_softmax_written_out() -> None:
    h, weight, targets, row_weights, penalty = inputs(9, 4, 11)
    log_p = (h @ weight.t()).log_softmax(-1)
    wanted = -sum(row_weights[m] * log_p[m, targets[m]] for m in range(9) if row_weights[m] > 0)
    for backend in ("reference", "torch"):
        for extra in (None, penalty):
            got = linear_cross_entropy(h, weight, targets, row_weights, extra, rows=4, backend=backend)
            torch.testing.assert_close(got, wanted, rtol=1e-6, atol=0)


@pytest.mark.parametrize("backend", ["reference", "torch"])
def test_penalty_is_shared_among_equal_largest_logits(backend: str) -> None:
    h = torch.ones(1, 1, dtype=torch.float64, requires_grad=True)
    weight = torch.tensor([[2.0], [5.0], [5.0], [1.0]], dtype=torch.float64, requires_grad=True)
    none, penalty = torch.zeros(1), torch.full((1,), 0.5)
    loss = linear_cross_entropy(h, weight, torch.tensor([-100]), none, penalty, backend=backend)
    loss.backward()
    assert float(loss.detach()) == 0.0
    assert weight.grad is not None and weight.grad.flatten().tolist() == [0.0, 1.25, 1.25, 0.0]


@pytest.mark.parametrize("backend", ["reference", "torch"])
def test_no_rows_make_no_loss_and_zero_gradients(backend: str) -> None:
    args = inputs(0, 4, 5)
    assert [float(x.abs().sum()) for x in results(args, l2=True, backend=backend)] == [0.0, 0.0, 0.0]


@pytest.mark.parametrize("frozen", ["h", "weight", "both"])
def test_gradients_only_where_asked(frozen: str) -> None:
    h, weight, *rest = inputs(8, 4, 5)
    h.requires_grad_(frozen == "weight"), weight.requires_grad_(frozen == "h")
    loss = linear_cross_entropy(h, weight, *rest, backend="torch")
    assert loss.requires_grad == (frozen != "both")
    if frozen != "both":
        loss.backward()
    assert (h.grad is None, weight.grad is None) == (frozen != "weight", frozen != "h")
    with torch.no_grad():
        assert not linear_cross_entropy(h, weight, *rest, backend="torch").requires_grad


def test_the_graph_can_be_walked_twice() -> None:
    args = inputs(8, 4, 5)
    loss = linear_cross_entropy(*args, backend="torch")
    first = torch.autograd.grad(loss, list(args[:2]), retain_graph=True)
    second = torch.autograd.grad(3 * loss, list(args[:2]))
    for a, b in zip(first, second, strict=True):
        torch.testing.assert_close(3 * a, b)


def test_autocast_rounds_the_products_and_keeps_wide_gradients() -> None:
    args = inputs(40, 16, 50, dtype=torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        found = results(args, l2=True, rows=8, backend="torch")
    assert {x.dtype for x in found} == {torch.float32}
    error = worst(found, exact(args, l2=True))
    assert 1e-5 < error < 2e-2


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"targets": torch.zeros(3, dtype=torch.long)}, r"targets has shape \[3\]; expected \[M\] = \[8\]"),
        ({"targets": torch.zeros(8)}, "targets is torch.float32; use int64"),
        ({"penalty": torch.zeros(8, 1)}, r"penalty has shape \[8, 1\]"),
        ({"penalty": torch.zeros(8, device="meta")}, "penalty is on meta but the inputs are on cpu"),
        ({"weight": torch.zeros(5, 3)}, "h has rows of 4 but weight of 3"),
        ({"h": torch.zeros(2, 4, 4)}, "h is torch.float32 of shape"),
        ({"h": torch.zeros(8, 4, dtype=torch.bfloat16)}, "cast one of them or use autocast"),
    ],
)
def test_wrong_arguments_are_named(change: dict[str, Tensor], message: str) -> None:
    names = ("h", "weight", "targets", "row_weights", "penalty")
    given = dict(zip(names, inputs(8, 4, 5, dtype=torch.float32), strict=True))
    with pytest.raises(ValueError, match=message):
        linear_cross_entropy(**(given | change))


@pytest.mark.parametrize(("n", "most"), [(0, 4), (1, 4), (8, 4), (9, 4), (1025, 1024)])
def test_blocks_cover_all_rows_evenly(n: int, most: int) -> None:
    cuts = list(blocks(n, most))
    assert [i for cut in cuts for i in range(cut.start, cut.stop)] == list(range(n))
    sizes = [cut.stop - cut.start for cut in cuts]
    assert max(sizes) <= most and max(sizes) - min(sizes) <= 1


INTERPRETED = """
import torch
from kernels.cross_entropy import linear_cross_entropy
from tests.kernels.test_cross_entropy import exact, inputs, results, worst
for dtype, bound in ((torch.float32, 4e-6), (torch.float16, 2e-3), (torch.bfloat16, 2e-2)):
    for m, v, l2, rows in ((7, 37, True, 3), (7, 37, False, 0), (4, 9001, True, 2), (0, 5, True, 0)):
        args = inputs(m, 6, v, dtype=dtype)
        found = results(args, l2=l2, upstream=0.25, rows=rows, backend="triton")
        assert [x.dtype for x in found] == [torch.float32, dtype, dtype]
        error = worst(found, exact(args, l2=l2, upstream=0.25))
        assert error < bound, (dtype, m, v, l2, rows, error)
args = inputs(8, 6, 37, dtype=torch.float32)
args[2][1] = 37
assert torch.isnan(results(args, l2=False, backend="triton")[0])
ties = torch.tensor([[2.0], [5.0], [5.0], [1.0]], requires_grad=True)
one, none = torch.ones(1, 1), torch.zeros(1)
linear_cross_entropy(one, ties, torch.tensor([-100]), none, none + 0.5, backend="triton").backward()
assert ties.grad.flatten().tolist() == [0.0, 1.25, 1.25, 0.0]
h, weight, *rest = args = inputs(8, 6, 37, dtype=torch.float32)
loss = linear_cross_entropy(*args, backend="triton")
torch.autograd.grad(loss, [h, weight], retain_graph=True)
try:
    torch.autograd.grad(loss, [h, weight])
    raise SystemExit("scaled twice")
except RuntimeError as error:
    assert "modified by an inplace operation" in str(error)
from kernels.gpu.cross_entropy import _forward
torch.library.opcheck(_forward, (*args, torch.float32, True, True, 3))
torch.library.opcheck(_forward, (h, weight.detach(), *rest[:2], None, torch.float32, True, False, 3))
def step(h, weight):
    return linear_cross_entropy(h * 2, weight, *rest, rows=3, backend="triton") * 3
found = []
for run in (step, torch.compile(step, fullgraph=True, backend="aot_eager")):
    loss = run(h, weight)
    found.append([loss.detach(), *torch.autograd.grad(loss, [h, weight])])
assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))
"""


def test_triton_kernel_in_the_interpreter() -> None:
    pytest.importorskip("triton", reason="Triton is not installed")
    environment = os.environ | {"TRITON_INTERPRET": "1"}  # must stand before Triton is imported
    command = [sys.executable, "-c", INTERPRETED]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]


@pytest.mark.gpu
@pytest.mark.parametrize("l2", [False, True])
@pytest.mark.parametrize(("dtype", "bound"), [(torch.float32, 1e-5), (torch.bfloat16, 6e-3)])
def test_triton_on_the_gpu(dtype: torch.dtype, bound: float, l2: bool) -> None:
    args = inputs(300, 64, 1003, dtype=dtype, device="cuda")
    if l2 and dtype == torch.bfloat16:
        bound = 3e-2  # rounded logits tie for the largest, or another one becomes it, as in the original
    found = [results(args, l2=l2, upstream=0.5, rows=128, backend="triton") for _ in range(2)]
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True)), "two runs differ"
    assert worst(found[0], exact(args, l2=l2, upstream=0.5)) < bound


@pytest.mark.gpu
def test_compiles_without_a_break() -> None:
    args = inputs(64, 32, 100, dtype=torch.float32, device="cuda")

    def step(h: Tensor, weight: Tensor) -> Tensor:
        return linear_cross_entropy(h * 2, weight, *args[2:], backend="triton") * 3

    found = []
    for run in (step, torch.compile(step, fullgraph=True)):
        loss = run(*args[:2])
        found.append([loss.detach(), *torch.autograd.grad(loss, list(args[:2]))])
    for a, b in zip(*found, strict=True):
        torch.testing.assert_close(a, b)
