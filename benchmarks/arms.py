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
import contextlib
import datetime
import json
import logging
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import IO, Any

from toolkit.sweep_process import CONNECTIONS

RESULTS = Path(__file__).parent / "results"
RECURRENCES = ("rwkv4", "rwkv5", "rwkv6")
PROCESSES = (1, 4, 8, 16)
STREAMS = (1, 4, 8, 16, 32)
STEPS = 1000
"""Steps of the stage that is built; replays begin anew after so many."""

LOOP = 150
"""Steps of the ordinary loop."""


def words(recurrence: str, cache: Path, device: str) -> list[str]:
    """The command line of an arm, on a part of its data."""
    return [
        "scale=small",
        f"recurrence={recurrence}",
        "scan=2d",
        "prompt=sandwich",
        "data.train_pictures=1500",
        "data.test_pictures=64",
        f"stages.tune.steps={STEPS}",
        "log.tensorboard=false",
        f"hardware.device={device}",
        f"paths.cache={cache}",
        f"paths.runs={cache / 'runs'}",
    ]


class Arm:
    """An arm of scale=small, ready to train. build: a seed's model on the device, its steps captured."""

    def __init__(self, recurrence: str, cache: Path, device: str) -> None:
        from toolkit import compose
        from toolkit.build import build_model, from_dict
        from toolkit.corpus import Corpus
        from toolkit.rundir import RunDir
        from toolkit.stages import Task
        from toolkit.train import choose_kernels, device_of, prepare

        request = compose.understand(words(recurrence, cache, device))
        cfg = compose.compose(request.jobs[0])
        conf = from_dict(cfg)
        there = device_of(conf.hardware)
        prepare(conf.hardware, conf.seed)
        choose_kernels(conf.hardware, there)
        corpus = Corpus(conf)
        self.build = lambda: build_model(conf, vocab_size=corpus.tokenizer.size, device=there).to(there)
        model = self.build()
        features = corpus.features(model, there)
        self.task = Task(conf, RunDir.of(cfg), corpus, model, features, there)
        self._data: Any = None

    def steps(self, *, stream: Any = None) -> Any:
        """The steps of a fresh model, captured where there is a GPU."""
        from dataclasses import replace

        from toolkit import graphs, resident
        from toolkit.build import select_trainable
        from toolkit.stages import planned

        conf, task = self.task.conf, replace(self.task, model=self.build())
        (stage,) = planned(task)
        select_trainable(task.model, stage.conf.train, stage.conf.freeze, stage=stage.name)
        task.model.train()
        if self._data is None:
            self._data = resident.load(stage.feed.apart, task.device)
        made = graphs.Steps(
            task.model,
            self._data,
            stage.plan,
            stage=stage.conf,
            loss=conf.loss,
            steps=stage.steps,
            bf16=conf.hardware.precision == "bf16",
        )
        if task.device.type == "cuda":
            made.capture(stream)
        return made

    def loop(self, steps: int) -> float:
        """Steps a second of the ordinary loop: loader, Trainer, kernels launched one by one."""
        from dataclasses import replace

        from toolkit.build import select_trainable
        from toolkit.stages import planned
        from toolkit.train import fit_stage

        task = replace(self.task, model=self.build())
        (stage,) = planned(task)
        select_trainable(task.model, stage.conf.train, stage.conf.freeze, stage=stage.name)
        task.model.train()
        rates = []
        for count in (10, steps):  # the first one compiles and warms up
            part = replace(stage, steps=count)
            loader = part.loader(task.conf.hardware, pin_memory=task.device.type == "cuda")
            began = time.perf_counter()
            fit_stage(
                task.model,
                loader,
                name=stage.name,
                conf=task.conf,
                steps=count,
                accumulate=part.accumulate(task.conf.hardware),
                first_step=0,
                logger=[],
                folder=task.run.path,
            )
            wait(task.device)
            rates.append(count / (time.perf_counter() - began))
        return rates[-1]


def wait(device: Any) -> None:
    import torch

    if device.type == "cuda":
        torch.cuda.synchronize(device)


def rate(arms: list[Any], streams: list[Any], seconds: float) -> float:
    """Steps a second of all arms together, replayed in turn, each on its stream."""
    import torch

    device = arms[0].device
    done, began = 0, time.perf_counter()
    while time.perf_counter() - began < seconds:
        for count in range(50):
            for arm, stream in zip(arms, streams, strict=True):
                with torch.cuda.stream(stream) if stream is not None else contextlib.nullcontext():
                    if count == 0:
                        arm.at.zero_()
                    arm.step()
            if device.type == "cpu":
                break
        done += (count + 1) * len(arms)
        wait(device)
    return done / (time.perf_counter() - began)


def child(recurrence: str, cache: Path, device: str) -> int:
    """A process of its own: tells when it is ready, then runs for so many seconds whenever asked."""
    arm = Arm(recurrence, cache, device).steps()
    print("@ready", flush=True)
    for line in sys.stdin:
        print(f"@{rate([arm], [None], float(line)):.3f}", flush=True)
    return 0


class Children:
    """Processes that share the GPU."""

    def __init__(self, count: int, cache: Path, device: str, environment: Mapping[str, str]) -> None:
        command = [sys.executable, "-m", "benchmarks.arms", "--child", "rwkv6"]
        command += ["--cache", str(cache), "--device", device]
        cores = len(os.sched_getaffinity(0))
        env = {**os.environ, "OMP_NUM_THREADS": str(max(1, cores // count)), **environment}
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
    os.environ |= {**CONNECTIONS, **os.environ}
    import torch

    if args.device == "cuda" and not torch.cuda.is_available():
        print("torch sees no CUDA device here; --device cpu tries the script without one", file=sys.stderr)
        return 1
    name = torch.cuda.get_device_name() if args.device == "cuda" else "the CPU (a trial of the script)"
    report = Report(args.out, name, args.budget)
    with tempfile.TemporaryDirectory() as folder:
        cache = Path(folder)
        alone(report, cache, args.device, args.seconds)
        processes(report, cache, args.device, args.seconds, "CUDA graphs, processes", {})
        one_process(report, cache, args.device, args.seconds)
        if args.mps:
            with multi_process_service() as environment:
                if environment is None:
                    report.left_out.append("MPS (no daemon here)")
                else:
                    how = "CUDA graphs, processes, MPS"
                    processes(report, cache, args.device, args.seconds, how, environment)
    report.write()
    print(report.table())
    return 0


if __name__ == "__main__":
    sys.exit(main())
