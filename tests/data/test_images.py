"""Decoding: three formats, nothing hostile."""

from __future__ import annotations

import random
from collections import Counter
from io import BytesIO

import numpy as np
import pytest
import torch
from PIL import Image, ImageFile

from data import images
from data.dataset import Examples
from data.images import BadPicture, decode, extension, header, pixels, transformed
from data.loader import eval_loader
from data.reader import ShardReader

from .helpers import Letters, mean_color, picture, plain_prompt, shard_folder


@pytest.mark.parametrize(("kind", "ending"), [("PNG", "png"), ("JPEG", "jpg"), ("WEBP", "webp")])
def test_formats_by_their_first_bytes(kind, ending):
    data = picture(1, kind=kind)
    assert extension(data) == ending
    assert header(data, "here") == (8, 6)
    decoded = decode(data, "here")
    assert (decoded.mode, decoded.size) == ("RGB", (8, 6))


@pytest.mark.parametrize(
    ("kind", "draft", "size"),
    [("JPEG", 0, (64, 48)), ("JPEG", 48, (64, 48)), ("JPEG", 24, (32, 24)), ("JPEG", 12, (16, 12)),
     ("JPEG", 1, (8, 6)), ("PNG", 12, (64, 48)), ("WEBP", 12, (64, 48))],
)  # fmt: skip
def test_drafts_are_smaller_and_never_smaller_than_asked(kind, draft, size):
    out = BytesIO()
    Image.linear_gradient("L").resize((64, 48)).convert("RGB").save(out, kind, quality=95)
    picture = decode(out.getvalue(), "x", draft=draft)
    assert (picture.size, picture.mode) == (size, "RGB")
    whole = decode(out.getvalue(), "x").resize((8, 6), Image.Resampling.BOX)
    near = picture.resize((8, 6), Image.Resampling.BOX)
    assert max(abs(a - b) for a, b in zip(whole.tobytes(), near.tobytes(), strict=True)) <= 3


