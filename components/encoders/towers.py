"""A pretrained tower read at one layer: what the timm, open_clip and lite0 encoders share."""

from __future__ import annotations

import difflib
from collections.abc import Callable, Collection

import torch
from torch import Tensor, nn
from torch.func import functional_call

from components.encoders.pixels import ImageTransform, check_pixels, from_map
from toolkit.contracts import ImageFeatures

Read = Callable[[nn.Module, Tensor], tuple[Tensor, Tensor | None]]
"""(tower, pixels) -> (feature map [B, D, height, width], extra tokens [B, E, D] or None)."""


class TowerEncoder(nn.Module):
    """Frozen tower and the way to read its feature map; eval mode from the start.

    Pixels [B, 3, size, size] -> [B, P, d_out] and `n_extra` extra vectors. Width and grid are
    found with one pass over shapes alone (meta tensors), so any tower that fits `read` will do.
    """

    learned = False

    def __init__(self, tower: nn.Module, read: Read, preprocess: ImageTransform) -> None:
        super().__init__()
        self.tower = tower
        self._read = read
        self._preprocess = preprocess
        self.eval()
        shapes = self._shapes()
        self.d_out, self.grid = shapes.patches.shape[2], shapes.grid
        self.n_extra = shapes.extra.shape[1]

    def transform(self) -> ImageTransform:
        return self._preprocess

    def forward(self, pixels: Tensor) -> ImageFeatures:
        check_pixels(pixels, self._preprocess.size)
        return from_map(*self._read(self.tower, pixels))

    def _shapes(self) -> ImageFeatures:
        size = self._preprocess.size
        tensors = {**dict(self.named_parameters()), **dict(self.named_buffers())}
        meta = {name: tensor.detach().to("meta") for name, tensor in tensors.items()}
        with torch.no_grad():
            return functional_call(self, meta, (torch.empty(1, 3, size, size, device="meta"),))


def unknown_model(name: str, known: Collection[str], library: str) -> ValueError:
    """The error for a model name that `library` lacks, with the three closest names it has."""
    close = difflib.get_close_matches(name, known, n=3, cutoff=0.0)
    return ValueError(f"encoder.model: {library} has no model '{name}'; closest: {', '.join(close)}")
