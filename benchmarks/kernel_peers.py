"""The implementations compared: ours, the naive loop, fla-core, the `rwkv` package's CUDA kernels.

Each is a function of the input dict of `kernel_inputs` (and packed ends) to (y, state). A peer that cannot
run a case raises `Unable` with the reason, which the tables show.
"""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import kernels
from benchmarks.kernel_inputs import empty_wkv4_state

Inputs = dict[str, Tensor]
Run = Callable[[Inputs, Tensor | None], tuple[Tensor, Tensor | None]]
OURS = "ours"
NAMES = ("r", "k", "v", "log_w", "u", "state")


class Unable(Exception):
    """Why an implementation cannot run a case."""


def leaves(x: Inputs) -> dict[str, Tensor]:
    """The operator's own arguments in x, without the arriving gradients."""
    return {name: x[name] for name in NAMES if name in x}


def ours(op: str, backend: str) -> Run:
    """Our public function with one backend."""
    function: Any = getattr(kernels, op)

    def run(x: Inputs, ends: Tensor | None) -> tuple[Tensor, Tensor | None]:
        packed = {} if ends is None else {"cu_seqlens": ends}
        return function(**leaves(x), backend=backend, **packed)

    return run


def _no_ends(ends: Tensor | None) -> None:
    if ends is not None:
        raise Unable("no packed sequences")


def _naive(op: str) -> Run:
    def run(x: Inputs, ends: Tensor | None) -> tuple[Tensor, Tensor | None]:
        _no_ends(ends)
        if x["k"].numel() > 2**25:
            raise Unable("the loop is run on small shapes only")
        return ours(op, "reference")(x, None)

    return run


def _fla_rwkv6(form: str) -> Run:
    """chunk_rwkv6 or fused_recurrent_rwkv6; for RWKV-5 the decay is expanded over time."""

    def run(x: Inputs, ends: Tensor | None) -> tuple[Tensor, Tensor | None]:
        from fla.ops import rwkv6

        log_w = x["log_w"].expand_as(x["k"])
        return getattr(rwkv6, form)(
            x["r"], x["k"], x["v"], log_w, x["u"], scale=1.0, initial_state=x.get("state"),
            output_final_state="state" in x, cu_seqlens=ends,
        )  # fmt: skip

    return run


def _fla_gla(x: Inputs, ends: Tensor | None) -> tuple[Tensor, Tensor | None]:
    """RWKV-5 through gated linear attention: queries one step early, the bonus added in PyTorch.

    y_t = r_t S_{t-1} + (r_t u k_t) v_t; GLA gives q_t S_t, so q_t = r_{t+1} and its output moves one on.
    """
    from fla.ops.gla import chunk_gla

    _no_ends(ends)
    if "state" in x:
        raise Unable("the shifted form has no place for an initial state")
    early = torch.nn.functional.pad(x["r"][:, 1:], (0, 0, 0, 0, 0, 1))
    o, _ = chunk_gla(early, x["k"], x["v"], x["log_w"].expand_as(x["k"]), scale=1.0)
    bonus = (x["r"] * x["u"] * x["k"]).sum(-1, keepdim=True) * x["v"]
    return torch.nn.functional.pad(o[:, :-1], (0, 0, 0, 0, 1, 0)) + bonus, None


def _fla_rwkv4(x: Inputs, ends: Tensor | None) -> tuple[Tensor, Tensor | None]:
    from fla.ops.rwkv4 import fused_recurrent_rwkv4

    _no_ends(ends)
    k = x["k"]
    state = x["state"] if "state" in x else empty_wkv4_state(k.shape[0], k.shape[2], k.device)
    time_decay = torch.log(-x["log_w"].float())  # it takes log(-log w)
    y, state = fused_recurrent_rwkv4(time_decay, x["u"], k, x["v"], state.unsqueeze(2))
    return y, state.squeeze(2)


def _package_only_forward(x: Inputs, ends: Tensor | None) -> None:
    _no_ends(ends)
    if torch.is_grad_enabled():
        raise Unable("inference kernel: forward only")


