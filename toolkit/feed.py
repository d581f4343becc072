"""What a stage trains on and in which order: one split or several in shares, shuffled, sorted by length."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from data.batch import collate
from data.dataset import Examples
from data.joined import Joined
from data.loader import per_step, train_loader
from data.mixture import Mixture, Source
from data.packing import Bucketed
from data.plan import Ints, Plan, Resumable, Steps
from data.policy import Counted, Guarded, reported
from toolkit.contracts import Batch
from toolkit.corpus import Corpus, shares
from toolkit.left_out import over_ranks, part
from toolkit.model import VisualRWKV
from toolkit.schema import RunConf
from toolkit.scoring import examples

_BYTES_PER_TOKEN = 4

PLANNED = {
    "mode": "plan",
    "exactly_once": "yes: each sample once an epoch, the tail filled at weight 0",
    "order": "depends on data and seed alone",
    "resume": "goes on with the very next sample",
    "integrity": "a checksum of every member",
    "steps": "equal on all ranks",
}
"""What a run that reads by plan says of its data, in the words of its result file."""


class Feed(Protocol):
    """What a stage trains on, however it is read."""

    @property
    def plan(self) -> Resumable:
        """The order of the samples; its state is the number of the next step."""

    @property
    def apart(self) -> Any:
        """The data once more, for what is tried before training; None where there is no other."""

    @property
    def features(self) -> Any:
        """The table of a frozen encoder's features, None if pictures are encoded in each step."""

    @property
    def eager(self) -> str:
        """Why its steps cannot be a CUDA graph, "" if they can."""

    @property
    def mode(self) -> dict[str, str]:
        """What this way of reading promises, for the result file."""

    @property
    def left_out(self) -> int:
        """Overlong samples served with weight 0 so far."""

    @property
    def report(self) -> Path:
        """The file that lists samples left out."""

    @property
    def reported(self) -> int:
        """Samples in that file."""

    def loader(
        self,
        *,
        start_step: int,
        end_step: int,
        rank: int = 0,
        world: int = 1,
        micro: int = 0,
        workers: int = 0,
        pin_memory: bool = False,
    ) -> Iterable[Batch]:
        """Micro batches of steps start_step to end_step - 1 for one rank, equally many on every rank."""

    def per_step(self, *, world: int = 1, micro: int = 0) -> int:
        """Micro batches of a rank and step."""

    def first(self, samples: int) -> Batch:
        """A batch of so many samples, about those of the first step, that leaves no trace in training."""


@dataclass(frozen=True)
class Planned:
    """Samples in an order that a plan gives. apart: the same data once more, for what is tried before."""

    plan: Any
    dataset: Guarded
    apart: Guarded

    @property
    def features(self) -> Any:
        return self.apart.features

    @property
    def report(self) -> Path:
        return self.dataset.report

    @property
    def eager(self) -> str:
        return ""

    def loader(
        self,
        *,
        start_step: int,
        end_step: int,
        rank: int = 0,
        world: int = 1,
        micro: int = 0,
        workers: int = 0,
        pin_memory: bool = False,
    ) -> Counted:
        made = train_loader(
            self.dataset,
            self.plan,
            start_step=start_step,
            end_step=end_step,
            rank=rank,
            world=world,
            micro=micro,
            workers=workers,
            pin_memory=pin_memory,
        )
        return Counted(made, self.plan, first_step=start_step, report=self.report, summed=over_ranks)

    def per_step(self, *, world: int = 1, micro: int = 0) -> int:
        return per_step(self.plan, world=world, micro=micro)

    def first(self, samples: int) -> Batch:
        items, _ = self.plan.step(0)
        read = self.apart.__getitems__([(int(j), 1.0) for j in items[:samples]])
        return collate(read, features=self.apart.features)

    @property
    def left_out(self) -> int:
        return self.dataset.left_out

    @property
    def reported(self) -> int:
        return len(reported(self.report))

    @property
    def mode(self) -> dict[str, str]:
        return PLANNED


def feed(conf: RunConf, corpus: Corpus, name: str, model: VisualRWKV, features: Any, folder: Path) -> Feed:
    """What a stage trains on. folder: for the report. Raises ValueError naming the key for what cannot be."""
    read = splits(conf, name)
    strict = any(corpus.policy(split) == "strict" for split in read)
    report = part(folder / f"left_out-{'+'.join(read)}.jsonl")

    def guarded() -> Guarded:
        made: Any = samples(conf, corpus, name, model, features)
        return Guarded(made, policy="strict" if strict else "tolerant", report=report)

    return Planned(order(conf, corpus, name, n_image=model.n_image), guarded(), guarded())


def samples(
    conf: RunConf, corpus: Corpus, name: str, model: VisualRWKV, features: dict[str, Any]
) -> Examples | Joined:
    """The samples of a stage; those of several splits one after the other, if it mixes them."""
    stage, prompt = conf.stages[name], corpus.prompts[name]
    parts = {
        split: examples(conf, corpus, split, model, features, prompt=prompt, answer=True)
        for split in splits(conf, name)
    }
    return Joined(parts) if stage.mix else parts[stage.split]


def splits(conf: RunConf, name: str) -> list[str]:
    """The splits that a stage trains on."""
    return list(shares(name, conf.stages[name])) or [conf.stages[name].split]


def order(conf: RunConf, corpus: Corpus, name: str, *, n_image: int) -> Steps:
    """The order in which a stage takes its samples. Raises ValueError naming the key for what cannot be."""
    stage = conf.stages[name]
    shuffle = {"block": stage.block, "window": stage.window}
    plan: Steps
    if stage.mix:
        try:
            sources = tuple(_sources(corpus, shares(name, stage)))
            plan = Mixture(sources, stage.global_batch, conf.seed, **shuffle)
        except ValueError as error:
            raise ValueError(f"stages.{name}.mix: {error}") from error
    else:
        reader = corpus.readers[stage.split]
        n = len(reader.examples.record)
        plan = Plan(n, stage.global_batch, conf.seed, reader.manifest_hash, **shuffle)
    if not stage.bucket:
        return plan
    lengths = [_lengths(corpus, split, n_image) for split in splits(conf, name)]
    return Bucketed(plan, np.concatenate(lengths), stage.bucket, conf.seed)


def _sources(corpus: Corpus, mix: dict[str, float]) -> list[Source]:
    return [
        Source(split, len(corpus.readers[split].examples.record), corpus.readers[split].manifest_hash, share)
        for split, share in mix.items()
    ]


def _lengths(corpus: Corpus, split: str, n_image: int) -> Ints:
    """About how many tokens every example has, from the index alone."""
    reader = corpus.readers[split]
    pictured = np.array([reader.has_image(i) for i in range(len(reader))])
    return reader.text_sizes // _BYTES_PER_TOKEN + n_image * pictured[reader.examples.record]
