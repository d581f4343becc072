"""One arm of scale=small, ready to train: what `benchmarks.arms` times."""

from __future__ import annotations

import contextlib
import time
from pathlib import Path
from typing import Any

STEPS = 1000
"""Steps of the stage that is built; replays begin anew after so many."""


def words(recurrence: str, cache: Path, device: str) -> list[str]:
    """The command line of an arm, on a part of its data."""
    return [
        "scale=small",
        f"recurrence={recurrence}",
        "scan=2d",
        "prompt=sandwich",
        "data.train_pictures=1500",
        "data.test_pictures=64",
        f"stages.tune.steps={STEPS}",
        "log.tensorboard=false",
        f"hardware.device={device}",
        f"paths.cache={cache}",
        f"paths.runs={cache / 'runs'}",
    ]


class Arm:
    """An arm of scale=small, ready to train. build: a seed's model on the device, its steps captured."""

    def __init__(self, recurrence: str, cache: Path, device: str) -> None:
        from toolkit import compose
        from toolkit.build import build_model, from_dict
        from toolkit.corpus import Corpus
        from toolkit.rundir import RunDir
        from toolkit.stages import Task
        from toolkit.train import choose_kernels, device_of, prepare

        request = compose.understand(words(recurrence, cache, device))
        cfg = compose.compose(request.jobs[0])
        conf = from_dict(cfg)
        there = device_of(conf.hardware)
        prepare(conf.hardware, conf.seed)
        choose_kernels(conf.hardware, there)
        corpus = Corpus(conf)
        self.build = lambda: build_model(conf, vocab_size=corpus.tokenizer.size, device=there).to(there)
        model = self.build()
        features = corpus.features(model, there)
        self.task = Task(conf, RunDir.of(cfg), corpus, model, features, there)
        self._data: Any = None

    def steps(self, *, stream: Any = None) -> Any:
        """The steps of a fresh model, captured where there is a GPU."""
        from dataclasses import replace

        from toolkit import graphs, resident
        from toolkit.build import select_trainable
        from toolkit.stages import planned

        conf, task = self.task.conf, replace(self.task, model=self.build())
        (stage,) = planned(task)
        select_trainable(task.model, stage.conf.train, stage.conf.freeze, stage=stage.name)
        task.model.train()
        if self._data is None:
            self._data = resident.load(stage.feed.apart, task.device)
        made = graphs.Steps(
            task.model,
            self._data,
            stage.plan,
            stage=stage.conf,
            loss=conf.loss,
            steps=stage.steps,
            bf16=conf.hardware.precision == "bf16",
        )
        if task.device.type == "cuda":
            made.capture(stream)
        return made

    def loop(self, steps: int) -> float:
        """Steps a second of the ordinary loop: loader, Trainer, kernels launched one by one."""
        from dataclasses import replace

        from toolkit.build import select_trainable
        from toolkit.stages import planned
        from toolkit.train import fit_stage

        task = replace(self.task, model=self.build())
        (stage,) = planned(task)
        select_trainable(task.model, stage.conf.train, stage.conf.freeze, stage=stage.name)
        task.model.train()
        rates = []
        for count in (10, steps):  # the first one compiles and warms up
            part = replace(stage, steps=count)
            loader = part.loader(task.conf.hardware, pin_memory=task.device.type == "cuda")
            began = time.perf_counter()
            fit_stage(
                task.model,
                loader,
                name=stage.name,
                conf=task.conf,
                steps=count,
                accumulate=part.accumulate(task.conf.hardware),
                first_step=0,
                logger=[],
                folder=task.run.path,
            )
            wait(task.device)
            rates.append(count / (time.perf_counter() - began))
        return rates[-1]


def wait(device: Any) -> None:
    import torch

    if device.type == "cuda":
        torch.cuda.synchronize(device)


def rate(arms: list[Any], streams: list[Any], seconds: float) -> float:
    """Steps a second of all arms together, replayed in turn, each on its stream."""
    import torch

    device = arms[0].device
    done, began = 0, time.perf_counter()
    while time.perf_counter() - began < seconds:
        for count in range(50):
            for arm, stream in zip(arms, streams, strict=True):
                with torch.cuda.stream(stream) if stream is not None else contextlib.nullcontext():
                    if count == 0:
                        arm.at.zero_()
                    arm.step()
            if device.type == "cpu":
                break
        done += (count + 1) * len(arms)
        wait(device)
    return done / (time.perf_counter() - began)
