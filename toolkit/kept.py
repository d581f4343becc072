"""What runs of one process work out of the same data, worked out once: the rows of a sweep share their data.

Kept in memory alone and named by everything that it depends on, so that nothing stale can be read.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable
from functools import partial
from typing import Any, TypeVar

_MOST = 16
"""Values that stay, the one used last for the longest: a few tables' worth of splits and prompts."""

_LARGEST = 256 << 20
"""Bytes of a value that may stay: a process with large data has few runs, and better use for its memory."""

_VALUES: dict[Hashable, Any] = {}  # the one used last stands last

T = TypeVar("T")


def once(key: Hashable, make: Callable[[], T], *, size: Callable[[T], int] = lambda value: 0) -> T:
    """The value kept under `key`, else the one that `make` returns, which is not to be changed by anyone.

    key: all that the value depends on. size: its bytes; one above _LARGEST is not kept. Where `make` raises,
    nothing is kept.
    """
    found: T = _VALUES.pop(key) if key in _VALUES else make()
    if size(found) > _LARGEST:
        return found
    _VALUES[key] = found
    while len(_VALUES) > _MOST:
        del _VALUES[next(iter(_VALUES))]
    return found


def named(made: Any) -> Hashable:
    """What tells components that `register.bind` made apart: the factory and the values given to it."""
    if isinstance(made, partial):
        return (made.func, *map(named, made.args), *((k, named(v)) for k, v in sorted(made.keywords.items())))
    if isinstance(made, list | tuple):
        return tuple(map(named, made))
    return made if isinstance(made, Hashable) else repr(made)
