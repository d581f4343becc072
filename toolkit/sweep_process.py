"""A worker process as its parent sees it: started, handed rows, read from, ended. Imports no torch.

A process has one lane or several, each of which runs a row at a time; to the sweep every lane is a worker.
"""

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
"""What a worker runs; descriptors and the number of rows at a time are added."""

GRACE = 60.0
"""Seconds that a worker asked to stop is given: it ends its step and saves where it is."""


class _Process:
    """The process of one or several workers. open: lanes that may still get rows."""

    def __init__(self, *, gpu: str, sharing: int, lanes: int) -> None:
        events, further = ([os.pipe() for _ in range(n)] for n in (lanes, lanes - 1))
        words = [",".join(str(theirs) for _, theirs in events), str(sharing)]
        words += [",".join(str(theirs) for _, theirs in further)] if further else []
        theirs = [one for _, one in (*events, *further)]
        self.popen = subprocess.Popen(
            [*COMMAND, *words],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            pass_fds=theirs,
            env=environment(gpu, lanes=lanes),
            start_new_session=True,  # Ctrl-C is the parent's alone
        )
        for one in theirs:
            os.close(one)
        assert self.popen.stdout is not None and self.popen.stdin is not None
        self.rows, self.open, self.asked = self.popen.stdin, lanes, False
        # A descriptor of its own: each worker closes what it reads.
        first = os.dup(self.popen.stdout.fileno())
        self.popen.stdout.close()
        self.outputs = [first, *(mine for mine, _ in further)]
        self.events = [mine for mine, _ in events]


def start(*, gpu: str, sharing: int, lanes: int = 1) -> list[Worker]:
    """The workers of a new process, one for each of its lanes.

    gpu: its CUDA_VISIBLE_DEVICES, "" for the parent's. sharing: rows of the sweep that run at a time.
    """
    process = _Process(gpu=gpu, sharing=sharing, lanes=lanes)
    made = [Worker(process, gpu, number) for number in range(lanes)]
    for worker in made:
        worker.together = made
    return made


class Worker:
    """A lane of a process of `toolkit.sweep_worker`: what it logs (`output`), what it tells (`events`).

    Both are file descriptors that never block. together: all workers of the process, this one with them.
    """

    def __init__(self, process: _Process, gpu: str, number: int) -> None:
        self.gpu, self.together = gpu, [self]
        self._process, self._number, self._closed = process, number, False
        self.output, self.events = process.outputs[number], process.events[number]
        self._parts = {self.output: b"", self.events: b""}
        for handle in self._parts:
            os.set_blocking(handle, False)

    def send(self, row: Mapping[str, Any]) -> None:
        """Hands over a row; one that has ended does not read it, and is found by its `events`."""
        with suppress(BrokenPipeError):
            self._process.rows.write(json.dumps({"lane": self._number, **row}).encode() + b"\n")
            self._process.rows.flush()

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
        return self._process.popen.poll() is not None

    def ask_to_stop(self) -> None:
        """Asks the process once, whichever of its workers are asked: a second signal would end it at once."""
        if not self._process.asked:
            self._process.asked = True
            self._process.popen.terminate()

    def close(self) -> None:
        """Takes no more rows; the process ends when all its workers are closed and done with theirs."""
        if self._closed:
            return
        self._closed = True
        self._process.open -= 1
        if not self._process.open:
            with suppress(BrokenPipeError):
                self._process.rows.close()

    def end(self) -> str:
        """Waits for the process, kills it after GRACE, frees what is this worker's; how it ended, in words.

        All workers of the process must be closed, or it has ended.
        """
        self.close()
        process = self._process.popen
        try:
            code = process.wait(GRACE)
        except subprocess.TimeoutExpired:
            process.kill()
            code = process.wait()
        os.close(self.output)
        os.close(self.events)
        if code >= 0:
            return f"exit code {code}"
        return f"killed by signal {-code}" + (" (out of memory?)" if code == -signal.SIGKILL else "")


def connections(lanes: int) -> dict[str, str]:
    """Queues of a process to the GPU, two for each lane: with fewer, its streams wait for each other.

    No more than needed: a GPU has so many in all. With 32 each, some of eight processes got none under the
    Multi-Process Service ("busy or unavailable"), and some of seventeen without it ("out of memory").
    """
    return {"CUDA_DEVICE_MAX_CONNECTIONS": str(min(32, max(8, 2 * lanes)))}


def environment(gpu: str, *, lanes: int) -> dict[str, str]:
    """The parent's environment and import path, and which GPU the worker sees."""
    path = [entry or os.getcwd() for entry in sys.path]
    # Waiting threads must sleep: spinning ones take the cores from the other workers.
    given = {"GOMP_SPINCOUNT": "5000", **(connections(lanes) if lanes > 1 else {}), **os.environ}
    made = {**given, "PYTHONPATH": os.pathsep.join(dict.fromkeys(path))}
    return {**made, "CUDA_VISIBLE_DEVICES": gpu} if gpu else made
