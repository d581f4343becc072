"""A worker process as its parent sees it: started, handed rows, read from, ended. Imports no torch."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Mapping
from contextlib import suppress
from typing import Any

COMMAND = (sys.executable, "-m", "toolkit.sweep_worker")
"""What a worker runs; the descriptor for events and the number of workers are added."""

GRACE = 60.0
"""Seconds that a worker asked to stop is given: it ends its step and saves where it is."""


class Worker:
    """A process of `toolkit.sweep_worker`, with what it logs (`output`) and what it tells (`events`).

    Both are file descriptors that never block.
    """

    def __init__(self, *, gpu: str, sharing: int) -> None:
        """gpu: its CUDA_VISIBLE_DEVICES, "" for the parent's. sharing: workers that share the terminal."""
        self.gpu = gpu
        self.events, theirs = os.pipe()
        self._process = subprocess.Popen(
            [*COMMAND, str(theirs), str(sharing)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            pass_fds=[theirs],
            env=environment(gpu),
            start_new_session=True,  # Ctrl-C is the parent's alone
        )
        os.close(theirs)
        assert self._process.stdout is not None and self._process.stdin is not None
        self._in, self._out = self._process.stdin, self._process.stdout
        self.output = self._out.fileno()
        self._parts = {self.output: b"", self.events: b""}
        for handle in self._parts:
            os.set_blocking(handle, False)

    def send(self, row: Mapping[str, Any]) -> None:
        """Hands over a row; one that has ended does not read it, and is found by its `events`."""
        with suppress(BrokenPipeError):
            self._in.write(json.dumps(row).encode() + b"\n")
            self._in.flush()

    def lines(self, handle: int) -> tuple[list[str], bool]:
        """(whole lines that arrived, whether no more can); the beginning of a line is kept."""
        data, ended = self._parts[handle], False
        while True:
            try:
                more = os.read(handle, 1 << 16)
            except BlockingIOError:
                break
            if not more:
                ended = True
                break
            data += more
        if ended and data and not data.endswith(b"\n"):
            data += b"\n"
        *whole, self._parts[handle] = data.split(b"\n")
        return [line.decode(errors="replace") for line in whole], ended

    def ended(self) -> bool:
        return self._process.poll() is not None

    def ask_to_stop(self) -> None:
        self._process.terminate()

    def close(self) -> None:
        """Hands over no more rows; the process ends when it is done with what it has."""
        with suppress(BrokenPipeError):
            self._in.close()

    def end(self) -> str:
        """Waits for the process, kills it after GRACE, frees everything; how it ended, in words."""
        self.close()
        try:
            code = self._process.wait(GRACE)
        except subprocess.TimeoutExpired:
            self._process.kill()
            code = self._process.wait()
        self._out.close()
        os.close(self.events)
        if code >= 0:
            return f"exit code {code}"
        return f"killed by signal {-code}" + (" (out of memory?)" if code == -signal.SIGKILL else "")


def environment(gpu: str) -> dict[str, str]:
    """The parent's environment and import path, and which GPU the worker sees."""
    path = [entry or os.getcwd() for entry in sys.path]
    # Waiting threads must sleep: spinning ones take the cores from the other workers.
    made = {"GOMP_SPINCOUNT": "5000", **os.environ, "PYTHONPATH": os.pathsep.join(dict.fromkeys(path))}
    return {**made, "CUDA_VISIBLE_DEVICES": gpu} if gpu else made
