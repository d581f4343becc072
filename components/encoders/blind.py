"""The blind control."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from components.encoders.pixels import from_map
from toolkit.contracts import ImageFeatures

if TYPE_CHECKING:
    from PIL.Image import Image


def withhold(image: Image) -> Tensor:
    """Any image -> the same single zero; collated to [B, 1], it only says how many samples there are."""
    return torch.zeros(1)


class BlankEncoder(nn.Module):
    """Zero features [B, grid**2, width], whatever the image; no parameters."""

    learned = False
    n_extra = 0

    def __init__(self, *, grid: int, width: int) -> None:
        super().__init__()
        self.d_out, self.grid = width, (grid, grid)

    def transform(self) -> Callable[[Image], Tensor]:
        return withhold

    def forward(self, pixels: Tensor) -> ImageFeatures:
        if pixels.dim() != 2 or pixels.shape[1] != 1:
            raise ValueError(
                f"encoder: blank takes no image, got shape {list(pixels.shape)}, expected [B, 1]; "
                "make pixels with the encoder's own transform()"
            )
        return from_map(pixels.new_zeros(pixels.shape[0], self.d_out, *self.grid))
