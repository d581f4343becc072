"""A training step of the 1.6B RWKV-6, ours beside fla's layers: tokens/s, model FLOP utilisation, memory.

    python -m benchmarks.whole_model              # on a GPU: eager, checkpointing off and on
    python -m benchmarks.whole_model --scans      # adds ours under the scans uni, bi and 2d
    python -m benchmarks.whole_model --compile    # adds our blocks under torch.compile
    python -m benchmarks.whole_model --graphs     # adds both models in CUDA graphs: the device's own time

Both models: 24 layers of 2,048, 32 heads, vocabulary 65,536, sequences of 2,048, bf16 weights, gradients
and moments (ours keeps `time_decay` in fp32), fused AdamW, no L2 term. fla: chunk_rwkv6, its fused norms and
fused cross entropy. The scans reorder half of each sequence, as a square image. Steps take turns in one
process; the batch is the largest of --batches that both can run, the same for both. Writes whole_model.json
and whole_model.md.
"""

from __future__ import annotations

import argparse
import datetime
import gc
import importlib.util
import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import nn

from benchmarks import kernel_tuning
from benchmarks.kernel_inputs import card
from benchmarks.kernel_models import HEAD, SIZES, TINY, Captured, Fla, Ours, Scanned, Trainer, allocated
from benchmarks.kernel_timing import sync
from components import scans

RESULTS = Path(__file__).parent / "results"
PEAK_FLOP = 989.4e12
"""H100 SXM, dense bf16, datasheet: what utilisation is usually told against."""

Row = dict[str, Any]


def matrix_parameters(model: nn.Module) -> int:
    """Parameters that multiply every token: all matrices but the input embedding."""
    skip = [m.weight for m in model.modules() if isinstance(m, nn.Embedding)]
    return sum(
        p.numel() for p in model.parameters() if p.squeeze().dim() > 1 and all(p is not s for s in skip)
    )


def step_flop(parameters: int, sizes: dict[str, int], batch: int) -> float:
    """Model FLOP of a step: 6 a matrix parameter and token, and the recurrence; nothing for recomputing."""
    tokens = batch * sizes["steps"]
    heads = sizes["d_model"] // HEAD
    recurrence = 14 * 64 * HEAD + 14 * HEAD * HEAD
    return float(tokens) * (6 * parameters + sizes["n_layer"] * heads * recurrence)


def timed_steps(
    trainers: dict[str, Any], batch: int, sizes: dict[str, int], device: torch.device, *, rounds: int
) -> dict[str, Row]:
    """Name -> median step ms, peak MiB of that model alone, last loss; the models take turns."""
    seen: dict[str, list[tuple[float, float]]] = {name: [] for name in trainers}
    losses: dict[str, float] = {}
    for turn in range(rounds + 3):
        shape = (batch, sizes["steps"])
        ids, labels = (torch.randint(0, sizes["vocab_size"], shape, device=device) for _ in range(2))
        for name, trainer in trainers.items():
            others = allocated(device) - trainer.static
            if device.type == "cuda":
                torch.cuda.reset_peak_memory_stats(device)
            sync(device)
            begin = time.perf_counter()
            loss = trainer.step(ids, labels)
            sync(device)
            ms = 1e3 * (time.perf_counter() - begin)
            losses[name] = float(loss)
            peak = torch.cuda.max_memory_allocated(device) - others if device.type == "cuda" else 0
            if turn >= 3:
                seen[name].append((ms, peak / 2**20))
    return {
        name: {
            "step_ms": round(statistics.median(ms for ms, _ in found), 2),
            "peak_mib": round(max(mib for _, mib in found)),
            "loss": round(losses[name], 4),
        }
        for name, found in seen.items()
    }


def largest_batch(
    trainers: dict[str, Trainer], wanted: list[int], sizes: dict[str, int], device: torch.device
) -> int:
    """The first of the batches that all models can run; raises ValueError if none."""
    for batch in wanted:
        try:
            timed_steps(trainers, batch, sizes, device, rounds=1)
            return batch
        except torch.OutOfMemoryError:
            print(f"batch {batch} does not fit all of {', '.join(trainers)}", flush=True)
        for trainer in trainers.values():  # after the exception, which holds the failed step's tensors
            trainer.optimizer.zero_grad(set_to_none=True)
        gc.collect()
        torch.cuda.empty_cache()
    raise ValueError(f"no batch of {wanted} fits; give smaller ones with --batches")


