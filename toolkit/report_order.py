"""Which arm is ahead: paired differences over seeds, and in words whether an expected order holds."""

from __future__ import annotations

import itertools
import statistics
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Literal

from toolkit.explain import fail
from toolkit.report_table import ALL, Row, Table
from toolkit.stats import ALPHA, Paired, holm, paired

CEILING = 0.98
"""Two arms above this accuracy have nothing left to differ in."""

FLOOR = 0.03
"""Two arms less than this above what can be had without the picture have learned nothing to differ in."""

MANY = 4
"""Arms of one key up to which every pair is compared; more are compared with the first and as asked."""

Word = Literal["holds", "reversed", "undecided", "ceiling", "floor", "missing"]


@dataclass(frozen=True)
class Pair:
    """Two arms that differ in one key; asked: the recipe expects `a` ahead of `b`."""

    a: Row
    b: Row
    asked: bool

    @property
    def name(self) -> str:
        return f"{self.a.label} over {self.b.label}"

    def at_end(self, kind: str) -> Paired | None:
        return paired(self.a.final(kind), self.b.final(kind))

    def over_training(self, kind: str) -> Paired | None:
        return paired(self.a.area(kind), self.b.area(kind))

    def word(self, kind: str) -> Word:
        """The verdict on `a` over `b`: by the paired t test, at ALPHA.

        What the test leaves open is "ceiling" if both solve the type and "floor" if neither learned it.
        """
        found = self.at_end(kind)
        if found is None:
            return "missing"
        if found.decided:
            return "holds" if found.mean > 0 else "reversed"
        low, high = sorted(row.mean(kind) or 0.0 for row in (self.a, self.b))
        floor = self.a.floor(kind)
        if low >= CEILING:
            return "ceiling"
        return "floor" if floor is not None and high < floor + FLOOR else "undecided"


def expected(table: Table) -> list[tuple[str, str]]:
    """What `report.order` asks: (better, worse), every ordered pair of a chain; raises BadRecipe."""
    found: list[tuple[str, str]] = []
    for chain in table.order:
        names = [name.strip() for name in chain.split(">")]
        if len(names) < 2 or not all(names) or len(set(names)) < len(names):
            what = f"{chain!r} is no order of different rows"
            raise fail(table.recipe, "report.order", what, fix='write it as "2d > uni"')
        found += [pair for pair in itertools.combinations(names, 2) if pair not in found]
    return found


def pairs(table: Table) -> list[Pair]:
    """Every two arms that differ in exactly one key, those whose order is asked first."""
    asked = expected(table)
    found = []
    for earlier, later in itertools.combinations(table.rows, 2):
        sides = _sides(earlier, later)
        if sides is None:
            continue
        if any((left, right) in asked for left, right in zip(*sides, strict=True)):
            found.append(Pair(earlier, later, asked=True))
        elif any((right, left) in asked for left, right in zip(*sides, strict=True)):
            found.append(Pair(later, earlier, asked=True))
        elif len(earlier.parts) > 1 or len(table.rows) <= MANY or earlier is table.rows[0]:
            found.append(Pair(later, earlier, asked=False))
    return sorted(found, key=lambda pair: not pair.asked)


def _sides(a: Row, b: Row) -> tuple[tuple[str, str, str], tuple[str, str, str]] | None:
    """By which words an order may name two arms: name, label, and the one key in which they differ."""
    other = [(x, y) for x, y in zip(a.parts, b.parts, strict=True) if x != y]
    if len(other) != 1:
        return None
    return (a.name, a.label, other[0][0]), (b.name, b.label, other[0][1])


def words(table: Table) -> Iterator[str]:
    """Markdown lines: whether the expected order holds, per pair and question type, from the data alone."""
    found = pairs(table)
    asked = [pair for pair in found if pair.asked]
    if not table.runs:
        return
    if asked:
        yield summary(table, asked)
        yield ""
        yield from (f"- {sentence(table, pair)}" for pair in asked)
        yield from robust(table, asked)
    else:
        yield "This table expects no order."
    rest = [text for pair in found if not pair.asked for text in _decided(table, pair)]
    if rest:
        yield ""
        yield "Decided besides: " + "; ".join(rest) + "."


def summary(table: Table, asked: list[Pair]) -> str:
    """One sentence that counts the verdicts over pairs and question types."""
    verdicts = [pair.word(kind) for pair in asked for kind in table.types]
    n = len(verdicts)
    counts = Counter(verdicts)
    said: dict[Word, str] = {
        "holds": f"holds in {counts['holds']}",
        "reversed": f"is reversed in {counts['reversed']}",
        "undecided": f"is undecided at {at_seeds(asked)} in {counts['undecided']}",
        "ceiling": f"has nothing left to show in {counts['ceiling']}, where both arms solve the task",
        "floor": f"has nothing to show yet in {counts['floor']}, where neither arm learned the task",
        "missing": f"lacks runs in {counts['missing']}",
    }
    told = [text for word, text in said.items() if counts[word] or word == "holds"]
    types = f"{len(table.types)} question type{'s' * (len(table.types) != 1)}"
    of = f"{len(asked)} pair{'s' * (len(asked) != 1)} by {types}"
    return f"Of {n} comparisons ({of}) the expected order {', '.join(told)}."


