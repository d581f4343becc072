"""Pictures to an encoder's pixels: the same values from PIL and from uint8 pixels."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from PIL import Image

from components.encoders.pixels import HALF, ImageTransform

CLIP = ((0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711))


def expected(transform: ImageTransform, image: Image.Image) -> torch.Tensor:
    """The same, written as it is read: resize, cut, scale, then channels first."""
    size, bicubic = transform.size, Image.Resampling.BICUBIC
    if transform.fit == "stretch":
        square = image.resize((size, size), bicubic)
    else:
        width, height = (size * side // min(image.size) for side in image.size)
        left, top = (width - size) // 2, (height - size) // 2
        square = image.resize((width, height), bicubic).crop((left, top, left + size, top + size))
    values = torch.from_numpy(np.array(square)).float() / 255
    return ((values - torch.tensor(transform.mean)) / torch.tensor(transform.std)).permute(2, 0, 1)


@pytest.mark.parametrize("fit", ["stretch", "crop"])
@pytest.mark.parametrize("shape", [(32, 32, 3), (40, 77, 3), (32, 50, 3), (9, 9, 3)])
@pytest.mark.parametrize("statistics", [(HALF, HALF), CLIP])
def test_pixels_and_pil_images_give_the_same_bits(
    fit: str, shape: tuple[int, ...], statistics: tuple
) -> None:
    pixels = np.random.default_rng(0).integers(0, 256, shape, dtype=np.uint8)
    transform = ImageTransform(32, *statistics, fit)
    image = Image.fromarray(pixels)
    for given in (image, torch.from_numpy(pixels.copy())):
        found = transform(given)
        assert found.is_contiguous() and torch.equal(found, expected(transform, image))
    assert np.array_equal(np.asarray(image), pixels), "what was given is as it was"


def test_other_modes_become_rgb() -> None:
    image = Image.linear_gradient("L").resize((32, 32))
    assert torch.equal(ImageTransform(32)(image), ImageTransform(32)(image.convert("RGB")))
