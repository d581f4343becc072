"""What a stage trains on and in which order: one split or several in shares, shuffled, sorted by length."""

from __future__ import annotations

from typing import Any

import numpy as np

from data.dataset import Examples
from data.joined import Joined
from data.mixture import Mixture, Source
from data.packing import Bucketed
from data.plan import Ints, Plan, Steps
from toolkit.corpus import Corpus, shares
from toolkit.model import VisualRWKV
from toolkit.schema import RunConf
from toolkit.scoring import examples

_BYTES_PER_TOKEN = 4


def samples(
    conf: RunConf, corpus: Corpus, name: str, model: VisualRWKV, features: dict[str, Any]
) -> Examples | Joined:
    """The samples of a stage; those of several splits one after the other, if it mixes them."""
    stage, prompt = conf.stages[name], corpus.prompts[name]
    parts = {
        split: examples(conf, corpus, split, model, features, prompt=prompt, answer=True)
        for split in splits(conf, name)
    }
    return Joined(parts) if stage.mix else parts[stage.split]


def splits(conf: RunConf, name: str) -> list[str]:
    """The splits that a stage trains on."""
    return list(shares(name, conf.stages[name])) or [conf.stages[name].split]


def order(conf: RunConf, corpus: Corpus, name: str, *, n_image: int) -> Steps:
    """The order in which a stage takes its samples. Raises ValueError naming the key for what cannot be."""
    stage = conf.stages[name]
    shuffle = {"block": stage.block, "window": stage.window}
    plan: Steps
    if stage.mix:
        try:
            sources = tuple(_sources(corpus, shares(name, stage)))
            plan = Mixture(sources, stage.global_batch, conf.seed, **shuffle)
        except ValueError as error:
            raise ValueError(f"stages.{name}.mix: {error}") from error
    else:
        reader = corpus.readers[stage.split]
        n = len(reader.examples.record)
        plan = Plan(n, stage.global_batch, conf.seed, reader.manifest_hash, **shuffle)
    if not stage.bucket:
        return plan
    lengths = [_lengths(corpus, split, n_image) for split in splits(conf, name)]
    return Bucketed(plan, np.concatenate(lengths), stage.bucket, conf.seed)


def _sources(corpus: Corpus, mix: dict[str, float]) -> list[Source]:
    return [
        Source(split, len(corpus.readers[split].examples.record), corpus.readers[split].manifest_hash, share)
        for split, share in mix.items()
    ]


def _lengths(corpus: Corpus, split: str, n_image: int) -> Ints:
    """About how many tokens every example has, from the index alone."""
    reader = corpus.readers[split]
    pictured = np.array([reader.has_image(i) for i in range(len(reader))])
    return reader.text_sizes // _BYTES_PER_TOKEN + n_image * pictured[reader.examples.record]
