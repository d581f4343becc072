"""The parts of the kernel benchmark: time, packed, eager, graph and error, and the warm-up before them."""

from __future__ import annotations

import argparse
import datetime
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from benchmarks import kernel_errors, kernel_tuning
from benchmarks.kernel_inputs import (
    DTYPES,
    SHAPES,
    TINY,
    Ceilings,
    Shape,
    budget_mib,
    floor_ms,
    n_sets,
    packed_lengths,
    random_inputs,
)
from benchmarks.kernel_peers import OURS, Inputs, Run, Unable, ours, peers, start_builds
from benchmarks.kernel_table import Row
from benchmarks.kernel_timing import captured, medians, one_call, peak_mib, sync


class Bench:
    """What all parts share: the options, the device, and the rows so far.

    run: names this run in every row. kept: called whenever a case is done.
    """

    def __init__(self, options: argparse.Namespace) -> None:
        self.options = options
        self.device = torch.device(options.device)
        self.backend = options.backend or ("triton" if self.device.type == "cuda" else "torch")
        self.reps = 8 if options.quick or options.tiny else 21
        self.budget_ms = 120.0 if options.quick else 350.0
        self.run = f"{datetime.datetime.now():%Y-%m-%d %H:%M}"
        self.rows: list[Row] = []
        self.kept: Callable[[], None] = lambda: None
        self.begin = time.perf_counter()

    def shapes(self, op: str) -> list[Shape]:
        if self.options.tiny:
            return [Shape(op, *s, 8) for s in TINY[op]]
        return [Shape(op, *s) for s in SHAPES[op]]

    def runs(self, op: str) -> dict[str, Run]:
        """Ours first, then the peers that were asked for."""
        found = {OURS: ours(op, self.backend)} | peers(op)
        wanted = self.options.impls
        return {n: r for n, r in found.items() if not wanted or any(w in n for w in wanted)}

    def say(self, text: str) -> None:
        print(f"[{time.perf_counter() - self.begin:6.1f}s] {text}", flush=True)

    def add(self, row: Row) -> None:
        self.rows.append(row | {"run": self.run})


def reason(error: Exception) -> str:
    """One line for the tables."""
    text = " ".join(str(error).split())
    return text[:160] if isinstance(error, Unable) else f"{type(error).__name__}: {text}"[:200]


def measure(
    bench: Bench,
    shape: Shape,
    top: Ceilings,
    sets: list[Inputs],
    *,
    mode: str,
    runs: dict[str, Run],
    ends: Tensor | None = None,
) -> None:
    """One row per implementation: forward, then forward and backward, all taking turns."""
    state = "dstate" in sets[0]
    case: Row = {"kind": "time", "op": shape.op, "shape": label(shape, ends), "dtype": "bf16"}
    rows: dict[str, Row] = {name: case | {"state": state, "mode": mode, "impl": name} for name in runs}
    for backward, field in ((False, "fwd_ms"), (True, "fwd_bwd_ms")):
        calls: dict[str, Callable[[int], object]] = {}
        for name, run in runs.items():
            call = caller(run, suited(name, shape, sets, rows[name]), ends, backward=backward)
            try:
                call(0)
                sync(bench.device)
                if backward:
                    rows[name]["peak_mib"] = round(peak_mib(call, bench.device), 1)
                calls[name] = captured(call, len(sets), bench.device) if mode == "graph" else call
            except Exception as error:
                rows[name].setdefault("note", reason(error))
        found = medians(calls, bench.device, mode=mode, reps=bench.reps, budget_ms=bench.budget_ms)
        for name, ms in found.items():
            rows[name][field] = round(ms, 5)
        if bench.device.type == "cuda":
            torch.cuda.empty_cache()
        counted = counted_shape(shape, ends)
        floor = floor_ms(counted, torch.bfloat16, top, state=state, backward=backward)
        for row in rows.values():
            row[f"floor_{field}"] = round(floor, 5)
    budget = budget_mib(counted, torch.bfloat16, state=state, sequences=0 if ends is None else len(ends) - 1)
    for row in rows.values():
        row["budget_mib"] = round(budget, 1)
        bench.add(row)
    bench.kept()
    bench.say(f"{shape.op} {label(shape, ends)} {mode} state={state}: " + summary(rows))


