"""CPU times of the kernels: reference loop against the torch backend, interleaved, medians.

    OMP_NUM_THREADS=2 python -m benchmarks.cpu_kernels

Writes benchmarks/results/cpu_kernels.json (with machine, versions, date) and cpu_kernels.md.
"""

from __future__ import annotations

import datetime
import json
import os
import platform
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

import kernels

RESULTS = Path(__file__).parent / "results"
SHAPES = {"long": (2, 256, 4, 64), "training": (64, 48, 2, 32), "decode": (1, 1, 40, 64)}  # B, T, H, N
ROUNDS = {"long": 9, "training": 9, "decode": 200}
THREADS = 2


def arguments(op: str, batch: int, time_steps: int, heads: int, size: int) -> dict[str, Tensor]:
    """Random leaves with typical decays, exp(-exp(x)) with x in (-6, -1), and an initial state."""
    torch.manual_seed(0)
    shape = (batch, time_steps, heads * size) if op == "wkv4" else (batch, time_steps, heads, size)
    weight = shape[2:]
    names = "kv" if op == "wkv4" else "rkv"
    found = {name: torch.randn(shape) for name in names}
    found["log_w"] = -torch.exp(torch.empty(shape if op == "wkv6" else weight).uniform_(-6, -1))
    found["u"] = torch.randn(weight)
    if time_steps == 1:
        found["state"] = torch.rand(batch, 3, *weight) if op == "wkv4" else torch.randn(batch, *weight, size)
    return found


def call(op: str, backend: str, args: dict[str, Tensor], backward: bool) -> Callable[[], None]:
    """One timed unit: the forward pass alone (no gradients), or forward and backward to every input."""
    kernel = getattr(kernels, op)
    leaves = {name: x.clone().requires_grad_(backward) for name, x in args.items()}
    seed = torch.randn_like(args["k"])

    def once() -> None:
        if not backward:
            with torch.no_grad():
                kernel(**leaves, backend=backend)
            return
        y, _ = kernel(**leaves, backend=backend)
        torch.autograd.grad(y, list(leaves.values()), seed, allow_unused=True)

    return once


def medians(calls: dict[str, Callable[[], None]], rounds: int) -> dict[str, float]:
    """Median milliseconds of each call, the calls taking turns."""
    seen: dict[str, list[float]] = {name: [] for name in calls}
    for turn in range(rounds + 2):
        for name, once in calls.items():
            begin = time.perf_counter()
            once()
            if turn >= 2:
                seen[name].append(1e3 * (time.perf_counter() - begin))
    return {name: statistics.median(times) for name, times in seen.items()}


def measure() -> list[dict[str, object]]:
    """One row per operator, shape and pass."""
    rows: list[dict[str, object]] = []
    for where, shape in SHAPES.items():
        for op in ("wkv4", "wkv5", "wkv6"):
            args = arguments(op, *shape)
            for backward in (False,) if where == "decode" else (False, True):
                calls = {b: call(op, b, args, backward) for b in ("reference", "torch")}
                ms = medians(calls, ROUNDS[where])
                what = "fwd+bwd" if backward else "fwd"
                rows.append({"op": op, "shape": where, "BTHN": shape, "pass": what, "ms": ms})
                print(op, where, what, {name: round(x, 3) for name, x in ms.items()}, flush=True)
    return rows


def machine() -> dict[str, object]:
    """What the times depend on."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    models = [x.split(":", 1)[1].strip() for x in lines if x.startswith("model name")]
    return {
        "cpu": models[0] if models else platform.processor(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "capability": torch.backends.cpu.get_cpu_capability(),
        "load_before": round(os.getloadavg()[0], 2),
        "torch": torch.__version__,
        "date": datetime.date.today().isoformat(),
    }


def table(where: dict[str, object], rows: list[dict[str, object]]) -> str:
    """The Markdown form of the results."""
    head = ", ".join(f"{name} {value}" for name, value in where.items())
    lines = ["# CPU kernels", ""]
    lines += [f"`python -m benchmarks.cpu_kernels`; float32, milliseconds, medians; {head}.", ""]
    lines += ["| op | (B,T,H,N) | pass | reference | torch | ratio |", "|---|---|---|---|---|---|"]
    for row in rows:
        ms = row["ms"]
        assert isinstance(ms, dict)
        slow, fast = ms["reference"], ms["torch"]
        lines.append(
            f"| {row['op']} | {row['BTHN']} | {row['pass']} | {slow:.3f} | {fast:.3f} | {slow / fast:.1f}x |"
        )
    return "\n".join(lines) + "\n"


def main() -> None:
    torch.set_num_threads(THREADS)
    where = machine()
    rows = measure()
    RESULTS.mkdir(exist_ok=True)
    (RESULTS / "cpu_kernels.json").write_text(json.dumps({"machine": where, "rows": rows}, indent=1) + "\n")
    (RESULTS / "cpu_kernels.md").write_text(table(where, rows))


if __name__ == "__main__":
    main()
