"""The guarantees over ranks, workers and shard layouts: every sample once, equal steps, any resume."""

from __future__ import annotations

import hashlib
import json
import os
import random
import signal
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch

from data.loader import StepSampler, train_loader
from data.packing import Bucketed, Packed, Packing
from data.plan import Plan
from data.reader import ShardReader
from data.shards import write_shards

from .helpers import conversation, mean_color, picture, shard_folder
from .test_dataset import examples_of

RANKS = (1, 2, 3, 4, 5, 7, 8, 16, 48)
BATCH = 1680  # the smallest number that all of RANKS divide
LAYOUTS = {
    "equal": [100] * 10,
    "11 to 500": [11, 500, 47, 333, 18, 75],
    "one shard": [1000],
    "fewer shards than ranks": [350, 300, 350],
    "prime": [500, 495, 2],
    "one empty shard": [400, 0, 600],
}
"""Samples of each shard."""


@pytest.fixture(scope="module", params=LAYOUTS)
def layout(request, tmp_path_factory):
    """A reader over shards of these sizes; a picture here and there, as most samples need none."""
    sizes = LAYOUTS[request.param]
    folder = tmp_path_factory.mktemp("layout")
    parts = [write_part(folder / str(k), size, 10_000 * k) for k, size in enumerate(sizes) if size]
    return ShardReader(merged(folder / "all", parts, sizes))


def write_part(out, size, first):
    def records():
        for i in range(first, first + size):
            pictured = i % 200 == 0
            turns = conversation(f"q{i}", f"a{i}", image=pictured)
            yield {"id": str(i), "conversations": turns}, picture(i) if pictured else None

    return write_shards(records(), out, shard_bytes=1 << 30, about={})


def merged(out, parts, sizes):
    """The one shard of each folder in one folder; an empty shard where a size is 0."""
    out.mkdir()
    manifest, shards, left = {}, [], list(parts)
    for k, size in enumerate(sizes):
        if not size:
            shards.append(empty_shard(out, k, shards[0]))
            continue
        source = left.pop(0)
        manifest = json.loads((source / "manifest.json").read_text())
        (entry,) = manifest["shardlist"]
        names = {"url": f"shard-{k:06d}.tar", "index": f"shard-{k:06d}.index"}
        for kind, name in names.items():
            (source / entry[kind]).rename(out / name)
        shards.append({**entry, **names})
    (out / "manifest.json").write_text(json.dumps({**manifest, "shardlist": shards}))
    return out


def empty_shard(out, k, like):
    from safetensors.numpy import load, save

    columns = load((out / like["index"]).read_bytes())
    content = save({name: column[:0].copy() for name, column in columns.items()})
    (out / f"shard-{k:06d}.tar").write_bytes(bytes(10_240))
    (out / f"shard-{k:06d}.index").write_bytes(content)
    held = {"nsamples": 0, "filesize": 10_240, "dialogs": 0, "images": 0}
    names = {"url": f"shard-{k:06d}.tar", "index": f"shard-{k:06d}.index"}
    return {**like, **names, **held, "index_sha256": hashlib.sha256(content).hexdigest()}


def test_every_sample_once_for_every_number_of_ranks(layout):
    """Workers only carry out what the sampler hands them in order, so here the sampler is walked."""
    n = len(layout.examples.record)
    plan = Plan(n, BATCH, 0, layout.manifest_hash)
    expected = Counter(range(n))
    for epoch in (0, 3):
        first = epoch * plan.steps_per_epoch
        for world in RANKS:
            seen, lengths = Counter(), set()
            for rank in range(world):
                sampler = StepSampler(
                    plan, start_step=first, end_step=first + plan.steps_per_epoch, rank=rank, world=world
                )
                batches = list(sampler)
                lengths.add((len(batches), *map(len, batches)))
                seen.update(item for batch in batches for item, weight in batch if weight)
            assert seen == expected
            assert len(lengths) == 1


