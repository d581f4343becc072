"""`python -m toolkit.data inspect [FOLDER] [key=value ...] [--plot [FILE]]`: what a data source holds."""

from __future__ import annotations

import argparse
from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from toolkit import compose, register
from toolkit.explain import COMMAND_LINE, fail

if TYPE_CHECKING:
    from data.reader import ShardReader
    from data.records import Example

_SHOWN = 10
"""Answers listed of a type; more are counted."""
_FORMATS = (".png", ".svg", ".pdf")


@dataclass(frozen=True)
class Facts:
    """One question type of one split. chance and blind are measured against the training split."""

    kind: str
    n: int
    texts: int
    answers: Mapping[str, int]
    chance: float
    majority: float
    blind: float


def main(words: list[str]) -> int:
    """Returns the exit code; raises BadRecipe for a request that cannot be run."""
    parser = argparse.ArgumentParser(
        prog="python -m toolkit.data inspect", description=__doc__, allow_abbrev=False
    )
    parser.add_argument(
        "overrides", nargs="*", metavar="FOLDER|key=value", help="shards, or a recipe's settings"
    )
    parser.add_argument("--samples", type=int, default=1, metavar="N", help="samples printed of each split")
    parser.add_argument(
        "--plot", nargs="?", const="", metavar="FILE", help="samples with questions and answers, as a picture"
    )
    args = parser.parse_intermixed_args(words)
    if args.plot and Path(args.plot).suffix not in _FORMATS:
        what = f"{args.plot!r} is no picture file ({', '.join(_FORMATS)})"
        raise fail(COMMAND_LINE, "--plot", what, fix="--plot samples.png, or --plot as the last word")
    overrides = [word for given in args.overrides for word in settings(given)]
    request = compose.understand(overrides)
    if request.multirun:
        what = "a table was chosen; its rows share one data source"
        raise fail(COMMAND_LINE, "recipe", what, fix="leave recipe= out, or name one row")
    config = compose.compose(request.jobs[0], complete=True)
    name = str(config["data"]["name"])
    try:
        readers = _readers(config)
    except ValueError as error:
        raise fail(request.jobs[0].plan.choices["data"].place, "", str(error)) from error
    from toolkit.data_samples import Rendering, show

    rendering = Rendering.of(config)
    inspect(readers)
    for split, reader in readers.items():
        show(split, reader, rendering, args.samples)
    if args.plot is not None:
        from toolkit.data_plot import draw

        chosen = [text for text in overrides if text.startswith("data.")]
        title = " ".join([f"data={name}", *chosen])
        print(draw(title, readers, Path(args.plot or f"{name}.png"), rendering))
    return 0


def settings(word: str) -> list[str]:
    """A folder of shards as the settings that read it; any other word as it is."""
    if "=" in word or not Path(word).is_dir():
        return [word]
    return ["data=shards", f"data.train={word}", "eval.split=train"]


def _readers(config: Mapping[str, object]) -> dict[str, ShardReader]:
    from data.reader import ShardReader
    from toolkit.build import from_dict
    from toolkit.corpus import cache_folder

    conf = from_dict(config)
    found = register.bind("data", conf.data)(cache_folder(conf))
    for split, place in found.items():
        if not isinstance(place, Path):
            print(f"{split}: {len(place.shards()):,} tars that are streamed; their samples have no number")
            print("  to count and see them: python -m toolkit.data index TARS --out FOLDER, inspect FOLDER")
    return {split: ShardReader(place) for split, place in found.items() if isinstance(place, Path)}


def inspect(readers: Mapping[str, ShardReader]) -> None:
    """Prints size, manifest hash and, per question type, answers and floors of every split."""
    learned = list(readers["train"].all_examples()) if "train" in readers else []
    for split, reader in readers.items():
        examples = list(reader.all_examples())
        print(f"{split}: {len(reader):,} records, {len(examples):,} questions, {reader.folder}")
        print(f"  manifest hash {reader.manifest_hash}")
        print(f"  {'type':<22}{'questions':>10}{'texts':>7}{'chance':>9}{'majority':>9}{'blind':>7}  answers")
        for facts in measure(learned or examples, examples):
            print(_line(facts))


def measure(train: Sequence[Example], examples: Sequence[Example]) -> Iterator[Facts]:
    """The facts of each question type, by name, then of all together if there are several."""
    from data.floors import blind, chance, majority

    kinds, learned = _by_kind(examples), _by_kind(train)
    groups: list[tuple[str, Sequence[Example], Sequence[Example]]]
    groups = [(kind or "all", learned.get(kind) or train, kinds[kind]) for kind in sorted(kinds)]
    if len(groups) > 1:
        groups.append(("all", train, examples))
    for kind, seen, asked in groups:
        yield Facts(
            kind,
            len(asked),
            len({e.question for e in asked}),
            Counter(e.gold for e in asked),
            chance(seen, asked),
            majority(asked),
            blind(seen, asked),
        )


def _by_kind(examples: Sequence[Example]) -> dict[str, list[Example]]:
    groups: defaultdict[str, list[Example]] = defaultdict(list)
    for example in examples:
        groups[example.kind].append(example)
    return dict(groups)


def _line(facts: Facts) -> str:
    ranked = sorted(facts.answers.items(), key=lambda item: (-item[1], item[0]))
    answers = ", ".join(f"{answer} {n / facts.n:.1%}" for answer, n in ranked[:_SHOWN])
    more = f", {len(ranked) - _SHOWN} more" if len(ranked) > _SHOWN else ""
    floors = f"{facts.chance:>9.1%}{facts.majority:>9.1%}{facts.blind:>7.1%}"
    return f"  {facts.kind:<22}{facts.n:>10,}{facts.texts:>7,}{floors}  {answers}{more}"
