"""How runs are stopped: Ctrl-C ends with exit code 130, SIGTERM with 75; the same command goes on later."""

from __future__ import annotations

import ctypes
import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager

STOPPED = 75
"""Exit code of a run that was asked to stop: "try again" (EX_TEMPFAIL of sysexits)."""

INTERRUPTED = 130
"""Exit code after Ctrl-C, as shells have it."""


def stop(signum: int, frame: object) -> None:
    """Ends the process by an exception, so that the run notes it and files are closed."""
    raise SystemExit(STOPPED)


@contextmanager
def stoppable() -> Iterator[None]:
    """SIGTERM raises SystemExit(STOPPED) inside; outside the main thread nothing is changed."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGTERM, stop)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, signal.SIG_DFL if before is None else before)


def end_with_parent() -> None:
    """Asks Linux for a SIGTERM when the process that started this one ends, however it ends."""
    if sys.platform == "linux":
        set_parent_death_signal = 1
        ctypes.CDLL(None).prctl(set_parent_death_signal, int(signal.SIGTERM), 0, 0, 0)
