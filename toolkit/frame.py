"""What stands around a run: who holds its directory, what is noted of it, how it is told."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import torch

from data.cluster import Place
from toolkit import ranks
from toolkit.ranks import RankFailed
from toolkit.rundir import RunDir
from toolkit.schema import RunConf


@contextmanager
def held(conf: RunConf, run: RunDir) -> Iterator[Place]:
    """Every process of the run inside, the run's directory locked by rank 0."""
    cuda = conf.hardware.device != "cpu" and torch.cuda.is_available()
    with (
        ranks.joined(cuda=cuda, last_words=lambda text: run.note("failed", error=text)) as place,
        run.lock() if ranks.main() else nullcontext(),
    ):
        yield place


@contextmanager
def noted(run: RunDir, **facts: Any) -> Iterator[None]:
    """Notes in status.json that the block runs and how it ended, whichever rank ended it."""
    note = run.note if ranks.main() else lambda state, **facts: None
    note("running", **facts)
    try:
        yield
    except BaseException as raised:
        error = ranks.cause(raised)
        code = error.code if isinstance(error, RankFailed) else 1
        if isinstance(error, (KeyboardInterrupt, SystemExit)) or code != 1:
            note("stopped")
        elif isinstance(error, RankFailed):
            note("failed", error=str(error))
        else:
            note("failed", error=f"{type(error).__name__}: {error}")
        if error is raised:
            raise
        raise error from raised
    note("done")


class Timer:
    """Notes the seconds that a block took under a name."""

    def __init__(self, facts: dict[str, Any], name: str) -> None:
        self.facts, self.name = facts, name

    def __enter__(self) -> None:
        self.began = time.monotonic()

    def __exit__(self, *error: object) -> None:
        self.facts[self.name] = round(time.monotonic() - self.began, 1)


def share(value: float | None) -> str:
    """A share in percent; what nobody knows is called so."""
    return "unknown" if value is None else f"{100 * value:.2f} %"


def closing_line(path: Path, result: Mapping[str, Any]) -> str:
    """What a run says when it ends."""
    percent = {k: share(result[k]) for k in ("accuracy", "majority", "blind")}
    return (
        f"accuracy {percent['accuracy']} on {result['n']:,} questions (majority {percent['majority']}, "
        f"question only {percent['blind']}) in {result['seconds']:.0f} s: {path}"
    )