def measure(options: argparse.Namespace, sizes: dict[str, int], device: torch.device) -> list[Row]:
    """One row per model, checkpointing off and on; with --compile our compiled blocks as a third model."""
    makers: dict[str, Callable[[], nn.Module]] = {"ours": lambda: Ours(sizes)}
    if not options.no_fla:
        makers["fla"] = lambda: Fla(sizes)
    trainers = {name: Trainer(make, device) for name, make in makers.items()}
    rows: list[Row] = []
    for recompute in (False, True):
        for trainer in trainers.values():
            trainer.model.recompute(recompute)
        batch = largest_batch(trainers, options.batches, sizes, device)
        found = timed_steps(trainers, batch, sizes, device, rounds=options.rounds)
        rows += described(found, trainers, sizes, batch, how="eager", recompute=recompute)
    if options.graphs:
        rows += captured_rows(trainers, rows, sizes, device, options.rounds)
    if options.scans:
        rows += scan_rows(trainers["ours"], rows, sizes, device, options.rounds)
    if options.compile:
        rows += compiled_rows(trainers["ours"], rows, sizes, device, options.rounds)
    return rows


def captured_rows(
    trainers: dict[str, Trainer], rows: list[Row], sizes: dict[str, int], device: torch.device, rounds: int
) -> list[Row]:
    """Every model's forward and backward pass as one CUDA graph, without checkpointing, taking turns."""
    batch = rows[0]["batch"]
    ids = torch.randint(0, sizes["vocab_size"], (batch, sizes["steps"]), device=device)
    pool = torch.cuda.graph_pool_handle() if device.type == "cuda" else None
    made = {}
    for name, trainer in trainers.items():
        trainer.model.recompute(False)
        try:
            made[name] = Captured(trainer, ids, pool)
        except RuntimeError as error:  # a peer that waits for the device, or too little memory
            print(f"{name} cannot be captured: {error}", flush=True)
    found = timed_steps(made, batch, sizes, device, rounds=rounds)
    for trainer in trainers.values():
        trainer.optimizer.zero_grad(set_to_none=True)
    rows = described(found, trainers, sizes, batch, how="captured", recompute=False)
    return [{**row, "peak_mib": None} for row in rows]  # a graph's memory is set aside before its steps


