"""Features of a frozen encoder in place of the pictures: shards that training reads without the encoder.

A record's picture is a member `{key}.safetensors` with `patches` [P, D] and `extra` [E, D], bfloat16. The
manifest says in `about.features` which encoder made them, and in `stands_for` which data they are of: plan
and order of training are those of the pictures.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load, save
from torch.nn.functional import avg_pool2d

from data.batch import stack
from data.features import FeatureTable
from data.images import BadPicture, transformed
from data.index import FEATURE_KIND, manifest_hash, read_manifest
from data.reader import ShardReader
from data.shards import Pictured
from data.sources.convert import converted
from toolkit.contracts import ImageFeatures

if TYPE_CHECKING:
    from PIL.Image import Image
    from torch import Tensor

Progress = Callable[[int, int], None]


def write_features(
    reader: ShardReader,
    out: Path,
    encode: Callable[[Any], ImageFeatures],
    transform: Callable[[Image], Any],
    *,
    facts: Mapping[str, Any],
    batch: int = 64,
    shard_bytes: int = 256 << 20,
    draft: int = 0,
    progress: Progress | None = None,
) -> Path:
    """Writes a folder of shards with the features of `reader`'s pictures; returns it.

    encode: stacked pixels -> features (pooled already if they are to be stored pooled), called without
    gradients. facts: what `about.features` says of them. draft: see data.images.decode. A folder
    that is there already is kept. Raises DamagedSample and BadPicture for pictures that cannot be read, and
    ValueError for features in place of pictures and for a folder that holds something else.
    """
    if features_of(reader) is not None:
        raise ValueError(f"{reader.folder} holds features already; name the folder they were made from")
    about = {"source": "features", "features": dict(facts)}

    def records() -> Iterator[Pictured]:
        for start in range(0, len(reader), batch):
            numbers = range(start, min(start + batch, len(reader)))
            yield from _encoded(reader, numbers, encode, transform, draft)
            if progress is not None:
                progress(numbers[-1] + 1, len(reader))

    made = converted(
        out,
        records,
        about,
        shard_bytes=shard_bytes,
        kind_of=lambda data: FEATURE_KIND,
        stands_for=reader.manifest_hash,
    )
    found = read_manifest(made)
    if found["about"] != json.loads(json.dumps(about)) or manifest_hash(found) != reader.manifest_hash:
        raise ValueError(
            f"{out} holds something else, such as features of other pictures or another encoder; delete it "
            "or name another --out"
        )
    return made


def _encoded(
    reader: ShardReader,
    numbers: Sequence[int],
    encode: Callable[[Any], ImageFeatures],
    transform: Callable[[Image], Any],
    draft: int,
) -> Iterator[Pictured]:
    """These records with features in place of their pictures."""
    pixels = [
        transformed(transform, data, reader.key(i), draft=draft)
        for i in numbers
        for _, data in reader.images(i)
    ]
    made: Iterator[bytes] = iter(())
    if pixels:
        with torch.no_grad():
            features = encode(stack(pixels))
        made = map(_packed, features.patches.cpu(), features.extra.cpu())
    for i in numbers:
        held = [next(made) for _ in range(reader.n_images(i))]
        yield reader.record(i), held[0] if len(held) == 1 else held or None


def _packed(patches: Tensor, extra: Tensor) -> bytes:
    parts = {"patches": patches, "extra": extra}
    return save({name: part.to(torch.bfloat16).contiguous() for name, part in parts.items()})


def pooled(features: ImageFeatures, grid: tuple[int, int]) -> ImageFeatures:
    """Patches averaged to `grid`, whose sides divide the features' own; (0, 0) keeps only the extra vectors.

    As every projector does before it projects (components.projectors.pool).
    """
    if grid == features.grid or grid == (0, 0):
        return ImageFeatures(
            features.patches[:, : features.patches.shape[1] if grid[0] else 0], features.extra, grid
        )
    kernel = (features.grid[0] // grid[0], features.grid[1] // grid[1])
    maps = features.patches.transpose(1, 2).unflatten(2, features.grid)  # [B, D, height, width]
    return ImageFeatures(avg_pool2d(maps, kernel).flatten(2).transpose(1, 2), features.extra, grid)


def features_of(reader: ShardReader) -> Mapping[str, Any] | None:
    """What a folder says of the features it holds; None for a folder of pictures."""
    found = reader.manifest["about"].get("features")
    return found if isinstance(found, Mapping) else None


def stored_features(reader: ShardReader, *, keep_bytes: int) -> FeatureTable:
    """The table of a folder of features: in memory up to `keep_bytes`, else read as batches ask for it."""
    table = FeatureShards(reader)
    return table.loaded() if table.n_bytes <= keep_bytes else table


class FeatureShards(FeatureTable):
    """Reads the features of a batch from the shards; `patches` and `extra` are only shapes (device meta)."""

    streamed = True

    def __init__(self, reader: ShardReader) -> None:
        facts = features_of(reader)
        if facts is None:
            raise ValueError(f"{reader.folder} holds no features")
        self.reader = reader
        self._ahead: dict[int, ImageFeatures] = {}
        height, width = (int(side) for side in facts["grid"])
        rows = torch.tensor([reader.has_image(i) for i in range(len(reader))])
        n = int(rows.sum())
        rows = torch.where(rows, rows.cumsum(0) - 1, -1)
        shapes = [(n, height * width, int(facts["width"])), (n, int(facts["n_extra"]), int(facts["width"]))]
        patches, extra = (torch.empty(shape, dtype=torch.bfloat16, device="meta") for shape in shapes)
        super().__init__(patches, extra, (height, width), rows)
        self.n_bytes = 2 * sum(math.prod(shape) for shape in shapes)

    def fetch(self, record: int) -> None:
        """Reads a record's features for the next `gather`. Raises DamagedSample or BadPicture."""
        self._ahead[record] = self._read(record)

    def gather(self, records: Sequence[int]) -> ImageFeatures:
        """Features of these records, [B, P, D] and [B, E, D]; ValueError for one without a picture."""
        made = [self._ahead.get(i) or self._read(i) for i in records]
        self._ahead.clear()
        patches, extra = (torch.stack([getattr(one, name) for one in made]) for name in ("patches", "extra"))
        return ImageFeatures(patches, extra, self.grid)

    def _read(self, record: int) -> ImageFeatures:
        data = self.reader.image_bytes(record)
        if data is None:
            raise ValueError(f"record {record} has no picture, so no features")
        try:
            found = load(data)
            patches, extra = found["patches"], found["extra"]
        except (SafetensorError, KeyError) as error:
            raise BadPicture(f"{self.reader.key(record)}: no features of this toolkit: {error}") from error
        if patches.shape != self.patches.shape[1:] or extra.shape != self.extra.shape[1:]:
            raise BadPicture(
                f"{self.reader.key(record)}: features of shape {list(patches.shape)} and "
                f"{list(extra.shape)}, the manifest says {list(self.patches.shape[1:])} and "
                f"{list(self.extra.shape[1:])}"
            )
        return ImageFeatures(patches, extra, self.grid)

    def loaded(self) -> FeatureTable:
        """All of it as a table in memory."""
        patches = torch.empty(self.patches.shape, dtype=torch.bfloat16)
        extra = torch.empty(self.extra.shape, dtype=torch.bfloat16)
        for record, row in enumerate(self.rows.tolist()):
            if row >= 0:
                one = self._read(record)
                patches[row], extra[row] = one.patches, one.extra
        return FeatureTable(patches, extra, self.grid, self.rows)

    def __reduce__(self) -> tuple[Any, ...]:
        return FeatureShards, (self.reader,)
