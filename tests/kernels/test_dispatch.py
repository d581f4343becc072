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
    with pytest.raises(ValueError, match="no kernel backend 'cuda'; known: auto, triton, torch, reference"):
        call("wkv6", backend="cuda")
    with pytest.raises(ValueError, match="no kernel backend 'cpu'; known: auto, triton"):
        kernels.set_backend("cpu")
    assert kernels.backends()["torch"] == kernels.backends()["reference"] == ""


def test_every_operator_has_every_backend() -> None:
    for op in OPS:
        assert list(dispatch._TABLE[op]) == ["reference", "torch", "triton"]


def test_triton_on_the_cpu_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    with pytest.raises(ValueError, match=r"'triton' cannot run: wkv6: the tensors are on cpu.*write 'auto'"):
        call("wkv6", backend="triton")
    with pytest.raises(ValueError, match=r"'triton' cannot run: the tensors are on cpu.* or 'torch'"):
        kernels.set_backend("triton", torch.device("cpu"))
    call("wkv6")
    assert kernels.chosen() == {"wkv6": "torch"}


def test_triton_without_the_package_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dispatch, "_has_triton", lambda: False)
    with pytest.raises(ValueError, match="the package triton is not installed; write 'auto' or 'torch'"):
        kernels.set_backend("triton")
    assert kernels.backends()["triton"] == "the package triton is not installed"


def test_triton_on_an_old_gpu_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    monkeypatch.setattr(dispatch, "_has_triton", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (7, 5))
    dispatch._too_old.cache_clear()
    with pytest.raises(ValueError, match=r"compute capability 7\.5 and 8\.0 is the oldest that works"):
        kernels.set_backend("triton", torch.device("cuda"))
    dispatch._too_old.cache_clear()


@pytest.mark.parametrize(
    ("op", "size", "dtype", "message"),
    [
        ("wkv6", 16, torch.float64, "wkv6: the inputs are float64"),
        ("wkv5", 8, torch.float32, "wkv5: the head size is 8, not one of 16, 32, 64, 128"),
        ("wkv6", 16, torch.bfloat16, "interpreter computes bfloat16 products wrongly"),
    ],
)
def test_triton_says_what_it_cannot_take(
    op: str, size: int, dtype: torch.dtype, message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    inputs = {n: x.to(dtype) for n, x in make(op, "typical", 3, size=size, state=False).inputs.items()}
    with pytest.raises(ValueError, match=f"{message}.*; write 'auto' or 'torch'"):
        getattr(kernels, op)(**inputs, backend="triton")


@pytest.mark.parametrize(("op", "name"), [("wkv4", "v"), ("wkv5", "r"), ("wkv6", "log_w")])
def test_triton_wants_neighbouring_channels(op: str, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    inputs = {n: x.float() for n, x in make(op, "typical", 3, size=16).inputs.items()}
    inputs[name] = torch.stack((inputs[name], inputs[name]), -1)[..., 0]
    with pytest.raises(ValueError, match=rf"of {name} has stride 2 \(call {name}.contiguous\(\) first\)"):
        getattr(kernels, op)(**inputs, backend="triton")


@pytest.fixture
def device(monkeypatch: pytest.MonkeyPatch) -> torch.device:
    """A CUDA device on which Triton works, as far as the dispatch sees; and an operator `demo`."""
    monkeypatch.setattr(dispatch, "_no_triton", lambda device: "" if device.type == "cuda" else "no GPU")
    backends = {"torch": max, "triton": "operator:add"}
    monkeypatch.setitem(dispatch._TABLE, "demo", backends)
    return torch.device("cuda")


def test_auto_takes_triton_on_a_gpu(device: torch.device, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO, logger="toolkit.kernels"):
        for _ in range(2):
            assert dispatch.pick("demo", None, device)(2, 3) == 5
    assert kernels.chosen() == {"demo": "triton"} and len(caplog.records) == 1
    assert dispatch.pick("demo", None, torch.device("cpu")) is max


def test_a_fallback_is_told_and_recorded(device: torch.device, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING, logger="toolkit.kernels"):
        for _ in range(2):
            assert dispatch.pick("demo", "auto", device, "the head size is 8") is max
    assert kernels.chosen() == {"demo": "torch (not triton: the head size is 8)"}
    assert len(caplog.records) == 1 and "not triton: the head size is 8" in caplog.text
    with pytest.raises(ValueError, match="demo: the head size is 8; write 'auto'"):
        dispatch.pick("demo", "triton", device, "the head size is 8")


def test_an_operator_without_the_global_backend_runs_on_torch(device: torch.device) -> None:
    with kernels.use("reference"):
        assert dispatch.pick("demo", None, device) is max
    assert kernels.chosen() == {"demo": "torch"}
    with pytest.raises(ValueError, match="demo: has no backend 'reference'; known: auto, torch, triton"):
        dispatch.pick("demo", "reference", device)


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


@pytest.mark.parametrize(("shape", "axis"), [((0, 3, 2, 4), "B"), ((1, 3, 0, 4), "H"), ((1, 3, 2, 0), "N")])
def test_nothing_to_compute(shape: tuple[int, ...], axis: str) -> None:
    empty = torch.zeros(shape)
    with pytest.raises(ValueError, match=f"r has shape .*; {axis} must be 1 or more"):
        kernels.wkv6(empty, empty, empty, empty, torch.zeros(shape[2:]))


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
