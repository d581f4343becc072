"""One dispatch for every recurrence: which backends exist, which one a call runs, what ran.

A backend is a function with the operator's tensor arguments; `register` puts it in the one table below.
Backends: `reference` (step loops, the definition) and `torch` (chunked forms, any device); `auto` picks.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

Kernel = Callable[..., tuple[Tensor, Tensor]]

_LOG = logging.getLogger("toolkit.kernels")
_TABLE: dict[str, dict[str, Kernel]] = {}  # op -> backend -> function
_NAMES = ("auto", "torch", "reference")
_ABSENT = {"triton": "there is no Triton backend in this version; write 'auto'"}

_default = "auto"
_ran: dict[str, set[str]] = {}
_logged: set[tuple[str, str, str]] = set()


def register(op: str, backend: str, kernel: Kernel) -> None:
    """Adds `kernel` as the `backend` of operator `op`."""
    _TABLE.setdefault(op, {})[backend] = kernel


def backends() -> dict[str, str]:
    """Backend name -> why it cannot be used here; the empty string where it can."""
    return {"torch": "", "reference": ""} | _ABSENT


def _check(name: str) -> str:
    if name in _ABSENT:
        raise ValueError(f"kernel backend {name!r}: {_ABSENT[name]}")
    if name not in _NAMES:
        raise ValueError(f"no kernel backend {name!r}; known: {', '.join(_NAMES)}")
    return name


def set_backend(name: str) -> None:
    """Sets the backend of all calls that do not name one: auto, torch or reference (else ValueError)."""
    global _default
    _default = _check(name)


@contextmanager
def use(name: str) -> Iterator[None]:
    """`set_backend` for the length of a `with` block."""
    before = _default
    set_backend(name)
    try:
        yield
    finally:
        set_backend(before)


def pick(op: str, backend: str | None, device: torch.device) -> Kernel:
    """The function that runs `op` on `device`; the call's own `backend` goes before the global one."""
    asked = _default if backend is None else _check(backend)
    name = _automatic(device) if asked == "auto" else asked
    _ran.setdefault(op, set()).add(name)
    if (op, asked, name) not in _logged:
        _logged.add((op, asked, name))
        _LOG.info("%s runs on backend %s (asked: %s, device: %s)", op, name, asked, device.type)
    return _TABLE[op][name]


def _automatic(device: torch.device) -> str:
    """The best backend of a device. One line per device that has a better one than torch."""
    return "torch"


def chosen() -> dict[str, str]:
    """Operator -> backend that ran since the last `reset_chosen`; several are joined by commas."""
    return {op: ",".join(sorted(names)) for op, names in sorted(_ran.items())}


def reset_chosen() -> None:
    """Forgets what ran, so that a run records only its own choices."""
    _ran.clear()
