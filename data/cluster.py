"""Which of how many processes this is: the variables of torchrun and SLURM, read in this one place."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from dataclasses import dataclass

_TORCH = ("RANK", "WORLD_SIZE", "LOCAL_RANK")
_SLURM = ("SLURM_PROCID", "SLURM_NTASKS", "SLURM_LOCALID")


@dataclass(frozen=True)
class Place:
    """rank of world processes, local_rank of those of a node. launcher: torchrun, slurm or none.

    master: (host, port) at which the processes meet, None for a single process.
    """

    rank: int = 0
    world: int = 1
    local_rank: int = 0
    launcher: str = "none"
    master: tuple[str, int] | None = None


def place(environ: Mapping[str, str] = os.environ) -> Place:
    """The place of this process. torchrun inside of srun counts, as it sets what is more exact.

    Raises ValueError for variables that are incomplete, that contradict each other, or that say that this
    process is one of several which were never started.
    """
    torch = _read(environ, _TORCH, "torchrun")
    slurm = _read(environ, _SLURM, "SLURM") if "SLURM_STEP_ID" in environ else None
    if torch is None and slurm is None:
        _refuse_batch_script(environ)
        return Place()
    if torch is None:
        assert slurm is not None
        return Place(*slurm, "slurm", _slurm_master(environ) if slurm[1] > 1 else None)
    if slurm is not None and slurm[1] > 1:
        _refuse_conflict(environ, torch, slurm)
    return Place(*torch, "torchrun", _torch_master(environ) if torch[1] > 1 else None)


def gpu(found: Place, visible: int) -> int:
    """The number of this process's GPU among the visible ones; SLURM may show each process only its own."""
    if found.local_rank < visible:
        return found.local_rank
    if visible == 1 and found.launcher == "slurm":
        return 0
    raise ValueError(
        f"local rank {found.local_rank} has no GPU of its own: {visible} visible on this node; start "
        f"{visible} processes a node, or write hardware.device=cpu"
    )


def _read(environ: Mapping[str, str], names: tuple[str, ...], launcher: str) -> tuple[int, int, int] | None:
    """(rank, world, local rank) of one launcher, None if none of its variables is set."""
    given = [name for name in names if name in environ]
    if not given:
        return None
    if len(given) < len(names):
        missing = next(name for name in names if name not in environ)
        raise ValueError(
            f"{given[0]}={environ[given[0]]} is set and {missing} is not: start with {launcher}, which sets "
            f"both, or unset {given[0]}"
        )
    rank, world, local = (_number(environ, name) for name in names)
    if not (0 <= rank < world and 0 <= local < world):
        told = ", ".join(f"{name}={environ[name]}" for name in names)
        raise ValueError(f"{told}: ranks count from 0 and are less than {names[1]}")
    return rank, world, local


def _number(environ: Mapping[str, str], name: str) -> int:
    if not re.fullmatch(r"\d{1,9}", environ[name]):
        raise ValueError(f"{name}={environ[name]!r} is not a whole number")
    return int(environ[name])


def _refuse_batch_script(environ: Mapping[str, str]) -> None:
    """Several tasks were asked of SLURM, but nothing has started them."""
    tasks = environ.get("SLURM_NTASKS", "1")
    if tasks != "1" and "SLURM_JOB_ID" in environ:
        raise ValueError(
            f"SLURM_NTASKS={tasks}, but this process was not started by srun, so the others would be "
            "missing: write srun before the command, or SLURM_NTASKS=1 before it for a single process"
        )


def _refuse_conflict(
    environ: Mapping[str, str], torch: tuple[int, int, int], slurm: tuple[int, int, int]
) -> None:
    """torchrun under srun is one launcher a node; anything else means that each thinks it is in charge."""
    if "TORCHELASTIC_RUN_ID" in environ and torch[1] % slurm[1] == 0:
        return
    if torch[:2] == slurm[:2]:
        return
    raise ValueError(
        f"RANK={torch[0]} of WORLD_SIZE={torch[1]}, but SLURM_PROCID={slurm[0]} of SLURM_NTASKS={slurm[1]}: "
        "two launchers disagree; use srun with one torchrun a node, or srun alone with RANK, WORLD_SIZE and "
        "LOCAL_RANK unset"
    )


def _torch_master(environ: Mapping[str, str]) -> tuple[str, int]:
    missing = [name for name in ("MASTER_ADDR", "MASTER_PORT") if not environ.get(name)]
    if missing:
        raise ValueError(f"WORLD_SIZE={environ['WORLD_SIZE']} and no {missing[0]}: torchrun sets it")
    return environ["MASTER_ADDR"], _number(environ, "MASTER_PORT")


def _slurm_master(environ: Mapping[str, str]) -> tuple[str, int]:
    """The first node, and a port that two jobs on it hardly share."""
    nodes = environ.get("SLURM_STEP_NODELIST") or environ.get("SLURM_JOB_NODELIST", "")
    if not nodes:
        raise ValueError("SLURM_NTASKS is above 1 and SLURM_JOB_NODELIST is empty: start with srun")
    host = environ.get("MASTER_ADDR") or first_host(nodes)
    if environ.get("MASTER_PORT"):
        return host, _number(environ, "MASTER_PORT")
    return host, 20_000 + int(environ.get("SLURM_JOB_ID", "0")) % 10_000


def first_host(nodes: str) -> str:
    """The first name of a SLURM node list: `gpu[003-010,12]` -> `gpu003`."""
    found = re.match(r"([^\[,]*)(?:\[([^\],-]+)[^\]]*\])?([^\[,]*)", nodes)
    assert found is not None
    return f"{found[1]}{found[2] or ''}{found[3]}"
