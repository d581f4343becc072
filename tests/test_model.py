"""The model: independence of batch neighbours, splicing, answer positions, loss forms, freezing."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

import kernels
from tests.helpers import make_batch, small_model, take
from toolkit import register
from toolkit.build import select_trainable
from toolkit.contracts import IGNORE, ImageFeatures
from toolkit.lit import to_device
from toolkit.loss import lm_loss
from toolkit.model import VisualRWKV, answer_rows, asked_for, image_rows

register.discover()
TEXTS = [(3, 5, 2), (0, 2, 1), (-1, 4, 3), (7, 1, 4), (2, 9, 1)]


@pytest.mark.parametrize("recurrence", sorted(register.components("recurrence")))
@pytest.mark.parametrize("scan", ["uni", "2d", "hilbert"])
def test_a_sample_does_not_see_its_neighbours(recurrence: str, scan: str) -> None:
    model = small_model(recurrence=recurrence, scan=scan).double()
    batch = make_batch(model, TEXTS, dtype=torch.float64, pad=3)
    together = model.logits(batch)
    for i in range(len(TEXTS)):
        alone = model.logits(take(batch, model, i))
        n = alone.shape[1]
        torch.testing.assert_close(together[i, :n], alone[0], rtol=1e-10, atol=1e-10)
    other = make_batch(model, [TEXTS[0], (9, 9, 1), (-1, 1, 1)], dtype=torch.float64)
    n = int(batch.lengths[0])
    torch.testing.assert_close(model.logits(other)[0, :n], together[0, :n], rtol=1e-10, atol=1e-10)


def test_image_vectors_overwrite_their_placeholders_and_nothing_else() -> None:
    model = small_model()
    batch = make_batch(model, TEXTS)
    x = model.embed(batch)
    plain = model.rwkv.emb(batch.ids)
    projected = model.proj(model.encoder(batch.pixels))
    vectors = torch.cat((projected.patches, projected.extra), 1)
    seen = 0
    for i, (before, _, _) in enumerate(TEXTS):
        if before < 0:
            assert torch.equal(x[i], plain[i])
            continue
        assert torch.equal(x[i, before : before + model.n_image], vectors[seen])
        assert torch.equal(x[i, :before], plain[i, :before])
        assert torch.equal(x[i, before + model.n_image :], plain[i, before + model.n_image :])
        seen += 1
    assert seen == 4


def test_features_in_place_of_pixels_give_the_same_logits() -> None:
    model = small_model()
    batch = make_batch(model, TEXTS)
    expected = model.logits(batch)
    batch.features, batch.pixels = model.encoder(batch.pixels), None
    assert isinstance(batch.features, ImageFeatures)
    assert torch.equal(model.logits(batch), expected)


def test_head_runs_on_answer_positions_only_and_equals_the_full_head() -> None:
    model = small_model().double()
    batch = make_batch(model, TEXTS, dtype=torch.float64)
    answers = model(batch)
    asked = (batch.labels[:, 1:] != IGNORE).nonzero()
    assert len(answers.logits) == len(asked) == sum(a for _, _, a in TEXTS)
    everywhere = model.logits(batch)
    torch.testing.assert_close(answers.logits, everywhere[asked[:, 0], asked[:, 1]])
    assert torch.equal(answers.targets, batch.labels[asked[:, 0], asked[:, 1] + 1])


def test_loss_forms_against_their_definitions() -> None:
    model = small_model().double()
    batch = make_batch(model, TEXTS, dtype=torch.float64)
    logits = model.logits(batch)[:, :-1]
    each = F.cross_entropy(
        logits.transpose(1, 2), batch.labels[:, 1:], ignore_index=IGNORE, reduction="none"
    )  # [B, T-1]
    counts = (batch.labels[:, 1:] != IGNORE).sum(1)
    answers = model(batch)
    torch.testing.assert_close(lm_loss(answers, reduction="sample"), (each.sum(1) / counts).mean())
    torch.testing.assert_close(lm_loss(answers, reduction="batch"), each.sum() / counts.sum())


def test_positions_looked_up_before_the_move_give_the_same_loss() -> None:
    model = small_model()
    batch = make_batch(model, TEXTS)
    batch.weight[1] = 0.0
    expected = lm_loss(model(batch, l2="answers"), reduction="sample")
    moved = to_device(batch, torch.device("meta"))
    assert moved.answers is not None and moved.images is not None
    assert (len(moved.answers), len(moved.images)) == (11 - 1, 4)
    batch.answers, batch.images = answer_rows(asked_for(batch)), image_rows(batch)
    assert torch.equal(lm_loss(model(batch, l2="answers"), reduction="sample"), expected)
    batch.answers = batch.answers[:-1]
    assert not torch.equal(lm_loss(model(batch, l2="answers"), reduction="sample"), expected)


@pytest.mark.parametrize("l2", ["none", "answers", "all"])
def test_block_form_gives_the_gradients_of_the_definition(l2: str) -> None:
    model = small_model().double()
    batch = make_batch(model, TEXTS, dtype=torch.float64)
    found = []
    for backend in ("torch", "reference"):
        with kernels.use(backend):
            loss = lm_loss(model(batch, l2=l2), reduction="sample")
        found.append(
            [loss, *torch.autograd.grad(0.5 * loss, list(model.rwkv.parameters()), allow_unused=True)]
        )
    for a, b in zip(*found, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-13)


@pytest.mark.parametrize("reduction", ["sample", "batch"])
def test_samples_without_weight_or_label_add_nothing(reduction: str) -> None:
    model = small_model()
    batch = make_batch(model, TEXTS)
    batch.weight = torch.tensor([1.0, 0.0, 1.0, 1.0, 1.0])
    batch.labels[3] = IGNORE
    answers = model(batch, l2="answers")
    assert 1 not in answers.sample and 3 not in answers.sample
    loss = lm_loss(answers, reduction=reduction)
    assert torch.isfinite(loss)
    batch.labels[:] = IGNORE
    nothing = lm_loss(model(batch, l2="answers"), reduction=reduction)
    nothing.backward()
    assert float(nothing.detach()) == 0.0
    assert all(torch.isfinite(p.grad).all() for p in model.parameters() if p.grad is not None)


class L2Wrap(torch.autograd.Function):
    """RWKV-LM's term, written from its definition: identity forward, z_max 1e-4 / (B T) added backward."""

    @staticmethod
    def forward(ctx: Any, loss: Tensor, logits: Tensor) -> Tensor:
        ctx.save_for_backward(logits)
        return loss.clone()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor]:  # type: ignore[override]
        (logits,) = ctx.saved_tensors
        top, at = logits.max(-1, keepdim=True)
        extra = torch.zeros_like(logits).scatter_(-1, at, top * 1e-4 / logits[..., 0].numel())
        return grad, extra


