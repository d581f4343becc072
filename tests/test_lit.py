"""Optimizer groups, the schedule, stage lengths and batches."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor
from torch.utils.data import DataLoader

from tests.helpers import make_batch, small_model
from toolkit.contracts import Batch, ImageFeatures
from toolkit.lit import parameter_groups, rate_factor, to_device
from toolkit.schema import HardwareConf, StageConf
from toolkit.train import device_of, micro_batch, stage_steps


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
    assert stage_steps(StageConf(steps=7), 16, name="tune") == 7
    assert stage_steps(StageConf(steps=0, epochs=2), 16, name="tune") == 32
    with pytest.raises(ValueError, match=r"stages\.tune\.epochs=2: nobody knows .*stages\.tune\.steps=1000"):
        stage_steps(StageConf(steps=0, epochs=2), None, name="tune")
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


def full_batch() -> Batch:
    """Every field set; pixels nested as an encoder of several towers makes them."""
    batch = make_batch(small_model(), [(3, 5, 2), (-1, 4, 3)])
    batch.pixels = (batch.pixels, (batch.pixels + 1, batch.pixels + 2))
    batch.features = ImageFeatures(torch.randn(1, 6, 4), torch.randn(1, 1, 4), (2, 3))
    batch.answers, batch.images = torch.arange(5), torch.arange(7)
    return batch


def tensors(batch: Batch) -> list[Tensor]:
    first, (second, third) = batch.pixels
    assert batch.features is not None and batch.answers is not None and batch.images is not None
    rows = [batch.answers, batch.images, batch.features.patches, batch.features.extra, first, second, third]
    return [batch.ids, batch.labels, batch.lengths, batch.image_start, batch.weight, *rows]


def test_a_batch_is_changed_tensor_by_tensor() -> None:
    batch = full_batch()
    found = batch.mapped(lambda tensor: tensor + 1)
    assert all(torch.equal(a, b + 1) for a, b in zip(tensors(found), tensors(batch), strict=True))
    assert found.keys == batch.keys and found.features is not None and found.features.grid == (2, 3)
    bare = make_batch(small_model(), [(-1, 4, 3)]).mapped(lambda tensor: tensor)
    assert bare.pixels is None and bare.features is None and bare.answers is None


def test_every_tensor_is_pinned_and_moved_without_waiting(monkeypatch: pytest.MonkeyPatch) -> None:
    pinned = torch.Tensor.clone
    asked: list[bool] = []
    to = torch.Tensor.to

    def watched(tensor: Tensor, *where: object, non_blocking: bool = False) -> Tensor:
        asked.append(non_blocking)
        return to(tensor, *where)

    monkeypatch.setattr(torch.Tensor, "pin_memory", pinned)
    batch = full_batch()
    found = batch.pin_memory()
    assert all(torch.equal(a, b) and a is not b for a, b in zip(tensors(found), tensors(batch), strict=True))
    monkeypatch.setattr(torch.Tensor, "to", watched)
    moved = tensors(to_device(found, torch.device("meta")))
    assert all(t.is_meta for t in moved) and asked == [True] * len(moved)


@pytest.mark.gpu
def test_a_loader_pins_batches() -> None:
    (found,) = DataLoader([full_batch()], batch_size=None, pin_memory=True)
    assert isinstance(found, Batch) and all(t.is_pinned() for t in tensors(found))
    moved = tensors(to_device(found, torch.device("cuda")))
    assert all(torch.equal(a.cpu(), b) for a, b in zip(moved[7:], tensors(found)[7:], strict=True))
