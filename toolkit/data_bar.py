"""Progress of a data command: a bar on a terminal, one plain line every few seconds elsewhere."""

from __future__ import annotations

import sys
import time
from types import TracebackType
from typing import Any

INTERVAL = 10.0
"""Seconds between two plain lines."""


class Bar:
    """`convert: 12,800/665,298`, on stderr. Called with (done, in all); use it in a `with` block."""

    def __init__(self, name: str) -> None:
        self.name = name
        self._bar: Any = None
        self._spoke = time.monotonic()

    def __enter__(self) -> Bar:
        if sys.stderr.isatty():
            from rich.console import Console
            from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

            columns = (TextColumn(self.name), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
            self._bar = Progress(*columns, console=Console(stderr=True))
            self._bar.start()
            self._task = self._bar.add_task(self.name, total=None)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._bar is not None:
            self._bar.stop()

    def __call__(self, done: int, total: int) -> None:
        if self._bar is not None:
            self._bar.update(self._task, completed=done, total=total)
        elif time.monotonic() - self._spoke >= INTERVAL:
            self._spoke = time.monotonic()
            print(f"{self.name}: {done:,}/{total:,}", file=sys.stderr, flush=True)