@pytest.mark.filterwarnings("ignore:This DataLoader will create")
@pytest.mark.parametrize("workers", [0, 1, 2, 3, 4])
def test_every_sample_once_through_real_workers(layout, workers):
    """All worker counts over all layouts, on rank counts in turn."""
    examples = examples_of(layout, transform=mean_color)
    plan = Plan(len(examples), 240, 1, layout.manifest_hash)
    world = (5, 3, 2, 1, 1)[workers]
    seen, lengths = Counter(), set()
    keys = [[] for _ in range(plan.steps_per_epoch)]
    for rank in range(world):
        loader = train_loader(
            examples,
            plan,
            start_step=0,
            end_step=plan.steps_per_epoch,
            rank=rank,
            world=world,
            workers=workers,
        )
        lengths.add(len(loader))
        for t, batch in enumerate(loader):
            keys[t] += batch.keys
            seen.update(key for key, w in zip(batch.keys, batch.weight.tolist(), strict=True) if w)
    assert seen == Counter(e.key for e in layout.all_examples())
    assert len(lengths) == 1
    assert keys == [
        [layout.example(int(j)).key for j in plan.step(t)[0]] for t in range(plan.steps_per_epoch)
    ]


def test_the_mean_over_an_epoch_does_not_depend_on_ranks():
    """Weight-0 slots count nowhere."""
    n, loss = 1003, np.random.default_rng(0).normal(size=1003)
    for plan in (Plan(n, 48, 0, "m"), Bucketed(Plan(n, 48, 0, "m"), np.arange(n), 7, 0)):
        for world in (1, 3, 16, 48):
            parts = [plan.rank_part(t, r, world) for t in range(plan.steps_per_epoch) for r in range(world)]
            total = sum(float((loss[items] * weights).sum()) for items, weights in parts)
            slots = sum(float(weights.sum()) for _, weights in parts)
            assert abs(total / slots - loss.mean()) < 1e-6


@pytest.mark.filterwarnings("ignore:This DataLoader will create")
def test_resuming_on_other_ranks_and_workers_gives_the_rest_of_the_order(tmp_path):
    reader = ShardReader(shard_folder(tmp_path / "s", 60))
    examples = examples_of(reader)
    plan = Plan(len(examples), 12, 0, reader.manifest_hash)

    def keys(first, last, world, workers):
        found = [[] for _ in range(first, last)]
        for rank in range(world):
            options = {
                "start_step": first,
                "end_step": last,
                "rank": rank,
                "world": world,
                "workers": workers,
            }
            for part, batch in zip(found, train_loader(examples, plan, **options), strict=True):
                part += batch.keys
        return found

    whole = keys(0, 18, 1, 0)
    state = json.loads(json.dumps(plan.state(7)))
    middle = plan.resume(state)
    assert keys(0, middle, 2, 4) + keys(middle, 12, 3, 0) + keys(12, 18, 1, 2) == whole


