"""What happens when training meets a sample that cannot be read, and the count that shows nothing got lost.

`strict` stops with one message. `tolerant` gives the sample's slot weight 0, so that every rank still takes
the same steps, and writes one row to a report. Either way each epoch ends with the check that every sample
the plan asked for was trained or reported.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch.utils.data import DataLoader, Dataset

from data.atomic import locked
from data.dataset import Examples, Sample, Slot
from data.images import BadPicture
from data.packing import Packed
from data.plan import Steps
from data.reader import AGAIN, DamagedSample, ShardReader
from data.records import BadRecord, Example, dump_json
from toolkit.contracts import IGNORE, NO_IMAGE, PAD_ID, Batch

log = logging.getLogger("toolkit.data")

POLICIES = ("strict", "tolerant")

OVERLONG = "longer than model.ctx_len, with no answer in what was kept"
"""Cause of a sample that is left out because a cut leaves nothing of it to learn."""


class Guarded(Dataset[Sample]):
    """Examples under a policy. report: JSON lines, one for each sample that was left out, in any epoch.

    Faults of the data are DamagedSample, BadRecord and BadPicture; whatever else is raised is a mistake of
    a setting or of the program and stops under both policies. `strict` raises DamagedSample.
    """

    def __init__(self, examples: Examples, *, policy: str, report: Path) -> None:
        if policy not in POLICIES:
            raise ValueError(f"the policy for damaged samples is {policy!r}; use strict or tolerant")
        self.examples, self.tolerant, self.report = examples, policy == "tolerant", report
        self.features, self.reader = examples.features, examples.reader
        self._noted: set[int] = set()  # rows of the report up to byte _read_to
        self._read_to = 0

    def __len__(self) -> int:
        return len(self.examples)

    @property
    def left_out(self) -> int:
        """As `Examples.left_out`: overlong samples served with weight 0."""
        return self.examples.left_out

    def __getitems__(self, items: Sequence[Slot]) -> list[Sample]:
        self.prefetch(j for j, _ in items)
        return [self[item] for item in items]

    def prefetch(self, items: Iterable[int]) -> None:
        """As `Examples.prefetch`."""
        self.examples.prefetch(items)

    def __getitem__(self, item: int | tuple[int, float]) -> Sample:
        j, weight = item if isinstance(item, tuple) else (item, 1.0)
        try:
            sample = self.examples[item]
            if self.features is not None and sample.image_start != NO_IMAGE:
                self.features.fetch(sample.record)
        except (DamagedSample, BadRecord, BadPicture) as error:
            damaged = self._placed(j, error)
            if not self.tolerant:
                raise damaged from error
            self._note(j, damaged)
            return self._stand_in(j)
        if weight > 0 and sample.weight == 0:
            self._note(j, self._placed(j, BadRecord(OVERLONG), fix="give model.ctx_len more to learn it"))
        return sample

    def _placed(self, j: int, error: ValueError, *, fix: str = AGAIN) -> DamagedSample:
        """The error with shard, key, member and byte offset."""
        if isinstance(error, DamagedSample):
            return error
        reader, i = self.reader, int(self.reader.examples.record[j])
        shard, span = reader.place(i, image=isinstance(error, BadPicture))
        key = reader.key(i)
        cause = str(error).removeprefix(f"{shard}: key {key}: ").removeprefix(f"{key}: ")
        return DamagedSample(
            shard=shard, key=key, member=f"{key}.{span.kind}", offset=span.offset, cause=cause, fix=fix
        )

    def _stand_in(self, j: int) -> Sample:
        """One position of padding without a label, for the slot of a sample that cannot be read."""
        record = int(self.reader.examples.record[j])
        ids, labels = torch.tensor([PAD_ID]), torch.tensor([IGNORE])
        return Sample(ids, labels, NO_IMAGE, self.reader.key(record), record, 0.0)

    def _note(self, j: int, fault: DamagedSample) -> None:
        """Adds the sample's row, unless this or another process has done so."""
        if j in self._noted:
            return
        row: dict[str, Any] = {"example": j, "shard": fault.shard, "key": fault.key}
        row |= {
            "field": fault.member.removeprefix(f"{fault.key}."),
            "offset": fault.offset,
            "cause": fault.cause,
        }
        with (
            locked(lock_of(self.report), "adding to the report"),
            self.report.open("a+b") as file,
        ):
            file.seek(self._read_to)
            self._noted |= {int(json.loads(line)["example"]) for line in file}
            if j not in self._noted:
                file.write(dump_json(row) + b"\n")
                log.warning("left out: %s", fault)
            self._read_to = file.tell()
        self._noted.add(j)


