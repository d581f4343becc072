"""Our language models against the `rwkv` package on random weights in its file format."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.test_recurrences import language_model
from toolkit.trunk import LanguageModel

LENGTH, D_MODEL, VOCAB = 64, 128, 97


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