def robust(table: Table, asked: list[Pair]) -> Iterator[str]:
    """Which of the decided comparisons are left once their number is corrected for."""
    tested = [(pair, kind, p) for pair in asked for kind in table.types if (p := _p(pair, kind)) is not None]
    decided = sum(p < ALPHA for _, _, p in tested)
    if not decided:
        return
    left = [
        f"{pair.name} on {_named(kind)}"
        for (pair, kind, _), p in zip(tested, holm([p for _, _, p in tested]), strict=True)
        if p < ALPHA
    ]
    yield ""
    yield (
        f"Corrected for {len(tested)} comparisons (Holm), {len(left)} of the {decided} decided "
        f"{'is' if len(left) == 1 else 'are'} left{': ' * bool(left)}{', '.join(left)}."
    )


def _p(pair: Pair, kind: str) -> float | None:
    found = pair.at_end(kind)
    return None if found is None else found.p


def at_seeds(found: list[Pair]) -> str:
    """`5 seeds`, `2 to 5 seeds`, `one seed`: how many the comparisons rest on."""
    counts = sorted({p.n for pair in found if (p := pair.at_end(ALL))}) or [0]
    if counts == [1]:
        return "one seed"
    return f"{counts[0]} seeds" if len(counts) == 1 else f"{counts[0]} to {counts[-1]} seeds"


def sentence(table: Table, pair: Pair) -> str:
    """What the paper says of a pair, and where it holds here, where it is reversed, where undecided."""
    head = f"**{pair.name}** ({paper(table.published, pair)})"
    total = pair.at_end(ALL)
    if total is None:
        return f"{head}: no seed was run of both."
    ahead = f"ahead in {total.ahead} of {total.n} seeds" if total.n > 1 else "one seed"
    told = [f"over all questions {difference(total)}, {ahead}"] if table.types != [ALL] else []
    for word, text in (
        ("holds", "holds on"),
        ("reversed", "reversed on"),
        ("undecided", "undecided at this number of seeds on"),
        ("ceiling", f"both above {CEILING:.0%} on".replace("%", " %")),
        ("floor", "neither arm above the floors on"),
        ("missing", "not run on"),
    ):
        kinds = [kind for kind in table.types if pair.word(kind) == word]
        if kinds:
            told.append(f"{text} " + ", ".join(f"{_named(k)} ({difference(pair.at_end(k))})" for k in kinds))
    return f"{head}: {'; '.join(told)}."


def _named(kind: str) -> str:
    return "all questions" if kind == ALL else kind


def difference(found: Paired | None) -> str:
    """`+17.2 points, p = 0.004`."""
    if found is None:
        return "no common seed"
    points = f"{points_of(found.mean)} points"
    return points if found.p is None else f"{points}, p {p_value(found.p)}"


def points_of(value: float) -> str:
    """A signed share in points of a percent."""
    return f"{100 * value:+.1f}".replace("-", "−")


def p_value(p: float) -> str:
    """`= 0.004`, `< 0.001`."""
    return "< 0.001" if p < 0.001 else f"= {p:.3f}" if p < 0.1 else f"= {p:.2f}"


def paper(published: Mapping[str, Mapping[str, float]], pair: Pair) -> str:
    """On how many of the paper's benchmarks the first of a pair is ahead, and by how much on average."""
    ours = [row for row in (pair.a, pair.b) if row.name not in published]
    if ours:
        return "not in the paper: " + ", ".join(row.label for row in ours)
    a, b = published[pair.a.name], published[pair.b.name]
    found = [a[bench] - b[bench] for bench in a if bench in b]
    if not found:
        return "no benchmark in common in the paper"
    mean = f"{statistics.fmean(found):+.1f}".replace("-", "−")
    return f"paper: ahead on {sum(d > 0 for d in found)} of {len(found)} benchmarks, {mean} on average"


def _decided(table: Table, pair: Pair) -> Iterator[str]:
    for kind in table.types:
        found = pair.at_end(kind)
        if found is not None and found.decided:
            a, b = (pair.a, pair.b) if found.mean > 0 else (pair.b, pair.a)
            size = points_of(abs(found.mean))
            yield f"{a.label} over {b.label} on {_named(kind)} ({size} points, p {p_value(found.p or 0.0)})"


def fine_print(table: Table) -> str:
    """How the differences were tested, and how many would be decided by chance alone."""
    found = pairs(table)
    n = len(found) * len(table.types)
    if not any(p.p is not None for pair in found if (p := pair.at_end(ALL))):
        return "Every arm ran with one seed: no spread and no p-value can be given, so no order is decided."
    return (
        f"p: two-sided paired t test over seeds, decided below {ALPHA}; not corrected for the {n} "
        f"comparisons of this table, of which about {n * ALPHA:.1f} would be decided by chance if no arm "
        "differed. "
        "It speaks of new seeds on this test split; the interval clustered by image speaks of new pictures."
    )
