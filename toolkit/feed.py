"""What a stage trains on: samples by a plan, or a stream."""

from __future__ import annotations

from collections.abc import Hashable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from data.batch import collate
from data.dataset import Examples
from data.joined import Joined
from data.loader import per_step, train_loader
from data.packing import Packed
from data.plan import Resumable
from data.policy import Counted, Guarded, reported
from toolkit import kept
from toolkit.contracts import Batch
from toolkit.corpus import Corpus
from toolkit.left_out import over_ranks, part
from toolkit.model import VisualRWKV
from toolkit.plans import order, per_rank, splits
from toolkit.schema import RunConf, StageConf
from toolkit.scoring import examples, options
from toolkit.streaming import Streaming

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
    def key(self) -> Hashable | None:
        """Names the texts of `apart` among all that this process reads; None if nothing can."""

    @property
    def features(self) -> Any:
        """The table of a frozen encoder's features, None if pictures are encoded in each step."""

    @property
    def per_epoch(self) -> int | None:
        """Steps of an epoch, None if nobody knows."""

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
    key: Hashable
    name: str
    stage: StageConf

    @property
    def features(self) -> Any:
        return self.apart.features

    @property
    def report(self) -> Path:
        return self.dataset.report

    @property
    def per_epoch(self) -> int:
        found: int = self.plan.steps_per_epoch
        return found

    @property
    def eager(self) -> str:
        return "micro batches within a token budget differ in shape" if isinstance(self.plan, Packed) else ""

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
        if isinstance(self.plan, Packed) and not micro:
            return per_rank(self.plan, self.stage, name=self.name, world=world)
        return per_step(self.plan, world=world, micro=micro)

    def first(self, samples: int) -> Batch:
        items = self.plan.items(0)
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
    policy, stage = "strict" if strict else "tolerant", conf.stages[name]
    if stage.split in corpus.streams:
        asked = options(conf, corpus, model, prompt=corpus.prompts[name], answer=True)
        return Streaming(corpus.streams[stage.split], asked, stage.global_batch, policy, report)

    def guarded() -> Guarded:
        made: Any = samples(conf, corpus, name, model, features)
        return Guarded(made, policy=policy, report=report)

    plan = order(conf, corpus, name, n_image=model.n_image)
    return Planned(plan, guarded(), guarded(), _key(conf, corpus, name, model.n_image), name, stage)


def _key(conf: RunConf, corpus: Corpus, name: str, n_image: int) -> Hashable:
    """All that the texts of a stage depend on."""
    read = tuple(corpus.identity(split) for split in splits(conf, name))
    prompt = kept.named(corpus.prompts[name])
    return ("samples", read, prompt, corpus.tokenizer, n_image, conf.model.ctx_len, conf.model.overlong)


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
