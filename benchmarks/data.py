"""Reading training data beside webdataset, litdata and mosaicml-streaming, in samples per CPU second.

    python -m benchmarks.data [--rounds 7] [--out FOLDER]

Writes data.json and data.md into benchmarks/results. All readers take turns in one process and each round
times every one of them, so that a busy machine slows all alike; medians over the rounds. Peers that are not
installed are left out and named. Pictures are 336 x 336 JPEG crops of a noise with a photograph's spectrum.
"""

from __future__ import annotations

import argparse
import datetime
import importlib.metadata
import json
import os
import platform
import statistics
import tempfile
import time
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks.data_peers import PEERS, Members, Peer, photographs
from data.dataset import Examples
from data.images import pixels
from data.loader import train_loader
from data.plan import Plan, epoch_order
from data.reader import ShardReader
from data.records import parse_json
from data.shards import write_shards
from toolkit.contracts import ImageSlot, Text

RESULTS = Path(__file__).parent / "results"
SIZES = (11, 500, 47, 333, 120, 250, 18, 402, 75, 244)
"""Samples of each shard: uneven, as real shards are."""


def per_cpu_second(work: Callable[[], int]) -> float:
    began = time.process_time()
    return work() / (time.process_time() - began)


def interleaved(works: dict[str, Callable[[], int]], rounds: int) -> dict[str, list[float]]:
    """Samples per CPU second of every work in every round; the first round warms up and is not kept."""
    found: dict[str, list[float]] = {name: [] for name in works}
    for turn in range(rounds + 1):
        for name, work in works.items():
            speed = per_cpu_second(work)
            if turn:
                found[name].append(speed)
    return found


def raw_ours(reader: ShardReader, plan: Plan) -> Iterator[Members]:
    """All bytes of every sample, in the shuffled order of an epoch."""
    for j in plan_order(plan):
        text, image = reader.raw(j)
        yield image, text


def plan_order(plan: Plan) -> list[int]:
    steps = [plan.step(t) for t in range(plan.steps_per_epoch)]
    return [int(j) for items, weights in steps for j, w in zip(items, weights, strict=True) if w]


def decoded_ours(reader: ShardReader, order: list[int]) -> Iterator[tuple[Any, Any]]:
    """Pixels and JSON of every sample, both checked by CRC-32."""
    for j in order:
        yield pixels(reader.image_bytes(j) or b"", "").numpy(), reader.record(j)


def count(items: Iterator[Any]) -> int:
    return sum(1 for _ in items)


def raw_line(reader: ShardReader, peers: list[Peer], rounds: int) -> dict[str, Any]:
    plan = Plan(len(reader), 48, 0, reader.manifest_hash)
    sets = {"ours": lambda: {crc for crc, _ in map(crcs, raw_ours(reader, plan))}}
    sets |= {peer.name: lambda peer=peer: {crc for crc, _ in map(crcs, peer.raw())} for peer in peers}
    different = {name for name, made in sets.items() if made() != sets["ours"]()}
    assert not different, f"other bytes: {different}"
    works = {"ours": lambda: count(raw_ours(reader, plan))}
    works |= {peer.name: lambda peer=peer: count(peer.raw()) for peer in peers}
    return summed(interleaved(works, rounds))


def crcs(members: Members) -> tuple[int, int]:
    return zlib.crc32(members[0]), zlib.crc32(members[1])


def decode_line(reader: ShardReader, peers: list[Peer], rounds: int, n: int) -> dict[str, Any]:
    ours = decoded_ours(reader, list(range(n)))
    expected = [zlib.crc32(pixels.tobytes()) for pixels, _ in ours]
    for peer in peers:
        found = [zlib.crc32(pixels.tobytes()) for pixels, _ in peer.decoded(n)]
        assert found == expected, f"{peer.name} has other pixels"
    works = {"ours": lambda: count(decoded_ours(reader, list(range(n))))}
    works |= {peer.name: lambda peer=peer: count(peer.decoded(n)) for peer in peers}
    return summed(interleaved(works, rounds))


def summed(speeds: dict[str, list[float]]) -> dict[str, Any]:
    """Medians, and ours over each peer as the median of the ratios of a round."""
    ratios = {
        name: statistics.median(a / b for a, b in zip(speeds["ours"], values, strict=True))
        for name, values in speeds.items()
        if name != "ours"
    }
    return {
        "samples_per_cpu_second": {name: round(statistics.median(v)) for name, v in speeds.items()},
        "ours_over": {name: round(ratio, 2) for name, ratio in ratios.items()},
        "rounds": {name: [round(v) for v in values] for name, values in speeds.items()},
    }


