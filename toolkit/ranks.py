"""The processes of one run: who writes, and what they tell each other.

Started without torchrun or srun there is one process, and every function here answers at once. What is told
is JSON or numbers; waiting for rank 0 has no time limit, since an evaluation may take hours.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, TypeVar

from toolkit.rank_group import RankFailed, cause, current, doing, joined, meeting, wait

if TYPE_CHECKING:
    from torch import Tensor

__all__ = [
    "RankFailed",
    "anyone",
    "barrier",
    "cause",
    "doing",
    "gathered",
    "in_turn",
    "joined",
    "main",
    "numbers",
    "rank",
    "same",
    "shared",
    "summed",
    "world",
]

T = TypeVar("T")


def world() -> int:
    """Number of processes that train this run."""
    group = current()
    return group.place.world if group else 1


def rank() -> int:
    """This one's number, from 0."""
    group = current()
    return group.place.rank if group else 0


def main() -> bool:
    """Whether this process writes the run's files, logs and answers: rank 0, or the only one."""
    return rank() == 0


def barrier() -> None:
    """Waits until every rank is here, however long that takes."""
    group = current()
    if group is None:
        return
    key = meeting(group)
    group.store.add(key, 1)
    wait(group, lambda: group.store.add(key, 0) == group.place.world)


def shared(what: Callable[[], T]) -> T:
    """What `what` returns on rank 0, a JSON value of a few MiB at most, on every rank."""
    group = current()
    if group is None:
        return what()
    key = meeting(group)
    if group.place.rank == 0:
        group.store.set(key, json.dumps(what()))
    wait(group, lambda: bool(group.store.check([key])))
    value: T = json.loads(group.store.get(key))
    return value


def in_turn(work: Callable[[], T]) -> T:
    """`work` of every rank: rank 0 first, then one process of each other node, then the rest.

    For what the first one leaves in a cache, whether the nodes share it or not.
    """
    group = current()
    if group is None:
        return work()
    turn = 0 if main() else 1 + (group.place.local_rank > 0)
    done: list[T] = []
    for now in range(3):
        if now == turn:
            done.append(work())
        barrier()
    return done[0]


def numbers(*mine: int) -> list[list[int]]:
    """The numbers of every rank, by rank; one small exchange."""
    if current() is None:
        return [list(mine)]
    import torch
    import torch.distributed as dist

    here = torch.tensor(mine, dtype=torch.int64)
    found = [torch.empty_like(here) for _ in range(world())]
    dist.all_gather(found, here)
    return [one.tolist() for one in found]


def anyone(flag: bool) -> bool:
    """Whether the flag is set on any rank; every rank must ask at the same step."""
    return any(one for (one,) in numbers(int(flag)))


def gathered(mine: T) -> list[T]:
    """A JSON value of every rank, by rank, of any size."""
    if current() is None:
        return [mine]
    import torch
    import torch.distributed as dist

    barrier()  # has no time limit, unlike what follows
    text = torch.frombuffer(bytearray(json.dumps(mine).encode()), dtype=torch.uint8)
    sizes = [size for (size,) in numbers(len(text))]
    padded = torch.zeros(max(sizes), dtype=torch.uint8)
    padded[: len(text)] = text
    found = [torch.empty_like(padded) for _ in sizes]
    dist.all_gather(found, padded)
    return [json.loads(bytes(one[:size].tolist())) for one, size in zip(found, sizes, strict=True)]


def same(tensors: Iterable[Tensor]) -> None:
    """Overwrites tensors with those of rank 0, in place."""
    if current() is None:
        return
    import torch.distributed as dist

    barrier()
    for tensor in tensors:
        dist.broadcast(tensor.detach(), src=0)


def summed(tensor: Tensor) -> Tensor:
    """The tensor, overwritten with its sum over the ranks."""
    if current() is not None:
        import torch.distributed as dist

        dist.all_reduce(tensor)
    return tensor
