"""Which backend runs, what is recorded, and what wrong arguments are told."""

from __future__ import annotations

import logging
from collections.abc import Iterator

import pytest
import torch

import kernels
from kernels import dispatch

from .cases import OPS, make


@pytest.fixture(autouse=True)
def fresh() -> Iterator[None]:
    kernels.reset_chosen()
    dispatch._logged.clear()
    yield
    kernels.set_backend("auto")
    kernels.debug(False)
    kernels.reset_chosen()


def call(op: str, **changes: object) -> tuple[torch.Tensor, torch.Tensor]:
    return getattr(kernels, op)(**make(op, "typical", 3).inputs | changes)


@pytest.mark.parametrize("op", OPS)
def test_auto_runs_torch_and_says_so_once(op: str, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO, logger="toolkit.kernels"):
        call(op)
        call(op)
    assert kernels.chosen() == {op: "torch"}
    assert len(caplog.records) == 1 and op in caplog.text and "torch" in caplog.text


def test_the_call_goes_before_the_block_before_the_default() -> None:
    kernels.set_backend("torch")
    with kernels.use("reference"):
        call("wkv5")
        call("wkv6", backend="torch")
    call("wkv4")
    assert kernels.chosen() == {"wkv4": "torch", "wkv5": "reference", "wkv6": "torch"}
    call("wkv4", backend="reference")
    assert kernels.chosen()["wkv4"] == "reference,torch"


def test_use_restores_after_an_error() -> None:
    with pytest.raises(RuntimeError), kernels.use("reference"):
        raise RuntimeError
    call("wkv6")
    assert kernels.chosen() == {"wkv6": "torch"}


def test_unknown_backends_are_refused() -> None:
    with pytest.raises(ValueError, match="no kernel backend 'cuda'; known: auto, torch, reference"):
        call("wkv6", backend="cuda")
    with pytest.raises(ValueError, match="there is no Triton backend in this version; write 'auto'"):
        kernels.set_backend("triton")
    assert kernels.backends()["torch"] == "" and "no Triton" in kernels.backends()["triton"]


def test_every_backend_has_every_operator() -> None:
    for op in OPS:
        assert {name for name, why in kernels.backends().items() if not why} == set(dispatch._TABLE[op])


@pytest.mark.parametrize(
    ("op", "changes", "message"),
    [
        ("wkv6", {"k": torch.zeros(2, 3, 16)}, r"wkv6: k has shape \[2, 3, 16\]; expected \[B, T, H, N\]"),
        ("wkv6", {"v": torch.zeros(2, 4, 2, 8).double()}, r"v has shape \[2, 4, .* but r has \[2, 3, 2, 8\]"),
        ("wkv5", {"k": torch.zeros(2, 3, 2, 8)}, "k is float32 but r is float64; cast one of them"),
        ("wkv5", {"log_w": torch.zeros(16)}, r"log_w has shape \[16\]; expected \[H, N\] = \[2, 8\]"),
        ("wkv4", {"u": torch.zeros(2, 8)}, r"u has shape \[2, 8\]; expected \[D\] = \[16\]"),
        ("wkv4", {"state": torch.zeros(2, 16)}, r"\[2, 16\]; expected \[B, 3, D\] = \[2, 3, 16\]"),
        ("wkv6", {"state": torch.zeros(2, 2, 8, 8).half()}, "state is float16; keep states in float32"),
        ("wkv6", {"u": torch.zeros(2, 8, dtype=torch.long)}, "u is int64; use bfloat16, float16, float32"),
        ("wkv6", {"lengths": torch.tensor([3, 4])}, r"lengths holds \[3, 4\]; each must lie in 0..3"),
        ("wkv4", {"lengths": torch.tensor([3.0, 2.0])}, r"lengths is float32 .* expected int64 \[2\]"),
        ("wkv6", {"u": torch.zeros(2, 8, device="meta")}, "u is on meta but the inputs are on cpu"),
    ],
)
def test_wrong_arguments_are_named(op: str, changes: dict[str, torch.Tensor], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        call(op, **changes)


def test_no_time_step() -> None:
    empty = torch.zeros(1, 0, 4)
    with pytest.raises(ValueError, match="T must be 1 or more"):
        kernels.wkv4(empty, empty, torch.zeros(4), torch.zeros(4))


@pytest.mark.parametrize("op", OPS)
def test_positive_log_decay_is_refused_in_debug_mode(op: str) -> None:
    wrong = make(op, "typical", 3).inputs["log_w"].exp()
    call(op, log_w=wrong)
    kernels.debug(True)
    with pytest.raises(ValueError, match=r"log_w has an entry of 0.* write log_w = -exp\(time_decay\)"):
        call(op, log_w=wrong)
    call(op)


def test_types_of_the_results() -> None:
    for op in OPS:
        inputs = make(op, "typical", 3, state=False).inputs
        half = {n: x.bfloat16() if n in "rkv" else x.float() for n, x in inputs.items()}
        y, last = getattr(kernels, op)(**half)
        assert (y.dtype, last.dtype) == (torch.bfloat16, torch.float32) and y.shape == half["k"].shape
        assert call(op)[1].dtype == torch.float64
