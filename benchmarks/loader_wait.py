"""How long a training step waits for its batch: the real loader beside batches that lie on the device.

    python -m benchmarks.loader_wait [--only small|paper] [--rounds 5] [--steps 40] [--workers 0,2,4,8]
        [--out FOLDER]
    python -m benchmarks.loader_wait --tiny --device cpu      # tries the script without a GPU

small: scale=small (scenes, batch 64), with kept features and with pictures decoded in each step; on a GPU
also the step of an ordinary run of it, captured with its data on the device ("as run": without a loader).
paper: scale=paper_1b6 with random weights (RWKV-6 of 24 layers of 2,048, CLIP ViT-L/14 at 336 px, about 800
positions), 16 samples a step as one of eight GPUs has them, JPEG pictures of 336 x 336 decoded in each step.

Every step trains: forward and backward pass, clipping, optimizer, in a loop shorter than a Trainer's.
Modes take turns, a block of steps each, in every round; the device is waited for at the ends of a block only.
What a loader has prepared before its turn is thrown away first. Goal: a step at most 1.02 times one with
resident batches, p95 of the wait at most 2 % of a step. Writes loader_wait.json and loader_wait.md;
what was measured before and is not measured again stays there.
"""

from __future__ import annotations

import argparse
import datetime
import gc
import itertools
import json
import os
import statistics
import tempfile
import time
from collections.abc import Iterator
from contextlib import nullcontext
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).parent / "results"
GOAL_STEP, GOAL_WAIT = 1.02, 0.02
STEPS = 40  # of a block at small
KEPT = 8  # steps whose batches lie on the device
ENDLESS = 1_000_000  # steps of a stage that no measurement reaches

Row = dict[str, Any]


class Timer:
    """Training steps of one stage, from any supply of micro batches."""

    def __init__(self, task: Any, stage: Any, micro: int) -> None:
        from toolkit.build import select_trainable
        from toolkit.lit import adamw, parameter_groups

        hardware = replace(task.conf.hardware, micro_batch=micro)
        self.conf = replace(task.conf, hardware=hardware)
        self.model, self.device, self.stage = task.model, task.device, stage
        self.per_step = stage.conf.global_batch // micro
        select_trainable(task.model, stage.conf.train, stage.conf.freeze, stage=stage.name)
        task.model.train()
        self.optimizer = adamw(parameter_groups(task.model, stage.conf.weight_decay), stage=stage.conf)
        self.learning = [p for group in self.optimizer.param_groups for p in group["params"]]

    def batches(self, workers: int) -> Iterator[Any]:
        """The stage's own loader."""
        hardware = replace(self.conf.hardware, workers=workers)
        return iter(self.stage.loader(hardware, pin_memory=self.device.type == "cuda"))

    def resident(self) -> Iterator[Any]:
        """The batches of a few steps, on the device, over and over."""
        from toolkit.lit import to_device

        first = itertools.islice(self.batches(0), KEPT * self.per_step)
        return itertools.cycle([to_device(batch, self.device) for batch in first])

    def step(self, supply: Iterator[Any]) -> float:
        """One optimizer step; returns the host's seconds in the supply."""
        import torch

        from toolkit.lit import to_device
        from toolkit.loss import lm_loss

        waited = 0.0
        bf16 = self.conf.hardware.precision == "bf16"
        for _ in range(self.per_step):
            began = time.perf_counter()
            batch = next(supply)
            waited += time.perf_counter() - began
            batch = to_device(batch, self.device)
            with torch.autocast(self.device.type, torch.bfloat16) if bf16 else nullcontext():
                answers = self.model(batch, l2=self.conf.loss.l2)
                loss = lm_loss(answers, reduction=self.conf.loss.reduction)
            (loss / self.per_step).backward()
        torch.nn.utils.clip_grad_norm_(self.learning, self.stage.conf.grad_clip or 1e9)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        return waited

    def block(self, supply: Iterator[Any], steps: int) -> tuple[float, list[float]]:
        """(ms of a step, ms waited in each)."""
        from benchmarks.kernel_timing import sync

        self.step(supply)
        sync(self.device)
        began = time.perf_counter()
        waits = [1e3 * self.step(supply) for _ in range(steps)]
        sync(self.device)
        return 1e3 * (time.perf_counter() - began) / steps, waits

    def measure(self, workers: list[int], *, rounds: int, steps: int) -> list[Row]:
        """A row for resident batches and for each number of workers; they take turns."""
        modes: dict[str, tuple[int, Iterator[Any]]] = {"resident": (0, self.resident())}
        modes |= {f"workers={n}": (n, self.batches(n)) for n in workers}
        seen: dict[str, list[tuple[float, list[float]]]] = {name: [] for name in modes}
        for turn in range(rounds + 1):
            for name, (n, supply) in modes.items():
                for _ in range(2 * n):  # two batches a worker are prepared ahead
                    next(supply)
                found = self.block(supply, steps if turn else 1)
                if turn:
                    seen[name].append(found)
        for _, supply in modes.values():
            getattr(supply, "close", lambda: None)()
        base = [ms for ms, _ in seen["resident"]]
        return [told(name, found, base) for name, found in seen.items()]


