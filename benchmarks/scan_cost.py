"""What a scan costs in training: steps with `bi` and `2d` against `uni`, interleaved, medians.

    python -m benchmarks.scan_cost

RWKV-6, 12 layers of width 1024, 16 sequences of 1,024 tokens with an image of 24 x 24 patches, each at its
own place. A step is the trunk forward and backward, without head, loss over a vocabulary and optimiser:
these cost every scan the same and would only hide the difference. Two ways to hold the weights: float32
under bfloat16 autocast, and bfloat16. On a GPU two ways to run: kernel by kernel from Python, whose time
varies with the host, and captured in a CUDA graph, which is the device's time. Writes
benchmarks/results/scan_cost.json and scan_cost.md.
"""

from __future__ import annotations

import argparse
import datetime
import json
import statistics
import time
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import kernels
from benchmarks.kernel_models import cheap_initial_values
from benchmarks.kernel_timing import captured
from toolkit import register
from toolkit.trunk import LanguageModel, ScanSteps

RESULTS = Path(__file__).parent / "results"
SCANS = ("uni", "bi", "2d")
SIZES = {"n_layer": 12, "d_model": 1024, "batch": 16, "steps": 1024, "side": 24, "rounds": 15}
TINY = {"n_layer": 3, "d_model": 32, "batch": 2, "steps": 16, "side": 3, "rounds": 2}


def trunk(sizes: dict[str, int], device: torch.device, dtype: torch.dtype) -> LanguageModel:
    """The model, with weights of `dtype` (decays stay in float32)."""
    recurrence = register.bind("recurrence", {"name": "rwkv6"})(sizes["d_model"], sizes["n_layer"])
    with cheap_initial_values():
        model = LanguageModel(recurrence, d_model=sizes["d_model"], n_layer=sizes["n_layer"], vocab_size=64)
    model.to(device=device, dtype=dtype)
    for name, parameter in model.named_parameters():
        if name.endswith("time_decay"):
            parameter.data = parameter.data.float()
    return model


def step(
    model: LanguageModel,
    scan: ScanSteps,
    x: Tensor,
    start: Tensor,
    cast: Callable[[], AbstractContextManager[Any]],
) -> Callable[[], None]:
    """One training step of the trunk under a scan."""

    def once() -> None:
        model.zero_grad(set_to_none=True)
        x.grad = None
        with cast():
            hidden, _ = model(x, scan=scan, image_start=start)
        hidden.float().square().mean().backward()

    return once


def milliseconds(once: Callable[[], None], device: torch.device) -> float:
    """Wall time of one call, the device drained before and after."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    begin = time.perf_counter()
    once()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return 1e3 * (time.perf_counter() - begin)


def medians(calls: dict[str, Callable[[], None]], rounds: int, device: torch.device) -> dict[str, float]:
    """Median milliseconds of each call, the calls taking turns, the first three rounds left out."""
    seen: dict[str, list[float]] = {name: [] for name in calls}
    for turn in range(rounds + 3):
        for name, once in calls.items():
            taken = milliseconds(once, device)
            if turn >= 3:
                seen[name].append(taken)
    return {name: statistics.median(values) for name, values in seen.items()}


def measure(sizes: dict[str, int], device: torch.device) -> list[dict[str, Any]]:
    """One row for each way to hold the weights."""
    register.discover()
    torch.manual_seed(0)
    side, steps, batch = sizes["side"], sizes["steps"], sizes["batch"]
    start = torch.arange(batch, device=device) % (steps - side * side)
    rows = []
    for weights, dtype in (("float32, autocast", torch.float32), ("bfloat16", torch.bfloat16)):
        model = trunk(sizes, device, dtype)
        x = torch.randn(batch, steps, sizes["d_model"], device=device, dtype=dtype, requires_grad=True)
        mixed = dtype == torch.float32

        def cast(mixed: bool = mixed) -> AbstractContextManager[Any]:
            return torch.autocast(device.type, torch.bfloat16) if mixed else nullcontext()

        calls = {}
        for name in SCANS:
            table = register.bind("scan", {"name": name})(sizes["n_layer"], side, side)
            calls[name] = step(model, ScanSteps(table).to(device), x, start, cast)
        ways = {"kernel by kernel": calls}
        if device.type == "cuda":
            pool = torch.cuda.graph_pool_handle()
            ways["captured"] = {
                name: partial(captured(lambda turn, once=once: once(), 1, device, pool=pool), 0)
                for name, once in calls.items()
            }
        for how, them in ways.items():
            ms = medians(them, sizes["rounds"], device)
            ratio = {n: ms[n] / ms["uni"] for n in SCANS}
            rows.append({"weights": weights, "how": how, "ms": ms, "ratio": ratio})
    return rows


def machine(device: torch.device) -> dict[str, Any]:
    """What the times depend on."""
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else device.type
    return {"device": name, "torch": torch.__version__, "date": datetime.date.today().isoformat()}


def table(where: dict[str, Any], sizes: dict[str, int], rows: list[dict[str, Any]]) -> str:
    """The Markdown form of the results."""
    shape = ", ".join(f"{name} {value}" for name, value in sizes.items())
    lines = ["# What a scan costs in training", ""]
    lines += [f"`python -m benchmarks.scan_cost`; {', '.join(f'{k} {v}' for k, v in where.items())}."]
    lines += [f"RWKV-6 trunk, forward and backward, milliseconds, medians; {shape}.", ""]
    lines += ["| weights | run | uni | bi | 2d | bi / uni | 2d / uni |", "|" + "---|" * 7]
    for row in rows:
        times = " | ".join(f"{row['ms'][n]:.2f}" for n in SCANS)
        ratios = " | ".join(f"{row['ratio'][n]:.3f}" for n in SCANS[1:])
        lines.append(f"| {row['weights']} | {row['how']} | {times} | {ratios} |")
    return "\n".join(lines) + "\n"


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description="Training steps with bi and 2d scans against uni.")
    parser.add_argument("--tiny", action="store_true", help="sizes that a CPU runs in seconds")
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder of the results")
    asked = parser.parse_args(argv)
    sizes = TINY if asked.tiny else SIZES
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    kernels.reset_chosen()
    rows = measure(sizes, device)
    where = machine(device) | {"backends": kernels.chosen()}
    asked.out.mkdir(parents=True, exist_ok=True)
    found = {"machine": where, "sizes": sizes, "rows": rows}
    (asked.out / "scan_cost.json").write_text(json.dumps(found, indent=1) + "\n")
    text = table(machine(device), sizes, rows)
    (asked.out / "scan_cost.md").write_text(text)
    print(text)


if __name__ == "__main__":
    main()
