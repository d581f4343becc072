"""Our language models against the `rwkv` package on random weights in its file format."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

import toolkit
from data.tokens import WorldTokenizer
from tests.test_recurrences import language_model
from toolkit import Sampling
from toolkit.continuation import Writer
from toolkit.convert.convert import convert
from toolkit.sampling import Picker
from toolkit.trunk import LanguageModel

LENGTH, D_MODEL, VOCAB = 64, 128, 97
STEPS = 200


@pytest.fixture
def package(monkeypatch: pytest.MonkeyPatch) -> Any:
    """The package's module; it reads these variables at import and at each call."""
    monkeypatch.setenv("RWKV_JIT_ON", "0")
    monkeypatch.setenv("RWKV_CUDA_ON", "0")
    return pytest.importorskip("rwkv.model", reason="the rwkv package is a test dependency")


def ours_in_pieces(model: LanguageModel, ids: list[int], sizes: list[int]) -> Tensor:
    """Logits [T, V] when the sequence is read in pieces with carried state."""
    state, logits = None, []
    with torch.no_grad():
        for piece in torch.tensor(ids).split(sizes):
            hidden, state = model(model.emb(piece).unsqueeze(0), state=state)
            logits.append(model.head(hidden)[0])
    return torch.cat(logits)


@pytest.mark.parametrize("name", ["rwkv4", "rwkv5", "rwkv6"])
def test_logits_equal_the_package(name: str, tmp_path: Path, package: Any) -> None:
    model = language_model(name, d_model=D_MODEL, n_layer=3, vocab=VOCAB)
    torch.save(model.state_dict(), tmp_path / f"{name}.pth")  # flat name -> tensor, as released
    theirs = package.RWKV(model=str(tmp_path / name), strategy="cpu fp32", verbose=False)
    ids = torch.randint(0, VOCAB, (LENGTH,), generator=torch.Generator().manual_seed(5)).tolist()
    expected = theirs.forward(list(ids), None, full_output=True)[0]
    state, single = None, []
    for token in ids:
        out, state = theirs.forward([token], state)
        single.append(out.clone())
    scale = expected.norm()
    assert float((torch.stack(single) - expected).norm() / scale) < 1e-4  # the package agrees with itself
    for sizes in ([LENGTH], [10, 1, 30, 23], [1] * LENGTH):
        logits = ours_in_pieces(model, ids, sizes)
        assert float((logits - expected).norm() / scale) < 1e-3, sizes


@pytest.mark.parametrize("name", ["rwkv4", "rwkv5", "rwkv6"])
def test_greedy_text_equals_the_packages(name: str, tmp_path: Path, package: Any) -> None:
    """200 tokens of the World vocabulary, through toolkit.convert and toolkit.load, from the state."""
    from rwkv.utils import PIPELINE

    state = language_model(name, d_model=D_MODEL, n_layer=2, vocab=VOCAB).state_dict()
    for row in ("emb.weight", "head.weight"):
        state[row] = torch.randn(WorldTokenizer.size, D_MODEL)
    save_file(state, tmp_path / "m.safetensors")
    torch.save(state, tmp_path / "m.pth")
    convert(tmp_path / "m.safetensors", tmp_path / "m")
    theirs = package.RWKV(model=str(tmp_path / "m"), strategy="cpu fp32", verbose=False)
    pipeline = PIPELINE(theirs, "rwkv_vocab_v20230424")
    ours = toolkit.load(tmp_path / "m", device="cpu", precision="fp32")
    prompt = "User: What is an RWKV? 你好。\n\nAssistant:"
    ids = pipeline.encode(prompt)
    assert ours.words.encode(prompt) == ids
    wanted, margin = [], 1.0
    out, state = theirs.forward(list(ids), None)
    for _ in range(STEPS):
        best = out.topk(2)
        margin = min(margin, float(best.values[0] - best.values[1]))
        wanted.append(int(best.indices[0]))
        out, state = theirs.forward([wanted[-1]], state)
    assert margin > 1e-4  # no choice hangs on rounding
    with torch.inference_mode():
        hidden, before = ours.rwkv(ours.rwkv.emb(torch.tensor([ids])))
        greedy = Picker(Sampling(max_new_tokens=STEPS))
        with Writer(ours.rwkv, ours.rwkv.head(hidden[:, -1]), before, greedy, owner=ours) as writer:
            found = [int(writer.token), *(int(writer.step()) for _ in range(STEPS - 1))]
    assert found == wanted and len(set(found)) > 20
    assert ours.words.raw(found) == pipeline.tokenizer.decodeBytes(wanted)
