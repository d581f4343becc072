"""In which order a stage takes its samples: shares of splits, shuffled, by length, within a token budget."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from data.mixture import Mixture, Source
from data.packing import Bucketed, Packed, Packing
from data.plan import Ints, Plan, Steps
from toolkit.corpus import Corpus, shares
from toolkit.lengths import positions
from toolkit.schema import RunConf, StageConf

_BYTES_PER_TOKEN = 4


def splits(conf: RunConf, name: str) -> list[str]:
    """The splits that a stage trains on."""
    return list(shares(name, conf.stages[name])) or [conf.stages[name].split]


def order(conf: RunConf, corpus: Corpus, name: str, *, n_image: int) -> Steps | Packed:
    """The order in which a stage takes its samples. Raises ValueError naming the key for what cannot be."""
    stage = conf.stages[name]
    if stage.tokens:
        return _packed(conf, corpus, name, n_image)
    sizes = {split: len(corpus.readers[split].examples.record) for split in splits(conf, name)}
    plan = _plan(conf, corpus, name, sizes, stage.global_batch)
    if not stage.bucket:
        return plan
    lengths = [_lengths(corpus, split, n_image) for split in splits(conf, name)]
    return Bucketed(plan, np.concatenate(lengths), stage.bucket, conf.seed)


def _plan(conf: RunConf, corpus: Corpus, name: str, sizes: dict[str, int], batch: int) -> Steps:
    """A plan over so many items of each split, samples or groups of them."""
    stage, hashes = conf.stages[name], {split: corpus.readers[split].manifest_hash for split in sizes}
    shuffle = {"block": stage.block, "window": stage.window}
    if not stage.mix:
        return Plan(sizes[stage.split], batch, conf.seed, hashes[stage.split], **shuffle)
    try:
        # Of groups a source gives fewer the more samples they hold, so that the shares are those of samples.
        held = {split: len(corpus.readers[split].examples.record) / n for split, n in sizes.items()}
        mixed = shares(name, stage).items()
        sources = [Source(s, sizes[s], hashes[s], share / held[s]) for s, share in mixed]
        return Mixture(tuple(sources), batch, conf.seed, **shuffle)
    except ValueError as error:
        raise ValueError(f"stages.{name}.mix: {error}") from error


def _packed(conf: RunConf, corpus: Corpus, name: str, n_image: int) -> Packed:
    """Groups within the token budget; so many are a step that it has `global_batch` samples on average."""
    stage, packings = conf.stages[name], {}
    for split in splits(conf, name):
        lengths = positions(
            corpus.readers[split],
            corpus.prompts[name],
            n_image=n_image,
            ctx_len=conf.model.ctx_len,
            tolerant=corpus.policy(split) == "tolerant",
            cache=corpus.cache,
        )
        longest = int(lengths.max())
        if longest > stage.tokens:
            raise ValueError(
                f"stages.{name}.tokens={stage.tokens}: split {split!r} has a sample of {longest:,} "
                f"positions; write stages.{name}.tokens={longest} or more"
            )
        packings[split] = Packing(lengths, stage.tokens)
    sizes = {split: len(packing.packs) for split, packing in packings.items()}
    rate = groups_per_sample(list(packings.values()), stage, name=name)
    groups = max(1, round(stage.global_batch * rate))
    return Packed(tuple(packings.values()), _plan(conf, corpus, name, sizes, groups))


def groups_per_sample(packings: Sequence[Packing], stage: StageConf, *, name: str) -> float:
    """Groups that hold a sample of a stage, on average: below 1."""
    weights = list(shares(name, stage).values()) or [1.0]
    rates = [len(packing.packs) / len(packing.lengths) for packing in packings]
    return sum(w * rate for w, rate in zip(weights, rates, strict=True)) / sum(weights)


def per_rank(plan: Packed, stage: StageConf, *, name: str, world: int) -> int:
    """Micro batches of a rank and step; ValueError saying how many samples make them divide."""
    if plan.groups % world:
        more = plan.groups + -plan.groups % world
        batch = round(more / groups_per_sample(plan.packings, stage, name=name))
        raise ValueError(
            f"stages.{name}.global_batch={stage.global_batch}: a step is {plan.groups} micro batches within "
            f"the token budget, which {world} ranks cannot share equally; write "
            f"stages.{name}.global_batch={batch} for {more}"
        )
    return plan.groups // world


def _lengths(corpus: Corpus, split: str, n_image: int) -> Ints:
    """About how many tokens every example has, from the index alone."""
    reader = corpus.readers[split]
    pictured = np.array([reader.has_image(i) for i in range(len(reader))])
    return reader.text_sizes // _BYTES_PER_TOKEN + n_image * pictured[reader.examples.record]