def suited(name: str, shape: Shape, sets: list[Inputs], row: Row) -> list[Inputs]:
    """The input sets, in fp16 for the one kernel that has no bf16; notes what a reader must know."""
    if name != "rwkv package":
        return sets
    row["note"] = "forward only" + ("" if shape.batch == 1 else "; its state mixes samples (B > 1)")
    if shape.op != "wkv4":
        return sets
    row["note"] = "forward only; in fp16 (has no bf16)"
    half = {torch.bfloat16: torch.float16}
    return [{n: t.detach().to(half.get(t.dtype, t.dtype)) for n, t in x.items()} for x in sets]


def label(shape: Shape, ends: Tensor | None) -> str:
    """The shape's name in the tables."""
    return str(shape) if ends is None else f"packed {int(ends[-1])} of {len(ends) - 1}, {shape.width}"


def counted_shape(shape: Shape, ends: Tensor | None) -> Shape:
    """What floor and budget count: of a packed batch its own tokens."""
    return shape if ends is None else Shape(shape.op, 1, int(ends[-1]), shape.width, shape.head)


def summary(rows: dict[str, Row]) -> str:
    """One line of progress."""
    texts = []
    for name, row in rows.items():
        note = f" ({row['note'][:60]})" if "note" in row else ""
        texts.append(f"{name} {row.get('fwd_ms', '-')}/{row.get('fwd_bwd_ms', '-')}{note}")
    return "; ".join(texts)


def caller(run: Run, sets: list[Inputs], ends: Tensor | None, *, backward: bool) -> Callable[[int], object]:
    """A call on the input set whose turn it is."""
    return lambda turn: one_call(run, sets[turn % len(sets)], ends, backward=backward)


def make_sets(bench: Bench, shape: Shape, *, state: bool) -> list[Inputs]:
    """Enough random input sets that rotating through them leaves the L2 cache."""
    count = 2 if bench.options.tiny else n_sets(shape, torch.bfloat16)
    return [random_inputs(shape, torch.bfloat16, bench.device, state=state, seed=i) for i in range(count)]


def time_part(bench: Bench, op: str, top: Ceilings) -> None:
    """All shapes of the operator, without and with state."""
    shapes = bench.shapes(op)
    for index, shape in enumerate(shapes):
        for state in (False, True):
            runs = bench.runs(op)
            if index or state:
                runs.pop("naive loop", None)
            measure(bench, shape, top, make_sets(bench, shape, state=state), mode="stream", runs=runs)


def small_part(bench: Bench, op: str, top: Ceilings, mode: str) -> None:
    """The smallest shape, launch by launch or as a graph."""
    shape = bench.shapes(op)[0]
    runs = bench.runs(op)
    runs.pop("naive loop", None)
    if mode == "graph":
        runs.pop("rwkv package", None)  # it launches on the default stream, which spoils a capture
    measure(bench, shape, top, make_sets(bench, shape, state=False), mode=mode, runs=runs)


def packed_part(bench: Bench, op: str, top: Ceilings) -> None:
    """A batch of unequal lengths: packed where an implementation can, else padded to the longest."""
    lengths = packed_lengths(tiny=bench.options.tiny)
    width = {"wkv4": 2048, "wkv5": 32, "wkv6": 32}[op]
    head = 64
    if bench.options.tiny:
        width, head = TINY[op][0][2], 8
    total, most = sum(lengths), max(lengths)
    ends = torch.tensor([0, *lengths], device=bench.device).cumsum(0)
    long = Shape(op, 1, total, width, head)
    sets = make_sets(bench, long, state=False)
    runs = bench.runs(op)
    for name in ("naive loop", "rwkv package", "fla chunk_gla"):
        runs.pop(name, None)
    padded = {n: runs.pop(n) for n in ("fla fused_recurrent_rwkv4",) if n in runs}
    offsets = torch.cat([torch.arange(n, device=bench.device) + i * most for i, n in enumerate(lengths)])

    def scattered(t: Tensor) -> Tensor:
        flat = t.new_zeros((len(lengths) * most, *t.shape[2:])).index_copy(0, offsets, t[0])
        return flat.view(len(lengths), most, *t.shape[2:])

    def as_padded(run: Run) -> Run:
        def call(x: Inputs, _: Tensor | None) -> tuple[Tensor, Tensor | None]:
            wide = {n: scattered(t) if t.dim() > 1 and t.shape[:2] == (1, total) else t for n, t in x.items()}
            y, state = run(wide, None)
            return y.flatten(0, 1)[offsets].unsqueeze(0), state

        return call

    runs |= {f"{n} (padded)": as_padded(r) for n, r in padded.items()}
    measure(bench, long, top, sets, mode="packed", runs=runs, ends=ends)