def test_batches_mix_the_shards_of_a_window():
    """S13: 500 samples a shard, the default window of 8 blocks of 64."""
    plan = Plan(40_000, 48, 0, "m")
    shards = [len(set((plan.step(t)[0] // 500).tolist())) for t in range(plan.steps_per_epoch)]
    ideal = 8 * (1 - (7 / 8) ** 48)
    assert np.mean(shards) >= 0.9 * ideal
    full = Plan(40_000, 48, 0, "m", block=1)
    order = (
        np.concatenate([full.step(t)[0] for t in range(full.steps_per_epoch)])[:40_000].argsort().argsort()
    )
    assert abs(np.corrcoef(order[:-1], order[1:])[0, 1]) <= 0.05


def test_a_million_samples_are_ordered_at_once_and_kept_small():
    """S12, without its clock: the orders of twenty epochs are not kept."""
    import resource

    plan = Plan(1_000_000, 256, 0, "m")
    for epoch in range(4):
        plan.step(epoch * plan.steps_per_epoch)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    for epoch in range(4, 24):
        plan.step(epoch * plan.steps_per_epoch)
    assert (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024 <= 50


def test_groups_of_a_packing_are_micro_batches(tmp_path):
    reader = ShardReader(shard_folder(tmp_path / "s", 60))
    examples = examples_of(reader)
    lengths = np.array([len(examples[j].ids) for j in range(len(examples))])
    packing = Packing(lengths, 64)
    plan = Packed((packing,), Plan(len(packing.packs), 6, 0, reader.manifest_hash, block=1))
    seen, counts = Counter(), set()
    for rank in range(3):
        loader = train_loader(examples, plan, start_step=0, end_step=plan.steps_per_epoch, rank=rank, world=3)
        counts.add(len(list(loader)))
        for batch in loader:
            assert batch.ids.numel() <= 64
            seen.update(k for k, w in zip(batch.keys, batch.weight.tolist(), strict=True) if w)
    assert seen == Counter(e.key for e in reader.all_examples())
    assert counts == {len(loader)} and len(loader) == 2 * plan.steps_per_epoch
    with pytest.raises(ValueError, match=r"hardware.micro_batch=2: groups .* are micro batches already"):
        train_loader(examples, plan, start_step=0, end_step=1, micro=2)
    with pytest.raises(ValueError, match=r"groups=6 cannot be shared equally over 4 ranks"):
        train_loader(examples, plan, start_step=0, end_step=1, world=4)


def digest_of(batch):
    held = [batch.ids, batch.labels, batch.lengths, batch.image_start, batch.weight, batch.pixels]
    made = hashlib.sha256(json.dumps(list(batch.keys)).encode())
    for tensor in held:
        made.update(b"-" if tensor is None else tensor.numpy().tobytes())
    return made.hexdigest()


def train_and_note(examples, plan, workers, end, notes):
    """What a training process does: one line for each step done, from the last one on."""
    start = len(notes.read_text().splitlines()) if notes.exists() else 0
    with notes.open("a") as out:
        for batch in train_loader(examples, plan, start_step=start, end_step=end, workers=workers):
            out.write(digest_of(batch) + "\n")
            out.flush()
            time.sleep(0.002)


@pytest.mark.parametrize("workers", [0, 2])
def test_kill_9_at_random_steps_changes_no_byte(tmp_path, workers):
    reader = ShardReader(shard_folder(tmp_path / "s", 40))
    examples = examples_of(reader, transform=mean_color)
    plan = Plan(len(examples), 8, 0, reader.manifest_hash)
    end, notes, draw = 200, tmp_path / "notes", random.Random(workers)
    unbroken = [digest_of(batch) for batch in train_loader(examples, plan, start_step=0, end_step=end)]
    for step in sorted(draw.sample(range(1, end - 1), 20)):
        child = os.fork()
        if not child:
            os.setpgid(0, 0)
            torch.set_num_threads(1)
            train_and_note(examples, plan, workers, end, notes)
            os._exit(0)
        while not notes.exists() or len(notes.read_text().splitlines()) < step:
            time.sleep(0.001)
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        kill_group(child)
    train_and_note(examples, plan, workers, end, notes)
    assert notes.read_text().splitlines() == unbroken


def kill_group(leader):
    """Workers notice the end of their parent only after seconds."""
    try:
        os.killpg(leader, signal.SIGKILL)
    except ProcessLookupError:
        return


GLOO = """
import sys
from datetime import timedelta

import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel

from data.loader import train_loader
from data.plan import Plan
from data.reader import ShardReader
from tests.data.test_dataset import examples_of

folder, meeting, rank = sys.argv[1], sys.argv[2], int(sys.argv[3])
dist.init_process_group(
    "gloo", init_method=f"file://{meeting}", rank=rank, world_size=2, timeout=timedelta(seconds=20)
)
reader = ShardReader(folder)
examples = examples_of(reader)
plan = Plan(len(examples), 6, 0, reader.manifest_hash)
model = DistributedDataParallel(torch.nn.Linear(1, 1, bias=False))
steps = trained = 0
for batch in train_loader(examples, plan, start_step=0, end_step=plan.steps_per_epoch, rank=rank, world=2):
    (model(batch.lengths[:, None].float()).squeeze(1) * batch.weight).sum().backward()
    steps, trained = steps + 1, trained + int(batch.weight.sum())
print(f"steps={steps} trained={trained} gradient={model.module.weight.grad.item():.1f}")
dist.destroy_process_group()
"""


def test_two_processes_over_uneven_shards_end_together(tmp_path):
    """A shorter rank would leave the other waiting for its gradients until the time-out."""
    folder = shard_folder(tmp_path / "s", 23, shard_bytes=1 << 12)
    reader = ShardReader(folder)
    sizes = {s["nsamples"] for s in reader.manifest["shardlist"]}
    n = len(reader.examples.record)
    assert len(sizes) > 1 and n % 6
    command = [sys.executable, "-c", GLOO, str(folder), str(tmp_path / "meet")]
    root = Path(__file__).parents[2]
    ranks = [
        subprocess.Popen([*command, str(rank)], cwd=root, stdout=subprocess.PIPE, text=True)
        for rank in (0, 1)
    ]
    said = [dict(word.split("=") for word in rank.communicate(timeout=120)[0].split()) for rank in ranks]
    assert [rank.returncode for rank in ranks] == [0, 0]
    assert {s["steps"] for s in said} == {str(-(-n // 6))}
    assert sum(int(s["trained"]) for s in said) == n
    assert len({s["gradient"] for s in said}) == 1
