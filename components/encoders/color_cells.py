"""What needs no weights: the colours and shapes in each cell of a picture, and where the cell is."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from components.encoders.pixels import ImageTransform, check_pixels, from_map
from toolkit.contracts import ImageFeatures

INK = 0.5
"""Weight of the ink: two shapes then differ by about as much as two colours or two places."""

LIGHT = 7
"""The corner of the RGB cube where red, green and blue are all light: paper."""


class ColorEncoder(nn.Module):
    """Per cell: colours of what is drawn, how much is paper, a coarse map of ink, its row and column.

    Pixels [B, 3, image_size, image_size] in [0, 1] -> [B, (image_size / cell)**2, 8 + detail**2 + 2 *
    image_size / cell]. A colour is a corner of the RGB cube; seven channels are shares of the pixels that are
    no paper, a histogram that does not depend on an object's size (Swain and Ballard 1991, coarse), the
    eighth is the share of paper. Ink is how far a pixel is from white, averaged to detail x detail values. Of
    a cell's row and column one channel each is set. No parameters, and no cell sees its neighbours, as it
    does in the features of a convolution.
    """

    learned = False
    n_extra = 0
    places: Tensor

    def __init__(self, *, image_size: int, cell: int, detail: int) -> None:
        super().__init__()
        if image_size % cell:
            raise ValueError(
                f"encoder.image_size: {image_size} is no multiple of encoder.cell={cell}; "
                f"use {image_size - image_size % cell or cell}"
            )
        if cell % detail:
            raise ValueError(
                f"encoder.detail: {detail} does not divide encoder.cell={cell}; "
                f"use {max(n for n in range(1, detail + 1) if cell % n == 0)}"
            )
        side = image_size // cell
        self.image_size, self.cell, self.detail, self.grid = image_size, cell, detail, (side, side)
        self.d_out = 8 + detail**2 + 2 * side
        self.register_buffer("places", _places(side), persistent=False)

    def transform(self) -> ImageTransform:
        return ImageTransform(self.image_size, mean=(0.0, 0.0, 0.0), std=(1.0, 1.0, 1.0))

    def forward(self, pixels: Tensor) -> ImageFeatures:
        check_pixels(pixels, self.image_size)
        corner = ((pixels > 0.5).long() * pixels.new_tensor([4, 2, 1]).long().view(3, 1, 1)).sum(dim=1)
        bins = F.one_hot(corner, 8).movedim(3, 1).to(pixels.dtype)  # [B, 8, image_size, image_size]
        shares = F.avg_pool2d(bins, self.cell)  # [B, 8, side, side]
        drawn, paper = shares[:, :LIGHT], shares[:, LIGHT:]
        colors = drawn / (1 - paper).clamp(min=1 / self.cell**2)
        ink = F.avg_pool2d(1 - pixels.amin(dim=1, keepdim=True), self.cell // self.detail)
        forms = F.pixel_unshuffle(ink, self.detail)  # [B, detail**2, side, side]
        places = self.places.to(pixels.dtype).expand(len(pixels), -1, -1, -1)
        return from_map(torch.cat((colors, paper, INK * forms, places), dim=1))


def _places(side: int) -> Tensor:
    """[2 * side, side, side]: first a channel per row, then one per column."""
    one = torch.eye(side)
    rows, columns = one.unsqueeze(2).expand(-1, -1, side), one.unsqueeze(1).expand(-1, side, -1)
    return torch.cat((rows, columns))
