"""Statistics over seeds, against tables, values worked by hand and simulated data with a known effect."""

from __future__ import annotations

import math
import random

import pytest

from toolkit.stats import first_step, holm, over_training, paired, spread, t_quantile, t_two_sided

# Critical values of Student's t, two-sided 5 % and 1 %, as printed in tables.
TABLE = [(1, 12.706, 63.657), (2, 4.303, 9.925), (4, 2.776, 4.604), (9, 2.262, 3.250), (30, 2.042, 2.750)]


@pytest.mark.parametrize(("df", "five", "one"), TABLE)
def test_students_t_is_that_of_printed_tables(df: int, five: float, one: float) -> None:
    assert t_two_sided(five, df) == pytest.approx(0.05, rel=1e-3)
    assert t_two_sided(-one, df) == pytest.approx(0.01, rel=2e-3)
    assert t_quantile(0.05, df) == pytest.approx(five, abs=5e-4)


def test_students_t_in_closed_form() -> None:
    assert t_two_sided(0, 5) == 1.0 and t_two_sided(math.inf, 3) == pytest.approx(0.0, abs=1e-15)
    assert t_two_sided(1, 1) == pytest.approx(0.5)  # Cauchy: 1 - 2 atan(t) / pi
    assert t_two_sided(2, 2) == pytest.approx(1 - 2 / math.sqrt(6))  # 1 - t / sqrt(t^2 + 2)
    with pytest.raises(ValueError, match="df=0"):
        t_two_sided(1, 0)


def test_paired_differences_by_hand() -> None:
    """Differences 1, 2, 3: mean 2, standard deviation 1, t = 2 sqrt(3), p = 1 - t / sqrt(t^2 + 2)."""
    found = paired({0: 11, 1: 12, 2: 13, 7: 99}, {0: 10, 1: 10, 2: 10, 8: 0})
    assert found is not None and (found.n, found.mean, found.ahead) == (3, 2, 3)
    t = 2 * math.sqrt(3)
    assert found.p == pytest.approx(1 - t / math.sqrt(t * t + 2)) and found.p == pytest.approx(
        0.0742, abs=1e-4
    )
    assert found.half95 == pytest.approx(4.3027 / math.sqrt(3), rel=1e-4)
    assert not found.decided


def test_too_few_seeds_or_no_spread() -> None:
    assert paired({0: 0.5}, {1: 0.5}) is None
    one = paired({0: 0.7}, {0: 0.5})
    assert one is not None and one.mean == pytest.approx(0.2) and one.p is one.half95 is None
    assert not one.decided
    same = paired({s: 0.5 for s in range(3)}, {s: 0.5 for s in range(3)})
    assert same is not None and same.p == 1.0
    always = paired({s: 0.75 for s in range(3)}, {s: 0.5 for s in range(3)})  # sign flips: 2 of 8 as extreme
    assert always is not None and always.p == 0.25 and always.half95 is None
    assert spread([0.5]) is None and spread([1, 2, 3]) == 1


def simulated(effect: float, *, seeds: int, rng: random.Random) -> bool:
    """Whether an effect, in deviations of the difference, is decided; both arms share a level per seed."""
    level = [rng.gauss(0.6, 0.2) for _ in range(seeds)]
    noise = 0.05 / math.sqrt(2)
    a = {s: x + 0.05 * effect + rng.gauss(0, noise) for s, x in enumerate(level)}
    b = {s: x + rng.gauss(0, noise) for s, x in enumerate(level)}
    found = paired(a, b)
    assert found is not None
    return found.decided


def test_simulated_arms_are_told_apart_as_often_as_theory_says() -> None:
    """Five seeds: 5 % false finds; power 0.40 at one deviation and 0.91 at two (noncentral t)."""
    rng = random.Random(0)
    share = {e: sum(simulated(e, seeds=5, rng=rng) for _ in range(4000)) / 4000 for e in (0.0, 1.0, 2.0)}
    assert share[0.0] == pytest.approx(0.05, abs=0.012)
    assert share[1.0] == pytest.approx(0.401, abs=0.025)
    assert share[2.0] == pytest.approx(0.911, abs=0.025)


def test_holm_by_hand() -> None:
    assert holm([0.01, 0.04, 0.03]) == pytest.approx([0.03, 0.06, 0.06])
    assert holm([0.5, 0.9]) == pytest.approx([1.0, 1.0]) and holm([]) == []


def test_steps_and_area_of_a_curve() -> None:
    curve = [(100, 0.5), (200, 0.9), (300, 0.8), (500, 1.0)]
    assert first_step(curve, 0.9) == 200 and first_step(curve, 0.95) == 500
    assert first_step(curve[:1], 0.9) == math.inf
    assert over_training(curve) == pytest.approx((70 + 85 + 180) / 400)
    assert over_training(curve[:1]) is None
