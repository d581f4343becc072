"""Kernels whose launches cost the host less.

At each launch Triton looks at every argument, for what a kernel is compiled for: types, alignment, ones.
By a profile that is a third of the host's time of a call of WKV-6. `kernel` finds what was compiled by the
arguments as they are, and hands on the addresses of tensors, which spares the driver a look at each of them.
Hooks around a launch are called where there are any, and otherwise left out.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable
from functools import partial
from operator import itemgetter
from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor
from triton import knobs
from triton.runtime import driver

Grid = tuple[int, ...]


class Ready(NamedTuple):
    """A compiled kernel, and what a launch of it needs beside grid, stream and arguments."""

    compiled: Any
    run: Callable[..., None]
    function: Any
    metadata: Any
    behind: tuple[Any, ...]
    """The values of the parameters behind a launch's arguments."""


_MOST = 4096
"""Different lists of arguments that a kernel knows; a new one costs what Triton's own launch does."""


def cdiv(a: int, b: int) -> int:
    """a / b, rounded up; `triton.cdiv` does the same for constants of a kernel, in twenty times the time."""
    return -(-a // b)


def power_of_two(n: int) -> int:
    """The smallest power of two that is not below n."""
    return 1 << max(0, n - 1).bit_length()


def described(value: Any, role: str) -> Hashable:
    """What a kernel may be compiled for of one argument: at least all that Triton tells apart.

    role: of its parameter, "constant", "special", or "" for one among the kernel's `do_not_specialize`.
    """
    kind = value.__class__
    if role == "constant" or value is None:
        return kind, value
    if isinstance(value, Tensor):
        return value.dtype, not value.data_ptr() & 15, value.get_device()
    if kind is int:
        size = (value > 0x7FFFFFFF) + (value > 0x7FFFFFFFFFFFFFFF) - (value < -0x80000000)
        return (size, not value & 15, value == 1) if role == "special" else size
    return kind if kind in (bool, float) else (kind, value)


def _role(parameter: Any) -> str:
    if parameter.is_constexpr:
        return "constant"
    return "" if parameter.do_not_specialize else "special"


def hooked() -> bool:
    """Whether somebody, a profiler say, wants to be told of launches."""
    hooks = (knobs.runtime.launch_enter_hook, knobs.runtime.launch_exit_hook)
    return any(getattr(hook, "calls", hook) for hook in hooks)


class Split:
    """Where tensors stand among arguments of these classes, and what picks the others."""

    def __init__(self, kinds: tuple[type, ...]) -> None:
        self.tensors = [i for i, kind in enumerate(kinds) if issubclass(kind, Tensor)]
        others = [i for i, kind in enumerate(kinds) if not issubclass(kind, Tensor)]
        self.others: Callable[[tuple[Any, ...]], Any] = itemgetter(*others) if others else len


class Kernel:
    """A Triton kernel, launched as it is: `kernel[grid](*arguments, **constants_and_options)`."""

    def __init__(self, fn: Any) -> None:
        self.fn = fn
        self.__doc__ = fn.__doc__
        self._compiled: dict[Hashable, Ready] = {}
        self._seen: dict[Hashable, Ready] = {}  # the same by the arguments as they were
        self._split: dict[tuple[type, ...], Split] = {}

    def __getitem__(self, grid: Grid) -> Callable[..., None]:
        return partial(self._launch, grid)

    def _launch(self, grid: Grid, /, *arguments: Any, **named: Any) -> None:
        device = driver.active.get_current_device()
        kinds = (*map(type, arguments),)
        split = self._split.get(kinds)
        if split is None:
            split = self._split[kinds] = Split(kinds)
        values = list(arguments)
        told: list[Hashable] = []
        for place in split.tensors:
            tensor = values[place]
            values[place] = address = tensor.data_ptr()
            # With the device, so that what Triton refuses is never taken for what it compiled.
            told += tensor.dtype, address & 15, tensor.get_device()
        key = (device, kinds, split.others(arguments), *told, *named, *named.values())
        found = self._seen.get(key)
        if found is None and (found := self._new(key, device, grid, arguments, named)) is None:
            return
        grid, stream = (*grid, 1, 1)[:3], driver.active.get_current_stream(device)
        if hooked():
            found.compiled[grid](*values, *found.behind, stream=stream)
            return
        # What Triton hands to hooks takes it as long as the launch itself.
        found.run(*grid, stream, found.function, found.metadata, None, None, None, *values, *found.behind)

    def _new(
        self, key: Hashable, device: int, grid: Grid, arguments: tuple[Any, ...], named: dict[str, Any]
    ) -> Ready | None:
        """What is compiled for a list of arguments that was not seen; None: Triton has launched it."""
        if len(self._seen) >= _MOST:
            self._seen.clear()
        compiled_for = (device, *named.items(), *map(described, arguments, map(_role, self.fn.params)))
        found = self._compiled.get(compiled_for)
        self._seen[key] = ready = found or self._first(grid, arguments, named)
        self._compiled[compiled_for] = ready
        return found

    def _first(self, grid: Grid, arguments: tuple[Any, ...], named: dict[str, Any]) -> Ready:
        """Launches through Triton; returns what it compiled, and the values behind the arguments."""
        compiled = self.fn[grid](*arguments, **named)
        behind = tuple(named.get(p.name, p.default) for p in self.fn.params[len(arguments) :])
        return Ready(compiled, compiled.run, compiled.function, compiled.packed_metadata, behind)


def kernel(fn: Any) -> Any:
    """Decorates a `triton.jit` function that is launched. One of Triton's interpreter stays as it is.

    So it does on AMD, where a kernel is compiled for the sizes of tensors too.
    """
    return Kernel(fn) if isinstance(fn, triton.JITFunction) and torch.version.hip is None else fn
