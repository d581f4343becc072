"""Mixing sources: shares, epochs of each source, and nothing remembered but the step."""

from __future__ import annotations

from collections import Counter

import numpy as np
import pytest

from data.mixture import PERIOD, Mixture, Source, quotas
from data.plan import Plan


def mix(sizes=(700, 2000, 90), shares=(0.5, 0.35, 0.15), *, batch=48, seed=0):
    named = zip("abc", sizes, shares, strict=False)
    return Mixture(tuple(Source(name, n, f"hash-{name}", share) for name, n, share in named), batch, seed)


def walked(plan, steps):
    return np.concatenate([plan.step(t)[0] for t in range(steps)])


def source_of(plan, items):
    ends = np.cumsum([source.n for source in plan.sources])
    return np.searchsorted(ends, items, side="right")


@pytest.mark.parametrize("shares", [(0.5, 0.35, 0.15), (1, 1, 1), (0.9, 0.09, 0.01), (3, 7)])
def test_every_thousand_samples_hold_the_shares(shares):
    plan = mix(shares=shares)
    which = source_of(plan, walked(plan, 120))
    for k, share in enumerate(shares):
        count = np.cumsum(np.concatenate([[0], which == k]))
        in_window = count[PERIOD:] - count[:-PERIOD]
        assert abs(in_window - PERIOD * share / sum(shares)).max() < 1


def test_sources_are_spread_evenly_and_not_in_runs():
    which = source_of(mix(shares=(0.75, 0.2, 0.05)), walked(mix(shares=(0.75, 0.2, 0.05)), 40))
    for k, share in ((1, 0.2), (2, 0.05)):
        gaps = np.diff(np.flatnonzero(which == k))
        assert gaps.max() <= 2 / share


def test_each_source_is_walked_in_its_own_epochs():
    plan = mix()
    items = walked(plan, 200)
    which, start = source_of(plan, items), 0
    for k, source in enumerate(plan.sources):
        mine = items[which == k] - start
        for first in range(0, len(mine) - source.n, source.n):
            assert sorted(mine[first : first + source.n]) == list(range(source.n))
        start += source.n
    small = items[which == 2]
    assert (small[:90] != small[90:180]).any()


def test_a_step_is_known_without_those_before():
    steps = [mix().step(t)[0].tolist() for t in range(100)]
    fresh = mix()
    for t in (99, 3, 57, 56, 98):
        assert fresh.step(t)[0].tolist() == steps[t]


def test_ranks_share_the_same_steps():
    for world in (1, 2, 3, 16, 48):
        for t in (0, 7, 55):
            parts = [mix().rank_part(t, rank, world)[0] for rank in range(world)]
            assert (np.concatenate(parts) == mix().step(t)[0]).all()


def test_no_slot_is_wasted():
    assert all((mix().step(t)[1] == 1).all() for t in range(70))


def test_quotas_are_rounded_by_largest_remainder():
    thirds = quotas([Source(name, 1, "", 1.0) for name in "abc"])
    assert sorted(thirds) == [333, 333, 334]
    assert quotas([Source("a", 1, "", 0.9994), Source("b", 1, "", 0.0006)]) == [999, 1]


@pytest.mark.parametrize(
    ("sizes", "shares", "message"),
    [
        ((5, 0), (1, 1), "source b has no examples"),
        ((5, 5), (1, 0.0001), "the share of b is less than 1 in 1,000 samples"),
        ((5, 5), (1, -1), "the share of b is -1; a share is a number above 0"),
        ((5, 5), (1, float("nan")), "the share of b is nan"),
        ((), (), "a mixture needs a source"),
    ],
)
def test_impossible_mixtures_are_refused(sizes, shares, message):
    with pytest.raises(ValueError, match=message):
        mix(sizes, shares)


def test_the_state_is_the_step_and_belongs_to_one_order():
    plan = mix()
    for t in (0, 1, 57, 58, 500):
        state = plan.state(t)
        assert set(state) == {"plan", "epoch", "step"}
        assert mix().resume(state) == t
    for other in (mix(seed=1), mix(batch=24), mix(shares=(0.5, 0.3, 0.2)), Plan(2790, 48, 0, "m")):
        with pytest.raises(ValueError, match=r"stands in the data order .*, this run's is"):
            other.resume(plan.state(3))


def test_a_small_source_repeats_within_a_mixture():
    seen = Counter(walked(mix((4, 1000), (0.5, 0.5), batch=16), 10).tolist())
    assert {seen[k] for k in range(4)} == {20}