def lock_of(report: Path) -> Path:
    """The file that keeps loader workers from adding to a report at the same time."""
    return report.with_name(f".{report.name}.lock")


def readable(reader: ShardReader, *, policy: str) -> Iterator[Example]:
    """Every example in order; under `tolerant` those whose text cannot be read are passed over."""
    if policy != "tolerant":
        yield from reader.all_examples()
        return
    for j in range(len(reader.examples.record)):
        try:
            example = reader.example(j)
        except (DamagedSample, BadRecord):
            continue
        yield example


def reported(report: Path) -> dict[int | str, dict[str, Any]]:
    """Rows of a report by number of the example, by shard and key if it was streamed; none without a file."""
    if not report.exists():
        return {}
    rows = (json.loads(line) for line in report.read_text(encoding="utf-8").splitlines() if line.strip())
    return {row.get("example", f"{row['shard']}: {row.get('key', '')}"): row for row in rows}


class Counted:
    """A training loader that checks, at the end of each epoch, that nothing was lost without a word.

    loader: of `data.loader.train_loader` for one rank, over `Guarded` examples, from step `first_step`.
    summed: (trained, reported) of one rank -> of all of them; every rank calls it after the same step.
    Raises RuntimeError if a planned sample came with weight 0 and has no row in the report.
    """

    def __init__(
        self,
        loader: DataLoader[Batch],
        plan: Steps | Packed,
        *,
        first_step: int,
        report: Path,
        summed: Callable[[int, int], tuple[int, int]] = lambda trained, reported: (trained, reported),
    ) -> None:
        self._loader, self._plan, self._first, self._report = loader, plan, first_step, report
        self._summed = summed

    def __len__(self) -> int:
        return len(self._loader)

    def __iter__(self) -> Iterator[Batch]:
        sampler: Any = self._loader.batch_sampler
        trained, missing = 0, set[int]()
        begun = self._first % self._plan.steps_per_epoch  # steps of the epoch before this loader
        for number, (slots, batch) in enumerate(zip(sampler, self._loader, strict=True), 1):
            for (item, planned), weight in zip(slots, batch.weight.tolist(), strict=True):
                trained += planned > 0 and weight > 0
                if planned > 0 and not weight > 0:
                    missing.add(item)
            step, within = divmod(number, sampler.per_step)
            if not within and (self._first + step) % self._plan.steps_per_epoch == 0:
                self._check((self._first + step) // self._plan.steps_per_epoch, trained, missing, begun)
                trained, missing, begun = 0, set(), 0
            # After the check: who knows the length never asks for more than the last batch.
            yield batch

    def _check(self, epoch: int, trained: int, missing: set[int], begun: int) -> None:
        lost = sorted(missing - set(reported(self._report)))
        if lost:
            raise RuntimeError(
                f"epoch {epoch}: {len(lost)} samples were neither trained nor reported, first example "
                f"{lost[0]}: this is a bug in the data loading"
            )
        trained, left_out = self._summed(trained, len(missing))
        if left_out:
            words = "epoch %d%s: %s samples planned = %s trained + %s reported in %s"
            since = f" after its first {begun:,} steps" if begun else ""
            total = trained + left_out
            log.warning(words, epoch, since, f"{total:,}", f"{trained:,}", f"{left_out:,}", self._report)
