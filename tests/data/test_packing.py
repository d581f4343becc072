"""Length buckets and token budgets."""

from __future__ import annotations

from collections import Counter

import numpy as np
import pytest

from data.mixture import Mixture, Source
from data.packing import Bucketed, Packed, Packing
from data.plan import Plan

LENGTHS = np.random.default_rng(0).integers(5, 200, 1003)


def bucketed(steps=8, *, seed=0, batch=24):
    return Bucketed(Plan(len(LENGTHS), batch, 1, "m", block=1), LENGTHS, steps, seed)


def packed(*, groups=6, seed=0, **options):
    packing = Packing(LENGTHS, **{"budget": 1024, **options})
    return Packed((packing,), Plan(len(packing.packs), groups, seed, "m", block=1))


@pytest.mark.parametrize("steps", [1, 8, 5, 100])
def test_buckets_keep_every_sample_once(steps):
    plan = bucketed(steps)
    for epoch in (0, 1):
        seen = Counter()
        for t in range(epoch * plan.steps_per_epoch, (epoch + 1) * plan.steps_per_epoch):
            items, weights = plan.step(t)
            assert len(items) == 24
            seen.update(items[weights > 0].tolist())
        assert seen == Counter(range(len(LENGTHS)))


def padding(plan, steps):
    lengths = [LENGTHS[plan.step(t)[0]] for t in range(steps)]
    return sum(part.max() * len(part) - part.sum() for part in lengths)


def test_buckets_save_padding():
    assert padding(bucketed(16), 32) < 0.3 * padding(bucketed(1), 32)


def test_buckets_do_not_come_by_length():
    means = [LENGTHS[bucketed(16).step(t)[0]].mean() for t in range(16)]
    assert means != sorted(means) and means != sorted(means, reverse=True)


def test_a_bucketed_step_is_known_without_those_before():
    walked = bucketed()
    steps = [walked.step(t)[0].tolist() for t in range(100)]
    fresh = bucketed()
    for t in (99, 0, 41, 42, 43):
        assert fresh.step(t)[0].tolist() == steps[t]


def test_buckets_of_a_mixture():
    sources = (Source("a", 500, "x", 0.5), Source("b", 503, "y", 0.5))
    inner = Mixture(sources, 24, 0)
    plan = Bucketed(inner, LENGTHS, 4, 0)
    ours = np.concatenate([plan.step(t)[0] for t in range(4)])
    theirs = np.concatenate([inner.step(t)[0] for t in range(4)])
    assert Counter(ours.tolist()) == Counter(theirs.tolist())


@pytest.mark.parametrize("measure", ["padded", "tokens"])
@pytest.mark.parametrize("near", [64, 10_000])
def test_packing_keeps_the_budget_and_every_sample(measure, near):
    plan = packed(measure=measure, near=near)
    for epoch in (0, 1):
        seen = Counter()
        for t in range(epoch * plan.steps_per_epoch, (epoch + 1) * plan.steps_per_epoch):
            groups = plan.step(t)
            assert len(groups) == 6
            for items, weight in groups:
                size = LENGTHS[items]
                assert (size.max() * len(size) if measure == "padded" else size.sum()) <= 1024
                seen.update(items.tolist() if weight else [])
        assert seen == Counter(range(len(LENGTHS)))


def test_packing_by_tokens_is_tight():
    plan = packed(measure="tokens")
    assert len(plan.packs) <= LENGTHS.sum() / 1024 * 1.02 + 1


def test_packing_padded_wastes_little():
    packs = packed().packs
    held = sum(LENGTHS[p].max() * len(p) for p in packs)
    assert LENGTHS.sum() / held > 0.95
    assert len(packs) < LENGTHS.sum() / 1024 * 1.25


def test_near_keeps_groups_among_neighbours():
    assert all(items.max() // 64 == items.min() // 64 for items in packed(near=64).packs)


def test_groups_change_their_order_with_the_epoch():
    plan = packed()
    first, second = ([i.tolist() for i, _ in plan.step(t)] for t in (0, plan.steps_per_epoch))
    assert first != second


@pytest.mark.parametrize("world", [1, 2, 3, 6])
def test_groups_are_shared_by_ranks(world):
    plan = packed()
    for t in (0, 3, plan.steps_per_epoch - 1):
        shares = [plan.rank_part(t, rank, world) for rank in range(world)]
        assert len({len(share) for share in shares}) == 1
        flat = [items.tolist() for share in shares for items, _ in share]
        assert flat == [items.tolist() for items, _ in plan.step(t)]


def test_impossible_packings_are_refused():
    with pytest.raises(ValueError, match=r"has 199 tokens, more than the budget of 100 tokens a group"):
        packed(budget=100)
    with pytest.raises(ValueError, match=r"packing needs samples"):
        Packing(LENGTHS[:0], 1024)
    with pytest.raises(ValueError, match=r"the plan is for 5 groups, there are "):
        Packed((Packing(LENGTHS, 1024),), Plan(5, 1, 0, "m"))
    with pytest.raises(ValueError, match=r"a bucket of 0 steps holds nothing"):
        bucketed(0)
    with pytest.raises(ValueError, match=r"2 lengths for 5 samples"):
        Bucketed(Plan(5, 1, 0, "m"), np.array([1, 2]), 1, 0)


def test_states_name_their_order():
    plan = packed()
    assert packed().resume(plan.state(17)) == 17
    with pytest.raises(ValueError, match=r"stands in the data order"):
        packed(budget=2048).resume(plan.state(17))
    other = LENGTHS.copy()
    other[0] += 1
    with pytest.raises(ValueError, match=r"stands in the data order"):
        Bucketed(bucketed().inner, other, 8, 0).resume(bucketed().state(2))
