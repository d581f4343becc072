"""What the tests of toolkit.convert share."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

import toolkit.convert.convert as converter

GOLDEN = Path(__file__).parent / "golden"
VERSIONS = {"rwkv4": "4", "rwkv5": "5.2", "rwkv6": "6"}


@pytest.fixture
def here(monkeypatch: pytest.MonkeyPatch) -> None:
    """Unpickles in this process: starting one for each of many harmless files takes seconds."""

    def without_a_child(path: Path, folder: Path, seconds: int, *, as_is: bool) -> dict[str, Any]:
        return converter.write_folder(path, folder, as_is=as_is)

    monkeypatch.setattr(converter, "_in_a_child", without_a_child)


def golden_file(version: int) -> dict[str, Tensor]:
    """A VisualRWKV checkpoint as its code saves it: rwkv.*, proj.*, vit.*."""
    stored = load_file(GOLDEN / f"visualrwkv_v{version}.safetensors")
    return {k.removeprefix("param/"): v for k, v in stored.items() if k.startswith("param/")}


def same(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    """Bit for bit, names in the same order, types too."""
    return list(a) == list(b) and all(
        a[n].dtype == b[n].dtype and a[n].shape == b[n].shape and torch.equal(a[n], b[n]) for n in a
    )


def read_back(path: Path) -> dict[str, Tensor]:
    return torch.load(path, weights_only=True)


def ghost_state(sizes: dict[str, Any]) -> dict[str, Tensor]:
    from toolkit.pretrained import ghost

    return dict(ghost(sizes).state_dict())


def vit(**options: Any) -> Any:
    from timm.models.vision_transformer import VisionTransformer

    torch.manual_seed(1)
    small = {"img_size": 32, "patch_size": 16, "embed_dim": 24, "depth": 2, "num_heads": 2, "num_classes": 0}
    model = VisionTransformer(**{**small, **options})
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter))
    return model


def without(state: dict[str, Tensor], pattern: str) -> dict[str, Tensor]:
    return {n: t for n, t in state.items() if not re.search(pattern, n)}
