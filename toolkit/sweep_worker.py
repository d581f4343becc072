"""A worker of `toolkit.sweep`: runs the rows that arrive on stdin, one after the other or in lanes.

torch is imported once, for the first row. Logs go to stdout and stderr, of further lanes to pipes; what the
parent has to know (estimates, results, errors) goes as JSON lines to a pipe for each lane.
"""

from __future__ import annotations

import gc
import json
import os
import signal
import sys
import traceback
from collections.abc import Mapping
from functools import partial
from typing import Any, TextIO

from toolkit import register, sweep_lanes
from toolkit.run import configure_logging, told
from toolkit.stopping import end_with_parent, stop


def main(words: list[str]) -> int:
    """words: file descriptors for the events of each lane and of the outputs of the lanes but the first, with
    commas between; in the middle, how many rows of the sweep share the machine."""
    events, sharing, outputs = words[0].split(","), int(words[1]), words[2:3]
    end_with_parent()
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    run = partial(_row, sharing=sharing)
    if outputs:
        logs = [sys.stdout, *map(_opened, outputs[0].split(","))]
        return sweep_lanes.serve(sys.stdin, logs, [_opened(number) for number in events], run)
    signal.signal(signal.SIGTERM, stop)
    configure_logging()
    with _opened(events[0]) as told_to:
        for line in sys.stdin:
            if not run(json.loads(line), told_to):
                return 1
    return 0


def _opened(descriptor: str) -> TextIO:
    return os.fdopen(int(descriptor), "w", encoding="utf-8")


def _row(row: Mapping[str, Any], events: TextIO, *, sharing: int) -> bool:
    """Runs one row and tells how it went; a process in which one failed is not used again."""

    def tell(event: str, **facts: Any) -> None:
        sys.stdout.flush()
        sys.stderr.flush()
        events.write(json.dumps({"event": event, **facts}) + "\n")
        events.flush()

    try:
        register.discover(row["cfg"]["plugins"])
        check_known(row["cfg"])
        from toolkit import progress
        from toolkit.job import run_job

        progress.INTERVAL = 10.0 * sharing
        result = run_job(
            row["cfg"],
            recipe=row["recipe"],
            argv=row["argv"],
            on_estimate=lambda seconds: tell("estimate", seconds=seconds),
        )
    except Exception as error:
        traceback.print_exc()
        tell("failed", error=told(error))
        return False
    gc.collect()
    tell("done", accuracy=result["accuracy"], seconds=result["seconds"])
    return True


def check_known(cfg: Mapping[str, Any]) -> None:
    """Refuses components that only the parent process knows."""
    for kind in register.KINDS:
        name = cfg[kind]["name"]
        if name not in register.components(kind):
            raise ValueError(
                f"{kind}={name} is registered by the program that started the sweep, which a worker does not "
                "run; name its module in plugins=[...], or write hardware.parallel=1"
            )


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
