"""The kernels beside every existing implementation: times, memory, errors, against floors of this machine.

    python -m benchmarks.kernels                                  # everything, on a GPU
    python -m benchmarks.kernels --ops wkv6 --parts time --quick  # one part
    python -m benchmarks.kernels --table                          # only rewrites the page

Writes kernels.jsonl (one row per measurement; rows measured again replace the old ones), kernels.md and
fla_tuned.json (what fla-core's tuner chose) into benchmarks/results or --out.
"""

from __future__ import annotations

import argparse
import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch

from benchmarks import kernel_tuning
from benchmarks.kernel_inputs import DTYPES, SHAPES, Ceilings, card
from benchmarks.kernel_parts import (
    Bench,
    error_part,
    packed_part,
    reason,
    small_part,
    time_part,
    warm,
    warm_variant,
)
from benchmarks.kernel_table import Row, table
from benchmarks.kernel_timing import ceilings

RESULTS = Path(__file__).parent / "results"
PARTS = ("time", "packed", "eager", "graph", "error")
KEY = ("kind", "op", "shape", "dtype", "state", "mode", "impl", "regime", "T")


def machine(device: torch.device, top: Ceilings) -> Row:
    """What the measurements depend on."""
    row: Row = {"kind": "machine"}
    row["device"] = card(device)
    if device.type == "cuda" and shutil.which("nvidia-smi"):
        query = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
        row["driver"] = subprocess.run(query, capture_output=True, text=True).stdout.strip()
    row["cuda"] = torch.version.cuda
    row["python"] = sys.version.split()[0]
    for name in ("torch", "triton", "fla-core", "rwkv"):
        try:
            row[name] = version(name)
        except PackageNotFoundError:
            row[name] = "not installed"
    row["copy_TB_s"] = round(top.bytes_per_s / 1e12, 3)
    row["bf16_product_TFLOP_s"] = round(top.flop_per_s / 1e12, 1)
    return row


def merged(old: list[Row], new: list[Row]) -> list[Row]:
    """All rows, those measured again replaced; machines are kept while a row could be theirs."""
    keys = {tuple(row.get(k) for k in KEY) for row in new if row["kind"] != "machine"}
    stay = [row for row in old if row["kind"] == "machine" or tuple(row.get(k) for k in KEY) not in keys]
    used = {row.get("run") for row in (*stay, *new) if row["kind"] != "machine"}
    return [row for row in (*stay, *new) if row["kind"] != "machine" or row["run"] in used]


def write(out: Path, rows: list[Row]) -> None:
    """The JSON lines and the page."""
    out.mkdir(parents=True, exist_ok=True)
    (out / "kernels.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (out / "kernels.md").write_text(table(rows))


def read(path: Path) -> list[Row]:
    """The rows of an earlier run."""
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def options(arguments: list[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.kernels")
    parser.add_argument("--ops", default="wkv6,wkv5,wkv4", help="of wkv4, wkv5, wkv6")
    parser.add_argument("--parts", default=",".join(PARTS), help=f"of {', '.join(PARTS)}")
    parser.add_argument("--dtypes", default=",".join(DTYPES), help=f"of errors: of {', '.join(DTYPES)}")
    parser.add_argument("--impls", default="", help="parts of names, 'ours,fla chunk'; empty: all")
    parser.add_argument("--quick", action="store_true", help="fewer repetitions")
    parser.add_argument("--tiny", action="store_true", help="tiny shapes, to test the script")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--backend", default="", help="ours: triton on a GPU, torch on a CPU")
    parser.add_argument("--retune", action="store_true", help="forget fla-core's stored winners")
    parser.add_argument("--no-warm", action="store_true", help="no processes that compile ahead")
    parser.add_argument("--workers", type=int, default=6)
    parser.add_argument("--out", default=str(RESULTS))
    parser.add_argument("--table", action="store_true", help="only write the page again")
    parser.add_argument("--warm", default="", help=argparse.SUPPRESS)
    found = parser.parse_args(arguments)
    found.ops, found.parts, found.dtypes = (x.split(",") for x in (found.ops, found.parts, found.dtypes))
    found.impls = [name for name in found.impls.split(",") if name]
    for name, known in (("ops", SHAPES), ("parts", PARTS), ("dtypes", DTYPES)):
        wrong = [x for x in getattr(found, name) if x not in known]
        if wrong:
            parser.error(f"--{name} {wrong[0]}: write {', '.join(known)}")
    if len(found.dtypes) < len(DTYPES) and "error" not in found.parts:
        parser.error("--dtypes chooses among errors; add error to --parts, times are of bf16")
    return found


def run_parts(bench: Bench, top: Ceilings) -> None:
    """The parts that were asked for, operator by operator; a failing part does not hide the others."""
    parts: dict[str, Callable[[str], None]] = {
        "time": lambda op: time_part(bench, op, top),
        "packed": lambda op: packed_part(bench, op, top),
        "eager": lambda op: small_part(bench, op, top, "eager"),
        "graph": lambda op: small_part(bench, op, top, "graph"),
        "error": lambda op: error_part(bench, op),
    }
    for part in bench.options.parts:
        for op in bench.options.ops:
            try:
                parts[part](op)
            except Exception as error:
                bench.say(f"FAILED {part} {op}: {reason(error)}")
            bench.kept()


def save(bench: Bench) -> None:
    """Writes what there is, so that a run that is cut off keeps its results."""
    old = read(RESULTS / "kernels.jsonl") if not bench.options.tiny else []
    write(Path(bench.options.out), merged(old, bench.rows))


def main(arguments: list[str] | None = None) -> None:
    """Entry point."""
    chosen = options(arguments)
    out = Path(chosen.out)
    if chosen.table:
        write(out, read(out / "kernels.jsonl"))
        return
    bench = Bench(chosen)
    out.mkdir(parents=True, exist_ok=True)
    on_gpu = bench.device.type == "cuda"
    if on_gpu:
        if not chosen.retune:
            kernel_tuning.load((RESULTS, out), bench.device)
        kernel_tuning.install()
    if chosen.warm:
        for job in chosen.warm.split(","):
            warm_variant(bench, job)
        return
    top = ceilings(bench.device)
    bench.say(f"copy {top.bytes_per_s / 1e12:.2f} TB/s, product {top.flop_per_s / 1e12:.0f} TFLOP/s")
    if on_gpu and not chosen.no_warm:
        warm(bench, chosen.ops, chosen.parts)
    bench.add(machine(bench.device, top))
    bench.kept = lambda: save(bench)
    run_parts(bench, top)
    if on_gpu:
        kernel_tuning.save(out, bench.device)
    bench.say(f"written to {out}")


if __name__ == "__main__":
    main()
