"""Random numbers for generated data: the same on every machine and in every version of numpy."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from typing import TypeVar

import numpy as np

T = TypeVar("T")

_AHEAD = 4096


class Stream:
    """Draws from a stream named by `key`; equal keys give equal draws.

    Only raw Philox output is used: numpy promises that, and not what its distributions make of it.
    """

    def __init__(self, *key: str | int) -> None:
        digest = hashlib.sha256(repr(key).encode()).digest()
        self._raw = np.random.Philox(key=int.from_bytes(digest[:16], "little"))
        self._ahead: list[int] = []

    def below(self, n: int) -> int:
        """One of 0..n-1, all equally likely (up to n / 2**64)."""
        if not self._ahead:
            self._ahead = self._raw.random_raw(_AHEAD).tolist()
        return (self._ahead.pop() * n) >> 64

    def between(self, low: int, high: int) -> int:
        """One of low..high, both included."""
        return low + self.below(high - low + 1)

    def pick(self, items: Sequence[T]) -> T:
        return items[self.below(len(items))]

    def sample(self, items: Sequence[T], k: int) -> list[T]:
        """k different items in random order."""
        pool = list(items)
        for i in range(k):
            j = self.between(i, len(pool) - 1)
            pool[i], pool[j] = pool[j], pool[i]
        return pool[:k]
