"""Every registered recurrence: one pass, chunks and single tokens agree; published values and shapes."""

from __future__ import annotations

import math
from functools import partial

import pytest
import torch
from torch.utils.checkpoint import checkpoint

import kernels
from tests.helpers import component, randomise
from toolkit import register
from toolkit.trunk import LanguageModel

register.discover()
RECURRENCES = sorted(register.components("recurrence"))


def language_model(name: str, *, d_model: int = 32, n_layer: int = 3, vocab: int = 23) -> LanguageModel:
    torch.manual_seed(3)
    mixers = component("recurrence", name)(d_model, n_layer)
    model = LanguageModel(mixers, d_model=d_model, n_layer=n_layer, vocab_size=vocab)
    randomise(model)
    return model


@pytest.mark.parametrize("name", RECURRENCES)
@pytest.mark.parametrize("backend", ["torch", "reference"])
def test_one_pass_chunks_and_single_tokens_agree(name: str, backend: str) -> None:
    model = language_model(name).double()
    x = torch.randn(2, 21, 32, dtype=torch.float64)
    with kernels.use(backend), torch.no_grad():
        whole, last = model(x)
        for cuts in ([8, 13], [1] * 21):
            state, parts = None, []
            for piece in x.split(cuts, dim=1):
                y, state = model(piece, state=state)
                parts.append(y)
            torch.testing.assert_close(torch.cat(parts, 1), whole, rtol=1e-9, atol=1e-9)
            for mine, theirs in zip(state, last, strict=True):
                for a, b in zip((*mine[0], mine[1]), (*theirs[0], theirs[1]), strict=True):
                    torch.testing.assert_close(a, b, rtol=1e-8, atol=1e-9)


@pytest.mark.parametrize("name", RECURRENCES)
def test_state_is_each_samples_own_end(name: str) -> None:
    model = language_model(name).double()
    lengths = torch.tensor([5, 12, 1])
    x = torch.randn(3, 12, 32, dtype=torch.float64)
    with torch.no_grad():
        _, together = model(x, lengths=lengths)
        for i, n in enumerate(lengths.tolist()):
            _, alone = model(x[i : i + 1, :n])
            for mine, theirs in zip(together, alone, strict=True):
                for a, b in zip((*mine[0], mine[1]), (*theirs[0], theirs[1]), strict=True):
                    torch.testing.assert_close(a[i], b[0], rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("backend", ["torch", "reference"])
@pytest.mark.parametrize("name", RECURRENCES)
def test_a_block_can_be_computed_again_in_the_backward_pass(name: str, backend: str) -> None:
    """Activation checkpointing, the form that gives every saved tensor out once."""
    block = language_model(name).blocks[1]
    x, late = (torch.randn(2, 21, 32, requires_grad=True) for _ in range(2))
    index, lengths = torch.randperm(42), torch.tensor([21, 9])
    found = []
    with kernels.use(backend):
        for again in (False, True):
            whole = partial(checkpoint, block, use_reentrant=False) if again else block
            y, more, (time_state, _), _ = whole(x, late, None, None, lengths, index)
            loss = (y * more).sum() + time_state[1].sum()
            found.append(torch.autograd.grad(loss, [x, late, *block.parameters()]))
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))


@pytest.mark.parametrize("name", RECURRENCES)
def test_every_parameter_has_a_gradient(name: str) -> None:
    model = language_model(name)
    model.head(model(model.emb(torch.randint(0, 23, (2, 9))))[0]).square().sum().backward()
    for key, parameter in model.named_parameters():
        assert parameter.grad is not None and float(parameter.grad.abs().sum()) > 0, key


