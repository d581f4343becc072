"""Tars without an index, read from front to back by webdataset's pipeline: weaker guarantees, told."""

from __future__ import annotations

import os
import random
from collections.abc import Iterable, Iterator, Mapping
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from torch.utils.data import get_worker_info

from data.batch import collate
from data.dataset import Examples, Sample
from data.failed import Failed, passed, raised
from data.images import BadPicture
from data.loader import heedless
from data.passing import Passing
from data.plan import divided
from data.records import BadRecord
from data.stream_shards import Left, opened
from data.streamed import GUARANTEES, Streamed
from toolkit.contracts import Batch

__all__ = ["GUARANTEES", "Streamed", "stream_loader"]

_BAD_SAMPLES = 10_000
"""In a row: a stream of which no sample can be read ends."""


def stream_loader(
    source: Streamed,
    options: Mapping[str, Any],
    *,
    start_step: int,
    end_step: int,
    global_batch: int,
    rank: int = 0,
    world: int = 1,
    micro: int = 0,
    workers: int = 0,
    multiple: int = 1,
    policy: str = "strict",
    report: Path | None = None,
    pin_memory: bool = False,
) -> Limited:
    """Micro batches of steps start_step to end_step - 1 for one rank, equally many on every rank.

    options: what `Examples` takes beside the reader. policy: "tolerant" leaves samples out that cannot be
    read and adds a line for each to `report`; "strict" stops. Raises ValueError for what does not divide, and
    for fewer shards than processes that walk them.
    """
    shards = source.shards()
    size, number = micro_batches(global_batch, world, micro)
    readers = world * max(1, workers)
    if not source.resample and len(shards) < readers:
        raise ValueError(
            f"{len(shards)} shards for {readers} reading processes ({world} ranks with {max(1, workers)} "
            "each): every process needs a shard of its own; use fewer workers, more shards, or resample=true"
        )
    wds = _webdataset()
    reader: Any = Passing(source.layout)
    examples = Examples(reader, **{**options, "keep_mb": 0})
    left = Left(policy, report)
    name = f"{source.seed}:{start_step}"
    pipeline = wds.DataPipeline(
        partial(_shard_names, shards, source, name, rank, world),
        partial(opened, left, len(shards)),
        partial(wds.tariterators.tar_file_expander, handler=left),
        partial(wds.tariterators.group_by_keys, keys=_key_and_field, handler=left),
        left.seen,
        partial(_shuffled, wds, source.shuffle, name, rank),
        partial(_samples, examples, reader, left),
        partial(_batches, size, multiple),
        _errors_as_batches,
    )
    # A generator of its own: making an iterator must not draw from the global random state.
    generator = torch.Generator()
    generator.manual_seed(0)
    loader = wds.WebLoader(
        pipeline,
        batch_size=None,
        num_workers=workers,
        generator=generator,
        worker_init_fn=heedless,
        pin_memory=pin_memory,
    )
    return Limited(loader, (end_step - start_step) * number, examples)


def micro_batches(global_batch: int, world: int, micro: int) -> tuple[int, int]:
    """(samples of a micro batch, micro batches of a rank and step); ValueError for what does not divide."""
    share = divided(global_batch, world, what="global_batch", over="ranks")
    size = micro or share
    if share % size:
        raise ValueError(
            f"hardware.micro_batch={size} does not divide the {share} samples of a rank and step"
        )
    return size, share // size


def _webdataset() -> Any:
    """webdataset without shell commands and unpickling, whatever a shard asks for."""
    os.environ["WDS_SECURE"] = "1"
    import webdataset

    webdataset.utils.enforce_security = True  # it may have been imported before
    return webdataset


class Limited:
    """The first n batches of an endless loader, so that all ranks end together."""

    def __init__(self, loader: Iterable[Batch], n: int, examples: Examples) -> None:
        self._loader, self._n, self._examples = loader, n, examples

    def __len__(self) -> int:
        return self._n

    def __iter__(self) -> Iterator[Batch]:
        number = 0
        for number, batch in enumerate(raised(islice(self._loader, self._n)), 1):  # noqa: B007
            yield batch
        if number < self._n:
            raise RuntimeError(f"the stream ended after {number:,} of {self._n:,} batches")

    @property
    def left_out(self) -> int:
        """Overlong samples served with weight 0 so far, in this process and its workers."""
        return self._examples.left_out


def _worker() -> tuple[int, int]:
    worker = get_worker_info()
    return (0, 1) if worker is None else (worker.id, worker.num_workers)


def _shard_names(
    shards: list[str], source: Streamed, name: str, rank: int, world: int
) -> Iterator[dict[str, str]]:
    """Shards of this process without an end: split by node and worker, or drawn from all."""
    number, workers = _worker()
    draw = random.Random(f"{name}:{rank}:{number}")
    mine = shards[rank::world][number::workers]
    while True:
        order = [draw.choice(shards) for _ in shards] if source.resample else draw.sample(mine, len(mine))
        yield from ({"url": shard} for shard in order)


def _key_and_field(name: str) -> tuple[str | None, str | None]:
    """Key and field of a member: split at the last dot, or before a number and the last dot."""
    stem, dot, kind = name.rpartition(".")
    head, numbered, number = stem.rpartition(".")
    if not dot:
        return None, None
    return (head, f"{number}.{kind}") if numbered and number.isdigit() and kind != "json" else (stem, kind)


def _shuffled(wds: Any, size: int, name: str, rank: int, samples: Iterable[Any]) -> Iterator[Any]:
    if size < 2:
        return iter(samples)
    rng = random.Random(f"{name}:{rank}:{_worker()[0]}:buffer")
    return iter(wds.filters.shuffle(size, initial=size, rng=rng)(samples))


def _samples(
    examples: Examples, passing: Passing, left: Left, stream: Iterable[Mapping[str, Any]]
) -> Iterator[Sample]:
    in_a_row = 0
    for sample in stream:
        try:
            made = [examples[(j, 1.0)] for j in range(passing.load(sample))]
        except (BadRecord, BadPicture) as error:
            if not left.tolerant:
                raise
            left.note({"shard": sample["__url__"], "key": sample["__key__"], "cause": str(error)})
            in_a_row += 1
            if in_a_row == _BAD_SAMPLES:
                raise ValueError(f"{in_a_row:,} samples in a row could not be read: {error}") from error
            continue
        in_a_row = 0
        yield from made


def _batches(size: int, multiple: int, samples: Iterable[Sample]) -> Iterator[Batch]:
    stream = iter(samples)
    while batch := list(islice(stream, size)):
        yield collate(batch, multiple=multiple)


def _errors_as_batches(batches: Iterable[Batch]) -> Iterator[Batch | Failed]:
    """The batches; in a worker an error ends them as a last one, to be raised where they arrive."""
    stream = iter(batches)
    while (batch := passed(lambda: next(stream, None))) is not None:
        yield batch
        if isinstance(batch, Failed):
            return