def integrity_line(reader: ShardReader, rounds: int) -> dict[str, Any]:
    """S11: CPU seconds of the CRC check beside those of decoding the same bytes as training does.

    A check is so short that each round makes CRC_TIMES of them: a few milliseconds measure poorly.
    """
    data = [reader.image_bytes(i) or b"" for i in range(400)]

    def check() -> int:
        return sum(zlib.crc32(part) > 0 for _ in range(CRC_TIMES) for part in data)

    def decoding() -> int:
        return sum(len(pixels(part, "")) > 0 for part in data)

    speeds = interleaved({"crc": check, "decode": decoding}, rounds)
    share = statistics.median(d / c for c, d in zip(speeds["crc"], speeds["decode"], strict=True))
    return {
        "crc_share_of_decode": round(share, 4),
        "micro_seconds": round(1e6 / statistics.median(speeds["crc"]), 1),
        "rounds": [round(d / c, 4) for c, d in zip(speeds["crc"], speeds["decode"], strict=True)],
    }


CRC_TIMES = 20


class Bytes:
    """A tokenizer of one id a byte."""

    size, end_id, pad_id = 512, 10, 0

    def encode(self, text: str) -> list[int]:
        return list(text.encode())

    def decode(self, ids: Any) -> str:
        return bytes(ids).decode()


def prompt(turns: Any) -> list[Any]:
    texts = [Text(turn.text.replace("<image>", ""), loss=turn.role == "gpt") for turn in turns]
    return [ImageSlot(), *texts]


def resume_line(reader: ShardReader, rounds: int) -> dict[str, Any]:
    """S7: wall seconds from a fresh plan and loader to the first batch, at two places of an epoch."""
    options = {"prompt": prompt, "tokenizer": Bytes(), "n_image": 4, "ctx_len": 4096}

    def first_batch(share: float) -> float:
        epoch_order_forgotten()
        examples = Examples(reader, **options, transform=as_tensor, keep_mb=0)
        began = time.perf_counter()
        plan = Plan(len(examples), 32, 0, reader.manifest_hash)
        start = int(share * plan.steps_per_epoch)
        next(iter(train_loader(examples, plan, start_step=start, end_step=start + 2)))
        return time.perf_counter() - began

    times: dict[float, list[float]] = {0.0: [], 0.8: []}
    for turn in range(max(rounds, 15) + 1):
        for share, kept in times.items():
            seconds = first_batch(share)
            if turn:
                kept.append(seconds)
    at_0, at_80 = (statistics.median(values) for values in times.values())
    return {"seconds_at_0": round(at_0, 4), "seconds_at_80": round(at_80, 4), "ratio": round(at_80 / at_0, 2)}


def epoch_order_forgotten() -> None:
    from data import plan

    plan._cached_order.cache_clear()


def as_tensor(image: Any) -> torch.Tensor:
    return torch.from_numpy(np.array(image))


def order_line(rounds: int) -> dict[str, Any]:
    """S12: CPU seconds to order a million samples."""
    found = []
    for epoch in range(rounds):
        began = time.process_time()
        epoch_order(1_000_000, manifest_hash="m", seed=0, epoch=epoch)
        found.append(time.process_time() - began)
    return {"seconds_for_1m": round(statistics.median(found), 3)}


def write_line(samples: list[Members], folder: Path, rounds: int) -> dict[str, Any]:
    """S16, its inner part: checked records with their pictures to shards with index and CRC."""
    speeds = []
    for turn in range(rounds):
        records = ((parse_json(text, ""), image) for image, text in samples)
        speeds.append(
            per_cpu_second(
                lambda t=turn, r=records: len(samples) if write_shards(r, folder / f"w{t}", about={}) else 0
            )
        )
    return {"samples_per_cpu_second": round(statistics.median(speeds))}


TARGETS = {
    "S7": ("first batch at 80 % of an epoch / at its begin", "≤ 1.2"),
    "S8": ("raw read, ours / webdataset, litdata", "≥ 5, ≥ 1.0"),
    "S9": ("JPEG to pixels and JSON, ours / webdataset rgb8, litdata and PIL", "≥ 1.3, ≥ 1.0"),
    "S11": ("CRC-32 of a picture / its decoding", "≤ 2 %"),
    "S12": ("ordering a million samples", "≤ 0.5 s"),
    "S16": ("records to shards, samples per CPU second", "≥ 3,000"),
}


