"""Several data sets as one, for a mixture: item numbers count through all of them."""

from __future__ import annotations

from bisect import bisect_right
from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import replace
from functools import cached_property
from itertools import accumulate
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch.utils.data import Dataset

from data.dataset import Sample, Slot
from data.index import Span
from data.reader import ExampleTable, ShardReader
from toolkit.contracts import ImageFeatures

if TYPE_CHECKING:
    from data.features import FeatureTable


class Joined(Dataset[Sample]):
    """Named data sets one after the other; keys are `name/key`, as two sources may use the same.

    Either all of them have a feature cache or none: a batch holds pixels or features, not both.
    """

    def __init__(self, parts: dict[str, Any]) -> None:
        cached = [name for name, part in parts.items() if part.features is not None]
        if cached and len(cached) < len(parts):
            without = next(name for name in parts if name not in cached)
            raise ValueError(
                f"{cached[0]} has cached features and {without} has none; write features.cache=off"
            )
        self.names, self.parts = list(parts), list(parts.values())
        self._ends = list(accumulate(len(part) for part in self.parts))
        self._rows = list(accumulate((len(part.reader) for part in self.parts), initial=0))
        self.reader = JoinedReader([part.reader for part in self.parts], self._rows)
        self.features: Any = JoinedFeatures([p.features for p in self.parts], self._rows) if cached else None

    def __len__(self) -> int:
        return self._ends[-1]

    @property
    def left_out(self) -> int:
        """Overlong samples served with weight 0 so far."""
        return sum(part.left_out for part in self.parts)

    def _place(self, j: int) -> tuple[int, int]:
        """(part, number in the part) of example j."""
        k = bisect_right(self._ends, j)
        return k, j - (self._ends[k - 1] if k else 0)

    def __getitem__(self, item: Slot) -> Sample:
        k, j = self._place(item[0])
        sample: Sample = self.parts[k][(j, item[1])]
        return replace(sample, key=f"{self.names[k]}/{sample.key}", record=self._rows[k] + sample.record)

    def __getitems__(self, items: Sequence[Slot]) -> list[Sample]:
        self.prefetch(j for j, _ in items)
        return [self[item] for item in items]

    def prefetch(self, items: Iterable[int]) -> None:
        """Brings examples nearer that are about to be read, if they are behind a URL."""
        wanted: defaultdict[int, list[int]] = defaultdict(list)
        for k, j in map(self._place, items):
            wanted[k].append(j)
        for k, numbers in wanted.items():
            self.parts[k].prefetch(numbers)


class JoinedReader:
    """Readers one after the other, as far as it takes to say where a sample lies."""

    def __init__(self, readers: Sequence[ShardReader], starts: Sequence[int]) -> None:
        self._readers, self._starts = readers, starts

    @cached_property
    def examples(self) -> ExampleTable:
        """Every dialog of every record of all readers."""
        tables = [reader.examples for reader in self._readers]
        record = np.concatenate([t.record + np.int32(s) for t, s in zip(tables, self._starts, strict=False)])
        return ExampleTable(record, np.concatenate([table.dialog for table in tables]))

    def _of(self, i: int) -> tuple[ShardReader, int]:
        k = bisect_right(self._starts, i) - 1
        return self._readers[k], i - self._starts[k]

    def key(self, i: int) -> str:
        reader, row = self._of(i)
        return reader.key(row)

    def place(self, i: int, *, image: bool) -> tuple[str, Span]:
        """As `ShardReader.place`, the shard with its folder."""
        reader, row = self._of(i)
        shard, span = reader.place(row, image=image)
        return f"{reader.folder}/{shard}", span


class JoinedFeatures:
    """Feature tables one after the other; starts: the first record number of each, as `Joined` counts."""

    def __init__(self, tables: Sequence[FeatureTable], starts: Sequence[int]) -> None:
        grids = {table.grid for table in tables}
        if len(grids) > 1:
            raise ValueError(
                f"the feature caches have different grids: {sorted(grids)}; make those of "
                "features with python -m toolkit.data features --whole, or make features of all of them"
            )
        self._tables, self._starts = tables, starts
        self.streamed = True  # gathered from several tables in each step

    def fetch(self, record: int) -> None:
        """As `FeatureTable.fetch`."""
        k = bisect_right(self._starts, record) - 1
        self._tables[k].fetch(record - self._starts[k])

    def gather(self, records: Sequence[int]) -> ImageFeatures:
        """Features of these records, [B, P, D] and [B, E, D], in their order."""
        of: defaultdict[int, list[int]] = defaultdict(list)
        for place, record in enumerate(records):
            of[bisect_right(self._starts, record) - 1].append(place)
        made = [self._tables[k].gather([records[p] - self._starts[k] for p in of[k]]) for k in of]
        back = torch.argsort(torch.tensor([p for places in of.values() for p in places]))
        patches, extra = (torch.cat([getattr(m, name) for m in made])[back] for name in ("patches", "extra"))
        return ImageFeatures(patches, extra, made[0].grid)
