"""Converted weights loaded by toolkit.load: language models, VisualRWKV checkpoints of every version."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

import toolkit
from data.tokens import WorldTokenizer
from tests.asking import QUESTIONS, picture
from tests.converting import golden_file
from tests.encoding import TINY_CLIP, tiny_clip
from tests.helpers import make_batch, small_model, take
from tests.test_load import Q, folder, here, told
from toolkit import Sampling, loading
from toolkit.contracts import Text
from toolkit.convert.convert import convert
from toolkit.weights import Weights, settings_of

__all__ = ["folder", "here", "tiny_clip"]  # fixtures of other files


def test_a_converted_language_model_is_asked_without_an_image(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from tests.helpers import component
    from toolkit.trunk import LanguageModel

    torch.manual_seed(0)
    size = WorldTokenizer.size
    rwkv = LanguageModel(component("recurrence", "rwkv6")(64, 2), d_model=64, n_layer=2, vocab_size=size)
    save_file(rwkv.state_dict(), tmp_path / "m.safetensors")
    convert(tmp_path / "m.safetensors", tmp_path / "m")
    model = toolkit.load(tmp_path / "m")
    ids = torch.tensor([[5, 6, 7]])
    with torch.no_grad():
        torch.testing.assert_close(model.logits(ids), rwkv.head(rwkv(rwkv.emb(ids))[0]))
    expected = model.answer(None, "Hi!", Sampling(max_new_tokens=5))
    words = (f"weights={tmp_path / 'm'}", "prompt=Hi!", "max_new_tokens=5")
    assert told(capsys, *words) == (0, expected + "\n", "")
    with pytest.raises(ValueError, match="model m has no vision parts"):
        model.answer(picture(1), "Hi!")


@pytest.fixture
def visual(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[int], Path]:
    """The golden VisualRWKV checkpoint of a version, converted, with the rows of the World vocabulary."""

    def make(version: int) -> Path:
        state = golden_file(version)
        torch.manual_seed(0)
        for name in ("rwkv.emb.weight", "rwkv.head.weight"):
            state[name] = torch.randn(WorldTokenizer.size, state[name].shape[1])
        save_file(state, tmp_path / "v.safetensors")
        convert(tmp_path / "v.safetensors", tmp_path / f"v{version}")
        return tmp_path / f"v{version}"

    monkeypatch.setattr(loading, "CLIP", TINY_CLIP)
    return make


def test_a_converted_visualrwkv_answers_about_an_image(
    visual: Callable[[int], Path],
    here: Path,
    capsys: pytest.CaptureFixture[str],
    caplog: pytest.LogCaptureFixture,
) -> None:
    folder = visual(6)
    model = toolkit.load(folder)
    assert model.vision is not None and model.words.size == WorldTokenizer.size
    stored = Weights(folder / "model.safetensors")
    for name, weight in model.vision.state_dict().items():
        if not name.startswith("encoder."):
            assert torch.equal(weight, stored[name]), name
    options = Sampling(max_new_tokens=5)
    texts = [model.answer(f"{i}.png", Q, options) for i in (1, 2)]
    words = (f"weights={folder}", "max_new_tokens=5", "image=1.png", f"prompt={Q}")
    assert told(capsys, *words)[1] == texts[0] + "\n"
    assert told(capsys, *words, "scan=bi", "layout=sandwich")[1] == texts[0] + "\n"
    turn = model.first_turn(Q, image=True)
    logits = [m.read_first([turn], [(picture(1), Q)])[0] for m in (model, toolkit.load(folder, scan="uni"))]
    assert not torch.allclose(*logits)
    assert f"{folder}: asked with layout=sandwich, as v6.0 was trained" in caplog.messages  # scan= was said
    code, _, err = told(capsys, *words, "scan=bo")
    assert code == 2 and "did you mean: bi" in err


def test_a_tower_alone_is_no_model(tmp_path: Path) -> None:
    """Its tensors are no foreign file's: they must not be taken for one that is unknown."""
    tower = {n.removeprefix("vit."): t for n, t in golden_file(6).items() if n.startswith("vit.")}
    save_file(tower, tmp_path / "tower.safetensors")
    convert(tmp_path / "tower.safetensors", tmp_path / "tower")
    with pytest.raises(ValueError, match="neither a run's directory nor a converted language model"):
        toolkit.load(tmp_path / "tower")


def test_precision_is_that_of_the_weights(visual: Callable[[int], Path]) -> None:
    folder = visual(6)
    exact, half = toolkit.load(folder), toolkit.load(folder, precision="bf16")
    assert {p.dtype for p in half.rwkv.parameters()} == {torch.bfloat16}
    assert half.vision is not None and {p.dtype for p in half.vision.encoder.parameters()} == {torch.float32}
    assert (exact.precision, half.precision) == ("fp32", "bf16")
    turn = exact.first_turn(Q, image=True)
    with torch.inference_mode():
        found, wanted = (m.read_first([turn], [(picture(1), Q)])[0].float() for m in (half, exact))
    # The golden model has large random weights: autocast alone differs from float32 by 5 % on it.
    assert 0 < float((found - wanted).norm() / wanted.norm()) < 0.15
    chat = half.chat(picture(1))
    assert chat.ask(Q, Sampling(max_new_tokens=4)) == half.answer(picture(1), Q, Sampling(max_new_tokens=4))
    assert chat.ask(QUESTIONS[1], Sampling(max_new_tokens=4)) is not None