def table(lines: dict[str, Any]) -> str:
    raw, decoding = lines["S8"]["ours_over"], lines["S9"]["ours_over"]
    found = {
        "S7": f"{lines['S7']['ratio']:.2f} ({1000 * lines['S7']['seconds_at_80']:.0f} ms)",
        "S8": ", ".join(f"{ratio:.2f} x {name}" for name, ratio in raw.items()),
        "S9": ", ".join(f"{ratio:.2f} x {name}" for name, ratio in decoding.items()),
        "S11": f"{100 * lines['S11']['crc_share_of_decode']:.2f} %",
        "S12": f"{lines['S12']['seconds_for_1m']:.2f} s",
        "S16": f"{lines['S16']['samples_per_cpu_second']:,}",
    }
    rows = [f"| {name} | {what} | {goal} | {found[name]} |" for name, (what, goal) in TARGETS.items()]
    speeds = [
        f"| {what} | "
        + ", ".join(f"{n} {v:,}" for n, v in lines[key]["samples_per_cpu_second"].items())
        + " |"
        for what, key in (("raw read", "S8"), ("decode", "S9"))
    ]
    head = ["| line | what | goal | measured |", "|---|---|---|---|"]
    return "\n".join([*head, *rows, "", "| samples per CPU second | |", "|---|---|", *speeds])


def machine(peers: list[Peer], missing: list[str]) -> dict[str, Any]:
    names = ["torch", "numpy", "pillow", *(peer.package for peer in peers)]
    return {
        "date": datetime.date.today().isoformat(),
        "machine": f"{platform.processor() or platform.machine()}, {os.cpu_count()} cores, shared",
        "load": os.getloadavg()[0],
        "python": platform.python_version(),
        "versions": {name: importlib.metadata.version(name) for name in names},
        "not_installed": missing,
    }


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--out", type=Path, default=RESULTS)
    args = parser.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        samples = photographs(sum(SIZES))
        reader = ShardReader(uneven_shards(samples, folder / "ours"))
        urls = [str(reader.folder / shard["url"]) for shard in reader.manifest["shardlist"]]
        peers, missing = [], []
        for make in PEERS:
            try:
                peers.append(make(samples, urls, folder))
            except ImportError as error:
                missing.append(str(error))
        lines = {
            "S8": raw_line(reader, peers, args.rounds),
            "S9": decode_line(reader, peers, args.rounds, 400),
        }
        lines["S7"] = resume_line(reader, args.rounds)
        lines["S11"], lines["S12"] = integrity_line(reader, args.rounds), order_line(args.rounds)
        lines["S16"] = write_line(samples, folder, args.rounds)
    about = machine(peers, missing)
    size = sum(len(image) for image, _ in samples) / len(samples)
    about |= {"samples": len(samples), "mean_jpeg_bytes": round(size), "rounds": args.rounds}
    report(args.out, {"about": about, "lines": lines})


def uneven_shards(samples: list[Members], out: Path) -> Path:
    """One folder of shards with SIZES samples each."""
    from benchmarks.data_peers import merged

    parts, first = [], 0
    for k, size in enumerate(SIZES):
        part = [(parse_json(text, ""), image) for image, text in samples[first : first + size]]
        parts.append(write_shards(part, out.with_name(f"part{k}"), shard_bytes=1 << 40, about={}))
        first += size
    return merged(out, parts)


def report(out: Path, found: dict[str, Any]) -> None:
    about = found["about"]
    versions = ", ".join(f"{name} {version}" for name, version in about["versions"].items())
    text = (
        f"# Reading training data\n\n`python -m benchmarks.data`, {about['date']}, {about['machine']}, "
        f"Python {about['python']}, {versions}. {about['samples']:,} JPEG pictures of 336 x 336, "
        f"{about['mean_jpeg_bytes']:,} bytes on average, in {len(SIZES)} shards of {min(SIZES)} to "
        f"{max(SIZES)}. Medians of {about['rounds']} rounds in which all readers take turns; ratios are "
        "medians of the rounds' ratios of CPU seconds.\n\n"
    )
    out.mkdir(parents=True, exist_ok=True)
    (out / "data.json").write_text(json.dumps(found, indent=1) + "\n")
    (out / "data.md").write_text(text + table(found["lines"]) + "\n")
    print((out / "data.md").read_text())


if __name__ == "__main__":
    main()
