"""Loading a language model of the released layout: peak memory and time, beside reading the file.

    python -m benchmarks.loading [--size 7b|3b|1b6|tiny] [--device cpu|cuda] [--folder DIR] [--out FOLDER]

Writes a folder as toolkit.convert does (RWKV-6, bfloat16, random numbers; one block of them repeated), then
measures in processes of their own, the file out of the page cache each time, in turn:

    read      the file from end to end, 16 MiB at a time
    bfloat16  the model loaded as the file has it: mapped, then every page of it read once
    float32   the model loaded in float32, where memory has room for it
    cuda      the model sent to the GPU, with --device cuda

Peak is the process's largest resident memory (ru_maxrss) less what it had after its imports. Medians.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import statistics
import struct
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).parent / "results"
SIZES = {"7b": (32, 4096, 14336), "3b": (32, 2560, 8960), "1b6": (24, 2048, 7168), "tiny": (3, 128, 448)}
"""Name -> layers, width, channel-mix width of the released RWKV-6 World models."""
CHUNK = 16 << 20
BLOCK = 64 << 20
PEAK, TIME = 1.15, 1.5
"""What is to be kept: peak over the weights' size, time over that of reading the file."""


def sizes_of(name: str) -> dict[str, Any]:
    """config.json's `parts.rwkv` of a size."""
    n_layer, d_model, d_ffn = SIZES[name]
    ranks = {"shift_rank": 64, "decay_rank": 128} if d_model == 4096 else {"shift_rank": 32, "decay_rank": 64}
    recurrence = {"name": "rwkv6", "head_size": 64, "d_ffn": d_ffn, **ranks}
    rows = 65536 if name != "tiny" else 512
    return {
        "version": "6",
        "n_layer": n_layer,
        "d_model": d_model,
        "vocab_size": rows,
        "vocabulary": "world" if rows == 65536 else "unknown",
        "recurrence": recurrence,
    }


