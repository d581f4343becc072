"""Processes that share a GPU, an arm each, with or without NVIDIA's Multi-Process Service."""

from __future__ import annotations

import contextlib
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import IO, Any

from benchmarks.arm import Arm, rate


def child(recurrence: str, cache: Path, device: str) -> int:
    """A process of its own: tells when it is ready, then runs for so many seconds whenever asked."""
    arm = Arm(recurrence, cache, device).steps()
    print("@ready", flush=True)
    for line in sys.stdin:
        print(f"@{rate([arm], [None], float(line)):.3f}", flush=True)
    return 0


class Children:
    """Processes that share the GPU. environment: all of theirs."""

    def __init__(self, count: int, cache: Path, device: str, environment: Mapping[str, str]) -> None:
        command = [sys.executable, "-m", "benchmarks.arms", "--child", "rwkv6"]
        command += ["--cache", str(cache), "--device", device]
        cores = len(os.sched_getaffinity(0))
        env = {"OMP_NUM_THREADS": str(max(1, cores // count)), **environment}
        pipes: dict[str, Any] = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
        self._all = [subprocess.Popen(command, env=env, **pipes) for _ in range(count)]
        for process in self._all:
            self._answer(process)

    @staticmethod
    def _answer(process: subprocess.Popen[str]) -> str:
        out: IO[str] | None = process.stdout
        assert out is not None
        for line in out:
            if line.startswith("@"):
                return line[1:].strip()
        raise RuntimeError(f"a process ended with exit code {process.wait()}")

    def rates(self, count: int, seconds: float) -> list[float]:
        """Steps a second of each of the first `count` processes while they run at the same time."""
        for process in self._all[:count]:
            assert process.stdin is not None
            process.stdin.write(f"{seconds}\n")
            process.stdin.flush()
        return [float(self._answer(process)) for process in self._all[:count]]

    def end(self) -> None:
        for process in self._all:
            process.kill()
            process.wait()


@contextlib.contextmanager
def multi_process_service() -> Iterator[dict[str, str] | None]:
    """Environment of processes under an MPS daemon of our own; None where there is none."""
    program = shutil.which("nvidia-cuda-mps-control")
    if program is None:
        yield None
        return
    with tempfile.TemporaryDirectory() as folder:
        places = {"CUDA_MPS_PIPE_DIRECTORY": folder, "CUDA_MPS_LOG_DIRECTORY": folder}
        env = {**os.environ, **places}
        started = subprocess.run([program, "-d"], env=env, timeout=30, check=False)
        try:
            yield places if started.returncode == 0 else None
        finally:
            subprocess.run([program], input="quit\n", text=True, env=env, timeout=30, check=False)
