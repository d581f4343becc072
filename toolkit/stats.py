"""Statistics over seeds: spread, paired differences with Student's t, steps to a level. No scipy.

Seeds pair arms: run s of every arm reads the same questions in the same order. A paired t test then asks
whether the mean difference is larger than its spread over seeds explains; an exact sign-flip test could not
go below 2^(1-n), 0.06 for five seeds.
"""

from __future__ import annotations

import itertools
import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

ALPHA = 0.05
"""Two-sided level below which a difference counts as decided."""

Curve = Sequence[tuple[int, float]]
"""(step, accuracy), steps rising."""


@dataclass(frozen=True)
class Paired:
    """Differences a - b over the seeds that both arms have; `half95`, `p`: None where unknown.

    mean: of the differences; half95: half of its 95 % interval; p: two-sided; ahead: seeds with a > b.
    """

    n: int
    mean: float
    half95: float | None
    p: float | None
    ahead: int

    @property
    def decided(self) -> bool:
        return self.p is not None and self.p < ALPHA


def spread(values: Sequence[float]) -> float | None:
    """Standard deviation over seeds; None for a single seed."""
    return statistics.stdev(values) if len(values) > 1 else None


def paired(a: Mapping[int, float], b: Mapping[int, float]) -> Paired | None:
    """Paired t test of a - b, both seed -> value; None without a common seed.

    Differences that are all the same have no spread to measure by: no interval, and the p of the exact
    sign-flip test, 2^(1-n), or 1 if they are all zero.
    """
    found = [a[seed] - b[seed] for seed in sorted(a.keys() & b.keys())]
    if not found:
        return None
    n, mean, ahead = len(found), statistics.fmean(found), sum(d > 0 for d in found)
    if n == 1:
        return Paired(n, mean, None, None, ahead)
    error = statistics.stdev(found) / math.sqrt(n)
    if error < 1e-12:
        return Paired(n, mean, None, 2.0 ** (1 - n) if abs(mean) > 1e-12 else 1.0, ahead)
    return Paired(n, mean, t_quantile(ALPHA, n - 1) * error, t_two_sided(mean / error, n - 1), ahead)


def holm(ps: Sequence[float]) -> list[float]:
    """p values corrected for being several, after Holm (1979): the chance of any false find stays below."""
    adjusted = [0.0] * len(ps)
    highest = 0.0
    for rank, i in enumerate(sorted(range(len(ps)), key=lambda i: ps[i])):
        highest = max(highest, min(1.0, (len(ps) - rank) * ps[i]))
        adjusted[i] = highest
    return adjusted


def t_two_sided(t: float, df: int) -> float:
    """P(|T| >= |t|) of Student's t with `df` degrees of freedom, by its finite series for whole df.

    Abramowitz and Stegun, 26.7.3 and 26.7.4.
    """
    if df < 1:
        raise ValueError(f"df={df}: Student's t needs at least one degree of freedom")
    angle = math.atan(abs(t) / math.sqrt(df))
    square = math.cos(angle) ** 2
    odd = df % 2
    term = math.sin(angle) * (math.cos(angle) if odd else 1.0)
    total = 0.0
    for k in range(2 + odd, df + 1, 2):
        total += term
        term *= square * (k - 1) / k
    inside = 2 / math.pi * (angle + total) if odd else total
    return min(1.0, max(0.0, 1.0 - inside))


def t_quantile(p: float, df: int) -> float:
    """The t with P(|T| >= t) = p, by bisection."""
    low, high = 0.0, 1.0
    while t_two_sided(high, df) > p:
        high *= 2
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (middle, high) if t_two_sided(middle, df) > p else (low, middle)
    return high


def first_step(curve: Curve, level: float) -> float:
    """The first step at which the accuracy was at or above `level`; infinity if it never was."""
    return next((float(step) for step, accuracy in curve if accuracy >= level), math.inf)


def over_training(curve: Curve) -> float | None:
    """Mean accuracy over the evaluated steps: the area under the curve by trapezoids over its span.

    None for fewer than two points.
    """
    if len(curve) < 2:
        return None
    pieces = itertools.pairwise(curve)
    area = sum((s1 - s0) * (a0 + a1) / 2 for (s0, a0), (s1, a1) in pieces)
    return area / (curve[-1][0] - curve[0][0])
