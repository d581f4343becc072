"""The group of processes that one run trains on: how they meet, and how all of them end when one does."""

from __future__ import annotations

import json
import logging
import os
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import timedelta
from typing import Any

from data.cluster import Place, place

log = logging.getLogger("toolkit.ranks")

MEETING = timedelta(minutes=10)
"""How long the first process waits for the last one to start."""

COLLECTIVE = timedelta(minutes=30)
"""How long a step may wait for the slowest rank: its storage may be trying again."""

_FAILED, _HEARD, _LEFT = "toolkit/failed", "toolkit/heard", "toolkit/left"
_ALIVE = "toolkit/alive/"  # and a rank: a number that grows for as long as its process lives
_EVERY = 0.2  # seconds between two looks for a failure
_GRACE = 10.0  # seconds in which a process ends by itself after a failure
_DEAD = 3.0  # seconds without a sign of life after which a rank counts as dead, where a connection broke
_SILENT = 300.0  # the same where nothing else has failed: it may be stopped, or its machine be gone
_GRACE_STOPPED = 120.0  # the same where a run was asked to stop, as it may be saving


class RankFailed(ValueError):
    """Another rank ended the run; the message says which, where and why. code: exit code of the process."""

    def __init__(self, failure: dict[str, Any]) -> None:
        self.code = int(failure["code"])
        super().__init__(told(failure))


@dataclass
class Group:
    """One process's side. meetings: how often the ranks have met; failure: what ended the run, once known.

    watch: the thread that looks for a failure of other ranks.
    """

    place: Place
    store: Any
    last_words: Callable[[str], None]
    meetings: int = 0
    failure: dict[str, Any] | None = None
    ended: threading.Event = field(default_factory=threading.Event)
    watch: threading.Thread | None = None


_KILLED = "ended without a word: it was killed, perhaps for want of memory, or its machine is gone"

_group: Group | None = None
_doing = ""


def current() -> Group | None:
    """The group of this process, None if it is alone."""
    return _group


def doing(what: str) -> None:
    """Notes what this process is at (`stage tune, step 17`), for the message if it fails there."""
    global _doing
    _doing = what


@contextmanager
def joined(*, cuda: bool, last_words: Callable[[str], None] = lambda text: None) -> Iterator[Place]:
    """Joins the processes that the launcher started; with one process nothing happens.

    An exception inside is told to every rank, and all of them end within seconds: those that wait here raise
    RankFailed, those that hang in a collective are ended. A rank that is to end in good order (after saving)
    must meet the others at a `barrier` before. cuda: whether tensors on GPUs are exchanged. last_words:
    called on rank 0 with the reason if it is ended while it hangs.
    """
    global _group
    found = place()
    if found.world == 1:
        yield found
        return
    _group = group = _meet(found, cuda, last_words)
    try:
        yield found
        met = meeting(group)
        group.store.add(met, 1)
        wait(group, lambda: group.store.add(met, 0) == found.world)
    except BaseException as error:
        code = _code(error)
        _tell(group, error, code)
        _end_watch(group)
        # What may still hang while Python ends has no one left to tell.
        last = threading.Timer(_grace(code), os._exit, [code])
        last.daemon = True
        last.start()
        raise
    _leave(group)
    _group = None


def _meet(found: Place, cuda: bool, last_words: Callable[[str], None]) -> Group:
    import torch.distributed as dist
    from torch.distributed.rendezvous import rendezvous

    assert found.master is not None
    host, port = found.master
    address = f"tcp://{host}:{port}"
    try:
        meet = rendezvous(address, rank=found.rank, world_size=found.world, timeout=MEETING)
        store, rank, world = next(iter(meet))
        # Numbers and texts go by gloo, so that no collective on a GPU has to wait for them.
        backend = "cpu:gloo,cuda:nccl" if cuda else "gloo"
        dist.init_process_group(backend, store=store, rank=rank, world_size=world, timeout=COLLECTIVE)
    except RuntimeError as error:
        raise ValueError(
            f"rank {found.rank} of {found.world} could not meet the others at {host}:{port}: {error}; start "
            "all of them, and let the nodes reach that address (MASTER_ADDR, MASTER_PORT choose another)"
        ) from error
    group = Group(found, store, last_words)
    group.watch = threading.Thread(target=_watch, args=(group, store.clone()), name="ranks", daemon=True)
    group.watch.start()
    return group


def _end_watch(group: Group) -> None:
    """Ends the thread that watches: one that is in the store's code while Python ends aborts the process."""
    group.ended.set()
    if group.watch is not None:
        group.watch.join(5.0)


def _leave(group: Group) -> None:
    import torch.distributed as dist

    _end_watch(group)
    dist.destroy_process_group()
    # Rank 0 may hold the store that the others are still reading.
    if group.place.rank:
        group.store.add(_LEFT, 1)
        return
    until = time.monotonic() + _GRACE
    while group.store.add(_LEFT, 0) < group.place.world - 1 and time.monotonic() < until:
        time.sleep(0.01)


def _watch(group: Group, store: Any) -> None:
    """Looks whether a rank has failed, and ends this process if it does not do so itself."""
    silence = Silence(group.place.world)
    while not group.ended.wait(_EVERY):
        try:
            store.add(f"{_ALIVE}{group.place.rank}", 1)
            if group.place.rank == 0:  # the others learn of its end by the store, which it holds
                _note_silent(store, silence)
            if not store.check([_FAILED]):
                continue
            failure = json.loads(store.get(_FAILED))
            if failure["rank"] != group.place.rank:
                store.add(_HEARD, 1)
        except RuntimeError:
            if group.ended.is_set():
                return
            failure = _gone()
        group.failure = failure
        if not group.ended.wait(_grace(failure["code"])):
            if group.place.rank == 0:
                group.last_words(told(failure))
            log.error("rank %d is ended: %s", group.place.rank, told(failure))
            os._exit(failure["code"])


