"""Decoding: three formats, nothing hostile."""

from __future__ import annotations

from io import BytesIO

import pytest
import torch
from PIL import Image, ImageFile

from data.dataset import Examples
from data.images import decode, extension, header
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