def error_part(bench: Bench, op: str) -> None:
    """Every implementation, type and length against fp64, all regimes."""
    tiny = bench.options.tiny
    for dtype_name in bench.options.dtypes:
        for length in (16, 13) if tiny else (512, 509):
            x = kernel_errors.error_inputs(op, DTYPES[dtype_name], length, bench.device, small=tiny)
            exact, p = kernel_errors.truth(op, x)
            for name, run in bench.runs(op).items():
                if name == "naive loop":
                    continue
                fixed = {"kind": "error", "op": op, "dtype": dtype_name, "T": length, "impl": name}
                try:
                    with torch.set_grad_enabled(name != "rwkv package"):
                        found = kernel_errors.outputs_and_gradients(run, x, p)
                    rows = kernel_errors.errors(op, found, exact)
                except Exception as error:
                    bench.add(fixed | {"regime": "all", "note": reason(error)})
                    continue
                for regime, row in rows.items():
                    bench.add(fixed | {"regime": regime} | row)
            bench.kept()
            bench.say(f"{op} {dtype_name} T={length} errors: {worst(bench.rows, op, dtype_name, length)}")


def worst(rows: list[Row], op: str, dtype: str, length: int) -> str:
    """Implementation -> its largest error over regimes and tensors, for the progress line."""
    found: dict[str, list[float]] = {}
    for row in rows:
        if (row["kind"], row.get("op"), row.get("dtype"), row.get("T")) == ("error", op, dtype, length):
            values = [v for k, v in row.items() if isinstance(v, float) and not k.endswith("_rounded")]
            found.setdefault(row["impl"], []).extend(values if row.get("finite", True) else [float("nan")])
    return "; ".join(f"{n} {max(v):.2g}" if v else f"{n} -" for n, v in found.items())


def warm(bench: Bench, ops: list[str], parts: list[str]) -> None:
    """Tunes the peers on one head count, then compiles the other variants in processes of their own.

    The variants (head counts, state, types) then come from Triton's disk cache.
    """
    start_builds([int(op[-1]) for op in ops if "rwkv package" in bench.runs(op)])
    for op in ops:
        warm_variant(bench, f"{op}:{bench.shapes(op)[0].width}:bf16:plain:8")
    bench.say(f"peers tuned: {len(kernel_tuning.WINNERS)} kernels")
    kernel_tuning.save(Path(bench.options.out), bench.device)
    heads = [op for op in ops if op != "wkv4"]
    # Without the part `time` only the smallest shapes run.
    timed = [s for op in ops for s in (bench.shapes(op) if "time" in parts else bench.shapes(op)[:1])]
    # The number of samples matters to RWKV-4 alone, whose segments depend on it.
    few = {(s.op, s.width, s.batch if s.op == "wkv4" else 8) for s in timed}
    jobs = [f"{op}:{w}:bf16:{k}:{b}" for op, w, b in sorted(few) for k in ("plain", "state")]
    if "packed" in parts:
        jobs += [f"{op}:32:bf16:packed:1" for op in heads]
    if "error" in parts:
        types = bench.options.dtypes
        jobs += [f"{op}:{'384' if op == 'wkv4' else '12'}:{d}:state:1" for op in ops for d in types]
    command = [sys.executable, "-m", "benchmarks.kernels", "--out", bench.options.out]
    command += ["--backend", bench.backend, "--impls", ",".join(bench.options.impls), "--warm"]
    shares = [jobs[i :: bench.options.workers] for i in range(bench.options.workers)]
    running = [subprocess.Popen([*command, ",".join(share)]) for share in shares if share]
    for process in running:
        process.wait()
    bench.say(f"{len(jobs)} variants compiled in {len(running)} processes")


def warm_variant(bench: Bench, job: str) -> None:
    """Runs every implementation once, forward and backward, on a short input of one variant."""
    op, width, dtype, kind, batch = job.split(":")
    # The sizes keep what compilers specialise on: batch of 1 or not, lengths divisible by 16; RWKV-4 with one
    # sample cuts its time into segments, from 2,048 steps on as many as with more.
    shape = Shape(op, int(batch), 2048 if op == "wkv4" else 512, int(width))
    x = random_inputs(shape, DTYPES[dtype], bench.device, state=kind == "state")
    ends = torch.tensor([0, 200, 512], device=bench.device) if kind == "packed" else None
    for name, run in bench.runs(op).items():
        if name in ("naive loop", "rwkv package"):
            continue
        try:
            one_call(run, x, ends, backward=True)
        except Exception as error:
            print(f"warming {job} {name}: {reason(error)}", flush=True)
    sync(bench.device)
