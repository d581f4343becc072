"""Features of a frozen encoder, computed once per picture and kept in memory or on disk."""

from __future__ import annotations

import hashlib
import json
import logging
import math
import mmap
import os
import zlib
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import PIL.Image
import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from data.atomic import locked, sync
from data.batch import stack
from data.images import BadPicture, decode
from data.reader import DamagedSample, ShardReader
from toolkit.contracts import ImageFeatures

if TYPE_CHECKING:
    from PIL.Image import Image

log = logging.getLogger(__name__)

_NAMES = {torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16"}


_UNKNOWN = "????????"
"""Stands in the head of a table for the checksum of what is not written yet."""


class FeatureTable:
    """Features of every picture of a shard folder.

    patches: [n_images, P, D]. extra: [n_images, E, D]. grid: (height, width). rows: [n_records]
    long, the row of each record, -1 for a text-only one. file: where the table is mapped from. streamed:
    each batch is read from shards (data.feature_shards).
    """

    streamed = False

    def __init__(
        self, patches: Tensor, extra: Tensor, grid: tuple[int, int], rows: Tensor, file: Path | None = None
    ) -> None:
        self.patches, self.extra, self.grid, self.rows, self.file = patches, extra, grid, rows, file

    def fetch(self, record: int) -> None:
        """Looks at a record's features before its batch is made. BadPicture if the picture was unreadable."""
        row = int(self.rows[record])
        one = self.patches if self.patches.shape[1] else self.extra
        if row >= 0 and bool(one[row, 0, 0].isnan()):
            raise BadPicture("the picture could not be read when its features were computed")

    def gather(self, records: Sequence[int]) -> ImageFeatures:
        """Features of these records, [B, P, D] and [B, E, D]; ValueError for one without a picture."""
        rows = self.rows[torch.as_tensor(records, dtype=torch.long)]
        if bool((rows < 0).any()):
            raise ValueError(f"record {records[int((rows < 0).nonzero()[0])]} has no picture, so no features")
        return ImageFeatures(self.patches[rows], self.extra[rows], self.grid)

    def __reduce__(self) -> tuple[Any, ...]:
        # A mapped table travels to another process by its path, not by its content.
        if self.file is not None:
            return _load, (self.file, self.rows)
        return FeatureTable, (self.patches, self.extra, self.grid, self.rows)


def estimate_bytes(
    n_images: int, grid: tuple[int, int], n_extra: int, d: int, dtype: torch.dtype = torch.float32
) -> int:
    """Bytes that a table of these sizes takes; `d` is the encoder's output width."""
    return n_images * (grid[0] * grid[1] + n_extra) * d * dtype.itemsize


def build_features(
    reader: ShardReader,
    encode: Callable[[Any], ImageFeatures],
    transform: Callable[[Image], Any],
    *,
    where: Literal["memory", "disk"],
    folder: Path,
    encoder_id: str,
    dtype: torch.dtype = torch.float32,
    batch: int = 64,
    tolerant: bool = False,
    draft: int = 0,
    progress: Callable[[int, int], None] | None = None,
) -> FeatureTable:
    """The features of every picture: each is decoded, transformed and encoded once.

    encode: stacked pixels -> features, the encoder in eval mode; called without gradients.
    encoder_id: names everything that decides the numbers (weights, size, transform).
    where="disk" keeps the table as safetensors in `folder`, named by data, encoder and dtype, uses
    it again next time, and maps it instead of loading it; a second process waits for the first.
    tolerant: a picture that cannot be read gets NaN, which `FeatureTable.fetch` refuses; otherwise it raises
    DamagedSample or BadPicture. draft: see data.images.decode. progress is called with (pictures
    done, pictures in all).
    """
    if where not in ("memory", "disk"):
        raise ValueError(f"features can be kept in 'memory' or on 'disk', not {where!r}")
    if dtype not in _NAMES:
        raise ValueError(f"features cannot be kept as {dtype}; use float32, float16 or bfloat16")
    records, rows = _pictured(reader)
    if not records:  # a split of texts alone: what has no row is only asked for its grid and widths
        with torch.no_grad():
            blank = encode(stack([transform(PIL.Image.new("RGB", (64, 64)))]))
        patches, extra = (one[:0].to("cpu", dtype) for one in (blank.patches, blank.extra))
        return FeatureTable(patches, extra, blank.grid, rows)
    read = partial(_readable if tolerant else _picture, reader, draft)
    batches = _encoded(read, records, encode, transform, dtype, batch, progress)
    if where == "memory":
        return _fill_memory(batches, len(records), rows)
    # NaN must not reach who does not look for it: another name.
    identity = encoder_id + (":tolerant" if tolerant else "") + (f":draft{draft}" if draft else "")
    file = folder / f"features-{_table_id(reader, identity, dtype)}.safetensors"
    with locked(folder / f".{file.name}.lock", f"computing {file}"):
        if tolerant and file.exists() and _mended(_load(file, rows), records, read):
            log.warning("%s is computed again: pictures that could not be read can be now", file)
            file.unlink()
        if not file.exists():
            _remove_parts(file)
            _fill_file(batches, len(records), dtype, file)
    return _load(file, rows)


def _table_id(reader: ShardReader, encoder_id: str, dtype: torch.dtype) -> str:
    return hashlib.sha256(f"{reader.manifest_hash}:{encoder_id}:{dtype}".encode()).hexdigest()[:16]


def _pictured(reader: ShardReader) -> tuple[list[int], Tensor]:
    """(indices of records with a picture, row of every record or -1)."""
    records = [i for i in range(len(reader)) if reader.has_image(i)]
    rows = torch.full((len(reader),), -1)
    rows[records] = torch.arange(len(records))
    return records, rows


def _picture(reader: ShardReader, draft: int, i: int) -> Image | None:
    return decode(reader.image_bytes(i) or b"", reader.key(i), draft=draft)


def _readable(reader: ShardReader, draft: int, i: int) -> Image | None:
    """The picture of record i, None if it cannot be read."""
    try:
        return _picture(reader, draft, i)
    except (DamagedSample, BadPicture) as error:
        log.warning("no features for a damaged picture: %s", error)
        return None


def _mended(table: FeatureTable, records: Sequence[int], read: Callable[[int], Image | None]) -> bool:
    """Whether a picture that had no features can be read now, as after a repair."""
    one = table.patches if table.patches.shape[1] else table.extra
    missing = one[:, 0, 0].isnan().nonzero().flatten().tolist()
    return any(read(records[row]) is not None for row in missing)


def _encoded(
    read: Callable[[int], Image | None],
    records: Sequence[int],
    encode: Callable[[Any], ImageFeatures],
    transform: Callable[[Image], Any],
    dtype: torch.dtype,
    batch: int,
    progress: Callable[[int, int], None] | None,
) -> Iterator[tuple[int, ImageFeatures]]:
    """(first row, features) of one batch of pictures after the other."""
    for start in range(0, len(records), batch):
        part = records[start : start + batch]
        pictures = [read(i) for i in part]
        with torch.no_grad():
            made = encode(stack([transform(p or PIL.Image.new("RGB", (64, 64))) for p in pictures]))
        patches, extra = (one.to("cpu", dtype, copy=True) for one in (made.patches, made.extra))
        for row, picture in enumerate(pictures):
            if picture is None:
                patches[row], extra[row] = math.nan, math.nan
        yield start, ImageFeatures(patches, extra, made.grid)
        if progress is not None:
            progress(start + len(part), len(records))


def _fill(
    batches: Iterator[tuple[int, ImageFeatures]], first: ImageFeatures, patches: Tensor, extra: Tensor
) -> None:
    """Copies the first batch and all that follow into the rows of the two tables."""
    start, made = 0, first
    while True:
        end = start + len(made.patches)
        patches[start:end], extra[start:end] = made.patches, made.extra
        following = next(batches, None)
        if following is None:
            return
        start, made = following


def _shapes(n: int, first: ImageFeatures) -> dict[str, list[int]]:
    return {name: [n, *getattr(first, name).shape[1:]] for name in ("patches", "extra")}


def _fill_memory(batches: Iterator[tuple[int, ImageFeatures]], n: int, rows: Tensor) -> FeatureTable:
    _, first = next(batches)
    patches, extra = (torch.empty(shape, dtype=first.patches.dtype) for shape in _shapes(n, first).values())
    _fill(batches, first, patches, extra)
    return FeatureTable(patches, extra, first.grid, rows)


def _fill_file(batches: Iterator[tuple[int, ImageFeatures]], n: int, dtype: torch.dtype, file: Path) -> None:
    """Writes the table through a memory map, so it may be larger than memory; renamed when complete."""
    _, first = next(batches)
    shapes = _shapes(n, first)
    head, ends = _file_head(shapes, dtype, first.grid)
    part = file.with_name(f".{file.name}.{os.getpid()}.part")
    try:
        with part.open("w+b") as out:
            out.write(head)
            out.truncate(len(head) + ends[-1])
            _fill_mapped(batches, first, out.fileno(), len(head), ends, shapes, dtype)
            out.seek(0)
            out.write(head.replace(_UNKNOWN.encode(), _checksum(part, len(head)).encode()))
        sync(part)
        part.replace(file)
        sync(file.parent)
    finally:
        part.unlink(missing_ok=True)


def _file_head(
    shapes: dict[str, list[int]], dtype: torch.dtype, grid: tuple[int, int]
) -> tuple[bytes, list[int]]:
    """The first bytes of a safetensors file and where each tensor's data ends."""
    entries: dict[str, Any] = {
        "__metadata__": {"height": str(grid[0]), "width": str(grid[1]), "crc32": _UNKNOWN}
    }
    ends = [0]
    for name, shape in shapes.items():
        ends.append(ends[-1] + math.prod(shape) * dtype.itemsize)
        entries[name] = {"dtype": _NAMES[dtype], "shape": shape, "data_offsets": ends[-2:]}
    text = json.dumps(entries).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text, ends


def _fill_mapped(
    batches: Iterator[tuple[int, ImageFeatures]],
    first: ImageFeatures,
    handle: int,
    start: int,
    ends: Sequence[int],
    shapes: dict[str, list[int]],
    dtype: torch.dtype,
) -> None:
    mapped = mmap.mmap(handle, start + ends[-1])
    tables = []
    for begin, shape in zip(ends, shapes.values(), strict=False):
        count = math.prod(shape)
        # frombuffer refuses a count of 0, which is what an encoder without extra tokens gives.
        flat = torch.empty(0, dtype=dtype)
        if count:
            flat = torch.frombuffer(mapped, dtype=dtype, offset=start + begin, count=count)
        tables.append(flat.view(shape))
    _fill(batches, first, *tables)
    mapped.flush()


def _checksum(file: Path, start: int | None) -> str:
    """CRC-32 of the tensors of a table, from byte `start`, None for where its head ends."""
    found = 0
    with file.open("rb") as opened:
        size = int.from_bytes(opened.read(8), "little")
        opened.seek(8 + size if start is None else start)
        while part := opened.read(1 << 22):
            found = zlib.crc32(part, found)
    return f"{found:08x}"


def _remove_parts(file: Path) -> None:
    for left in file.parent.glob(f".{file.name}.*.part"):
        log.warning("removing %s, left by an interrupted run", left)
        left.unlink(missing_ok=True)


def _load(file: Path, rows: Tensor) -> FeatureTable:
    """The table in a file; safetensors maps it, so only rows in use take memory."""
    try:
        with safe_open(str(file), framework="pt") as opened:
            meta = opened.metadata()
            expected = meta.get("crc32")  # tables of earlier versions have none
            patches, extra = opened.get_tensor("patches"), opened.get_tensor("extra")
    except (SafetensorError, OSError) as error:
        raise ValueError(
            f"the feature cache {file} cannot be read: {error}; delete it to compute it again"
        ) from error
    if expected and _checksum(file, None) != expected:
        raise ValueError(
            f"the feature cache {file} was damaged after it was written: CRC-32 is {_checksum(file, None)}, "
            f"its head says {expected}; delete it to compute it again"
        )
    if len(patches) != int((rows >= 0).sum()):
        raise ValueError(
            f"the feature cache {file} holds {len(patches):,} pictures, not the data's; delete it"
        )
    return FeatureTable(patches, extra, (int(meta["height"]), int(meta["width"])), rows, file)
