"""One run from a validated config: data, model, stages, evaluation, result."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import kernels
from data.tokens import WorldTokenizer
from toolkit import checkpoint, curve, metrics, ranks, resume, stopping
from toolkit.build import build_model, from_dict, on_meta, parameters_by_part, select_trainable
from toolkit.corpus import Corpus
from toolkit.evaluate import as_jsonl
from toolkit.frame import Timer, closing_line, held, noted
from toolkit.graphs import Steps
from toolkit.left_out import merged
from toolkit.model import VisualRWKV
from toolkit.rundir import RunDir, provenance, write_json, write_text
from toolkit.saver import Saver, StepEnds
from toolkit.schema import RunConf
from toolkit.scoring import check_scored, chosen_by, evaluate, floors_of, probes
from toolkit.stages import Stage, Task, announce, captured, planned, step_seconds, warn_without_gpu
from toolkit.train import (
    choose_kernels,
    device_of,
    fit_stage,
    micro_batch,
    prepare,
)
from toolkit.waits import Waits
from toolkit.waits import summary as summary_of_waits

log = logging.getLogger("toolkit.run")

_KEPT = ("steps", "left_out", "reported", "training", "data_mode", "resumed_from", "seconds_before")
"""What finished weights tell of their training."""


def run_job(
    cfg: Mapping[str, Any],
    *,
    recipe: str,
    argv: list[str],
    on_estimate: Callable[[float], None] | None = None,
) -> dict[str, Any]:
    """Trains and evaluates one config, or returns the result that its directory already holds.

    on_estimate: called before training with the seconds that this run will take from there.
    """
    conf = from_dict(cfg)
    run = RunDir(Path(conf.paths.runs).expanduser(), cfg)
    with held(conf, run) as place:
        done: dict[str, Any] | None = ranks.shared(run.finished)
        if done is not None:
            log.info("%s is already done: accuracy %.2f %%", run.path, 100 * done["accuracy"])
            return done
        began = time.monotonic()
        with noted(run, recipe=recipe, **provenance(argv)):
            if ranks.main():
                write_text(run.config, _yaml(cfg))
            made = execute(conf, run, on_estimate=on_estimate)
            before = made.pop("seconds_before", 0.0)
            facts = provenance(argv)
            result = {
                "recipe": recipe,
                "title": conf.title,
                "seed": conf.seed,
                **made,
                "ranks": {"world": place.world, "launcher": place.launcher},
                "seconds": round(before + time.monotonic() - began, 1),
                **{k: facts[k] for k in ("commit", "dirty", "versions", "machine")},
            }
            if ranks.main():
                write_json(run.result, result)
    log.info("%s", closing_line(run.path, result))
    return result


def execute(
    conf: RunConf,
    run: RunDir,
    *,
    on_estimate: Callable[[float], None] | None = None,
) -> dict[str, Any]:
    """Data, model, training stages and evaluation; returns what the result tells of them."""
    device = device_of(conf.hardware)
    warn_without_gpu(conf.hardware, device)
    for name, stage in conf.stages.items():
        if not stage.tokens:
            micro_batch(stage, conf.hardware, name=name)  # refuses what cannot be shared before data are read
    prepare(conf.hardware, conf.seed)
    choose_kernels(conf.hardware, device)
    log.info("run directory %s", run.path)
    corpus = ranks.in_turn(partial(Corpus, conf))
    if ranks.main():
        corpus.tokenizer.save(run.path / "vocabulary.json")
    model = build_model(conf, vocab_size=corpus.tokenizer.size, device=device).to(device)
    parts = learning_parts(conf, model)
    facts: dict[str, Any] = {"parameters": parameters_by_part(model), "learning": parts}
    if ranks.main():
        check_scored(conf, corpus, model)
    with Timer(facts, "feature_seconds"):
        made = partial(corpus.features, model, device)
        features = made() if conf.features.cache == "memory" else ranks.in_turn(made)
    with Timer(facts, "train_seconds"):
        task = Task(conf, run, corpus, model, features, device)
        facts |= train(task, parts, on_estimate=on_estimate)
    facts["train_seconds"] = round(facts["train_seconds"] + facts.get("seconds_before", 0.0), 1)
    with Timer(facts, "eval_seconds"):
        predictions = evaluate(conf, corpus, model, features, device)
        facts |= chosen_by(conf, corpus, model, features, device)
    if ranks.main():
        write_text(run.predictions / f"{conf.eval.split}.jsonl", as_jsonl(predictions))
    learned_from = list(conf.stages.values())[-1].split
    return {
        **metrics.summary(predictions),
        **floors_of(conf, corpus, learned_from),
        "image_tokens": model.n_image,
        **facts,
        "curve": curve.read(run.curve),
        "data_wait": summary_of_waits(run.waits),
        "vocabulary": corpus.tokenizer.size,
        "data": corpus.hashes,
        "kernels": kernels.chosen(),
        "device": str(device),
    }


def learning_parts(conf: RunConf, model: VisualRWKV) -> list[str]:
    """Parts that learn in any stage; leaves requires_grad as the union over the stages."""
    parts = {
        part
        for name, stage in conf.stages.items()
        for part in select_trainable(model, stage.train, stage.freeze, stage=name)
    }
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name.split(".")[0] in parts)
    if getattr(model.encoder, "learned", False) and "encoder" not in parts:
        raise ValueError(
            f"encoder={conf.encoder['name']} has no pretrained weights and every stage freezes it; "
            "take `encoder` out of stages.*.freeze"
        )
    return sorted(parts)


def from_no_file(conf: RunConf) -> list[str]:
    """Parts that begin with random weights: checkpoints hold them also where they stay frozen.

    Nothing else could bring them back: loading a run draws other numbers.
    """
    begun = {"rwkv": bool(conf.lm.weights), "proj": bool(conf.proj.weights)}
    return [*(part for part, file in begun.items() if not file), *(["encoder"] * _random(conf.encoder))]


def _random(node: Mapping[str, Any]) -> bool:
    """Whether an encoder, or a member of a fused one, was asked for with random weights."""
    return node.get("weights") == "random" or any(map(_random, node.get("members") or ()))


def train(
    task: Task,
    parts: list[str],
    *,
    on_estimate: Callable[[float], None] | None = None,
) -> dict[str, Any]:
    """All stages, one after the other; finished training is not repeated.

    Returns the optimizer steps done, how often an overlong sample, cut to nothing that could be learned,
    was served with weight 0 (`model.overlong=cut`), how many samples `left_out-SPLIT.jsonl` lists, how the
    steps of each stage ran, and from which steps it went on after it was stopped.
    """
    run, model = task.run, task.model
    if ranks.shared(run.weights.exists):
        facts = ranks.shared(partial(checkpoint.load, run.weights, model))
        ranks.same(model.parameters())
        log.info("training was finished before: weights from %s", run.weights)
        for op, what in facts.get("kernels", {}).items():
            kernels.note(op, what)
        return {key: facts[key] for key in _KEPT if key in facts}
    point = resume.newest(run)
    stages = resume.continued(task, planned(task), point)
    parts = sorted({*parts, *from_no_file(task.conf)})
    saver = Saver(task, stages, parts=parts, logger=resume.loggers(task, point), point=point)
    before = resume.left_out(stages, point)
    with stopping.at_step_ends():
        train_stages(task, saver, on_estimate)
        done = trained(saver, before)
        saver.finish(done)
    return done


def train_stages(task: Task, saver: Saver, on_estimate: Callable[[float], None] | None) -> None:
    """What is left of every stage, with the time that all will take told before."""
    model, stages = task.model, [stage for stage in saver.stages if stage.start < stage.steps]
    left = each = 0.0  # seconds, of all that is to come and of one sample
    for stage in stages:
        select_trainable(model, stage.conf.train, stage.conf.freeze, stage=stage.name)
        model.train()
        steps, seconds, saver.modes[stage.name] = captured(task, stage)
        if stage is stages[0]:
            measured = True
            if steps is None:
                seconds, measured = step_seconds(task, stage)
            found, rest = announce(task, stages, seconds, measured=measured)
            left, each = found.total + rest, found.step / stage.conf.global_batch
            if on_estimate is not None:
                on_estimate(found.total)
        left -= each * stage.samples
        after = max(0.0, left) / max(1e-9, each * stage.conf.global_batch)
        fit(task, stage, steps, saver, after=after)


def trained(saver: Saver, left_out: int) -> dict[str, Any]:
    """What a run tells of its training; left_out: overlong samples before it was stopped."""
    stages = saver.stages
    left_out += sum(one for (one,) in ranks.numbers(sum(stage.feed.left_out for stage in stages)))
    if left_out:
        log.warning("%d overlong samples had no answer within model.ctx_len and were left out", left_out)
    rows = sum(merged(report) for report in dict.fromkeys(stage.feed.report for stage in stages))
    return {
        "steps": stages[-1].first_step + stages[-1].steps,
        "left_out": left_out,
        "reported": rows,
        "training": saver.modes,
        "data_mode": {stage.name: stage.feed.mode for stage in stages},
        "resumed_from": saver.resumed_from,
        "seconds_before": saver.before,
    }


def fit(task: Task, stage: Stage, steps: Steps | None, saver: Saver, *, after: float) -> None:
    """Trains the rest of a stage by its captured steps or a Trainer. after: what follows, in its steps."""
    conf, end = task.conf, stage.first_step + stage.steps
    ends = StepEnds(saver, stage)
    points = probes(
        conf,
        task.run,
        task.corpus,
        task.model,
        task.features,
        first_step=stage.first_step,
        last_step=end if stage is saver.stages[-1] else 0,
        start=stage.start,
    )
    if steps is not None:
        ends.begin(steps.optimizer)
        steps.run(
            stage.name,
            first_step=stage.first_step,
            logger=saver.logger,
            every=min(conf.log.every, stage.steps),
            probes=points,
            after=after,
            start=stage.start,
            ends=ends,
        )
        return
    waits = Waits(task.run.waits, first_step=stage.first_step, every=conf.log.every)
    fit_stage(
        task.model,
        waits.timed(
            stage.loader(
                conf.hardware, rank=ranks.rank(), world=ranks.world(), pin_memory=task.device.type == "cuda"
            )
        ),
        name=stage.name,
        conf=conf,
        steps=stage.steps,
        first_step=stage.first_step,
        accumulate=stage.accumulate(conf.hardware, world=ranks.world()),
        logger=saver.logger,
        folder=task.run.path,
        callbacks=[ends, waits, *points],
        after=after,
        start=stage.start,
    )


def check(cfg: Mapping[str, Any]) -> dict[str, Any]:
    """Builds the model on the meta device: parameters per part, and what each stage trains."""
    conf = from_dict(cfg)
    world = conf.model.vocab == "world"
    with on_meta():
        model = build_model(conf, vocab_size=WorldTokenizer.size if world else 1)
    stages = {}
    for name, stage in conf.stages.items():
        select_trainable(model, stage.train, stage.freeze, stage=name)
        stages[name] = sum(p.numel() for p in model.parameters() if p.requires_grad)
    return {
        "parameters": parameters_by_part(model),
        "trainable": stages,
        "image_tokens": model.n_image,
        "per_vocabulary_entry": 0 if world else 2 * conf.model.d_model,
    }


def _yaml(cfg: Mapping[str, Any]) -> str:
    from omegaconf import OmegaConf

    return OmegaConf.to_yaml(OmegaConf.create(dict(cfg)))
