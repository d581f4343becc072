"""A checkpoint on its own: complete or passed over, told apart from other runs', and what it puts back."""

from __future__ import annotations

import dataclasses
import json
import os
import random
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from tests.test_rundir import CFG
from toolkit import checkpoint, resume, rundir, state, stopping
from toolkit.rundir import RunDir
from toolkit.schema import RunConf, StageConf


@pytest.fixture
def saved(tmp_path: Path) -> RunDir:
    """A run with checkpoints of steps 1, 2 and 3, each holding its number."""
    found = RunDir(tmp_path, CFG)
    for step in (1, 2, 3):
        numbered(found, step)
    return found


def numbered(of: RunDir, step: int) -> None:
    folder = of.weights.parent / f"step-{step:08d}"
    tensors = {"model.safetensors": {"w": torch.full((20_000,), float(step))}}
    checkpoint.write(folder, tensors, {"total": step}, files={"metrics.csv": b"loss\n1\n"})


def cut(folder: Path) -> None:
    with (folder / "model.safetensors").open("r+b") as file:
        file.truncate(100)


def changed(folder: Path) -> None:
    with (folder / "model.safetensors").open("r+b") as file:
        file.seek(-1, os.SEEK_END)
        file.write(b"\x01")


@pytest.mark.parametrize(
    "damage",
    [
        cut,
        changed,
        lambda folder: (folder / "metrics.csv").unlink(),
        lambda folder: (folder / "manifest.json").unlink(),
        lambda folder: (folder / "manifest.json").write_text("{"),
        lambda folder: (folder / "manifest.json").write_text("[]"),
    ],
    ids=["cut", "changed", "file-gone", "no-manifest", "half-a-manifest", "other-json"],
)
def test_damaged_checkpoints_are_passed_over(
    saved: RunDir, damage: Callable[[Path], None], caplog: pytest.LogCaptureFixture
) -> None:
    newest = resume.newest(saved)
    assert newest is not None and newest.step == 3 and not caplog.messages
    damage(saved.weights.parent / "step-00000003")
    before = resume.newest(saved)
    assert before is not None and before.step == 2
    assert len(caplog.messages) == 1 and "step-00000003 is passed over: " in caplog.messages[0]


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_killed_at_any_moment_of_saving_the_newest_complete_one_loads(tmp_path: Path) -> None:
    found, draw = RunDir(tmp_path, CFG), random.Random(0)
    numbered(found, 1)
    complete = {1}
    for _ in range(25):
        pid = os.fork()
        if pid == 0:
            try:
                for step in range(max(complete) + 1, 1000):  # each of them twice, until it is killed
                    numbered(found, step)
                    numbered(found, step)
            finally:
                os._exit(1)
        time.sleep(draw.uniform(0.0, 0.1))
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
        point = resume.newest(found)
        assert point is not None and point.step >= max(complete)
        complete.add(point.step)
        weights = load_file(point.folder / "model.safetensors")
        assert weights["w"].unique().tolist() == [float(point.step)]
    assert max(complete) > 3


def test_a_checkpoint_of_other_settings_or_data_is_refused_by_name() -> None:
    conf = RunConf(stages={"tune": StageConf(steps=5)}, scan={"name": "2d"}, recurrence={"name": "rwkv6"})
    told = {"data": {"train": "aa", "test": "bb"}, "plans": {"tune": [5, "order"]}}
    asked = dataclasses.asdict(conf)
    facts = {"run": rundir.run_id(asked), "asked": asked, **told}
    assert list(resume.differences(facts, conf, told)) == []
    moved = dataclasses.replace(conf, title="other", hardware=dataclasses.replace(conf.hardware, workers=3))
    assert list(resume.differences(facts, moved, told)) == []
    other = dataclasses.replace(conf, seed=3, stages={"tune": StageConf(steps=5, lr=0.5)})
    assert list(resume.differences(facts, other, told)) == [
        "seed was 0 and is 3",
        "stages.tune.lr was 0.001 and is 0.5",
    ]
    elsewhere = {"data": {"train": "cc", "test": "bb"}, "plans": {"tune": [5, "another"]}}
    assert list(resume.differences(facts, conf, elsewhere)) == [
        "the data of split 'train' was aa and is cc",
        "steps and order of the samples of stages.tune were [5, 'order'] and are [5, 'another']",
    ]


def test_the_first_signal_is_noted_and_a_second_one_ends_at_once() -> None:
    before = {name: signal.getsignal(name) for name in (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)}
    for sent, ends in ((signal.SIGTERM, SystemExit), (signal.SIGINT, KeyboardInterrupt)):
        with stopping.at_step_ends():
            assert not stopping.asked()
            signal.raise_signal(signal.SIGUSR1)
            assert stopping.asked() == signal.SIGUSR1
            with pytest.raises(ends):
                signal.raise_signal(sent)
        assert not stopping.asked()
    assert {name: signal.getsignal(name) for name in before} == before
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # as in a worker of a sweep, whose parent minds Ctrl-C
    try:
        with stopping.at_step_ends():
            stopping.listen()
            signal.raise_signal(signal.SIGINT)
            assert not stopping.asked()
    finally:
        signal.signal(signal.SIGINT, before[signal.SIGINT])


def test_random_generators_are_put_back() -> None:
    np.random.normal()  # keeps a second number for the next call
    random.gauss(0, 1)
    tensors, python = state.generators()

    def draws() -> list[float]:
        return [random.gauss(0, 1), random.random(), *np.random.normal(size=3), float(torch.rand(()))]

    first = draws()
    state.put_generators(tensors, json.loads(json.dumps(python)))
    assert draws() == first


@pytest.mark.parametrize("fused", [False, True])
def test_moments_go_to_their_parameters_and_into_their_tensors(fused: bool) -> None:
    model = nn.Sequential(nn.Linear(2, 3), nn.Linear(3, 1))

    def optimizer(parameters: Any) -> torch.optim.AdamW:
        return torch.optim.AdamW(parameters, lr=0.1, fused=fused)

    def step(one: torch.optim.AdamW) -> None:
        one.zero_grad()
        model(torch.ones(1, 2)).sum().backward()
        one.step()

    first = optimizer(model.parameters())
    step(first)
    tensors = {name: tensor.clone() for name, tensor in state.moments_of(model, first).items()}
    assert set(tensors) == {f"{k}/{n}" for k in ("step", "exp_avg", "exp_avg_sq") for n in model.state_dict()}
    weights = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    step(first)
    wanted = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    # A new optimizer with its parameters in another order, and one that has tensors of its own by now.
    for other, used in ((optimizer(list(model.parameters())[::-1]), False), (first, True)):
        places = [t.data_ptr() for s in other.state.values() for t in s.values()]
        model.load_state_dict(weights)
        state.put_moments(model, other, tensors)
        assert not used or places == [t.data_ptr() for s in other.state.values() for t in s.values()]
        step(other)
        assert all(torch.equal(tensor, wanted[name]) for name, tensor in model.state_dict().items())