def _package_wkv56(version: int) -> Run:
    """The `rwkv` package's inference kernel: its state is right for B = 1 only, as its source says."""

    def run(x: Inputs, ends: Tensor | None) -> tuple[Tensor, Tensor | None]:
        _package_only_forward(x, ends)
        operators = package_kernels(version)
        batch, steps, heads, size = x["k"].shape
        state = x["state"].transpose(-1, -2) if "state" in x else x["k"].new_zeros(1, dtype=torch.float32)
        state = state.expand(batch, heads, size, size).to(torch.float32, copy=True).contiguous()
        decay = torch.exp(x["log_w"].float())
        y = torch.empty_like(x["k"])
        kind = {torch.bfloat16: "bf16", torch.float16: "fp16", torch.float32: "fp32"}[y.dtype]
        forward = getattr(operators, f"forward_{kind}")
        forward(batch, steps, heads * size, heads, state, x["r"], x["k"], x["v"], decay, x["u"], y)
        return y, state.transpose(-1, -2)

    return run


def _package_wkv4(x: Inputs, ends: Tensor | None) -> tuple[Tensor, Tensor | None]:
    _package_only_forward(x, ends)
    if x["k"].dtype == torch.bfloat16:
        raise Unable("takes fp16 and fp32 only")
    operators = package_kernels(4)
    batch, steps, width = x["k"].shape
    state = x["state"] if "state" in x else empty_wkv4_state(batch, width, x["k"].device)
    a, b, p = (s.contiguous() for s in state.detach().clone().unbind(1))
    y = torch.empty_like(x["k"])
    operators.wkv_forward(batch, steps, width, x["log_w"].float(), x["u"].float(), x["k"], x["v"], y, a, b, p)
    return y, torch.stack((a, b, p), 1)


def peers(op: str) -> dict[str, Run]:
    """Name -> implementation, for one operator."""
    found: dict[str, Run] = {"naive loop": _naive(op)}
    if op == "wkv4":
        return found | {"fla fused_recurrent_rwkv4": _fla_rwkv4, "rwkv package": _package_wkv4}
    found["fla chunk_rwkv6"] = _fla_rwkv6("chunk_rwkv6")
    found["fla fused_recurrent_rwkv6"] = _fla_rwkv6("fused_recurrent_rwkv6")
    if op == "wkv5":
        found["fla chunk_gla"] = _fla_gla
    return found | {"rwkv package": _package_wkv56(int(op[-1]))}


# The `rwkv` package's kernels: built by nvcc in a process of their own, while other things are warmed up.

_SOURCES = {
    4: ("wkv_cuda", ("wrapper.cpp", "operators.cu")),
    5: ("rwkv5", ("rwkv5_op.cpp", "rwkv5.cu")),
    6: ("rwkv6", ("rwkv6_op.cpp", "rwkv6.cu")),
}
_loaded: dict[int, Any] = {}
_builds: dict[int, subprocess.Popen[str]] = {}


def _load_package(version: int) -> Any:
    """Compiles (or finds compiled) one of the package's extensions, with the package's own flags."""
    from torch.utils.cpp_extension import load

    where = Path(importlib.util.find_spec("rwkv").origin).parent / "cuda"  # type: ignore[union-attr,arg-type]
    name, files = _SOURCES[version]
    return load(
        name=name,
        sources=[str(where / file) for file in files],
        extra_cflags=["-DDISABLE_CUBLAS_GEMM"],
        extra_cuda_cflags=["--use_fast_math", "-O3", "--extra-device-vectorization", "-D_N_=64"],
    )


def start_builds(versions: list[int]) -> None:
    """Starts the builds in the background."""
    os.environ.setdefault("TORCH_CUDA_ARCH_LIST", "9.0")
    code = "import sys; from benchmarks.kernel_peers import _load_package; _load_package(int(sys.argv[1]))"
    for version in versions:
        command = [sys.executable, "-c", code, str(version)]
        _builds[version] = subprocess.Popen(
            command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
        )


def package_kernels(version: int) -> Any:
    """The built extension; raises Unable with the build's last line if it did not build."""
    build = _builds.get(version)
    if build is None:
        raise Unable("not built in this run")
    if version not in _loaded:
        output, _ = build.communicate()
        if build.returncode:
            lines = [line for line in output.splitlines() if "error" in line.lower()] or output.splitlines()
            _loaded[version] = Unable(f"did not build: {(lines or ['no output'])[-1][:160]}")
        else:
            _loaded[version] = _load_package(version)
    if isinstance(_loaded[version], Unable):
        raise _loaded[version]
    return _loaded[version]
