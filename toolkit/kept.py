"""What runs of one process work out of the same data, worked out once: the rows of a sweep share their data.

Kept in memory alone and named by everything that it depends on, so that nothing stale can be read.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable
from functools import partial
from typing import Any, TypeVar

_MOST = 16
"""Values that stay, the one used last for the longest: a few tables' worth of splits and prompts."""

_VALUES: dict[Hashable, Any] = {}  # the one used last stands last

T = TypeVar("T")


def once(key: Hashable, make: Callable[[], T]) -> T:
    """The value kept under `key`, else the one that `make` returns, which is not to be changed by anyone.

    key: all that the value depends on. Where `make` raises, nothing is kept.
    """
    found: T = _VALUES.pop(key) if key in _VALUES else make()
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
