"""How times and memory are taken: device events, medians, implementations taking turns.

Modes. "stream": the device is kept busy for as long as the host needs to enqueue a call, so the time is the
device's alone. "eager": the device is idle at each call, so launches and Python count. "graph": replays.
On a CPU (for the test of the scripts) wall-clock time stands in for all of them.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from benchmarks.kernel_inputs import Ceilings
from benchmarks.kernel_peers import Inputs, Run, leaves

Call = Callable[[int], object]
CYCLES_PER_MS = 1_755_000
WARM = 2


def sync(device: torch.device) -> None:
    """Waits for the device."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def one_call(run: Run, x: Inputs, ends: Tensor | None, *, backward: bool) -> object:
    """The timed unit: forward without gradients, or forward and the gradients of all arguments."""
    if not backward:
        with torch.no_grad():
            return run(x, ends)
    y, state = run(x, ends)
    given = leaves(x)
    if "dstate" in x:
        return torch.autograd.grad((y, state), list(given.values()), (x["dy"], x["dstate"].to(state.dtype)))
    return torch.autograd.grad(y, list(given.values()), x["dy"])


def medians(calls: dict[str, Call], device: torch.device, *, mode: str, reps: int, budget_ms: float) -> dict:
    """Name -> median ms. The calls take turns; one that is slow gets fewer turns (4 at least)."""
    turns, host_ms = {}, {}
    for name, call in calls.items():
        turns[name], host_ms[name] = _plan(call, device, reps, budget_ms)
    marks: dict[str, list[Callable[[], float]]] = {name: [] for name in calls}
    for turn in range(max(turns.values(), default=0)):
        for name, call in calls.items():
            if turn < turns[name]:
                marks[name].append(_timed(call, turn, device, mode, host_ms[name]))
    sync(device)
    return {name: statistics.median(mark() for mark in found) for name, found in marks.items()}


def _plan(call: Call, device: torch.device, reps: int, budget_ms: float) -> tuple[int, float]:
    """(turns, host ms a call) after a warm-up."""
    for turn in range(WARM):
        call(turn)
    sync(device)
    begin = time.perf_counter()
    call(WARM)
    host = time.perf_counter() - begin
    sync(device)
    whole = 1e3 * (time.perf_counter() - begin)
    return max(min(4, reps), min(reps, int(budget_ms / max(whole, 1e-3)))), 1e3 * host


def _timed(call: Call, turn: int, device: torch.device, mode: str, host_ms: float) -> Callable[[], float]:
    """Enqueues one call between two marks; the result reads the time once the device is done."""
    if device.type != "cuda":
        begin = time.perf_counter()
        call(turn)
        passed = 1e3 * (time.perf_counter() - begin)
        return lambda: passed
    start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    if mode == "eager":
        torch.cuda.synchronize(device)
    else:
        torch.cuda._sleep(int(min(8.0, 1.3 * host_ms + 0.05) * CYCLES_PER_MS))
    start.record()
    call(turn)
    end.record()
    return lambda: start.elapsed_time(end)


def captured(call: Call, count: int, device: torch.device, *, pool: Any = None) -> Call:
    """The call in CUDA graphs, one per input set; pool: memory shared with graphs that never run at once."""
    if device.type != "cuda":
        return call
    side = torch.cuda.Stream(device)
    side.wait_stream(torch.cuda.current_stream(device))
    with torch.cuda.stream(side):
        for turn in range(3):
            call(turn % count)
    torch.cuda.current_stream(device).wait_stream(side)
    graphs = []
    for turn in range(count):
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=pool):
            call(turn)
        graphs.append(graph)
    return lambda turn: graphs[turn % count].replay()


def peak_mib(call: Call, device: torch.device) -> float:
    """Highest memory in use during one call, above what was in use before it."""
    if device.type != "cuda":
        return 0.0
    sync(device)
    before = torch.cuda.memory_allocated(device)
    torch.cuda.reset_peak_memory_stats(device)
    call(0)
    sync(device)
    return (torch.cuda.max_memory_allocated(device) - before) / 2**20


def ceilings(device: torch.device) -> Ceilings:
    """Copy bandwidth (bytes read + written) and bf16 matrix rate of this machine, now, on random data."""
    on_gpu = device.type == "cuda"
    size, edge = (2**30, 8192) if on_gpu else (2**20, 64)
    source = torch.randint(0, 127, (2, size), dtype=torch.int8, device=device)
    a, b = (torch.randn(edge, edge, device=device, dtype=torch.bfloat16) for _ in range(2))
    calls: dict[str, Call] = {
        "copy": lambda turn: source[0].copy_(source[1]),
        "product": lambda turn: a @ b,
    }
    ms = medians(calls, device, mode="stream", reps=15, budget_ms=1000)
    return Ceilings(2e3 * size / ms["copy"], 2e3 * edge**3 / ms["product"])
