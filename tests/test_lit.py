"""Optimizer groups, the schedule, stage lengths and batches."""

from __future__ import annotations

import math

import pytest
import torch

from tests.helpers import small_model
from toolkit.lit import parameter_groups, rate_factor
from toolkit.schema import HardwareConf, StageConf
from toolkit.train import device_of, micro_batch, refuse_several_processes, stage_steps


def test_decay_acts_on_matrices_only() -> None:
    model = small_model()
    model.rwkv.emb.weight.requires_grad_(False)
    matrices, vectors = parameter_groups(model, 0.1)
    assert matrices["weight_decay"] == 0.1 and vectors["weight_decay"] == 0.0
    names = {id(p): n for n, p in model.named_parameters()}
    inside = {names[id(p)] for p in matrices["params"]}
    outside = {names[id(p)] for p in vectors["params"]}
    assert "rwkv.blocks.0.att.time_maa_w1" in inside and "rwkv.blocks.0.att.time_maa_k" in outside
    assert "rwkv.head.weight" in inside and "rwkv.ln_out.bias" in outside
    assert "rwkv.emb.weight" not in inside | outside
    assert len(inside | outside) == sum(p.requires_grad for p in model.parameters())


def test_schedule_warms_up_then_follows_a_cosine_to_its_end() -> None:
    factor = rate_factor(StageConf(lr=1e-3, lr_final=1e-5, warmup=4), 104)
    assert [factor(s) for s in range(4)] == pytest.approx([0.2, 0.4, 0.6, 0.8])
    assert factor(4) == pytest.approx(1.0)
    assert factor(54) == pytest.approx(0.01 + 0.99 * 0.5)
    assert factor(104) == factor(500) == pytest.approx(0.01)
    assert factor(29) == pytest.approx(0.01 + 0.99 * 0.5 * (1 + math.cos(math.pi / 4)))


def test_stage_length_in_steps_or_epochs() -> None:
    assert stage_steps(StageConf(steps=7), 1000, name="tune") == 7
    assert stage_steps(StageConf(steps=0, epochs=2, global_batch=64), 1000, name="tune") == 32
    with pytest.raises(ValueError, match=r"stages\.tune: steps=5 and epochs=1 are both set"):
        stage_steps(StageConf(steps=5, epochs=1), 10, name="tune")
    with pytest.raises(ValueError, match=r"stages\.align: steps and epochs are both 0"):
        stage_steps(StageConf(steps=0), 10, name="align")


def test_micro_batches_make_the_global_batch() -> None:
    assert micro_batch(StageConf(global_batch=64), HardwareConf(), name="tune") == 64
    assert micro_batch(StageConf(global_batch=64), HardwareConf(micro_batch=16), name="tune") == 16
    with pytest.raises(
        ValueError, match=r"hardware\.micro_batch=24 does not divide stages\.tune\.global_batch=64"
    ):
        micro_batch(StageConf(global_batch=64), HardwareConf(micro_batch=24), name="tune")


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device here")
def test_an_absent_gpu_is_an_error_not_a_fallback() -> None:
    with pytest.raises(ValueError, match=r"hardware\.device=cuda.*hardware\.device=cpu"):
        device_of(HardwareConf(device="cuda"))
    assert device_of(HardwareConf()).type == "cpu"


def test_a_launcher_with_several_processes_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(ValueError, match="WORLD_SIZE=2: a run trains on one device"):
        refuse_several_processes()
    monkeypatch.setenv("WORLD_SIZE", "1")
    refuse_several_processes()