def scan_rows(
    trainer: Trainer, rows: list[Row], sizes: dict[str, int], device: torch.device, rounds: int
) -> list[Row]:
    """Ours under uni, bi and 2d scans, taking turns, at the batch of the eager rows without checkpointing."""
    side = int((sizes["steps"] // 2) ** 0.5)
    tables = {"uni": scans.uni, "bi": scans.bi, "2d": scans.rows_and_columns}
    made = {n: Scanned(trainer, t(sizes["n_layer"], side, side), device) for n, t in tables.items()}
    batch = rows[0]["batch"]
    trainer.model.recompute(False)
    found = timed_steps(made, batch, sizes, device, rounds=rounds)
    trainer.model.scan = None
    result = []
    for name, row in found.items():
        one = {"ours": row}
        result += described(one, {"ours": trainer}, sizes, batch, how=f"eager, scan {name}", recompute=False)
    return result


def compiled_rows(
    trainer: Trainer, rows: list[Row], sizes: dict[str, int], device: torch.device, rounds: int
) -> list[Row]:
    """Our blocks under torch.compile at the batches of the eager rows; measured after, not between, them."""
    found: list[Row] = []
    trainer.model.recompute(False)
    trainer.model.compile_blocks()
    for recompute in (False, True):
        trainer.model.recompute(recompute)
        batch = next(r["batch"] for r in rows if r["recompute"] == recompute)
        timed = timed_steps({"ours": trainer}, batch, sizes, device, rounds=rounds)
        found += described(timed, {"ours": trainer}, sizes, batch, how="compiled", recompute=recompute)
    return found


def described(
    found: dict[str, Row], trainers: dict[str, Any], sizes: dict[str, int], batch: int, *, how: str,
    recompute: bool,
) -> list[Row]:  # fmt: skip
    """The measured numbers with tokens/s and utilisation; FLOP are counted on each model's own matrices."""
    rows = []
    for name, row in found.items():
        parameters = matrix_parameters(trainers[name].model)
        seconds = row["step_ms"] / 1e3
        fixed = {"model": name, "how": how, "recompute": recompute, "batch": batch}
        rates = {
            "matrix_parameters": parameters,
            "tokens_per_s": round(batch * sizes["steps"] / seconds),
            "mfu": round(step_flop(parameters, sizes, batch) / seconds / PEAK_FLOP, 4),
        }
        rows.append(fixed | row | rates)
        print(json.dumps(rows[-1]), flush=True)
    return rows


def table(result: dict[str, Any]) -> str:
    """The Markdown form of the results."""
    lines = ["# Whole model: one training step of the 1.6B RWKV-6", ""]
    lines += [
        "`python -m benchmarks.whole_model`; " + ", ".join(f"{k} {v}" for k, v in result["machine"].items())
    ]
    lines += ["", "bf16 weights, gradients and moments, fused AdamW; model FLOP against 989 TFLOP/s.", ""]
    lines += [
        "| model | blocks | checkpointing | batch x T | step ms | tokens/s | MFU | peak MiB | ours/fla |"
    ]
    lines += ["|" + "---|" * 9]
    rows = result["rows"]
    for row in rows:
        peers = [r for r in rows if r["model"] == "fla" and r["recompute"] == row["recompute"]]
        peers = [r for r in peers if r["how"] == row["how"]] or peers  # else beside the eager one
        ratio = f"{row['tokens_per_s'] / peers[0]['tokens_per_s']:.2f}x" if peers else "-"
        lines.append(
            f"| {row['model']} | {row['how']} | {'on' if row['recompute'] else 'off'} "
            f"| {row['batch']} x {result['sizes']['steps']} | {row['step_ms']} | {row['tokens_per_s']} "
            f"| {row['mfu']:.3f} | {row['peak_mib'] or '-'} | {ratio if row['model'] != 'fla' else ''} |"
        )
    return "\n".join(lines) + "\n"


def main(arguments: list[str] | None = None) -> None:
    """Entry point."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.whole_model")
    parser.add_argument("--batches", default="4,2,1", help="tried in this order")
    parser.add_argument("--rounds", type=int, default=10)
    parser.add_argument("--compile", action="store_true", help="our blocks under torch.compile too")
    parser.add_argument("--graphs", action="store_true", help="both models in CUDA graphs too (a GPU)")
    parser.add_argument("--scans", action="store_true", help="ours under the scans uni, bi and 2d too")
    parser.add_argument("--no-fla", action="store_true")
    parser.add_argument("--tiny", action="store_true", help="tiny sizes, to test the script")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--out", default=str(RESULTS))
    options = parser.parse_args(arguments)
    found = importlib.util.find_spec("fla")  # fla-core alone has the kernels, but no models
    if not options.no_fla and (found is None or importlib.util.find_spec("fla.models") is None):
        parser.error("fla's models are not here: install flash-linear-attention, or write --no-fla")
    options.batches = [int(b) for b in options.batches.split(",")]
    out, device = Path(options.out), torch.device(options.device)
    sizes = TINY if options.tiny else SIZES
    if device.type == "cuda" and not options.no_fla:
        kernel_tuning.load((RESULTS, out), device)
        kernel_tuning.install()
    machine = {
        "device": card(device),
        "torch": torch.__version__,
        "date": f"{datetime.datetime.now():%Y-%m-%d %H:%M}",
    }
    rows = measure(options, sizes, device)
    result = {"machine": machine, "sizes": sizes, "rows": rows}
    out.mkdir(parents=True, exist_ok=True)
    (out / "whole_model.json").write_text(json.dumps(result, indent=1) + "\n")
    (out / "whole_model.md").write_text(table(result))


if __name__ == "__main__":
    main()
