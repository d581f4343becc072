"""The README's claim, executed: every recurrence x scan x prompt x projector trains one step."""

from __future__ import annotations

import itertools

import pytest
import torch

from data.batch import collate
from data.dataset import Sample
from data.tokens import CompactTokenizer, WorldTokenizer, encode_segments
from tests.helpers import component, randomise
from toolkit import register
from toolkit.contracts import IGNORE, Text, Turn
from toolkit.lit import parameter_groups
from toolkit.loss import lm_loss
from toolkit.model import VisualRWKV
from toolkit.trunk import LanguageModel

register.discover()
KINDS = ("recurrence", "scan", "prompt", "projector")
CASES = list(itertools.product(*(sorted(register.components(kind)) for kind in KINDS)))

DIALOGS = [
    (Turn("human", "<image>\nWhat shape is it?"), Turn("gpt", "circle")),
    (Turn("human", "<image>\nIs it red?"), Turn("gpt", "no"), Turn("human", "And blue?"), Turn("gpt", "yes")),
]


def test_the_product_covers_every_registered_component() -> None:
    assert len(CASES) >= 3 * 8 * 3 * 3
    assert {c[0] for c in CASES} == {"rwkv4", "rwkv5", "rwkv6"}


@pytest.fixture(scope="module")
def tokenizer() -> CompactTokenizer:
    texts = [
        segment.text
        for name in register.components("prompt")
        for turns in DIALOGS
        for segment in component("prompt", name)(turns)
        if isinstance(segment, Text)
    ]
    return CompactTokenizer.collect(texts, WorldTokenizer())


@pytest.mark.parametrize(("recurrence", "scan", "prompt", "projector"), CASES)
def test_one_step(
    recurrence: str, scan: str, prompt: str, projector: str, tokenizer: CompactTokenizer
) -> None:
    torch.manual_seed(0)
    encoder = component("encoder", "patch", image_size=32, patch=8, width=12)()
    proj = component("projector", projector, tokens=4)(encoder.d_out, 16, encoder.grid)
    rwkv = LanguageModel(
        component("recurrence", recurrence)(16, 2), d_model=16, n_layer=2, vocab_size=tokenizer.size
    )
    model = VisualRWKV(encoder, proj, rwkv, table=component("scan", scan)(2, *proj.grid))
    randomise(model)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    samples = []
    for turns in DIALOGS:
        made = encode_segments(component("prompt", prompt)(turns), tokenizer, model.n_image)
        ids, labels = torch.tensor(made.ids), torch.tensor(made.labels)
        samples.append(Sample(ids, labels, made.image_start, "key", 0, 1.0, torch.randn(3, 32, 32)))
    batch = collate(samples)
    assert bool((batch.labels != IGNORE).any())
    optimizer = torch.optim.AdamW(parameter_groups(model, 0.01), lr=1e-2)
    loss = lm_loss(model(batch, l2="answers"), reduction="sample")
    loss.backward()
    optimizer.step()
    assert torch.isfinite(loss)
    still = [name for name, p in model.named_parameters() if torch.equal(p, before[name])]
    assert not still, f"these did not learn: {still}"
