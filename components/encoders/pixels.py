"""Images to pixels, and feature maps to `ImageFeatures`: what all encoders share."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

import numpy as np
import torch
from torch import Tensor

from toolkit.contracts import ImageFeatures

if TYPE_CHECKING:
    from PIL.Image import Image

HALF = (0.5, 0.5, 0.5)
"""Mean and standard deviation that map [0, 1] to [-1, 1]."""

Statistics = tuple[float, ...]


@dataclass(frozen=True)
class ImageTransform:
    """PIL image -> float32 pixels [3, size, size], bicubic, then (x - mean) / std on [0, 1] values.

    An image may also be uint8 pixels [height, width, 3]; one of this size already is not resized.
    fit "stretch": both sides to `size`, aspect lost. "crop": shortest side to `size`, then the centre
    square, borders lost (what the CLIP processor of the paper's code does, to the pixel).
    """

    size: int
    mean: Statistics = HALF
    std: Statistics = HALF
    fit: str = "stretch"

    takes_pixels: ClassVar[bool] = True

    def __call__(self, image: Image | Tensor) -> Tensor:
        pixels = self._sized(image).permute(2, 0, 1).contiguous()  # [3, size, size]
        mean, std = (torch.tensor(values).view(3, 1, 1) for values in (self.mean, self.std))
        return pixels.float().div_(255).sub_(mean).div_(std)

    def _sized(self, image: Image | Tensor) -> Tensor:
        """uint8 pixels [size, size, 3]."""
        if isinstance(image, Tensor):
            if image.shape[:2] == (self.size, self.size):
                return image
            from PIL.Image import fromarray

            image = fromarray(image.numpy())
        rgb = image if image.mode == "RGB" else image.convert("RGB")
        return torch.from_numpy(np.array(rgb if rgb.size == (self.size, self.size) else self._square(rgb)))

    def _square(self, image: Image) -> Image:
        from PIL.Image import Resampling

        if self.fit == "stretch":
            return image.resize((self.size, self.size), Resampling.BICUBIC)
        short = min(image.size)
        width, height = (self.size * side // short for side in image.size)
        left, top = (width - self.size) // 2, (height - self.size) // 2
        # Resized whole, then cut: resampling only the cut would see other pixels at its border.
        whole = image.resize((width, height), Resampling.BICUBIC)
        return whole.crop((left, top, left + self.size, top + self.size))


def check_pixels(pixels: Tensor, size: int) -> None:
    """Raises ValueError unless pixels are [B, 3, size, size]."""
    if pixels.dim() != 4 or tuple(pixels.shape[1:]) != (3, size, size):
        raise ValueError(
            f"encoder: pixels have shape {list(pixels.shape)}, expected [B, 3, {size}, {size}]; "
            "make them with the encoder's own transform()"
        )


def from_map(feature_map: Tensor, extra: Tensor | None = None) -> ImageFeatures:
    """[B, D, height, width] and [B, E, D] -> row-major patches with their extra tokens."""
    batch, width = feature_map.shape[:2]
    if extra is None:
        extra = feature_map.new_zeros(batch, 0, width)
    patches = feature_map.flatten(2).transpose(1, 2)  # [B, P, D]
    return ImageFeatures(patches, extra, (feature_map.shape[2], feature_map.shape[3]))


def to_map(features: ImageFeatures) -> Tensor:
    """Patches -> [B, D, height, width]; extra tokens are left out."""
    return features.patches.transpose(1, 2).unflatten(2, features.grid)