def test_a_cut_jpeg_is_no_draft_either():
    data = picture(1, kind="JPEG", size=(200, 200))
    with pytest.raises(ValueError, match=r"^key 7: the picture cannot be decoded"):
        decode(data[: len(data) // 2], "key 7", draft=25)


@pytest.mark.parametrize("workers", [0, 1])
def test_a_sample_may_have_its_picture_at_several_resolutions(tmp_path, workers):
    """What `fused` asks for: every member its own size, stacked part by part."""
    reader = ShardReader(shard_folder(tmp_path / "s", 4))

    def several(image):
        return mean_color(image), (mean_color(image.resize((4, 4))), mean_color(image)[:, :1])

    settings = {"prompt": plain_prompt, "tokenizer": Letters(), "n_image": 4, "ctx_len": 64}
    examples = Examples(reader, transform=several, **settings)
    (batch,) = eval_loader(examples, batch=8, workers=workers)
    pictured = [j for j in range(len(examples)) if examples.example(j).has_image]
    large, (small, part) = batch.pixels
    assert large.shape == small.shape == (len(pictured), 3, 2, 2) and part.shape == (len(pictured), 3, 1, 2)
    for row, j in enumerate(pictured):
        assert torch.equal(part[row], examples[j].pixels[1][1]) and torch.equal(large[row, :, :1], part[row])


def test_png_pixels_are_exact():
    data = picture(5)
    assert decode(data, "x").tobytes() == bytes((5 * 37 + i * 11) % 256 for i in range(8 * 6 * 3))


@pytest.mark.parametrize("mode", ["L", "1", "P", "RGBA", "LA", "I;16"])
def test_other_modes_become_rgb(mode):
    out = BytesIO()
    Image.new(mode, (4, 3)).save(out, "PNG")
    assert decode(out.getvalue(), "x").mode == "RGB"


def test_16_bits_of_grey_keep_their_shades():
    out = BytesIO()
    Image.frombytes("I;16", (4, 1), bytes([0, 0, 255, 0, 0, 100, 255, 255])).save(out, "PNG")
    assert decode(out.getvalue(), "x").tobytes() == bytes([0] * 6 + [100] * 3 + [255] * 3)


@pytest.mark.parametrize("kind", ["GIF", "TIFF", "BMP", "ICO"])
def test_other_parsers_are_never_reached(kind):
    with pytest.raises(ValueError, match=r"^key 7: no JPEG, PNG or WebP picture"):
        decode(picture(1, kind=kind), "key 7")


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "WEBP"])
def test_truncated_pictures_are_errors_whatever_the_flag(kind, monkeypatch):
    monkeypatch.setattr(ImageFile, "LOAD_TRUNCATED_IMAGES", True)
    data = picture(1, kind=kind, size=(200, 200))
    with pytest.raises(ValueError, match=r"^key 7: the picture"):
        decode(data[: len(data) // 3], "key 7")


@pytest.mark.parametrize(
    "data", [b"", b"\x89PNG\r\n\x1a\n", b"\xff\xd8\xff\xe0" + bytes(40), b"RIFF\0\0\0\0WEBPVP8 "]
)
def test_broken_headers_are_errors(data):
    with pytest.raises(ValueError, match=r"^key 7: "):
        header(data, "key 7")


def bomb(width: int, height: int, mode: str = "1") -> bytes:
    out = BytesIO()
    Image.new(mode, (width, height)).save(out, "PNG", optimize=True)
    return out.getvalue()


@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
@pytest.mark.parametrize("size", [(9400, 9400), (15_000, 15_000)])
def test_bombs_by_pixels_are_refused_from_the_header(size):
    data = bomb(*size)
    assert len(data) < 50_000
    with pytest.raises(ValueError, match=r"^key 7: "):
        header(data, "key 7")


def test_bombs_by_ratio_are_refused():
    data = bomb(5000, 5000)
    with pytest.raises(
        ValueError, match=r"^key 7: [\d,]+ bytes would decode to 75,000,000, more than 2,000 times"
    ):
        decode(data, "key 7")


def test_the_pixel_limit_is_named():
    with pytest.raises(ValueError, match=r"8001 x 8001 = 64,016,001 pixels, at most 64,000,000 are decoded"):
        header(bomb(8001, 8001), "key 7")


def test_small_flat_pictures_are_no_bombs():
    out = BytesIO()
    Image.new("RGB", (512, 512)).save(out, "WEBP", lossless=True)
    assert decode(out.getvalue(), "x").size == (512, 512)


def jpeg(size=(65, 47), *, mode="RGB", **options) -> bytes:
    out = BytesIO()
    noise = np.random.default_rng(7).integers(0, 256, (*size[::-1], 3), dtype=np.uint8)
    Image.fromarray(noise).convert(mode).save(out, "JPEG", **options)
    return out.getvalue()


SORTS = {
    "4:2:0": jpeg(subsampling=2, quality=60),
    "4:2:2": jpeg(subsampling=1, quality=95),
    "4:4:4": jpeg(subsampling=0),
    "progressive": jpeg(progressive=True, quality=30),
    "restart": jpeg(restart_marker_rows=1),
    "kept RGB": jpeg(keep_rgb=True),
    "a pixel": jpeg((1, 1)),
    "grey": jpeg(mode="L"),
    "CMYK": jpeg(mode="CMYK"),
    "turned": jpeg(exif=b"Exif\0\0MM\0*\0\0\0\x08\0\x01\x01\x12\0\x03\0\0\0\x01\0\x06\0\0\0\0\0\0"),
    "png": picture(1),
    "webp": picture(1, kind="WEBP"),
}
FAST = [name for name in SORTS if name not in ("grey", "CMYK", "png", "webp")]


@pytest.mark.parametrize("name", SORTS)
def test_pixels_are_those_of_pillow(name):
    found = pixels(SORTS[name], "x")
    assert found.dtype == torch.uint8 and found.is_contiguous()
    assert np.array_equal(found.numpy(), np.asarray(decode(SORTS[name], "x")))


@pytest.mark.parametrize("name", SORTS)
def test_color_jpegs_need_no_pillow(name, monkeypatch):
    asked = []
    monkeypatch.setattr(images, "decode", lambda *a, **k: asked.append(a) or decode(*a, **k))
    pixels(SORTS[name], "x")
    assert bool(asked) == (name not in FAST)
    pixels(SORTS[name], "x", draft=8)
    assert len(asked) == 2 - (name in FAST), "only Pillow drafts"


def test_damaged_jpegs_are_told_as_by_pillow():
    draw, judged = random.Random(0), Counter()
    for turn in range(400):
        data = bytearray(SORTS[draw.choice(FAST)])
        kind = draw.choice(["flip", "cut", "cut and ended", "longer"])
        if kind == "flip":
            data[draw.randrange(3, len(data))] ^= 1 << draw.randrange(8)
        elif kind == "longer":
            at = draw.randrange(3, len(data))
            data[at:at] = draw.randbytes(3)
        else:
            data = data[: draw.randrange(4, len(data))] + b"\xff\xd9" * (kind != "cut")
        told = []
        for read in (pixels, decode):
            try:
                told.append(np.asarray(read(bytes(data), "x")).tobytes())
            except BadPicture as error:
                told.append(str(error))
        assert told[0] == told[1], (turn, kind)
        judged[type(told[0])] += 1
    assert min(judged[str], judged[bytes]) > 50


def test_a_jpeg_of_too_many_pixels_is_refused_before_it_is_decoded(monkeypatch):
    monkeypatch.setattr(images, "_jpeg_reader", lambda: lambda _: pytest.fail("decoded"))
    data = bytearray(jpeg((64, 64)))
    at = data.index(b"\xff\xc0")
    data[at + 5 : at + 9] = bytes([255, 255, 255, 255])
    with pytest.raises(BadPicture, match="at most 64,000,000 are decoded"):
        pixels(bytes(data), "x")


def test_a_torchvision_without_jpeg_is_told_once(monkeypatch, caplog):
    import torchvision.io

    def none(data, mode):
        raise RuntimeError("not compiled with libjpeg support")

    monkeypatch.setattr(torchvision.io, "decode_jpeg", none)
    images._jpeg_reader.cache_clear()
    try:
        for _ in range(2):
            assert np.array_equal(pixels(SORTS["4:2:0"], "x").numpy(), decode(SORTS["4:2:0"], "x"))
    finally:
        images._jpeg_reader.cache_clear()
    (record,) = caplog.records
    assert "not compiled with libjpeg support" in record.getMessage()


def test_a_transform_gets_what_it_takes():
    class Transform:
        takes_pixels = True

        def __call__(self, image):
            return image

    assert isinstance(transformed(Transform(), SORTS["4:2:0"], "x"), torch.Tensor)
    assert isinstance(transformed(lambda image: image, SORTS["4:2:0"], "x"), Image.Image)
    assert transformed(Transform(), SORTS["4:2:0"], "x", draft=12).shape[:2] == (24, 33)
