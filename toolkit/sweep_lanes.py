"""The lanes of a sweep's worker: rows that one process trains at the same time, a thread of it each.

What a row logs or prints goes to its lane's output, what belongs to no row to the first lane's.
"""

from __future__ import annotations

import io
import json
import os
import sys
import threading
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from typing import Any, TextIO

from toolkit import stopping

RunRow = Callable[[Mapping[str, Any], TextIO], bool]
"""Runs a row and tells its events; False if it failed."""


class ByLane(io.TextIOBase):
    """Stands for stdout and stderr: text goes to the output of the lane whose thread writes it."""

    def __init__(self, outputs: Sequence[TextIO]) -> None:
        self._outputs, self._here = outputs, threading.local()

    def enter(self, lane: int) -> None:
        """This thread belongs to a lane from now on."""
        self._here.lane = lane

    @property
    def _mine(self) -> TextIO:
        return self._outputs[getattr(self._here, "lane", 0)]

    def write(self, text: str) -> int:
        return self._mine.write(text)

    def flush(self) -> None:
        self._mine.flush()

    def fileno(self) -> int:
        return self._mine.fileno()


def serve(rows: TextIO, outputs: Sequence[TextIO], events: Sequence[TextIO], run: RunRow) -> int:
    """Runs what arrives, a line a row with its lane, until no more can; the exit code of the process.

    A lane gets a row when it is done with the one before. SIGTERM ends each row with its step; a second one
    ends the process at once.
    """
    shown = ByLane(outputs)
    sys.stdout = sys.stderr = shown
    from toolkit import turns
    from toolkit.run import configure_logging

    configure_logging()
    lanes = [turns.lane() for _ in outputs]
    failed, threads = threading.Event(), []

    def train(row: Mapping[str, Any]) -> None:
        number = row["lane"]
        shown.enter(number)
        # A row that was asked to stop has saved where it is; one that waits for its turn then never begins.
        with turns.taken(lanes[number]), suppress(SystemExit, KeyboardInterrupt):
            if not stopping.asked() and not run(row, events[number]):
                failed.set()

    with stopping.at_step_ends():
        try:
            for line in rows:
                threads.append(threading.Thread(target=train, args=[json.loads(line)]))
                threads[-1].start()
            for thread in threads:
                thread.join()
        except SystemExit:  # a second signal: Python would wait for the threads
            os._exit(stopping.STOPPED)
        if stopping.asked():
            return stopping.STOPPED
    return 1 if failed.is_set() else 0