def test_l2_term_changes_gradients_as_the_original_and_not_the_value() -> None:
    model = small_model().double()
    batch = make_batch(model, TEXTS, dtype=torch.float64)
    plain = lm_loss(model(batch), reduction="sample")
    logits = model.logits(batch)
    everywhere = lm_loss(model(batch, l2="all"), reduction="sample")
    torch.testing.assert_close(plain, everywhere, rtol=1e-14, atol=0)  # other row blocks, other sums
    theirs = torch.autograd.grad(
        L2Wrap.apply(plain, logits), list(model.rwkv.parameters()), retain_graph=True
    )
    ours = torch.autograd.grad(everywhere, list(model.rwkv.parameters()))
    without = torch.autograd.grad(plain, list(model.rwkv.parameters()), retain_graph=True)
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-12)
    assert any(not torch.allclose(a, b, rtol=1e-9, atol=1e-12) for a, b in zip(ours, without, strict=True))
    # "answers" is the same term on the answer rows alone.
    rows = model(batch, l2="answers")
    expected = model(batch).logits.amax(-1).square().sum() * 1e-4 / 2 / batch.ids.numel()
    (got,) = torch.autograd.grad(
        lm_loss(rows, reduction="sample") - lm_loss(model(batch), reduction="sample"),
        [model.rwkv.head.weight],
    )
    (want,) = torch.autograd.grad(expected, [model.rwkv.head.weight])
    torch.testing.assert_close(got, want, rtol=1e-9, atol=1e-12)


def _learning(model: VisualRWKV) -> set[str]:
    return {n for n, p in model.named_parameters() if p.requires_grad}


def test_stages_choose_what_learns_by_whole_name_components() -> None:
    model = small_model(n_layer=11)
    assert select_trainable(model, ["proj", "rwkv"], ["rwkv.emb", "rwkv.blocks.1"], stage="tune") == [
        "proj",
        "rwkv",
    ]
    learning = _learning(model)
    assert "rwkv.emb.weight" not in learning and "rwkv.head.weight" in learning
    assert not any(n.startswith("rwkv.blocks.1.") for n in learning)
    assert any(n.startswith("rwkv.blocks.10.") for n in learning)
    assert select_trainable(model, ["proj"], [], stage="align") == ["proj"]
    assert all(n.startswith("proj.") for n in _learning(model))
    with pytest.raises(ValueError, match=r"stages\.tune\.train: no parameter begins with 'rwkv\.block'"):
        select_trainable(model, ["rwkv.block"], [], stage="tune")
    with pytest.raises(ValueError, match=r"stages\.tune\.freeze=.* takes out all of"):
        select_trainable(model, ["proj"], ["proj"], stage="tune")


def test_frozen_encoder_stays_in_eval_mode_and_builds_no_graph() -> None:
    model = small_model()
    model.encoder.scale = torch.nn.Parameter(torch.ones(()))
    select_trainable(model, ["proj", "rwkv"], [], stage="tune")
    assert not model.train().encoder.training and model.rwkv.training
    model.encoder.scale.requires_grad_(True)
    assert model.train().encoder.training


def test_batch_without_any_image() -> None:
    model = small_model()
    batch = make_batch(model, [(-1, 4, 1), (-1, 2, 2)])
    assert batch.pixels is None
    assert torch.isfinite(model.logits(batch)).all()