@pytest.mark.parametrize(("name", "tensors"), [("rwkv4", 18), ("rwkv5", 22), ("rwkv6", 28)])
def test_tensor_counts_and_shapes_of_the_published_files(name: str, tensors: int) -> None:
    """visualrwkv.md section 2: 18L+6, 22L+6, 28L+6 tensors; a 3.5 C or 4 C channel mix."""
    with torch.device("meta"):
        mixers = component("recurrence", name)(2048, 24)
        weights = LanguageModel(mixers, d_model=2048, n_layer=24, vocab_size=65536).state_dict()
    assert len(weights) == tensors * 24 + 6
    assert weights["blocks.7.ffn.key.weight"].shape == (8192 if name == "rwkv4" else 7168, 2048)
    if name != "rwkv4":
        assert weights["blocks.0.att.time_faaaa"].shape == (32, 64)
    if name == "rwkv6":
        assert weights["blocks.0.att.time_maa_w1"].shape == (2048, 160)
        assert weights["blocks.0.att.time_decay_w2"].shape == (64, 2048)


@pytest.mark.parametrize(
    ("d_model", "n_layer", "millions"), [(2048, 24, 1600), (2560, 32, 3100), (4096, 32, 7636)]
)
def test_parameter_counts_of_released_rwkv6_models(d_model: int, n_layer: int, millions: int) -> None:
    with torch.device("meta"):
        mixers = component("recurrence", "rwkv6")(d_model, n_layer)
        model = LanguageModel(mixers, d_model=d_model, n_layer=n_layer, vocab_size=65536)
    assert sum(p.numel() for p in model.parameters()) / 1e6 == pytest.approx(millions, rel=2e-3)


def test_initial_values_of_the_reference() -> None:
    """Spot checks against visualrwkv.md sections 2.1 to 2.3, layer 2 of 5, D = 64."""
    down, up = 1 - 2 / 5, 2 / 4
    c, edge = torch.arange(64) / 64, torch.arange(64) / 63
    four = component("recurrence", "rwkv4")(64, 5).time_mix(2)
    torch.testing.assert_close(four.time_decay, -5 + 8 * edge ** (0.7 + 1.3 * up))
    torch.testing.assert_close(four.time_first[:3], math.log(0.3) + 0.5 * torch.tensor([0.0, 1.0, -1.0]))
    torch.testing.assert_close(four.time_mix_v.flatten(), c**down + 0.3 * up)
    assert not four.key.weight.any() and not four.receptance.weight.any() and not four.output.weight.any()
    five = component("recurrence", "rwkv5")(64, 5).time_mix(2)
    torch.testing.assert_close(five.time_decay.flatten(), -6 + 5 * edge ** (0.7 + 1.3 * up))
    zigzag = ((torch.arange(64) + 1) % 3 - 1).float()
    torch.testing.assert_close(five.time_faaaa.flatten(), up * (1 - edge) + 0.1 * zigzag)
    torch.testing.assert_close(five.time_mix_g.flatten(), c ** (0.5 * down))
    torch.testing.assert_close(five.ln_x.weight, torch.full((64,), (3 / 5) ** 0.7))
    six = component("recurrence", "rwkv6")(64, 5).time_mix(2)
    torch.testing.assert_close(six.time_maa_v.flatten(), 1 - (c**down + 0.3 * up))
    torch.testing.assert_close(six.time_maa_r.flatten(), 1 - c ** (0.5 * down))
    assert not six.time_maa_w1.any() and six.time_maa_w2.detach().abs().max() <= 0.01
    gram = six.value.weight @ six.value.weight.T
    torch.testing.assert_close(gram, torch.eye(64), atol=1e-5, rtol=0)
    gram = six.key.weight @ six.key.weight.T
    torch.testing.assert_close(gram, 0.01 * torch.eye(64), atol=1e-6, rtol=0)
    for mixers in (four, five, six):
        assert not mixers.output.weight.any()


def test_head_size_that_does_not_divide_is_refused_with_both_keys() -> None:
    with pytest.raises(
        ValueError, match=r"recurrence\.head_size=48 does not divide model\.d_model=64; write"
    ):
        component("recurrence", "rwkv6", head_size=48)(64, 2)


def test_bf16_autocast_keeps_the_decay_in_fp32() -> None:
    mixer = component("recurrence", "rwkv6")(32, 2).time_mix(0)
    with torch.autocast("cpu", torch.bfloat16):
        assert mixer.log_decay(torch.randn(2, 3, 32)).dtype == torch.float32
