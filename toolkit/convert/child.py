"""The process that unpickles a foreign file: limits first, then the file, then safetensors out.

    python -P -m toolkit.convert.child FILE FOLDER SECONDS AS_IS

Prints one line of JSON: the facts, or {"error": ...}. Without a network where the system lets a process
give it up, without core dumps, with bounded memory, time and file size.
"""

from __future__ import annotations

import ctypes
import json
import os
import sys
from pathlib import Path
from typing import Any

SLACK = 2 << 30
"""Bytes of address space beyond twice the file: torch's own work, and what is imported later."""

NEW_USER, NEW_NETWORK = 0x10000000, 0x40000000


def leave_network() -> None:
    """An empty network of its own, if the system allows it (in many containers it does not).

    Root needs no users of its own for that, and would lose its right to read other users' files.
    """
    if sys.platform == "linux":
        ctypes.CDLL(None).unshare(NEW_NETWORK if os.geteuid() == 0 else NEW_NETWORK | NEW_USER)


def limit(path: Path, seconds: int) -> None:
    """Address space, processor time, size of files: scaled with the file. After torch is imported."""
    if sys.platform == "win32":
        return  # no such limits there; the parent's time limit holds
    import resource

    size = path.stat().st_size
    pages = Path("/proc/self/statm")
    used = int(pages.read_text().split()[0]) * resource.getpagesize() if pages.exists() else 64 << 30
    for kind, bound in (
        (resource.RLIMIT_AS, used + 2 * size + SLACK),
        (resource.RLIMIT_CPU, seconds),
        (resource.RLIMIT_FSIZE, 2 * size + (64 << 20)),
        (resource.RLIMIT_CORE, 0),
    ):
        hard = resource.getrlimit(kind)[1]
        bound = bound if hard == resource.RLIM_INFINITY else min(bound, hard)
        resource.setrlimit(kind, (bound, bound))


def answer(path: Path, folder: Path, seconds: int, *, as_is: bool) -> dict[str, Any]:
    """What the parent is told."""
    import torch

    from toolkit.convert.convert import write_folder

    torch.set_num_threads(1)
    limit(path, seconds)
    try:
        return write_folder(path, folder, as_is=as_is)
    except ValueError as error:
        return {"error": str(error)}
    except MemoryError:
        return {"error": f"{path}: needs more memory than a file of its size should; refused"}


def main(words: list[str]) -> int:
    leave_network()
    path, folder, seconds, as_is = words
    print(json.dumps(answer(Path(path), Path(folder), int(seconds), as_is=as_is == "1")))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