class Silence:
    """Ranks whose count of signs of life stands still, as rank 0 sees it; times are seconds of one clock."""

    def __init__(self, world: int, now: float | None = None) -> None:
        self._last = time.monotonic() if now is None else now
        self._seen = dict.fromkeys(range(1, world), (0, self._last))

    def look(self, counts: Mapping[int, int], now: float) -> list[int]:
        """Ranks that have been silent for _SILENT seconds."""
        # A job that was suspended and goes on finds every rank silent, itself as well.
        late, self._last = now - self._last > _SILENT / 3, now
        for rank, count in counts.items():
            if late or count != self._seen[rank][0]:
                self._seen[rank] = (count, now)
        return [rank for rank, (_, since) in self._seen.items() if now - since > _SILENT]

    def ranks(self) -> list[int]:
        return list(self._seen)

    def due(self, now: float) -> bool:
        return now - self._last > min(_DEAD, _SILENT / 20)


def _note_silent(store: Any, silence: Silence) -> None:
    """Tells all ranks of one that has given no sign of life for long."""
    if not silence.due(time.monotonic()):
        return
    counts = {rank: store.add(f"{_ALIVE}{rank}", 0) for rank in silence.ranks()}
    for rank in silence.look(counts, time.monotonic())[:1]:
        error = f"gave no sign of life for {_SILENT:.0f} s: it was stopped, or its machine is gone"
        store.compare_set(_FAILED, "", json.dumps({"rank": rank, "doing": "", "error": error, "code": 1}))


def _dead(group: Group) -> dict[str, Any] | None:
    """The first rank that has ended without a word, which breaks the connections of others."""
    counts = [group.store.add(f"{_ALIVE}{rank}", 0) for rank in range(group.place.world)]
    until = time.monotonic() + _DEAD
    while time.monotonic() < until and not group.store.check([_FAILED]):
        time.sleep(_EVERY)
    for rank, count in enumerate(counts):
        if rank != group.place.rank and group.store.add(f"{_ALIVE}{rank}", 0) == count:
            found = {"rank": rank, "doing": "", "error": _KILLED, "code": 1}
            told_first: dict[str, Any] = json.loads(group.store.compare_set(_FAILED, "", json.dumps(found)))
            return told_first
    return None


def _grace(code: int) -> float:
    return _GRACE if code == 1 else _GRACE_STOPPED


def _gone() -> dict[str, Any]:
    return {"rank": 0, "doing": "", "error": _KILLED, "code": 1}


def _code(error: BaseException) -> int:
    """The exit code that an exception gives a process."""
    if isinstance(error, KeyboardInterrupt):
        return 130
    given = error.code if isinstance(error, SystemExit | RankFailed) else 1
    return given if isinstance(given, int) else 1


def _tell(group: Group, error: BaseException, code: int) -> None:
    """Tells the others why this rank ends, unless another has ended the run, and waits until they heard."""
    if isinstance(error, RankFailed):
        return
    mine = {"rank": group.place.rank, "doing": _doing, "error": _named(error), "code": code}
    try:
        kept = json.loads(group.store.compare_set(_FAILED, "", json.dumps(mine)))
        if kept != mine:
            return
        log.log(logging.ERROR if code == 1 else logging.INFO, "%s", told(mine))
        until = time.monotonic() + _GRACE / 2
        while group.store.add(_HEARD, 0) < group.place.world - 1 and time.monotonic() < until:
            time.sleep(0.05)
    except RuntimeError:
        log.warning("rank %d could not tell the others that it ends", group.place.rank)


def _named(error: BaseException) -> str:
    if isinstance(error, (KeyboardInterrupt, SystemExit)):
        return "asked to stop"
    return f"{type(error).__name__}: {' '.join(str(error).split())}"


def told(failure: dict[str, Any]) -> str:
    """`rank 1, stage tune, step 17: DamagedSample: ...`."""
    where = ", ".join(part for part in (f"rank {failure['rank']}", failure["doing"]) if part)
    return f"{where}: {failure['error']}"


def _broken(error: BaseException) -> bool:
    """Whether a collective lost a connection, as when the process at its other end was killed."""
    return isinstance(error, RuntimeError) and ("gloo" in str(error) or "NCCL" in str(error))


def cause(error: BaseException) -> BaseException:
    """What ended the run: `error`, or the failure of another rank that it came from."""
    if _group is None or isinstance(error, RankFailed):
        return error
    if _group.failure is None:
        broken = _broken(error)
        try:
            if broken and not _group.store.check([_FAILED]):
                _group.failure = _dead(_group)
            elif _group.store.check([_FAILED]):
                _group.failure = json.loads(_group.store.get(_FAILED))
        except RuntimeError:
            if not broken:
                return error
            _group.failure = _gone()
    found = _group.failure
    return error if found is None or found["rank"] == _group.place.rank else RankFailed(found)


def wait(group: Group, ready: Callable[[], bool]) -> None:
    pause = 0.002
    while True:
        try:
            if ready():
                return
        except RuntimeError as error:
            raise RankFailed(group.failure or _gone()) from error
        if group.failure is not None:
            raise RankFailed(group.failure)
        time.sleep(pause)
        pause = min(2 * pause, 0.1)


def meeting(group: Group) -> str:
    """A key that this and the same call of every other rank share."""
    group.meetings += 1
    return f"toolkit/meeting/{group.meetings}"