def write(folder: Path, name: str) -> Path:
    """A converted folder of that size; its file."""
    import torch

    from toolkit.pretrained import ghost
    from toolkit.weights import CONFIG, WEIGHTS

    sizes = sizes_of(name)
    shapes = {f"rwkv.{n}": t.shape for n, t in ghost(sizes).state_dict().items()}
    begin, listed = 0, {}
    for key, shape in shapes.items():
        end = begin + 2 * shape.numel()
        listed[key] = {"dtype": "BF16", "shape": list(shape), "data_offsets": [begin, end]}
        begin = end
    header = json.dumps(listed).encode()
    header += b" " * (-len(header) % 8)
    torch.manual_seed(0)
    block = (0.02 * torch.randn(BLOCK // 2)).bfloat16().view(torch.uint8).numpy().tobytes()
    folder.mkdir(parents=True)
    with (folder / WEIGHTS).open("wb") as file:
        file.write(struct.pack("<Q", len(header)) + header)
        for start in range(0, begin, BLOCK):
            file.write(block[: min(BLOCK, begin - start)])
        file.flush()
        os.fsync(file.fileno())
    (folder / CONFIG).write_text(json.dumps({"format": 1, "parts": {"rwkv": sizes}}))
    return folder / WEIGHTS


CHILD = """
import json, os, resource, sys, time
from pathlib import Path
path, way, chunk = Path(sys.argv[1]), sys.argv[2], int(sys.argv[3])
if way != "read":
    import torch
    from toolkit import register
    from toolkit.pretrained import load_language_model
    register.discover()
    register.bind("recurrence", {"name": "rwkv6"})(64, 1).time_mix(0)  # imports are no part of loading
    torch.set_num_threads(1)
    if way == "cuda":
        torch.zeros(1, device="cuda")
with path.open("rb") as file:
    os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
peak = lambda: 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
before, began = peak(), time.perf_counter()
if way == "read":
    with path.open("rb", buffering=0) as file:
        held = bytearray(chunk)
        while file.readinto(held):
            pass
    bytes_ = path.stat().st_size
else:
    dtype = torch.float32 if way == "float32" else None
    model, _ = load_language_model(str(path.parent), dtype=dtype, device="cuda" if way == "cuda" else "cpu")
    loaded = time.perf_counter() - began
    if way == "cuda":
        torch.cuda.synchronize()
    else:
        for p in model.parameters():
            p.detach().view(torch.uint8).view(-1)[::4096].max()  # a byte of each page
    bytes_ = sum(p.numel() * p.element_size() for p in model.parameters())
seconds = time.perf_counter() - began
print(json.dumps({"way": way, "seconds": seconds, "peak": peak() - before, "bytes": bytes_}))
"""


def measured(file: Path, way: str) -> dict[str, Any]:
    """One process that reads or loads the file: seconds, peak bytes, bytes of the weights."""
    root = str(Path(__file__).resolve().parent.parent)
    env = {**os.environ, "PYTHONPATH": os.pathsep.join([root, os.environ.get("PYTHONPATH", "")])}
    command = [sys.executable, "-c", CHILD, str(file), way, str(CHUNK)]
    done = subprocess.run(command, env=env, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"{way}: {done.stderr.strip().splitlines()[-1:]}")
    return dict(json.loads(done.stdout))


def memory() -> int:
    """Bytes of memory that are free or can be freed."""
    for line in Path("/proc/meminfo").read_text().splitlines():
        if line.startswith("MemAvailable"):
            return int(line.split()[1]) * 1024
    return 0


def ways(size: int, device: str) -> Iterator[str]:
    """What is measured of a file of so many bytes."""
    yield "read"
    yield "bfloat16"
    if 2.4 * size < memory():
        yield "float32"
    if device == "cuda":
        yield "cuda"


def measure(name: str, file: Path, device: str, rounds: int) -> dict[str, Any]:
    """All ways in turn, their medians, and whether the bounds are kept."""
    size = file.stat().st_size
    rows: dict[str, list[dict[str, Any]]] = {}
    for turn in range(rounds):
        for way in ways(size, device):
            rows.setdefault(way, []).append(measured(file, way))
            print(f"round {turn + 1}: {json.dumps(rows[way][-1])}", flush=True)
    made = {
        way: {k: statistics.median(row[k] for row in found) for k in ("seconds", "peak", "bytes")}
        for way, found in rows.items()
    }
    read = made["read"]["seconds"]
    for way, row in made.items():
        row["time_ratio"] = row["seconds"] / read
        # On a GPU the weights are not in host memory at all: the peak is told beside their size.
        row["peak_ratio"] = row["peak"] / row["bytes"]
        # float32 writes twice the bytes that it reads: its time is told, and has no bound.
        row["kept"] = way == "read" or (
            row["peak_ratio"] <= PEAK and (way == "float32" or row["time_ratio"] <= TIME)
        )
    return {"size": name, "bytes": size, "rounds": rounds, "rows": made}


def table(result: dict[str, Any]) -> str:
    """The Markdown form."""
    lines = [
        f"# Loading RWKV-6 {result['size']}, {result['bytes'] / 1e9:.2f} GB of bfloat16",
        "",
        f"`python -m benchmarks.loading --size {result['size']}`; medians of {result['rounds']}; the file is "
        "out of the page cache each time.",
        f"To keep: peak at most {PEAK} of the weights, time (float32 apart) at most {TIME} of reading.",
        "",
        "| way | seconds | over reading | weights GB | peak GB | over weights |",
        "|---|---|---|---|---|---|",
    ]
    for way, row in result["rows"].items():
        peak = "" if way == "read" else f"{row['peak'] / 1e9:.2f} | {row['peak_ratio']:.3f}"
        lines.append(
            f"| {way} | {row['seconds']:.2f} | {row['time_ratio']:.2f} | {row['bytes'] / 1e9:.2f} | "
            f"{peak or ' | '} |"
        )
    return "\n".join(lines) + "\n"


def main(argv: list[str] | None = None) -> int:
    """Exit code 1 if a bound is not kept."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("--size", choices=SIZES, default="1b6")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--folder", type=Path, default=None, help="where the file is written, then deleted")
    parser.add_argument("--out", type=Path, default=RESULTS)
    args = parser.parse_args(argv)
    place = Path(tempfile.mkdtemp(dir=args.folder))
    try:
        need = sum(2 * n for n in _numels(args.size))
        if shutil.disk_usage(place).free < 1.1 * need:
            print(
                f"{place}: the file needs {need / 1e9:.1f} GB; --folder names another disk", file=sys.stderr
            )
            return 2
        file = write(place / args.size, args.size)
        result = measure(args.size, file, args.device, args.rounds)
    finally:
        shutil.rmtree(place, ignore_errors=True)
    args.out.mkdir(parents=True, exist_ok=True)
    (args.out / f"loading-{args.size}.json").write_text(json.dumps(result, indent=1) + "\n")
    (args.out / f"loading-{args.size}.md").write_text(table(result))
    print(table(result))
    small = args.size == "tiny"  # the test of the script: nothing but overhead
    return int(not small and not all(row["kept"] for row in result["rows"].values()))


def _numels(name: str) -> list[int]:
    from toolkit.pretrained import ghost

    return [t.numel() for t in ghost(sizes_of(name)).state_dict().values()]


if __name__ == "__main__":
    raise SystemExit(main())
