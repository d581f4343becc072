"""A worker of `toolkit.sweep`: runs the rows that arrive on stdin, one after the other, in one process.

torch is imported once, for the first row. Logs go to stdout and stderr; what the parent has to know
(estimates, results, errors) goes as JSON lines to a pipe of its own.
"""

from __future__ import annotations

import gc
import json
import os
import signal
import sys
import traceback
from collections.abc import Mapping
from typing import Any, TextIO

from toolkit import register
from toolkit.run import configure_logging, told
from toolkit.stopping import end_with_parent, stop


def main(words: list[str]) -> int:
    """words: the file descriptor for events, and how many workers share the terminal."""
    end_with_parent()
    signal.signal(signal.SIGTERM, stop)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    configure_logging()
    with os.fdopen(int(words[0]), "w", encoding="utf-8") as events:
        for line in sys.stdin:
            if not _row(json.loads(line), events, sharing=int(words[1])):
                return 1
    return 0


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
