"""The cache of blocks by itself: its limit, what it keeps, and a count that went wrong."""

from __future__ import annotations

import os

import pytest

from data.cache import BlockCache


def test_the_cache_keeps_its_limit(tmp_path):
    cache = BlockCache(tmp_path, 10_000)
    for turn in range(100):
        data = bytes([turn]) * 900
        assert cache.read(f"x/{turn}", 10, 20, lambda data=data: data) == data[10:30]
        held = [f.stat().st_size for f in (tmp_path / "x").iterdir()]
        assert sum(held) <= 10_000
    assert len(held) > 5


def test_the_cache_keeps_what_was_used_last(tmp_path):
    cache = BlockCache(tmp_path, 10_000)
    for turn in range(10):
        cache.read(f"{turn}", 0, 1, lambda: bytes(1000))
        os.utime(tmp_path / str(turn), (turn + 1, turn + 1))
    cache.read("3", 0, 1, lambda: pytest.fail("was here"))
    cache.read("new", 0, 1, lambda: bytes(1000))
    assert cache.holds("3") and cache.holds("new") and not cache.holds("0")


def test_a_cache_miscounted_by_a_killed_process_counts_anew(tmp_path):
    cache = BlockCache(tmp_path, 10_000)
    cache.read("a", 0, 1, lambda: bytes(1000))
    (tmp_path / ".total").write_text(f"{9_900:020d}")
    cache.read("b", 0, 1, lambda: bytes(1000))
    assert cache.holds("a") and int((tmp_path / ".total").read_text()) == 2000


def test_a_count_that_was_damaged_is_made_anew(tmp_path):
    cache = BlockCache(tmp_path, 10_000)
    cache.read("a", 0, 1, lambda: bytes(1000))
    (tmp_path / ".total").write_bytes(bytes(20))
    cache.read("b", 0, 1, lambda: bytes(1000))
    assert cache.holds("a") and int((tmp_path / ".total").read_text()) == 2000