def told(mode: str, found: list[tuple[float, list[float]]], base: list[float]) -> Row:
    """Medians of the rounds; the ratio to resident batches is the median of the rounds' ratios."""
    import numpy as np

    step_ms = statistics.median(ms for ms, _ in found)
    waits = [wait for _, block in found for wait in block]
    p95 = float(np.percentile(waits, 95))
    return {
        "mode": mode,
        "step_ms": round(step_ms, 3),
        "over_resident": round(statistics.median(ms / b for (ms, _), b in zip(found, base, strict=True)), 4),
        "wait_mean_ms": round(statistics.fmean(waits), 3),
        "wait_p95_ms": round(p95, 3),
        "wait_p95_share": round(p95 / step_ms, 4),
        "rounds_ms": [round(ms, 2) for ms, _ in found],
    }


def as_run(task: Any, stage: Any, resident_ms: float, *, rounds: int, steps: int) -> list[Row]:
    """The step of an ordinary run of the stage, captured with its data on the device. CPU: no row."""
    from benchmarks.kernel_timing import sync
    from toolkit.build import select_trainable
    from toolkit.stages import captured

    if task.device.type != "cuda":
        return []
    select_trainable(task.model, stage.conf.train, stage.conf.freeze, stage=stage.name)
    task.model.train()
    made, _, mode = captured(task, stage)
    if made is None:
        raise ValueError(f"an ordinary run of this stage is not captured: {mode}")
    found: list[tuple[float, list[float]]] = []
    for _ in range(rounds):
        sync(task.device)
        began = time.perf_counter()
        for _ in range(steps):
            made.step()
        sync(task.device)
        found.append((1e3 * (time.perf_counter() - began) / steps, [0.0] * steps))
    return [told("as run", found, [resident_ms] * rounds)]


def task_of(words: list[str], folder: Path, device: str, *, steps: int = ENDLESS) -> tuple[Any, Any]:
    """(task, its last stage) of a command line, the model built on the device."""
    import torch

    from benchmarks.kernel_models import cheap_initial_values
    from toolkit import compose
    from toolkit.build import build_model, from_dict
    from toolkit.corpus import Corpus
    from toolkit.rundir import RunDir
    from toolkit.stages import Task, planned
    from toolkit.train import choose_kernels, device_of, prepare

    places = [f"paths.cache={folder / 'cache'}", f"paths.runs={folder / 'runs'}", f"hardware.device={device}"]
    endless = [f"stages.tune.steps={steps}", "stages.tune.epochs=0"]
    cfg = compose.compose(compose.understand([*words, *places, *endless]).jobs[0])
    conf = from_dict(cfg)
    there = device_of(conf.hardware)
    prepare(conf.hardware, conf.seed)
    choose_kernels(conf.hardware, there)
    corpus = Corpus(conf)
    with cheap_initial_values(), torch.device(there):
        model = build_model(conf, vocab_size=corpus.tokenizer.size)
    model = model.to(there)
    task = Task(conf, RunDir.of(cfg), corpus, model, corpus.features(model, there), there)
    task.run.path.mkdir(parents=True, exist_ok=True)
    return task, planned(task)[-1]


def small(folder: Path, options: argparse.Namespace, *, features: str) -> list[Row]:
    pictures = 60 if options.tiny else 3000
    words = ["scale=small", f"features.cache={features}", f"data.train_pictures={pictures}"]
    words += ["data.test_pictures=64"]
    words += ["stages.tune.global_batch=8", "model.d_model=64", "model.n_layer=1"] if options.tiny else []
    task, stage = task_of(words, folder, options.device)
    timer = Timer(task, stage, stage.conf.global_batch)
    steps = options.steps or (2 if options.tiny else STEPS)
    rows = timer.measure(options.workers, rounds=options.rounds, steps=steps)
    if features == "memory":
        enough = max(200, options.rounds * steps)  # and no fewer than the warm-up of the learning rate
        task, stage = task_of(words, folder, options.device, steps=enough)
        rows += as_run(task, stage, rows[0]["step_ms"], rounds=options.rounds, steps=steps)
    name = "features" if features == "memory" else "pictures"
    return [{"model": "small", "data": name, "batch": stage.conf.global_batch, **row} for row in rows]


