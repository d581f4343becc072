"""Small arms on one GPU: a step as a CUDA graph beside the ordinary loop, and many arms side by side.

    python -m benchmarks.arms [--out FOLDER] [--seconds 4] [--budget 220] [--mps]

Arms are those of scale=small (scan 2d, sandwich). Measured, in steps a second over all arms: the ordinary
loop and the captured step of each recurrence; N processes that share the GPU; N arms captured in one
process, each on a stream of its own. --mps: the processes once more under NVIDIA's Multi-Process Service,
with a daemon of its own for the length of the run. Writes arms.json and arms.md after each part; a part that
would begin after --budget seconds is left out, and said so. --device cpu tries the script without a GPU.
"""

from __future__ import annotations

import argparse
import datetime
import json
import logging
import os
import sys
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from benchmarks.arm import Arm, rate
from benchmarks.arm_processes import Children, child, multi_process_service
from toolkit.sweep_process import connections

RESULTS = Path(__file__).parent / "results"
RECURRENCES = ("rwkv4", "rwkv5", "rwkv6")
PROCESSES = (1, 4, 8, 16)
STREAMS = (1, 4, 8, 16, 32)
LOOP = 150
"""Steps of the ordinary loop."""


class Report:
    """Rows so far, written after each part."""

    def __init__(self, out: Path, device: str, budget: float) -> None:
        self.out, self.budget, self.began = out, budget, time.monotonic()
        self.facts: dict[str, Any] = {"date": datetime.date.today().isoformat(), "device": device}
        self.rows: list[dict[str, Any]] = []
        self.left_out: list[str] = []

    def time_for(self, part: str) -> bool:
        """Whether the budget allows another part; what is left out is told."""
        if time.monotonic() - self.began < self.budget:
            print(f"{time.monotonic() - self.began:4.0f} s: {part}", flush=True)
            return True
        self.left_out.append(part)
        print(f"left out for time: {part}", flush=True)
        return False

    def add(self, how: str, recurrence: str, arms: int, steps: float) -> None:
        row = {"how": how, "recurrence": recurrence, "arms": arms, "steps_per_second": round(steps, 1)}
        self.rows.append({**row, "ms_per_arm_step": round(1000 / steps, 4)})
        print(f"       {how}, {recurrence}, {arms} arms: {steps:,.1f} steps/s in all", flush=True)
        self.write()

    def write(self) -> None:
        self.out.mkdir(parents=True, exist_ok=True)
        whole = {**self.facts, "rows": self.rows, "left_out": self.left_out}
        (self.out / "arms.json").write_text(json.dumps(whole, indent=2) + "\n", encoding="utf-8")
        (self.out / "arms.md").write_text(self.table(), encoding="utf-8")

    def table(self) -> str:
        lines = [f"Arms of scale=small on {self.facts['device']}, {self.facts['date']}.", ""]
        lines += [
            "| how | recurrence | arms | steps/s in all | ms a step of one arm |",
            "|---|---|---|---|---|",
        ]
        lines += [
            f"| {r['how']} | {r['recurrence']} | {r['arms']} | {r['steps_per_second']:,.1f} "
            f"| {r['ms_per_arm_step']:.3f} |"
            for r in self.rows
        ]
        lines += [f"\nLeft out for time: {', '.join(self.left_out)}."] if self.left_out else []
        return "\n".join(lines) + "\n"


def alone(report: Report, cache: Path, device: str, seconds: float) -> None:
    """Each recurrence: the ordinary loop, and the captured step."""
    for recurrence in RECURRENCES:
        if report.time_for(f"one arm, {recurrence}"):
            arm = Arm(recurrence, cache, device)
            report.add("ordinary loop", recurrence, 1, arm.loop(LOOP if device == "cuda" else 3))
            report.add("CUDA graph", recurrence, 1, rate([arm.steps()], [None], seconds))


def one_process(report: Report, cache: Path, device: str, seconds: float) -> None:
    """N arms captured in this process, each on its stream."""
    import torch

    arm = Arm("rwkv6", cache, device)
    made: list[Any] = []
    streams: list[Any] = []
    for count in STREAMS if device == "cuda" else (1, 2):
        if not report.time_for(f"{count} arms in one process"):
            continue
        while len(made) < count:
            stream = torch.cuda.Stream() if device == "cuda" else None
            made.append(arm.steps(stream=stream))
            streams.append(stream)
        report.add("CUDA graphs, one process", "rwkv6", count, rate(made, streams, seconds))


def processes(
    report: Report, cache: Path, device: str, seconds: float, how: str, environment: Mapping[str, str]
) -> None:
    """N processes, an arm each."""
    counts = PROCESSES if device == "cuda" else (1, 2)
    if not report.time_for(f"{how}: {max(counts)} processes start"):
        return
    children = Children(max(counts), cache, device, environment)
    try:
        for count in counts:
            if report.time_for(f"{how}: {count} of them"):
                report.add(how, "rwkv6", count, sum(children.rates(count, seconds)))
    finally:
        children.end()


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.arms", description=__doc__.split("\n")[0])
    parser.add_argument("--out", type=Path, default=RESULTS)
    parser.add_argument("--seconds", type=float, default=4.0)
    parser.add_argument("--budget", type=float, default=220.0)
    parser.add_argument("--mps", action="store_true")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--child", default="", help=argparse.SUPPRESS)
    parser.add_argument("--cache", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args()
    logging.getLogger("toolkit").setLevel(logging.ERROR)
    if args.child:
        return child(args.child, args.cache, args.device)
    own = dict(os.environ)  # what processes of one arm get
    os.environ |= {**connections(max(STREAMS)), **os.environ}
    import torch

    if args.device == "cuda" and not torch.cuda.is_available():
        print("torch sees no CUDA device here; --device cpu tries the script without one", file=sys.stderr)
        return 1
    name = torch.cuda.get_device_name() if args.device == "cuda" else "the CPU (a trial of the script)"
    report = Report(args.out, name, args.budget)
    with tempfile.TemporaryDirectory() as folder:
        cache = Path(folder)
        alone(report, cache, args.device, args.seconds)
        processes(report, cache, args.device, args.seconds, "CUDA graphs, processes", own)
        one_process(report, cache, args.device, args.seconds)
        if args.mps:
            with multi_process_service() as environment:
                if environment is None:
                    report.left_out.append("MPS (no daemon here)")
                else:
                    how = "CUDA graphs, processes, MPS"
                    processes(report, cache, args.device, args.seconds, how, {**own, **environment})
    report.write()
    print(report.table())
    return 0


if __name__ == "__main__":
    sys.exit(main())
