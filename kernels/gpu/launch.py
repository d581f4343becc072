"""Kernels whose launches cost the host less.

At each launch Triton looks at every argument, for what a kernel is compiled for: types, alignment, ones.
By a profile that is a third of the host's time of a call of WKV-6. `kernel` finds what was compiled by the
arguments as they are, and hands on the addresses of tensors, which spares the driver a look at each of them.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable
from functools import partial
from typing import Any

import torch
import triton
from torch import Tensor
from triton.runtime import driver

Grid = tuple[int, ...]
Compiled = tuple[Any, tuple[Any, ...]]
"""A compiled kernel, and the values of the parameters behind a launch's arguments."""

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


class Kernel:
    """A Triton kernel, launched as it is: `kernel[grid](*arguments, **constants_and_options)`."""

    def __init__(self, fn: Any) -> None:
        self.fn = fn
        self.__doc__ = fn.__doc__
        self._compiled: dict[Hashable, Compiled] = {}
        self._seen: dict[Hashable, Compiled] = {}  # the same by the arguments as they were

    def __getitem__(self, grid: Grid) -> Callable[..., None]:
        return partial(self._launch, grid)

    def _launch(self, grid: Grid, /, *arguments: Any, **named: Any) -> None:
        device = driver.active.get_current_device()
        values: list[Any] = []
        told: list[Hashable] = []
        for value in arguments:
            if isinstance(value, Tensor):
                address = value.data_ptr()
                values.append(address)
                told.append(value.dtype)
                told.append(address & 15)
                told.append(value.get_device())  # what Triton refuses is never taken for what it compiled
            else:
                values.append(value)
                told.append(value)
        key = (device, *told, *map(type, told), *named.items())
        found = self._seen.get(key)
        if found is None:
            if len(self._seen) >= _MOST:
                self._seen.clear()
            options = (device, *named.items())
            compiled_for = (*options, *map(described, arguments, map(_role, self.fn.params)))
            found = self._compiled.get(compiled_for)
            if found is None:
                self._seen[key] = self._compiled[compiled_for] = self._first(grid, arguments, named)
                return
            self._seen[key] = found
        compiled, rest = found
        compiled[(*grid, 1, 1)[:3]](*values, *rest, stream=driver.active.get_current_stream(device))

    def _first(self, grid: Grid, arguments: tuple[Any, ...], named: dict[str, Any]) -> Compiled:
        """Launches through Triton; returns what it compiled, and the values behind the arguments."""
        compiled = self.fn[grid](*arguments, **named)
        behind = self.fn.params[len(arguments) :]
        return compiled, tuple(named.get(p.name, p.default) for p in behind)


def kernel(fn: Any) -> Any:
    """Decorates a `triton.jit` function that is launched. One of Triton's interpreter stays as it is.

    So it does on AMD, where a kernel is compiled for the sizes of tensors too.
    """
    return Kernel(fn) if isinstance(fn, triton.JITFunction) and torch.version.hip is None else fn
