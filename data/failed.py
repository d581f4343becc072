"""Errors of loader workers, which reach the process that trains as they were raised."""

from __future__ import annotations

import copy
import traceback
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from multiprocessing.reduction import ForkingPickler
from typing import Any

from torch.utils.data import Dataset, get_worker_info


@dataclass(frozen=True)
class Failed:
    """What a worker sends in place of a batch. torch itself would make a RuntimeError of most errors."""

    error: ValueError
    trace: str

    def reraise(self) -> None:
        self.error.add_note(f"in a loader worker:\n{self.trace}")
        raise self.error


def passed(make: Callable[[], Any]) -> Any:
    """What `make` returns, or `Failed` for what it raises in a worker: mistakes of data or settings alone."""
    try:
        return make()
    except ValueError as error:
        # An error that cannot travel would never arrive: its batch would be waited for, or passed over.
        if get_worker_info() is None or not _travels(error):
            raise
        return Failed(error, traceback.format_exc())


def raised(batches: Iterable[Any]) -> Iterator[Any]:
    """The batches, up to the first error."""
    for batch in batches:
        if isinstance(batch, Failed):
            batch.reraise()
        yield batch


class Fallible(Dataset[Any]):
    """A data set that gives `Failed` where it cannot give the samples of a batch."""

    def __init__(self, examples: Any) -> None:
        self.examples = examples

    def __len__(self) -> int:
        return len(self.examples)

    def __getitems__(self, items: Any) -> Any:
        many = getattr(self.examples, "__getitems__", None)
        return passed(lambda: many(items) if many else [self.examples[item] for item in items])


def _travels(error: ValueError) -> bool:
    try:
        ForkingPickler.dumps(error)  # as the queue does, in a thread that tells nobody
        return type(copy.copy(error)) is type(error)  # rebuilt as on arrival
    except Exception:  # whatever an error's own class does when it is rebuilt
        return False
