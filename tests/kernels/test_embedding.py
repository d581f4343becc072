"""Rows of a table: torch's numbers on every device, and a gradient with the same bits on every run."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from kernels.embedding import _Embedding, embedding, in_fixed_order


def gradient(ids: Tensor, weight: Tensor, upstream: Tensor) -> Tensor:
    return torch.autograd.grad(embedding(ids, weight), weight, upstream)[0]


def test_the_form_of_a_gpu_is_torch_s_own_function() -> None:
    """Its backward pass, on the CPU: rows that come often, once, and never."""
    ids = torch.tensor([[3, 0, 3], [3, 1, 0]])
    weight = torch.randn(5, 4, dtype=torch.float64, requires_grad=True)
    assert torch.equal(_Embedding.apply(ids, weight), F.embedding(ids, weight))
    assert torch.autograd.gradcheck(lambda w: _Embedding.apply(ids, w), (weight,))


@pytest.mark.parametrize(("enabled", "warn_only", "fill"), [(False, False, True), (True, True, False)])
def test_settings_are_put_back(enabled: bool, warn_only: bool, fill: bool) -> None:
    def settings() -> tuple[bool, bool, bool]:
        return (
            torch.are_deterministic_algorithms_enabled(),
            torch.is_deterministic_algorithms_warn_only_enabled(),
            torch.utils.deterministic.fill_uninitialized_memory,
        )

    before = settings()
    try:
        torch.use_deterministic_algorithms(enabled, warn_only=warn_only)
        torch.utils.deterministic.fill_uninitialized_memory = fill
        with pytest.raises(RuntimeError, match="inside"), in_fixed_order():
            assert settings() == (True, True, False)
            raise RuntimeError("inside")
        assert settings() == (enabled, warn_only, fill)
    finally:
        torch.use_deterministic_algorithms(before[0], warn_only=before[1])
        torch.utils.deterministic.fill_uninitialized_memory = before[2]


@pytest.mark.gpu
@pytest.mark.parametrize(("n_rows", "n_ids"), [(5, 200), (60, 20_000), (65_536, 20_000)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_same_bits_on_every_run(n_rows: int, n_ids: int, dtype: torch.dtype) -> None:
    """Few rows that come often are what torch adds up by atomics."""
    torch.manual_seed(0)
    ids = torch.randint(0, n_rows, (4, n_ids // 4), device="cuda")
    weight = torch.randn(n_rows, 256, device="cuda", dtype=dtype).requires_grad_()
    upstream = torch.randn(4, n_ids // 4, 256, device="cuda", dtype=dtype)
    first = gradient(ids, weight, upstream)
    assert all(torch.equal(first, gradient(ids, weight, upstream)) for _ in range(20))
    exact = torch.zeros(n_rows, 256, dtype=torch.float64).index_add_(
        0, ids.flatten().cpu(), upstream.flatten(0, 1).double().cpu()
    )
    error = (first.double().cpu() - exact).norm() / exact.norm()
    # For few ids torch adds blocks of them up in the gradient's own precision, for many in float32.
    assert float(error) < (1e-6 if dtype == torch.float32 else 8e-3 if n_ids == 200 else 4e-3)


@pytest.mark.gpu
def test_captured_in_a_cuda_graph() -> None:
    ids = torch.randint(0, 40, (8, 1000), device="cuda")
    weight = torch.randn(40, 64, device="cuda", requires_grad=True)
    upstream = torch.randn(8, 1000, 64, device="cuda")
    for _ in range(2):
        wanted = gradient(ids, weight, upstream)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        found = gradient(ids, weight, upstream)
    graph.replay()
    assert torch.equal(found, wanted)
