"""Times the WKV-5/6 kernels one by one for given tiles: how the table in kernels/gpu/wkv6.py was chosen.

    python -m benchmarks.tune_kernels                                       # the table as it stands
    python -m benchmarks.tune_kernels --tiles 64,64,4,2,32,4 64,64,4,3,32,4 --shapes 8,2048,40
    python -m benchmarks.tune_kernels --regime mixed --decay fp32
    python -m benchmarks.tune_kernels --registers walk=168 backward=168 --programs 396  # three on each SM

Tiles are the fields of `kernels.gpu.wkv6.Tiles` for head size 64. Device time, medians, rotating inputs;
then, behind the bar, each kernel of one backward pass. Prints only: what is chosen goes into the table.
"""

from __future__ import annotations

import argparse
import functools
from collections.abc import Callable
from statistics import median
from typing import Any

import torch
from torch import Tensor

from benchmarks.kernel_inputs import REGIMES

SHAPES = ("8,2048,40", "1,16384,40", "8,4096,32", "8,1024,32", "16,512,8")
KERNELS = ("local", "combine", "strong_scores", "walk", "backward", "backward_strong")
SETS, TURNS = 3, 11


def timed(call: Callable[[int], Any]) -> float:
    """Milliseconds on the device, the host's own time hidden behind a wait."""
    for i in range(SETS):
        call(i)
    torch.cuda.synchronize()
    torch.cuda._sleep(20_000_000)
    marks = []
    for i in range(TURNS):
        pair = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        pair[0].record()
        call(i % SETS)
        pair[1].record()
        marks.append(pair)
    torch.cuda.synchronize()
    return median(a.elapsed_time(b) for a, b in marks)


class Limited:
    """A Triton kernel whose programs get so many registers a thread at most."""

    def __init__(self, kernel: Any, registers: int) -> None:
        self.kernel, self.registers = kernel, registers

    def __getitem__(self, grid: Any) -> Callable[..., Any]:
        return functools.partial(self.kernel[grid], maxnreg=self.registers)


class Watched:
    """A Triton kernel whose launches are timed."""

    def __init__(self, kernel: Any) -> None:
        self.kernel, self.marks = kernel, []

    def __getitem__(self, grid: Any) -> Callable[..., None]:
        def launch(*args: Any, **kwargs: Any) -> None:
            pair = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            pair[0].record()
            self.kernel[grid](*args, **kwargs)
            pair[1].record()
            self.marks.append(pair)

        return launch

    def ms(self) -> float:
        return median(a.elapsed_time(b) for a, b in self.marks)


def inputs(shape: list[int], regime: str, decay: str) -> list[tuple[Tensor, ...]]:
    """SETS of r, k, v, log_w, u and dy; decay "static" is RWKV-5's."""
    batch, time, heads = shape
    low, high = REGIMES[regime]
    found = []
    for _ in range(SETS):
        r, k, v, dy = (torch.randn(batch, time, heads, 64, device="cuda").bfloat16() for _ in range(4))
        x = torch.rand((heads, 64) if decay == "static" else r.shape, device="cuda") * (high - low) + low
        log_w = -torch.exp(x)
        u = torch.randn(heads, 64, device="cuda")
        found.append((r, k, v, log_w.bfloat16() if decay == "bf16" else log_w, u, dy))
    return found


def measure(shape: list[int], regime: str, decay: str) -> str:
    """One line: forward with and without saved states, backward, and its kernels."""
    from kernels.gpu import wkv6

    sets = inputs(shape, regime, decay)
    saved = [torch.ops.visualrwkv.wkv6(*x[:5], None, None, None, True) for x in sets]

    def forward(i: int, save: bool) -> Any:
        return torch.ops.visualrwkv.wkv6(*sets[i][:5], None, None, None, save)

    def backward(i: int) -> Any:
        return torch.ops.visualrwkv.wkv6_backward(*sets[i][:5], None, None, *saved[i][2:], sets[i][5], None)

    times = timed(lambda i: forward(i, True)), timed(lambda i: forward(i, False)), timed(backward)
    watched = {name: Watched(getattr(wkv6, name)) for name in KERNELS}
    for name, kernel in watched.items():
        setattr(wkv6, name, kernel)
    try:
        torch.cuda._sleep(50_000_000)
        for i in range(SETS):
            backward(i)
        torch.cuda.synchronize()
    finally:
        for name, kernel in watched.items():
            setattr(wkv6, name, kernel.kernel)
    parts = " ".join(f"{name} {kernel.ms():.3f}" for name, kernel in watched.items() if kernel.marks)
    total = times[0] + times[2]
    whole = f"forward {times[0]:.3f} (no gradients {times[1]:.3f}) backward {times[2]:.3f} sum {total:.3f}"
    return f"{whole} | {parts}"


def registers(text: str) -> tuple[str, int]:
    """KERNEL=N of the command line."""
    name, _, most = text.partition("=")
    if name not in KERNELS or not most.isdigit():
        raise argparse.ArgumentTypeError(f"{text!r} is no KERNEL=N with one of {', '.join(KERNELS)}")
    return name, int(most)


def main() -> None:
    """Entry point."""
    from kernels.gpu import wkv6

    parser = argparse.ArgumentParser(prog="python -m benchmarks.tune_kernels")
    parser.add_argument("--shapes", nargs="*", default=SHAPES, help="B,T,H")
    parser.add_argument("--tiles", nargs="*", default=[""], help="fields of Tiles, comma separated")
    parser.add_argument("--regime", default="typical", choices=REGIMES)
    parser.add_argument("--decay", default="bf16", choices=("bf16", "fp32", "static"))
    parser.add_argument("--programs", type=int, default=wkv6.PROGRAMS, help="walks that run at once")
    parser.add_argument("--registers", nargs="*", default=[], type=registers, help="KERNEL=N a thread")
    chosen = parser.parse_args()
    wkv6.PROGRAMS = chosen.programs
    for name, most in chosen.registers:
        setattr(wkv6, name, Limited(getattr(wkv6, name), most))
    for text in chosen.tiles:
        if text:
            wkv6.TILES[64] = wkv6.Tiles(*map(int, text.split(",")))
        told = f"programs {wkv6.PROGRAMS} registers {dict(chosen.registers)}"
        print(wkv6.TILES[64], told, flush=True)
        for shape in chosen.shapes:
            try:
                print(
                    f"  {shape}: {measure([*map(int, shape.split(','))], chosen.regime, chosen.decay)}",
                    flush=True,
                )
            except Exception as error:  # one that does not fit must not hide the others
                print(f"  {shape}: {type(error).__name__}: {str(error)[:160]}", flush=True)


if __name__ == "__main__":
    main()
