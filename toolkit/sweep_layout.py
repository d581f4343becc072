"""How the workers of a sweep share a machine: their number, CPU threads and GPUs. Imports no torch."""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

_PER_GPU = 8
"""Workers on a GPU where `hardware.parallel=0`."""

_MEMORY = 3 << 29
"""Bytes that a small run takes on a CPU, about."""


@dataclass(frozen=True)
class Layout:
    """How workers share the machine.

    workers: rows at a time. threads: CPU threads of a process. gpus: values of CUDA_VISIBLE_DEVICES, dealt in
    turn; none on a CPU. lanes: workers of a process at most.
    """

    workers: int
    cores: int
    threads: int
    gpus: tuple[str, ...]
    lanes: int = 1

    def __str__(self) -> str:
        threads = f"{self.threads} thread{'s' * (self.threads > 1)} each"
        if self.lanes > 1:
            processes = -(-self.workers // self.lanes)
            threads = f"{processes} process{'es' * (processes > 1)}, {threads}"
        if self.gpus:
            return f"{len(self.gpus)} GPU{'s' * (len(self.gpus) > 1)}, {threads}"
        return f"{self.cores} CPU cores, {threads}"


def layout(hardware: Mapping[str, Any], rows: int) -> Layout:
    """How many workers, and what each gets; `hardware.parallel=0` asks for as many as there is room for.

    Where rows share a process there is room for its lanes on every GPU, however few the cores are. Without a
    GPU each row has a process: lanes would take turns there and nothing else.
    """
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    gpus = visible_gpus() if hardware["device"] != "cpu" else ()
    room = min(cores, _PER_GPU * len(gpus) if gpus else max(1, free_memory() // _MEMORY))
    lanes = hardware["lanes"] if gpus else 1
    workers = max(1, min(hardware["parallel"] or max(room, lanes * len(gpus)), rows))
    processes = -(-workers // lanes)
    threads = hardware["threads"] or max(1, cores // processes)
    limit = os.environ.get("OMP_NUM_THREADS", "")
    if not hardware["threads"] and limit.isdigit():
        threads = max(1, min(threads, int(limit)))
    return Layout(workers, cores, threads, gpus, lanes)


def visible_gpus() -> tuple[str, ...]:
    """What CUDA_VISIBLE_DEVICES may name, one GPU each, without importing torch."""
    given = os.environ.get("CUDA_VISIBLE_DEVICES")
    if given is not None:
        return tuple(part.strip() for part in given.split(",") if part.strip() not in ("", "-1"))
    program = shutil.which("nvidia-smi")
    if program is None:
        return ()
    try:
        listed = subprocess.run([program, "-L"], capture_output=True, text=True, timeout=30, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return ()
    count = (
        sum(line.startswith("GPU ") for line in listed.stdout.splitlines()) if not listed.returncode else 0
    )
    return tuple(map(str, range(count)))


def free_memory() -> int:
    """Bytes that new processes can take; much, where the system does not tell."""
    try:
        lines = Path("/proc/meminfo").read_text(encoding="ascii").splitlines()
        return next(int(line.split()[1]) << 10 for line in lines if line.startswith("MemAvailable:"))
    except (OSError, StopIteration, ValueError):
        return 1 << 40
