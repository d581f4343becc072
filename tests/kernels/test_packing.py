"""Packed sequences on the backends that know padded batches only, and what wrong borders are told."""

from __future__ import annotations

import pytest
import torch

import kernels
from kernels import packing

from .cases import OPS, assert_close, make, run, run_packed

pytestmark = pytest.mark.usefixtures("nan_memory")
LENGTHS = (7, 1, 0, 13)


@pytest.mark.parametrize("state", [False, True])
@pytest.mark.parametrize("backend", ["reference", "torch"])
@pytest.mark.parametrize("op", OPS)
def test_packed_is_separate(op: str, backend: str, state: bool) -> None:
    case = make(op, "mixed", 13, batch=4, state=state)
    case.lengths = torch.tensor(LENGTHS)
    wanted = run(case, backend, torch.float64)
    for dtype in (torch.int32, torch.int64):
        assert_close(run_packed(case, backend, torch.float64, index=dtype), wanted, 1e-14)


def test_there_and_back() -> None:
    x = torch.randn(1, 21, 2, 3)
    plan = packing.layout(torch.tensor([0, 7, 8, 8, 21]), 21)
    padded = packing.unpack(x, plan)
    assert padded.shape == (4, 13, 2, 3) and plan.lengths.tolist() == list(LENGTHS)
    assert bool((padded[1, 0] == x[0, 7]).all()) and not padded[1, 1:].any() and not padded[2].any()
    assert torch.equal(packing.pack(padded, plan), x)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"cu_seqlens": torch.tensor([0, 3]), "lengths": torch.tensor([3])}, "both lengths and cu_seqlens"),
        (
            {"cu_seqlens": torch.tensor([0.0, 3.0])},
            r"cu_seqlens is float32 .* expected int32 or int64 \[S \+",
        ),
        ({"cu_seqlens": torch.tensor([3])}, r"of shape \[1\]; expected int32 or int64"),
        ({"cu_seqlens": torch.tensor([1, 3])}, r"holds \[1, 3\]; expected rising borders from 0 to T = 3"),
        ({"cu_seqlens": torch.tensor([0, 2])}, r"holds \[0, 2\]; expected rising borders"),
        ({"cu_seqlens": torch.tensor([0, 2, 1, 3])}, r"holds \[0, 2, 1, 3\]; expected rising"),
        (
            {"cu_seqlens": torch.tensor([0, 1, 3])},
            r"\[1, 2, 8, 8\]; expected \[S, H, N, N\] = \[2, 2, 8, 8\]",
        ),
        ({"cu_seqlens": torch.tensor([0, 3], device="meta")}, "cu_seqlens is on meta but the inputs are on"),
    ],
)
def test_wrong_borders_are_named(changes: dict[str, torch.Tensor], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        kernels.wkv6(**make("wkv6", "typical", 3, batch=1).inputs, **changes)


def test_packed_inputs_have_one_row() -> None:
    with pytest.raises(ValueError, match=r"needs packed inputs \[1, T, ...\]; the batch size is 2"):
        kernels.wkv6(**make("wkv6", "typical", 3).inputs, cu_seqlens=torch.tensor([0, 3]))