def paper(folder: Path, options: argparse.Namespace) -> list[Row]:
    import torch

    shards = conversations(folder / "shards", 24 if options.tiny else 512)
    words = [
        "scale=paper_1b6",
        "data=shards",
        *(f"data.{name}={shards}" for name in ("train", "test", "align")),
    ]
    words += ["features.cache=off", f"stages.tune.global_batch={4 if options.tiny else 16}"]
    words += ["eval.split=test"]
    if options.tiny:
        words += ["model.d_model=64", "model.n_layer=1", "encoder=patch", "encoder.image_size=336"]
        words += ["encoder.patch=56", "model.vocab=dataset"]
    else:
        words += ["encoder.weights=random"]
    task, stage = task_of(words, folder, options.device)
    for micro in (2,) if options.tiny else (8, 4, 2):
        try:
            steps = 2 if options.tiny else 6
            rows = Timer(task, stage, micro).measure(options.workers, rounds=options.rounds, steps=steps)
            fixed = {"model": "paper", "data": "pictures", "batch": stage.conf.global_batch, "micro": micro}
            return [{**fixed, **row} for row in rows]
        except torch.OutOfMemoryError:
            print(f"micro batches of {micro} do not fit", flush=True)
        task.model.zero_grad(set_to_none=True)  # after the exception, which holds the failed step's tensors
        gc.collect()
        torch.cuda.empty_cache()
    raise ValueError("not even micro batches of 2 fit into this device's memory")


def conversations(out: Path, n: int) -> Path:
    """A shard folder of n photographs with a question and about 200 tokens of answer."""
    from benchmarks.data_peers import photographs
    from data.shards import write_shards

    def records() -> Iterator[tuple[dict[str, Any], bytes]]:
        for i, (image, text) in enumerate(photographs(n)):
            record = json.loads(text)
            record["conversations"][1]["value"] = " ".join(f"Patch {i + k} of noise." for k in range(32))
            yield record, image

    return write_shards(records(), out, about={})


def table(rows: list[Row]) -> str:
    head = ["model", "reads", "batch", "mode", "step ms", "/ resident", "wait ms", "p95 ms", "p95 / step"]
    goals = f"a step at most {GOAL_STEP} of a resident one, p95 of the wait at most {GOAL_WAIT:.0%} of a step"
    lines = ["# The loader's wait", "", f"`python -m benchmarks.loader_wait`; goals: {goals}."]
    for where, there in itertools.groupby(rows, key=lambda row: row["machine"]):
        lines += ["", ", ".join(f"{k} {v}" for k, v in where.items()) + ":", ""]
        lines += ["| " + " | ".join(head) + " |", "|" + "---|" * len(head)]
        for row in there:
            batch = f"{row['batch']}" + (f" in {row['micro']}s" if "micro" in row else "")
            cells = [row["model"], row["data"], batch, row["mode"], f"{row['step_ms']:.2f}"]
            cells += [f"{row['over_resident']:.3f}", f"{row['wait_mean_ms']:.2f}"]
            cells += [f"{row['wait_p95_ms']:.2f}", f"{row['wait_p95_share']:.2%}"]
            lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def merged(old: list[Row], new: list[Row]) -> list[Row]:
    """Rows of before, but for the models and data that were measured again, and the new ones."""
    again = {(row["model"], row["data"]) for row in new}
    return [row for row in old if (row["model"], row["data"]) not in again] + new


def machine(device: str) -> dict[str, Any]:
    import torch

    there = torch.device(device)
    return {
        "device": torch.cuda.get_device_name(there) if there.type == "cuda" else "cpu",
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "torch": torch.__version__,
        "date": f"{datetime.date.today():%Y-%m-%d}",
    }


def main(arguments: list[str] | None = None) -> None:
    """Entry point."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.loader_wait")
    parser.add_argument("--only", choices=("small", "paper"))
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument(
        "--steps", type=int, help=f"of a block at small, {STEPS}: fewer lie nearer to those beside"
    )
    parser.add_argument("--workers", default="0,2,4,8")
    parser.add_argument("--tiny", action="store_true", help="tiny sizes, to test the script")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--out", type=Path, default=RESULTS)
    options = parser.parse_args(arguments)
    if options.steps and options.only == "paper":
        parser.error("--steps is of small's blocks; leave it out, or --only paper")
    options.workers = [int(n) for n in options.workers.split(",")]
    file = options.out / "loader_wait.json"
    before: list[Row] = json.loads(file.read_text()) if file.exists() else []
    rows: list[Row] = []
    options.out.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as scratch:
        parts = {
            "small": [partial(small, Path(scratch), options, features=kind) for kind in ("memory", "off")],
            "paper": [partial(paper, Path(scratch), options)],
        }
        for make in [one for name, made in parts.items() if options.only in (None, name) for one in made]:
            began = time.perf_counter()
            rows += [{**row, "machine": machine(options.device)} for row in make()]
            gc.collect()
            print(f"{rows[-1]['model']}: {time.perf_counter() - began:.0f} s", flush=True)
            file.write_text(json.dumps(merged(before, rows), indent=1) + "\n")
            (options.out / "loader_wait.md").write_text(table(merged(before, rows)))
    print(table(merged(before, rows)))


if __name__ == "__main__":
    main()
