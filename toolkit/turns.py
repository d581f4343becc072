"""Runs that share a process take turns: one computes on the host, the others wait for the GPU meanwhile.

A run's thread has the turn from its first line on (`taken`) and lets the others have it in `waiting` alone.
What is the process's and a run's at the same time, random generators and the record of what ran on which
backend, goes with the turn. Each lane has GPU streams of its own, so that what the runs launched runs side by
side.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, suppress
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch

import kernels
from toolkit.state import generators, put_generators

_turn = threading.Lock()
_here = threading.local()
_failed: list[torch.cuda.CUDAGraph] = []
"""Captures that torch could not end: what it asks at each allocation from then on must not go."""


@dataclass(frozen=True)
class Lane:
    """Streams of the runs that follow each other in one place, None without a GPU.

    main: what they run on. side: what their graphs are captured on; streams that are captured on may not be
    shared, as libraries keep scratch memory by stream.
    """

    main: Any = None
    side: Any = None


def lane() -> Lane:
    """A new lane on the GPU in use, if there is one."""
    if not torch.cuda.is_available():
        return Lane()
    return Lane(torch.cuda.Stream(), torch.cuda.Stream())


@contextmanager
def taken(mine: Lane) -> Iterator[None]:
    """This thread's turn, once it comes; inside, the lane's main stream is the current one."""
    with _turn:
        _here.lane = mine
        try:
            with torch.cuda.stream(mine.main):
                yield
        finally:
            _here.lane = None
            if mine.main is not None:
                with suppress(RuntimeError):  # whatever ended the run has been told
                    torch.cuda.empty_cache()  # graphs that went leave their memory set aside


@contextmanager
def waiting() -> Iterator[None]:
    """Inside, other runs of the process have the turn; nothing changes where there is one run alone."""
    if _mine() is None:
        yield
        return
    (tensors, python), settings = generators(), kernels.settings()
    _turn.release()
    try:
        yield
    finally:
        _turn.acquire()
        put_generators(tensors, python)
        kernels.put_settings(settings)


def side_stream(device: torch.device) -> Any:
    """A stream for what is tried before a capture: the lane's, or a new one."""
    mine = _mine()
    return torch.cuda.Stream(device) if mine is None else mine.side


def capturing(graph: torch.cuda.CUDAGraph, stream: Any = None) -> AbstractContextManager[Any]:
    """Captures what runs inside. stream: what it is captured on; None: one of the process's, or the lane's.

    As `torch.cuda.graph`, which first waits until the device is idle; a lane does not, as the others are at
    work there. Where the capture fails, the error is the one raised inside.
    """
    mine = _mine()
    if mine is not None:
        return _captured(graph, stream or mine.side)
    torch.cuda.synchronize()
    torch.cuda.empty_cache()
    return _captured(graph, stream or _own_stream(torch.cuda.current_device()))


@cache
def _own_stream(device: int) -> Any:
    """What captures of a process without lanes share."""
    return torch.cuda.Stream(device)


@contextmanager
def _captured(graph: torch.cuda.CUDAGraph, stream: Any) -> Iterator[None]:
    before = torch.cuda.current_stream(stream.device)
    stream.wait_stream(before)
    pool = torch.cuda.graph_pool_handle()
    with torch.cuda.stream(stream):
        graph.capture_begin(pool=pool, capture_error_mode="thread_local")
        ended = False
        try:
            yield
            graph.capture_end()
            ended = True
        finally:
            if not ended:
                _give_up(graph, pool, stream.device_index)
    before.wait_stream(stream)


def _give_up(graph: torch.cuda.CUDAGraph, pool: Any, device: int) -> None:
    """Ends a capture that failed, also for torch.

    torch 2.11 gives up where CUDA calls the capture invalid (the step waited for the device), and would go on
    as if it ran: no cached memory given back when memory is short, no random numbers on the GPU.
    """
    with suppress(RuntimeError):
        graph.capture_end()
    torch_c: Any = torch._C
    with suppress(RuntimeError):  # the allocator knows of no such capture: it has ended
        torch_c._cuda_endAllocateToPool(device, pool)
        torch_c._cuda_releasePool(device, pool)
        _failed.append(graph)
        other = torch.cuda.CUDAGraph()  # one that succeeds brings the generator back
        other.capture_begin(capture_error_mode="thread_local")
        torch.zeros(1, device=torch.device("cuda", device))
        other.capture_end()


def _mine() -> Lane | None:
    return getattr(_here, "lane", None)
