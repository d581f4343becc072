"""The plan: exactly once, the same on any number of ranks, known in constant time."""

from __future__ import annotations

import hashlib

import numpy as np
import pytest

from data.plan import Plan, divided, epoch_order


def order(n, *, seed=0, epoch=0, manifest="m", **options):
    return epoch_order(n, manifest_hash=manifest, seed=seed, epoch=epoch, **options)


@pytest.mark.parametrize("n", [1, 2, 63, 64, 65, 511, 512, 513, 4099])
@pytest.mark.parametrize(("block", "window"), [(64, 8), (1, 8), (7, 1), (5000, 3)])
def test_an_epoch_is_a_permutation(n, block, window):
    assert sorted(order(n, block=block, window=window)) == list(range(n))


def test_the_order_is_pinned():
    """Another order would make a resumed run train other samples: this must never change."""
    digest = hashlib.sha256(order(1000, seed=3, epoch=2).astype("<i8").tobytes()).hexdigest()
    full = hashlib.sha256(order(1000, seed=3, epoch=2, block=1).astype("<i8").tobytes()).hexdigest()
    assert (digest[:16], full[:16]) == ("fd6a000131cfff9f", "93f3735662f126f8")


def test_every_argument_changes_the_order():
    base = order(1000)
    for other in (order(1000, seed=1), order(1000, epoch=1), order(1000, manifest="n")):
        assert (base != other).mean() > 0.9
    assert (base == order(1000)).all()


def test_blocks_stay_near_each_other_inside_windows():
    shuffled = order(64 * 80, block=64, window=8)
    for start in range(0, len(shuffled), 512):
        assert len(np.unique(shuffled[start : start + 512] // 64)) == 8
    assert (np.diff(shuffled) == 1).mean() < 0.02


def test_a_full_shuffle_does_not_correlate_neighbours():
    shuffled = order(20_000, block=1).astype(float)
    assert abs(np.corrcoef(shuffled[:-1], shuffled[1:])[0, 1]) < 0.03


@pytest.mark.parametrize(("n", "batch"), [(1, 48), (47, 48), (48, 48), (49, 48), (997, 48), (960, 48)])
@pytest.mark.parametrize("world", [1, 2, 3, 4, 8, 16, 48])
def test_each_item_once_per_epoch_over_all_ranks(n, batch, world):
    plan = Plan(n, batch, 5, "m")
    for epoch in range(2):
        seen: list[int] = []
        for t in range(epoch * plan.steps_per_epoch, (epoch + 1) * plan.steps_per_epoch):
            for rank in range(world):
                items, weights = plan.rank_part(t, rank, world)
                assert len(items) == len(weights) == batch // world
                seen += items[weights == 1].tolist()
                assert set(weights.tolist()) <= {0.0, 1.0}
        assert sorted(seen) == list(range(n))


def test_the_global_order_does_not_depend_on_ranks():
    plan = Plan(500, 24, 1, "m")
    for world in (1, 2, 3, 12, 24):
        for t in range(30):
            parts = [plan.rank_part(t, rank, world) for rank in range(world)]
            assert (np.concatenate([p[0] for p in parts]) == plan.step(t)[0]).all()
            assert (np.concatenate([p[1] for p in parts]) == plan.step(t)[1]).all()


def test_a_step_is_known_without_those_before():
    first, second = Plan(500, 24, 1, "m"), Plan(500, 24, 1, "m")
    walked = [first.step(t)[0].tolist() for t in range(200)]
    assert second.step(199)[0].tolist() == walked[199]
    assert walked[0] != walked[21]


def test_the_tail_is_filled_with_its_own_items_at_weight_0():
    plan = Plan(10, 8, 0, "m")
    items, weights = plan.step(1)
    assert weights.tolist() == [1, 1, 0, 0, 0, 0, 0, 0]
    assert set(items.tolist()) == set(items[:2].tolist())


@pytest.mark.parametrize(
    ("total", "parts", "near"),
    [(48, 5, "use 4 or 6 ranks"), (48, 100, "use 24 or 48 ranks"), (7, 3, "use 1 or 7 ranks")],
)
def test_what_does_not_divide_is_refused_with_what_does(total, parts, near):
    with pytest.raises(
        ValueError, match=rf"global_batch={total} cannot be shared equally over {parts} ranks: {near}"
    ):
        divided(total, parts, what="global_batch", over="ranks")


def test_impossible_plans_are_refused():
    with pytest.raises(ValueError, match=r"no examples"):
        Plan(0, 8, 0, "m")
    with pytest.raises(ValueError, match=r"global_batch=0 must be at least 1"):
        Plan(8, 0, 0, "m")
    with pytest.raises(ValueError, match=r"rank 4 is not one of 4 ranks"):
        Plan(8, 8, 0, "m").rank_part(0, 4, 4)
    with pytest.raises(ValueError, match=r"block=0 and window=8 must be at least 1"):
        order(10, block=0)
