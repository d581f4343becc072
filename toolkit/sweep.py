"""Rows of a sweep side by side: worker processes of one machine, each running one row at a time or several.

The parent imports no torch. It hands rows to workers, shows what they log with the row in front, keeps
each row's log in its run directory, and tells how long the rest will take.
"""

from __future__ import annotations

import json
import math
import selectors
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import IO, Any

from toolkit import estimate, sweep_process
from toolkit.rundir import RunDir
from toolkit.stopping import stoppable
from toolkit.sweep_layout import Layout
from toolkit.sweep_process import Worker

LOG = "log.txt"
"""A row's log, in its run directory."""

_SAY = 30.0  # seconds between two lines on the whole sweep


@dataclass(frozen=True)
class Row:
    """One run of the sweep. label: what tells it from the others."""

    number: int
    label: str
    cfg: Mapping[str, Any]
    recipe: str
    argv: Sequence[str]

    @property
    def folder(self) -> RunDir:
        return RunDir.of(self.cfg)


@dataclass
class _Running:
    """A row in a worker's hands."""

    row: Row
    log: IO[str]
    trains_since: float = math.inf


class Sweep:
    """Runs rows on workers; `errors` holds a line for each row that failed, by its number."""

    def __init__(self, rows: Sequence[Row], plan: Layout, *, show: Callable[[str], None]) -> None:
        """show: prints a line for the user."""
        self.rows, self.plan, self.show = rows, plan, show
        self.errors: dict[int, str] = {}
        self.seconds: dict[int, float] = {}  # of a row: estimated before it trains, as it was when done
        self.took: set[int] = set()  # rows of which `seconds` is what they took
        self.waiting = [row for row in rows if row.folder.finished() is None]
        self.done = len(rows) - len(self.waiting)
        self._workers: dict[Worker, _Running | None] = {}
        self._retired: set[Worker] = set()  # get no more rows, and are about to end
        self._selector = selectors.DefaultSelector()
        self._said = time.monotonic()
        self._announced = False

    def run(self) -> dict[int, str]:
        """Number of each failed row -> what happened. Every worker is ended, whatever ends the sweep."""
        if self.done:
            self.show(f"{self.done} of {len(self.rows)} rows are done already")
        how = ""
        try:
            with stoppable():
                while self.waiting or any(self._workers.values()):
                    self._hand_out()
                    for key, _ in self._selector.select(timeout=1.0):
                        key.data()
                    for worker in [w for w in self._workers if w.ended()]:
                        self._end(worker)
                    self._say()
        except (KeyboardInterrupt, SystemExit) as end:
            how = "interrupted" if isinstance(end, KeyboardInterrupt) else "asked to stop"
            raise
        finally:
            self._end_all()
            if how:
                rest = "the same command goes on with the rest"
                self.show(f"{how}: {self.done} of {len(self.rows)} rows are done; {rest}")
        return self.errors

    @property
    def running(self) -> list[_Running]:
        return [running for running in self._workers.values() if running]

    @property
    def _active(self) -> list[Worker]:
        return [worker for worker in self._workers if worker not in self._retired]

    def _hand_out(self) -> None:
        """Gives every free worker a row, starting workers up to the plan's number."""
        for worker in [w for w in self._active if self._workers[w] is None]:
            self._give(worker)
        while len(self._active) < self.plan.workers and self._next() is not None:
            for worker in self._start():
                self._give(worker)

    def _next(self) -> Row | None:
        """The next row whose directory no worker holds: two rows may ask for the same run."""
        held = {running.row.folder.path for running in self.running}
        return next((row for row in self.waiting if row.folder.path not in held), None)

    def _give(self, worker: Worker) -> None:
        row = self._next()
        if row is None:
            return
        self.waiting.remove(row)
        row.folder.path.mkdir(parents=True, exist_ok=True)
        log = (row.folder.path / LOG).open("a", encoding="utf-8", errors="replace")
        log.write(f"{' '.join(row.argv)}\n")
        self._workers[worker] = _Running(row, log)
        self._line(worker, f"row {row.number} of {len(self.rows)}: {row.folder.path}")
        hardware = {**row.cfg["hardware"], "threads": self.plan.threads}
        cfg = {**row.cfg, "hardware": hardware}
        worker.send({"cfg": cfg, "recipe": row.recipe, "argv": list(row.argv)})

    def _start(self) -> list[Worker]:
        """The workers of a new process."""
        taken = [worker.gpu for worker in self._active]
        gpu = min(self.plan.gpus, key=taken.count) if self.plan.gpus else ""
        lanes = min(self.plan.lanes, self.plan.workers - len(taken))
        made = sweep_process.start(gpu=gpu, sharing=self.plan.workers, lanes=lanes)
        for worker in made:
            self._workers[worker] = None
            for handle in (worker.output, worker.events):
                self._selector.register(handle, selectors.EVENT_READ, partial(self._read, worker))
        return made

    def _read(self, worker: Worker) -> None:
        """What has arrived: an estimate stands before what the row logs after it, a result behind it all."""
        lines, silent = worker.lines(worker.output)
        arrived, over = worker.lines(worker.events)
        events = [json.loads(event) for event in arrived]
        for event in events:
            if event["event"] == "estimate":
                self._estimated(worker, event)
        for line in lines:
            self._line(worker, line)
        for event in events:
            if event["event"] != "estimate":
                self._ended(worker, event)
        for handle, done in ((worker.output, silent), (worker.events, over)):
            if done:
                self._forget(handle)

    def _line(self, worker: Worker, line: str) -> None:
        running = self._workers[worker]
        if running is not None:
            running.log.write(line + "\n")
            running.log.flush()
        if line.strip():
            self.show(f"[{running.row.label if running else 'worker'}] {line}")

    def _estimated(self, worker: Worker, event: Mapping[str, Any]) -> None:
        running = self._workers[worker]
        if running is not None:
            running.trains_since = time.monotonic()
            self.seconds[running.row.number] = float(event["seconds"])
            self._announce()

    def _ended(self, worker: Worker, event: Mapping[str, Any]) -> None:
        for line in worker.lines(worker.output)[0]:  # what it logged before
            self._line(worker, line)
        running = self._workers[worker]
        if running is None:
            return
        if event["event"] == "done":
            self.done += 1
            self.seconds[running.row.number] = float(event["seconds"])
            self.took.add(running.row.number)
        else:  # what a failure leaves behind in a process, nobody knows
            self._fail(running.row, str(event["error"]))
            self._retired.update(worker.together)
            for one in worker.together:
                one.close()
        self._close(worker)
        self._said = -math.inf

    def _fail(self, row: Row, error: str) -> None:
        self.errors[row.number] = f"{error}; log: {row.folder.path / LOG}"

    def _close(self, worker: Worker) -> None:
        running = self._workers[worker]
        if running is not None:
            running.log.close()
        self._workers[worker] = None

    def _end(self, worker: Worker) -> None:
        """Takes a worker out of use; a row that it still had in its hands has failed."""
        self._read(worker)
        for handle in (worker.output, worker.events):
            self._forget(handle)
        how = worker.end()
        running = self._workers[worker]
        if running is not None:
            self._fail(running.row, f"its process ended: {how}")
            self._close(worker)
        del self._workers[worker]
        self._retired.discard(worker)

    def _forget(self, handle: int) -> None:
        if handle in self._selector.get_map():
            self._selector.unregister(handle)

    def _end_all(self) -> None:
        """Asks every worker to stop, and ends those that do not."""
        for worker, running in self._workers.items():
            if running is not None:
                worker.ask_to_stop()
        for worker in self._workers:
            worker.close()
        # What a row says while it saves and ends is its own still.
        until = time.monotonic() + sweep_process.GRACE
        while time.monotonic() < until and not all(worker.ended() for worker in self._workers):
            for key, _ in self._selector.select(timeout=0.1):
                key.data()
        for worker in list(self._workers):
            self._end(worker)
        self._selector.close()

    def left(self) -> float | None:
        """Seconds until the sweep is done; None before anything was measured."""
        known = [row for row in self.rows if row.number in self.seconds]
        if not known:
            return None
        # What is estimated for a row does not know of those beside it on its GPU; what one took does.
        shared = len(self.plan.gpus) if self.plan.workers > len(self.plan.gpus) else 0
        if shared and self.took:
            known, shared = [row for row in known if row.number in self.took], 0
        numbers = {row.number for row in known}

        def guess(row: Row) -> float:
            if row.number in numbers:
                return self.seconds[row.number]
            return sum(estimate.scaled(self.seconds[k.number], k.cfg, row.cfg) for k in known) / len(known)

        now = time.monotonic()
        running = [max(0.0, guess(r.row) - max(0.0, now - r.trains_since)) for r in self.running]
        waiting = [guess(row) for row in self.waiting]
        return estimate.span(running, waiting, self.plan.workers, gpus=shared)

    def _announce(self) -> None:
        """Once, before the first row trains: how long all of them will take."""
        left = self.left()
        if self._announced or left is None:
            return
        self._announced = True
        rows = len(self.rows) - self.done
        at_a_time = f"{self.plan.workers} at a time on {self.plan}"
        self.show(f"about {estimate.duration(left)} for {rows} rows, {at_a_time}")

    def _say(self) -> None:
        """Every now and then: how far the sweep is."""
        running, left = len(self.running), self.left()
        if time.monotonic() - self._said < _SAY or not (running or self.waiting):
            return
        self._said = time.monotonic()
        failed = f", {len(self.errors)} failed" if self.errors else ""
        rest = f", about {estimate.duration(left)} left" if left else ""
        self.show(f"{self.done} of {len(self.rows)} rows done{failed}, {running} running{rest}")
