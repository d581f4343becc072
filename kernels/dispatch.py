"""One dispatch for every operator: which backends exist, which one a call runs, what ran and why.

A backend is a function with the operator's tensor arguments; `register` puts it in the one table below,
either itself or, for what must not be imported everywhere, as the place "module:function" to load it from.
Backends: `reference` (step loops, the definition), `torch` (any device), `triton` (kernels of our own on a
GPU, or anywhere in Triton's interpreter); `auto` takes triton on a GPU and torch elsewhere.
"""

from __future__ import annotations

import importlib
import importlib.util
import logging
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
from typing import Any, TypeVar

import torch

Kernel = Callable[..., Any]
_Call = TypeVar("_Call", bound=Callable[..., Any])

_LOG = logging.getLogger("toolkit.kernels")
_TABLE: dict[str, dict[str, Kernel | str]] = {}  # op -> backend -> function or "module:function"
_NAMES = ("auto", "triton", "torch", "reference")
_OLDEST = (8, 0)  # compute capability: the first with bfloat16 and asynchronous copies

_default = "auto"
_ran: dict[str, set[str]] = {}
_logged: set[tuple[str, str, str, str]] = set()


def _while_tracing(call: _Call) -> _Call:
    """torch.compile runs `call` when it traces and keeps the result: choices are recorded then, once."""
    return torch.compiler.assume_constant_result(call)


def register(op: str, **written: Kernel | str) -> None:
    """Adds backends of operator `op` by name: a function, or "module:function", loaded when first picked."""
    _TABLE.setdefault(op, {}).update(written)


def backends() -> dict[str, str]:
    """Backend name -> why it cannot be used on this machine; the empty string where it can."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    return {"triton": _no_triton(device), "torch": "", "reference": ""}


def set_backend(name: str, device: torch.device | None = None) -> None:
    """Sets the backend of all calls that do not name one: auto, triton, torch or reference.

    Raises ValueError for an unknown name and for one that cannot run on `device` (None: on this machine).
    """
    global _default
    if name not in _NAMES:
        raise ValueError(f"no kernel backend {name!r}; known: {', '.join(_NAMES)}")
    if name == "triton" and (why := backends()[name] if device is None else _no_triton(device)):
        raise ValueError(_refusal(name, why))
    _default = name


@contextmanager
def use(name: str) -> Iterator[None]:
    """`set_backend` for the length of a `with` block."""
    global _default
    before = _default
    set_backend(name)
    try:
        yield
    finally:
        _default = before


def pick(op: str, backend: str | None, device: torch.device, unfit: str = "") -> Kernel:
    """The function that runs `op` on `device`: `function(op, choose(...))`."""
    return function(op, choose(op, backend, device, unfit))


def choose(op: str, backend: str | None, device: torch.device, unfit: str = "") -> str:
    """The backend's name for this call; the call's own `backend` goes before the global one.

    `unfit` says why Triton cannot take these arguments ("" if it can): `auto` then runs torch and the
    reason is logged and recorded; asking for triton is a ValueError. An operator without the globally set
    backend (none was ever written) runs on torch.
    """
    return _choose(op, _default if backend is None else backend, backend is not None, device, unfit)


@_while_tracing
def _choose(op: str, asked: str, by_call: bool, device: torch.device, unfit: str) -> str:
    if asked not in _NAMES:
        raise ValueError(f"no kernel backend {asked!r}; known: {', '.join(_NAMES)}")
    written = _TABLE[op]
    if asked not in written and asked != "auto":
        if by_call:
            raise ValueError(f"{op}: has no backend {asked!r}; known: auto, {', '.join(written)}")
        name, why = "torch", ""
    elif asked == "triton":
        if why := _no_triton(device) or unfit:
            raise ValueError(_refusal(asked, f"{op}: {why}"))
        name = asked
    elif asked == "auto":
        name, why = _automatic(written, device, unfit)
    else:
        name, why = asked, ""
    _load(op, name)
    _record(op, asked, name, device.type, why)
    return name


def _automatic(written: dict[str, Kernel | str], device: torch.device, unfit: str) -> tuple[str, str]:
    """The best backend of a device, and why it is not the one expected there."""
    if device.type != "cuda" or "triton" not in written:
        return "torch", ""
    why = _no_triton(device) or unfit
    return ("torch", why) if why else ("triton", "")


def _record(op: str, asked: str, name: str, device: str, why: str) -> None:
    note(op, f"{name} (not triton: {why})" if why else name)
    if (entry := (op, asked, name, why)) in _logged:
        return
    _logged.add(entry)
    reason = f", not triton: {why}" if why else ""
    # A fallback is slower than what was paid for: a warning, not a note.
    level = logging.WARNING if why else logging.INFO
    _LOG.log(level, "%s runs on backend %s (asked: %s, device: %s%s)", op, name, asked, device, reason)


def note(op: str, what: str) -> None:
    """Adds to what `chosen` tells: for what runs in a way of its own beside the operators."""
    _ran.setdefault(op, set()).add(what)


def function(op: str, backend: str) -> Kernel:
    """The function of a backend that `choose` named before."""
    kernel = _TABLE[op][backend]
    assert not isinstance(kernel, str), f"{op}: {kernel} was not chosen before"
    return kernel


def _load(op: str, backend: str) -> None:
    """Puts the function in the place of "module:function"."""
    place = _TABLE[op][backend]
    if isinstance(place, str):
        module, _, name = place.partition(":")
        _TABLE[op][backend] = getattr(importlib.import_module(module), name)


@cache
def _has_triton() -> bool:
    return importlib.util.find_spec("triton") is not None


@_while_tracing
def interpreted() -> bool:
    """Whether Triton kernels run in its interpreter (TRITON_INTERPRET=1 before their first use)."""
    return os.environ.get("TRITON_INTERPRET", "") == "1"


def _no_triton(device: torch.device) -> str:
    """Why Triton kernels cannot run on `device`; "" if they can."""
    if not _has_triton():
        return "the package triton is not installed"
    if interpreted():
        return ""
    if device.type != "cuda":
        there = "" if torch.cuda.is_available() else " and torch sees no CUDA device here"
        return f"the tensors are on {device.type}{there}"
    return _too_old(device)


@cache
def _too_old(device: torch.device) -> str:
    found = torch.cuda.get_device_capability(device)
    if found >= _OLDEST:
        return ""
    wanted = ".".join(map(str, _OLDEST))
    return f"the GPU has compute capability {'.'.join(map(str, found))} and {wanted} is the oldest that works"


def _refusal(name: str, why: str) -> str:
    return f"kernel backend {name!r} cannot run: {why}; write 'auto' or 'torch'"


def chosen() -> dict[str, str]:
    """Operator -> backend that ran (or what was noted) since `reset_chosen`; several are joined by commas.

    Where `auto` had to fall back, the reason stands behind the name: "torch (not triton: ...)".
    """
    return {op: ",".join(sorted(names)) for op, names in sorted(_ran.items())}


def reset_chosen() -> None:
    """Forgets what ran, so that a run records only its own choices."""
    _ran.clear()


Settings = tuple[str, dict[str, set[str]]]
"""The backend of all calls, and what ran."""


def settings() -> Settings:
    """What `set_backend` chose and `chosen` tells, for `put_settings`: runs of a process keep apart by it."""
    return _default, {op: set(names) for op, names in _ran.items()}


def put_settings(kept: Settings) -> None:
    """Puts back what `settings` gave."""
    global _default
    _default = kept[0]
    _ran.clear()
    _ran.update(kept[1])