def test_a_v5_checkpoint_needs_its_scan_and_layout(visual: Callable[[int], Path]) -> None:
    folder = visual(5)
    with pytest.raises(ValueError, match=r"does not tell how it was trained; write scan= \(2d, bi"):
        toolkit.load(folder)
    model = toolkit.load(folder, scan="2d", layout="sandwich")
    before = model.first_turn("<image>\nhi", image=True)[0]
    assert before == Text("User: hi\n") and model.name == "model v5 with scan=2d layout=sandwich"
    assert model.answer(picture(1), Q, Sampling(max_new_tokens=2)) is not None


def test_a_class_token_in_front_as_in_v5_0(visual: Callable[[int], Path]) -> None:
    """Against the language model alone over embeddings in that order."""
    folder = visual(5)
    with pytest.raises(ValueError, match=r"write class_token=first for v5\.0, class_token=last for v5\.1"):
        toolkit.load(folder, scan="uni", layout="prefix")
    with pytest.raises(ValueError, match="write class_token=first or class_token=last"):
        toolkit.load(folder, scan="uni", layout="prefix", class_token="middle")
    model = toolkit.load(folder, scan="uni", layout="prefix", class_token="first")
    assert model.name.endswith("class_token=first") and model.vision is not None
    turn = model.first_turn(Q, image=True)
    with torch.inference_mode():
        found = model.read_first([turn], [(picture(1), Q)])[0]
        pixels = model.vision.encoder.transform()(picture(1)).unsqueeze(0)
        projected = model.vision.proj(model.vision.encode(pixels))
        first, *rest = [model.words.encode(s.text) for s in turn if isinstance(s, Text)]
        later = [i for ids in rest for i in ids]
        before, after = (model.rwkv.emb(torch.tensor([ids])) for ids in (first, later))
        for place in ("first", "last"):
            parts = [projected.extra, projected.patches][:: 1 if place == "first" else -1]
            x = torch.cat([before, *parts, after], dim=1)
            wanted = model.rwkv.head(model.rwkv(x)[0][:, -1])
            assert torch.allclose(found, wanted, rtol=1e-4, atol=1e-5) == (place == "first")


def test_stored_scan_orders_tell_v5_1(visual: Callable[[int], Path], tmp_path: Path) -> None:
    state = dict(Weights(visual(5) / "model.safetensors").items()) | {"spiral_order": torch.arange(16)}
    save_file(state, tmp_path / "w.safetensors")
    convert(tmp_path / "w.safetensors", tmp_path / "v51")
    model = toolkit.load(tmp_path / "v51", scan="uni", layout="prefix")
    assert model.vision is not None and not model.vision.extra_first


@pytest.mark.parametrize("scan", ["uni", "2d"])
def test_the_scan_begins_behind_a_class_token_in_front(scan: str) -> None:
    model = small_model(scan=scan, n_extra=2).double()
    model.extra_first = True
    batch = make_batch(model, [(3, 5, 1), (0, 2, 1), (-1, 4, 1)], dtype=torch.float64)
    for i in range(3):
        alone = take(batch, model, i)
        start = alone.image_start
        with torch.no_grad():
            x = model.rwkv.emb(alone.ids)
            if start >= 0:
                projected = model.proj(model.encode(alone.pixels))
                image = torch.cat((projected.extra, projected.patches), dim=1)
                x = torch.cat((x[:, :start], image, x[:, start + model.n_image :]), dim=1)
                start = start + 2
            wanted = model.rwkv(x, scan=model.scan, image_start=start)[0]
            torch.testing.assert_close(model.hidden(batch)[i : i + 1, : x.shape[1]], wanted)
            torch.testing.assert_close(model.prefill(batch)[0][i : i + 1, : x.shape[1]], wanted)


def test_a_config_that_lies_is_refused_before_anything_is_built(visual: Callable[[int], Path]) -> None:
    folder = visual(6)
    held = (folder / "config.json").read_text()
    changes: list[Callable[[Any], None]] = [
        lambda parts: parts["rwkv"].update(n_layer=10**9),
        lambda parts: parts["rwkv"].update(d_model=1 << 40),
        lambda parts: parts["rwkv"]["recurrence"].update(name="evil"),
        lambda parts: parts["proj"].update(name="evil"),
        lambda parts: parts.update(rwkv=[]),
    ]
    for change in changes:
        config = json.loads(held)
        change(config["parts"])
        (folder / "config.json").write_text(json.dumps(config))
        with pytest.raises(ValueError, match=r"its config\.json does not tell what its weights hold"):
            toolkit.load(folder)
        assert isinstance(settings_of(str(folder)), dict)
    for text in ("{", "[]", '{"parts": 3}', '{"parts": [1]}', "[" * 100_000):
        (folder / "config.json").write_text(text)
        with pytest.raises(ValueError, match="neither a run's directory"):
            toolkit.load(folder)
        assert settings_of(str(folder)) == {}
