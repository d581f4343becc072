"""Encoders that are learned from scratch with the rest of the model."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from components.encoders.pixels import ImageTransform, check_pixels, from_map
from toolkit.contracts import ImageFeatures

STEM_STRIDE = 16


class PatchEncoder(nn.Module):
    """One linear map per patch (ViT, Dosovitskiy et al. 2021, eq. 1, without class token).

    Pixels [B, 3, image_size, image_size] -> [B, (image_size/patch)**2, width].
    """

    learned = True
    n_extra = 0

    def __init__(self, *, image_size: int, patch: int, width: int, positions: bool) -> None:
        super().__init__()
        if image_size % patch:
            raise ValueError(
                f"encoder.image_size: {image_size} is no multiple of encoder.patch={patch}; "
                f"use {image_size - image_size % patch or patch}"
            )
        side = image_size // patch
        self.image_size, self.d_out, self.grid = image_size, width, (side, side)
        self.embed = nn.Conv2d(3, width, kernel_size=patch, stride=patch)
        # 0.02 is ViT's own scale for the position table.
        table = nn.Parameter(torch.randn(width, side, side) * 0.02) if positions else None
        self.register_parameter("positions", table)

    def transform(self) -> ImageTransform:
        return ImageTransform(self.image_size)

    def forward(self, pixels: Tensor) -> ImageFeatures:
        check_pixels(pixels, self.image_size)
        features = self.embed(pixels)  # [B, D, height, width]
        return from_map(features if self.positions is None else features + self.positions)


class ConvEncoder(nn.Module):
    """Four 3 x 3 convolutions of stride 2, each doubling the channels up to `width`.

    Pixels [B, 3, image_size, image_size] -> [B, (image_size/16)**2, width]. The early convolutions
    are those of Xiao et al. 2021 (arXiv 2106.14881), which train faster than plain patches.
    """

    learned = True
    n_extra = 0

    def __init__(self, *, image_size: int, width: int) -> None:
        super().__init__()
        if image_size % STEM_STRIDE:
            raise ValueError(
                f"encoder.image_size: {image_size} is no multiple of {STEM_STRIDE}; "
                f"use {max(STEM_STRIDE, image_size - image_size % STEM_STRIDE)}"
            )
        if width % 8:
            raise ValueError(f"encoder.width: {width} is no multiple of 8; use {width - width % 8}")
        side = image_size // STEM_STRIDE
        self.image_size, self.d_out, self.grid = image_size, width, (side, side)
        widths = [3, width // 8, width // 4, width // 2, width]
        self.stem = nn.Sequential(*(_stage(widths[i], widths[i + 1], last=i == 3) for i in range(4)))

    def transform(self) -> ImageTransform:
        return ImageTransform(self.image_size)

    def forward(self, pixels: Tensor) -> ImageFeatures:
        check_pixels(pixels, self.image_size)
        return from_map(self.stem(pixels))


def _stage(d_in: int, d_out: int, *, last: bool) -> nn.Sequential:
    # Group norm looks at one sample only: batch statistics would make a result depend on its
    # neighbours and on how a global batch is cut into micro batches.
    parts = [nn.Conv2d(d_in, d_out, kernel_size=3, stride=2, padding=1, bias=False), nn.GroupNorm(1, d_out)]
    return nn.Sequential(*parts) if last else nn.Sequential(*parts, nn.GELU())
