"""How runs are stopped: Ctrl-C ends with exit code 130, SIGTERM and SIGUSR1 with 75.

Training ends with its next step, once its state is saved (`at_step_ends`); all else ends at once. The same
command goes on.
"""

from __future__ import annotations

import ctypes
import logging
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager

log = logging.getLogger("toolkit.run")

STOPPED = 75
"""Exit code of a run that was asked to stop: "try again" (EX_TEMPFAIL of sysexits)."""

INTERRUPTED = 130
"""Exit code after Ctrl-C, as shells have it."""

_ASK = tuple(getattr(signal, name) for name in ("SIGTERM", "SIGUSR1") if hasattr(signal, name))

_asked: list[int] = []
"""The signals that came while training, in their order."""


def stop(signum: int, frame: object) -> None:
    """Ends the process by an exception, so that the run notes it and files are closed."""
    raise SystemExit(STOPPED)


@contextmanager
def stoppable() -> Iterator[None]:
    """SIGTERM and SIGUSR1 raise SystemExit(STOPPED) inside; outside the main thread nothing is changed."""
    with _handled(dict.fromkeys(_ASK, stop)):
        yield


@contextmanager
def at_step_ends() -> Iterator[None]:
    """Inside, the first SIGTERM, SIGUSR1 or Ctrl-C is only noted, for `asked`; a second one ends at once.

    The main thread listens for runs in others too: outside of it nothing is changed, nor is it for a Ctrl-C
    that the process ignores.
    """
    if not _main_thread():
        yield
        return
    _asked.clear()
    heard = [*_ASK, *([signal.SIGINT] if signal.getsignal(signal.SIGINT) != signal.SIG_IGN else [])]
    try:
        with _handled(dict.fromkeys(heard, _note)):
            yield
    finally:
        _asked.clear()


def asked() -> int:
    """The signal by which training was asked to stop; 0 if it was not."""
    return _asked[0] if _asked else 0


def listen() -> None:
    """Inside `at_step_ends`: puts its handlers back after another library has put its own in their place."""
    if _main_thread():
        for signum in (*_ASK, signal.SIGINT):
            if signal.getsignal(signum) != signal.SIG_IGN:
                signal.signal(signum, _note)


def end(signum: int) -> None:
    """Raises what a signal ends the process with."""
    if signum == signal.SIGINT:
        raise KeyboardInterrupt
    raise SystemExit(STOPPED)


def _note(signum: int, frame: object) -> None:
    _asked.append(signum)
    if len(_asked) > 1:
        end(signum)
    log.info("%s: stopping at the end of this step; once more ends at once", signal.Signals(signum).name)


@contextmanager
def _handled(handlers: dict[signal.Signals, Callable[[int, object], None]]) -> Iterator[None]:
    """The handlers, and those of before again afterwards."""
    if not _main_thread():
        yield
        return
    before = {signum: signal.signal(signum, handler) for signum, handler in handlers.items()}
    try:
        yield
    finally:
        for signum, handler in before.items():
            signal.signal(signum, signal.SIG_DFL if handler is None else handler)


def _main_thread() -> bool:
    return threading.current_thread() is threading.main_thread()


def end_with_parent() -> None:
    """Asks Linux for a SIGTERM when the process that started this one ends, however it ends."""
    if sys.platform == "linux":
        set_parent_death_signal = 1
        ctypes.CDLL(None).prctl(set_parent_death_signal, int(signal.SIGTERM), 0, 0, 0)
