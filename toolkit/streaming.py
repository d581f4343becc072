"""A stage that trains on a stream: tars without an index, as they come."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any

from data.policy import reported
from data.stream import Limited, micro_batches, stream_loader
from data.streamed import GUARANTEES, Endless, Streamed
from toolkit.contracts import Batch


@dataclass(frozen=True)
class Streaming:
    """A stage's samples as a stream gives them; see `toolkit.feed.Feed`.

    options: what `data.dataset.Examples` takes beside the reader. policy: for samples that cannot be read.
    """

    source: Streamed
    options: Mapping[str, Any]
    global_batch: int
    policy: str
    report: Path
    loaders: list[Limited] = field(default_factory=list)

    apart = None
    key = None
    features = None
    per_epoch = None
    eager = "samples are streamed"

    @cached_property
    def plan(self) -> Endless:
        return Endless(self.source, self.global_batch)

    @property
    def mode(self) -> dict[str, str]:
        return GUARANTEES

    @property
    def left_out(self) -> int:
        return sum(loader.left_out for loader in self.loaders)

    @property
    def reported(self) -> int:
        return len(reported(self.report))

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
    ) -> Limited:
        made = stream_loader(
            self.source,
            self.options,
            start_step=start_step,
            end_step=end_step,
            global_batch=self.global_batch,
            rank=rank,
            world=world,
            micro=micro,
            workers=workers,
            policy=self.policy,
            report=self.report,
            pin_memory=pin_memory,
        )
        self.loaders.append(made)
        return made

    def per_step(self, *, world: int = 1, micro: int = 0) -> int:
        return micro_batches(self.global_batch, world, micro)[1]

    def first(self, samples: int) -> Batch:
        # The buffer of a shuffle would be filled for each batch that is tried.
        source = replace(self.source, shuffle=0)
        return next(
            iter(
                stream_loader(
                    source,
                    self.options,
                    start_step=0,
                    end_step=1,
                    global_batch=samples,
                    policy=self.policy,
                )
            )
        )
