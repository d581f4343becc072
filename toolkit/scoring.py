"""What a run reads and scores: samples of a split, predictions on them, floors, points while training."""

from __future__ import annotations

import copy
import itertools
from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import replace
from typing import Any

import torch

from data.dataset import Examples
from data.floors import blind, majority
from data.loader import eval_loader
from data.records import Different, Example
from toolkit import kept, ranks
from toolkit.corpus import Corpus
from toolkit.curve import Probe
from toolkit.evaluate import answer_all
from toolkit.metrics import Prediction, summary
from toolkit.model import VisualRWKV
from toolkit.rundir import RunDir
from toolkit.schema import RunConf


def examples(
    conf: RunConf,
    corpus: Corpus,
    split: str,
    model: VisualRWKV,
    features: dict[str, Any],
    *,
    prompt: Any,
    answer: bool,
) -> Examples:
    """The samples of a split, as the model reads them."""
    made = options(conf, corpus, model, prompt=prompt, answer=answer)
    if features:
        made |= {"features": features.get(split), "transform": None}
    return Examples(corpus.readers[split], **made)


def options(conf: RunConf, corpus: Corpus, model: VisualRWKV, *, prompt: Any, answer: bool) -> dict[str, Any]:
    """What `Examples` takes beside the reader where pictures are encoded in each step."""
    return {
        "prompt": prompt,
        "tokenizer": corpus.tokenizer,
        "n_image": model.n_image,
        "ctx_len": conf.model.ctx_len,
        "overlong": conf.model.overlong,
        "transform": model.encoder.transform(),
        "draft": conf.features.draft,
        "answer": answer,
    }


def scored_examples(conf: RunConf, corpus: Corpus) -> list[Example]:
    """The examples that evaluation asks: the whole split, or its first `eval.limit`."""
    found = corpus.readers[conf.eval.split].all_examples()
    return list(itertools.islice(found, conf.eval.limit or None))


def check_scored(conf: RunConf, corpus: Corpus, model: VisualRWKV) -> None:
    """Raises ValueError for a question that cannot be scored: too long for `model.ctx_len`, or unanswered.

    To be asked before training: no later command could score what was trained under other settings.
    """
    for split in dict.fromkeys([conf.eval.split, conf.eval.choose or conf.eval.split]):
        examples(conf, corpus, split, model, {}, prompt=corpus.prompt, answer=False).check(conf.eval.limit)


def evaluate(
    conf: RunConf, corpus: Corpus, model: VisualRWKV, features: dict[str, Any], device: torch.device
) -> list[Prediction]:
    """Predictions on the evaluation split."""
    model.to(device)
    dataset = examples(conf, corpus, conf.eval.split, model, features, prompt=corpus.prompt, answer=False)
    loader = eval_loader(
        dataset,
        batch=conf.eval.batch,
        limit=conf.eval.limit,
        rank=ranks.rank(),
        world=ranks.world(),
        workers=conf.hardware.workers,
        pin_memory=device.type == "cuda",
    )
    return answer_all(
        model,
        loader,
        scored_examples(conf, corpus),
        corpus.tokenizer,
        max_new_tokens=conf.eval.max_new_tokens,
        device=device,
        bf16=conf.hardware.precision == "bf16",
    )


def chosen_by(
    conf: RunConf, corpus: Corpus, model: VisualRWKV, features: dict[str, Any], device: torch.device
) -> dict[str, Any]:
    """Accuracy on the split that settings are chosen by (`eval.choose`), so that the test split is not."""
    if not conf.eval.choose:
        return {}
    other = replace(conf, eval=replace(conf.eval, split=conf.eval.choose))
    scores = summary(evaluate(other, corpus, model, features, device))
    return {"choose": {"split": conf.eval.choose, "accuracy": scores["accuracy"], "n": scores["n"]}}


def probes(
    conf: RunConf,
    run: RunDir,
    corpus: Corpus,
    model: VisualRWKV,
    features: dict[str, Any],
    *,
    first_step: int,
    last_step: int,
    start: int = 0,
) -> list[Probe]:
    """None, or the evaluation every `eval.every` steps, on the first `eval.every_limit` examples.

    first_step, last_step, start: as `Probe` has them.
    """
    if not conf.eval.every:
        return []
    fewer = replace(conf, eval=replace(conf.eval, limit=conf.eval.every_limit or conf.eval.limit))

    def score() -> list[Prediction]:
        return evaluate(fewer, corpus, model, features, next(model.rwkv.parameters()).device)

    steps = {"first_step": first_step, "last_step": last_step, "start": start}
    return [Probe(run.curve, every=conf.eval.every, **steps, score=score)]


def floors_of(conf: RunConf, corpus: Corpus, learned_from: str) -> dict[str, Any]:
    """The floors of what evaluation asks; learned_from: the split whose answers `blind` knows."""

    def measured() -> dict[str, Any]:
        return floors(corpus.different(learned_from), scored_examples(conf, corpus))

    if learned_from not in corpus.readers:
        return floors(None, scored_examples(conf, corpus))
    asked = corpus.identity(learned_from), corpus.identity(conf.eval.split), conf.eval.limit
    return copy.deepcopy(kept.once(("floors", *asked), measured))


def floors(train: Different | None, scored: Sequence[Example]) -> dict[str, Any]:
    """`majority` and `blind` of the whole split, and of each question type under `floors`.

    train: what was learned from; None if nobody can go through it, and `blind` is None too.
    """
    kinds = sorted(_by_kind(scored).items())
    return {
        "majority": majority(scored),
        "blind": _blind(train, scored),
        "floors": {
            kind: {"majority": majority(asked), "blind": _blind(train, asked, kind)} for kind, asked in kinds
        },
    }


def _blind(train: Different | None, asked: Sequence[Example], kind: str = "") -> float | None:
    """kind: learn from the examples of this type; from all of them if training does not have it."""
    if train is None:
        return None
    of_kind = [i for i, e in enumerate(train.examples) if not kind or (e.kind or "all") == kind]
    rows = of_kind or range(len(train.examples))
    return blind([train.examples[i] for i in rows], asked, times=[train.times[i] for i in rows])


def _by_kind(examples: Iterable[Example]) -> dict[str, list[Example]]:
    groups: defaultdict[str, list[Example]] = defaultdict(list)
    for example in examples:
        groups[example.kind or "all"].append(example)
    return groups
