"""The control arm of examples/: causal attention whose state is as long as its window, whatever was read."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from tests.compositions import one, registry
from tests.helpers import component, make_batch, randomise, small_model, take
from toolkit import run
from toolkit.decode import Decoder
from toolkit.loss import lm_loss
from toolkit.trunk import LanguageModel

EXAMPLES = Path(__file__).resolve().parent.parent / "examples"
WINDOW = 6


@pytest.fixture(autouse=True)
def plugin(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """The registry with the plug-in, as plugins=[attention] leaves it; without it afterwards."""
    monkeypatch.setattr(sys, "path", [str(EXAMPLES), *sys.path])
    with registry():
        one("plugins=[attention]")
        yield
    for name in ("attention", "attention_layers"):
        sys.modules.pop(name, None)


def language_model(window: int = WINDOW) -> LanguageModel:
    torch.manual_seed(3)
    mixers = component("recurrence", "attention", window=window)(32, 3)
    model = LanguageModel(mixers, d_model=32, n_layer=3, vocab_size=23)
    randomise(model)
    return model.double()


@pytest.mark.parametrize("cuts", [[8, 13], [1] * 21, [20, 1]])
def test_one_pass_chunks_and_single_tokens_agree(cuts: list[int]) -> None:
    """Also beyond the window: what lies in the state is what one pass sees."""
    model = language_model()
    x = torch.randn(2, 21, 32, dtype=torch.float64)
    with torch.no_grad():
        whole, last = model(x)
        state, parts = None, []
        for piece in x.split(cuts, dim=1):
            y, state = model(piece, state=state)
            parts.append(y)
    torch.testing.assert_close(torch.cat(parts, 1), whole, rtol=1e-9, atol=1e-9)
    assert state is not None
    for (mine, _), (theirs, _) in zip(state, last, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-8, atol=1e-9)


def test_a_token_sees_its_window_and_nothing_else() -> None:
    mixer = language_model().blocks[0].att
    x = torch.randn(1, 12, 32, dtype=torch.float64, requires_grad=True)
    mixer(x, None, None, None)[0][0, 9].sum().backward()
    assert x.grad is not None
    assert x.grad[0].abs().sum(1).nonzero().flatten().tolist() == list(range(9 - WINDOW + 1, 10))


def test_where_a_text_begins_does_not_matter() -> None:
    """Rotary positions say how far apart two tokens are, not where they stand."""
    mixer = language_model(window=4).blocks[0].att
    x = torch.randn(1, 12, 32, dtype=torch.float64)
    with torch.no_grad():
        late, early = mixer(x, None, None, None)[0], mixer(x[:, 5:], None, None, None)[0]
    torch.testing.assert_close(late[:, 5 + 3 :], early[:, 3:], rtol=1e-9, atol=1e-9)
    assert not torch.allclose(late[:, 5], early[:, 0])


def test_state_is_each_samples_own_end() -> None:
    model = language_model()
    lengths = torch.tensor([5, 12, 1])
    x = torch.randn(3, 12, 32, dtype=torch.float64)
    with torch.no_grad():
        _, together = model(x, lengths=lengths)
        for i, n in enumerate(lengths.tolist()):
            _, alone = model(x[i : i + 1, :n])
            for (mine, _), (theirs, _) in zip(together, alone, strict=True):
                for a, b in zip(mine, theirs, strict=True):
                    torch.testing.assert_close(a[i], b[0], rtol=1e-9, atol=1e-9)


def test_decoding_from_the_state_equals_reading_everything() -> None:
    """The decoder overwrites states in place, which a cache that grows would not bear."""
    model = language_model().eval()
    ids = torch.randint(0, 23, (2, 9))
    with torch.no_grad():
        _, state = model(model.emb(ids))
        decoder = Decoder(model, state)
        decoder.load(ids[:, -1] * 0 + 4, state)
        tokens = [torch.full((2,), 4)]
        for _ in range(WINDOW + 2):
            tokens.append(decoder.step().clone())
        whole, _ = model(model.emb(torch.cat((ids, torch.stack(tokens[:-1], 1)), 1)))
        expected = model.head(whole)[:, ids.shape[1] :].argmax(-1)
    assert torch.stack(tokens[1:], 1).tolist() == expected.tolist()


def test_a_sample_does_not_depend_on_its_batch_and_every_parameter_learns() -> None:
    model = small_model(recurrence="attention", scan="2d")
    batch = make_batch(model, [(3, 5, 1), (0, 2, 1), (-1, 4, 1)], pad=2)
    with torch.no_grad():
        together = model.logits(batch)
        for i, n in enumerate(batch.lengths.tolist()):
            alone = model.logits(take(batch, model, i))
            torch.testing.assert_close(together[i, :n], alone[0], rtol=1e-4, atol=1e-4)
    lm_loss(model(batch, l2="answers"), reduction="sample").backward()
    still = [n for n, p in model.named_parameters() if p.grad is None or not p.grad.any()]
    assert not still, f"these do not learn: {still}"


def test_it_trains_and_answers_by_configuration(tmp_path: Path) -> None:
    """One row of a table with the control arm in it: composed, trained, evaluated from the state."""
    words = [
        *("plugins=[attention]", "recurrence=attention", "recipe=ablation/scan_2d", "scale=tiny"),
        *("data=scenes", "data.train_pictures=24", "data.test_pictures=8", "encoder=patch"),
        *("model.d_model=16", "model.n_layer=2", "stages.tune.steps=2", "stages.tune.warmup=0"),
        *(
            "stages.tune.global_batch=4",
            "eval.every=0",
            f"paths.cache={tmp_path}",
            f"paths.runs={tmp_path}/r",
        ),
    ]
    assert run.main(words) == 0
    (file,) = (tmp_path / "r").glob("attention-2d-prefix-s0-*/result.json")
    assert json.loads(file.read_text())["n"] > 0


def test_a_head_size_that_does_not_fit_is_refused() -> None:
    with pytest.raises(
        ValueError, match=r"recurrence\.head_size=24 must be even and divide model\.d_model=32"
    ):
        component("recurrence", "attention", head_size=24)(32, 2)
