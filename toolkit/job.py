"""One run from a validated config: data, model, stages, evaluation, result."""

from __future__ import annotations

import logging
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import kernels
from data.loader import train_loader
from data.plan import Plan
from data.tokens import WorldTokenizer
from toolkit import checkpoint, curve, metrics
from toolkit.build import build_model, from_dict, on_meta, parameters_by_part, select_trainable
from toolkit.corpus import Corpus
from toolkit.evaluate import as_jsonl
from toolkit.model import VisualRWKV
from toolkit.rundir import RunDir, provenance, write_json, write_text
from toolkit.schema import RunConf
from toolkit.scoring import evaluate, examples, floors, probes, scored_examples
from toolkit.train import (
    choose_kernels,
    device_of,
    fit_stage,
    loggers,
    micro_batch,
    prepare,
    refuse_several_processes,
    stage_steps,
)

log = logging.getLogger("toolkit.run")


def run_job(cfg: Mapping[str, Any], *, recipe: str, argv: list[str]) -> dict[str, Any]:
    """Trains and evaluates one config, or returns the result that its directory already holds."""
    refuse_several_processes()
    conf = from_dict(cfg)
    run = RunDir(Path(conf.paths.runs).expanduser(), cfg)
    with run.lock():
        done = run.finished()
        if done is not None:
            log.info("%s is already done: accuracy %.2f %%", run.path, 100 * done["accuracy"])
            return done
        began = time.monotonic()
        write_text(run.config, _yaml(cfg))
        run.note("running", recipe=recipe, **provenance(argv))
        try:
            result = execute(conf, run)
        except BaseException as error:
            run.note("failed", error=f"{type(error).__name__}: {error}")
            raise
        result = {
            "recipe": recipe,
            "title": conf.title,
            "seed": conf.seed,
            **result,
            "seconds": round(time.monotonic() - began, 1),
            **{k: v for k, v in provenance(argv).items() if k in ("commit", "dirty", "versions", "machine")},
        }
        write_json(run.result, result)
        run.note("done")
    log.info("%s", closing_line(run.path, result))
    return result


def execute(conf: RunConf, run: RunDir) -> dict[str, Any]:
    """Data, model, training stages and evaluation; returns what the result tells of them."""
    device = device_of(conf.hardware)
    prepare(conf.hardware, conf.seed)
    choose_kernels(conf.hardware, device)
    log.info("run directory %s", run.path)
    corpus = Corpus(conf)
    corpus.tokenizer.save(run.path / "vocabulary.json")
    model = build_model(conf, vocab_size=corpus.tokenizer.size, device=device).to(device)
    parts = learning_parts(conf, model)
    facts: dict[str, Any] = {"parameters": parameters_by_part(model), "learning": parts}
    with Timer(facts, "feature_seconds"):
        features = corpus.features(model, device)
    with Timer(facts, "train_seconds"):
        facts |= train(conf, run, corpus, model, features, parts)
    with Timer(facts, "eval_seconds"):
        predictions = evaluate(conf, corpus, model, features, device)
    write_text(run.predictions / f"{conf.eval.split}.jsonl", as_jsonl(predictions))
    learned_from = list(conf.stages.values())[-1].split
    return {
        **metrics.summary(predictions),
        **floors(corpus.readers[learned_from].all_examples(), scored_examples(conf, corpus)),
        "image_tokens": model.n_image,
        **facts,
        "curve": curve.read(run.curve),
        "vocabulary": corpus.tokenizer.size,
        "data": {split: reader.manifest_hash for split, reader in corpus.readers.items()},
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


def train(
    conf: RunConf, run: RunDir, corpus: Corpus, model: VisualRWKV, features: dict[str, Any], parts: list[str]
) -> dict[str, int]:
    """All stages, one `fit` each; finished training is not repeated.

    Returns the optimizer steps done and how often an overlong sample, cut to nothing that could be
    learned, was served with weight 0 (`model.overlong=cut`).
    """
    if run.weights.exists():
        facts = checkpoint.load(run.weights, model)
        log.info("training was finished before: weights from %s", run.weights)
        return {key: int(facts[key]) for key in ("steps", "left_out")}
    logger = loggers(run.path, conf.log)
    run.curve.unlink(missing_ok=True)
    total = left_out = 0
    last = list(conf.stages)[-1]
    for name, stage in conf.stages.items():
        select_trainable(model, stage.train, stage.freeze, stage=name)
        model.train()
        reader = corpus.readers[stage.split]
        dataset = examples(
            conf, corpus, stage.split, model, features, prompt=corpus.prompts[name], answer=True
        )
        steps = stage_steps(stage, len(dataset), name=name)
        loader = train_loader(
            dataset,
            Plan(len(dataset), stage.global_batch, conf.seed, reader.manifest_hash, block=1),
            start_step=0,
            end_step=steps,
            micro=micro_batch(stage, conf.hardware, name=name),
            workers=conf.hardware.workers,
            pin_memory=device_of(conf.hardware).type == "cuda",
        )
        end = total + steps
        fit_stage(
            model,
            loader,
            name=name,
            conf=conf,
            steps=steps,
            first_step=total,
            logger=logger,
            folder=run.path,
            callbacks=probes(
                conf, run, corpus, model, features, first_step=total, last_step=end if name == last else 0
            ),
        )
        total = end
        left_out += dataset.left_out
    if left_out:
        log.warning("%d overlong samples had no answer within model.ctx_len and were left out", left_out)
    done = {"steps": total, "left_out": left_out}
    checkpoint.save(run.weights, model, parts=parts, facts=done)
    return done


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


class Timer:
    """Notes the seconds that a block took under a name."""

    def __init__(self, facts: dict[str, Any], name: str) -> None:
        self.facts, self.name = facts, name

    def __enter__(self) -> None:
        self.began = time.monotonic()

    def __exit__(self, *error: object) -> None:
        self.facts[self.name] = round(time.monotonic() - self.began, 1)


def closing_line(path: Path, result: Mapping[str, Any]) -> str:
    """What a run says when it ends."""
    percent = {k: f"{100 * result[k]:.2f} %" for k in ("accuracy", "majority", "blind")}
    return (
        f"accuracy {percent['accuracy']} on {result['n']:,} questions (majority {percent['majority']}, "
        f"question only {percent['blind']}) in {result['seconds']:.0f} s: {path}"
    )


def _yaml(cfg: Mapping[str, Any]) -> str:
    from omegaconf import OmegaConf

    return OmegaConf.to_yaml(OmegaConf.create(dict(cfg)))
