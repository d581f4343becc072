"""Tars without an index, read from front to back by webdataset's pipeline: weaker guarantees, told."""

from __future__ import annotations

import json
import logging
import os
import random
import tarfile
from collections.abc import Iterable, Iterator, Mapping
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

from fsspec.implementations.local import LocalFileSystem
from torch.utils.data import get_worker_info

from data.batch import collate
from data.dataset import Examples, Sample
from data.images import BadPicture
from data.index import IMAGE_KINDS
from data.plan import divided
from data.records import BadRecord, Example, dialogs_of, dump_json, parse_record
from data.remote import Origin
from data.streamed import GUARANTEES, Streamed
from toolkit.contracts import Batch

__all__ = ["GUARANTEES", "Streamed", "stream_loader"]

log = logging.getLogger("toolkit.data")


class Passing:
    """The record that a stream has just read, as the reader that `Examples` asks."""

    def __init__(self, layout: Mapping[str, Any] | None) -> None:
        self._layout = layout
        self._examples: list[Example] = []
        self._images: list[bytes] = []

    def load(self, sample: Mapping[str, Any]) -> int:
        """Takes a sample of webdataset; returns its number of examples. Raises BadRecord."""
        key = str(sample["__key__"])
        where = f"{sample['__url__']}: key {key}"
        wanted = str(self._layout["text"]) if self._layout else "json"
        if wanted not in sample:
            raise BadRecord(f"{where}: there is no member {key}.{wanted}")
        pictures = [name for name in sample if name.rpartition(".")[2] in (*IMAGE_KINDS[1:], "jpeg")]
        self._images = [sample[name] for name in sorted(pictures)]
        n = len(self._images)
        dialogs = dialogs_of(parse_record(sample[wanted], where, self._layout, n), where)
        self._examples = [Example(key, d.turns, d.kind, 0, bool(n)) for d in dialogs]
        return len(dialogs)

    def example(self, j: int) -> Example:
        return self._examples[j]

    def n_images(self, i: int) -> int:
        return len(self._images)

    def image_bytes(self, i: int) -> bytes | None:
        return self._images[0] if self._images else None


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
) -> Iterable[Batch]:
    """Micro batches of steps start_step to end_step - 1 for one rank, equally many on every rank.

    options: what `Examples` takes beside the reader. policy: "tolerant" leaves samples out that cannot be
    read and adds a line for each to `report`; "strict" stops. Raises ValueError for what does not divide, and
    for fewer shards than processes that walk them.
    """
    shards = source.shards()
    share = divided(global_batch, world, what="global_batch", over="ranks")
    size = micro or share
    if share % size:
        raise ValueError(
            f"hardware.micro_batch={size} does not divide the {share} samples of a rank and step"
        )
    readers = world * max(1, workers)
    if not source.resample and len(shards) < readers:
        raise ValueError(
            f"{len(shards)} shards for {readers} reading processes ({world} ranks with {max(1, workers)} "
            "each): every process needs a shard of its own; use fewer workers, more shards, or resample=true"
        )
    wds = _webdataset()
    name = f"{source.seed}:{start_step}"
    pipeline = wds.DataPipeline(
        partial(_shard_names, shards, source, name, rank, world),
        _opened,
        partial(wds.tariterators.tar_file_expander, handler=_Left(policy, report)),
        partial(wds.tariterators.group_by_keys, keys=_key_and_field),
        partial(_shuffled, wds, source.shuffle, name, rank),
        partial(_samples, source.layout, dict(options), policy, report),
        partial(_batches, size, multiple),
    )
    loader = wds.WebLoader(pipeline, batch_size=None, num_workers=workers)
    return _Limited(loader, (end_step - start_step) * (share // size))


def _webdataset() -> Any:
    """webdataset without shell commands and unpickling, whatever a shard asks for."""
    os.environ["WDS_SECURE"] = "1"
    import webdataset

    webdataset.utils.enforce_security = True  # it may have been imported before
    return webdataset


class _Limited:
    """The first n batches of an endless loader, so that all ranks end together."""

    def __init__(self, loader: Iterable[Batch], n: int) -> None:
        self._loader, self._n = loader, n

    def __len__(self) -> int:
        return self._n

    def __iter__(self) -> Iterator[Batch]:
        yield from islice(self._loader, self._n)


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


def _opened(names: Iterable[dict[str, str]]) -> Iterator[dict[str, Any]]:
    """Adds an open stream to each shard's name: a local file, or a URL through fsspec."""
    systems: dict[str, Any] = {}
    for sample in names:
        url = sample["url"]
        kind = url.partition("://")[0] if "://" in url else "file"
        if kind not in systems:
            systems[kind] = LocalFileSystem() if kind == "file" else Origin(url, "").filesystem()
        with systems[kind].open(url, "rb") as stream:
            yield {**sample, "stream": stream}


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


class _Left:
    """What a tolerant stream leaves out: a line in the report, and one in the log."""

    def __init__(self, policy: str, report: Path | None) -> None:
        self.tolerant, self.report = policy == "tolerant", report

    def __call__(self, error: Exception) -> bool:
        """As a handler of webdataset: whether to go on after an error in a shard."""
        if not isinstance(error, (tarfile.TarError, OSError, ValueError)):
            return False
        shard = next(
            (str(a) for a in reversed(error.args) if isinstance(a, str) and a.endswith(".tar")), "a shard"
        )
        cause = f"the rest of the shard is lost: {error.args[0] if error.args else error}"
        if not self.tolerant:
            raise ValueError(
                f"{shard}: {cause}; verify the shards, or index them and read with data=shards"
            ) from error
        self.note({"shard": shard, "cause": cause})
        return True

    def note(self, row: dict[str, Any]) -> None:
        log.warning("left out: %s", json.dumps(row))
        if self.report is not None:
            with self.report.open("ab") as file:
                file.write(dump_json(row) + b"\n")


def _samples(
    layout: Mapping[str, Any] | None,
    options: dict[str, Any],
    policy: str,
    report: Path | None,
    stream: Iterable[Mapping[str, Any]],
) -> Iterator[Sample]:
    passing, left = Passing(layout), _Left(policy, report)
    reader: Any = passing
    examples = Examples(reader, **{**options, "keep_mb": 0})
    for sample in stream:
        try:
            made = [examples[(j, 1.0)] for j in range(passing.load(sample))]
        except (BadRecord, BadPicture) as error:
            if not left.tolerant:
                raise
            left.note({"shard": sample["__url__"], "key": sample["__key__"], "cause": str(error)})
            continue
        yield from made


def _batches(size: int, multiple: int, samples: Iterable[Sample]) -> Iterator[Batch]:
    stream = iter(samples)
    while batch := list(islice(stream, size)):
        yield collate(batch, multiple=multiple)
