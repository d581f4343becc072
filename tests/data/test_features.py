"""The feature cache: the same numbers from memory, from disk and from the encoder."""

from __future__ import annotations

import os
import pickle

import pytest
import torch

from data.batch import collate
from data.dataset import Examples
from data.features import build_features, estimate_bytes
from data.images import BadPicture, decode
from data.loader import eval_loader
from data.reader import ShardReader
from data.shards import write_shards
from toolkit.contracts import NO_IMAGE, ImageFeatures

from .faulty import flip
from .helpers import Letters, conversation, mean_color, picture, plain_prompt, shard_folder


@pytest.fixture(scope="module")
def reader(tmp_path_factory):
    return ShardReader(shard_folder(tmp_path_factory.mktemp("shards") / "s", 24))


class Encode:
    """[B, 3, 2, 2] -> four patches of width 3 and n_extra extra vectors; counts its pictures."""

    def __init__(self, n_extra: int = 1) -> None:
        self.n_extra, self.seen = n_extra, 0

    def __call__(self, pixels):
        assert not torch.is_grad_enabled()
        self.seen += len(pixels)
        patches = pixels.flatten(2).transpose(1, 2)  # [B, 4, 3]
        return ImageFeatures(patches, patches[:, : self.n_extra] * 2, (2, 2))


def build(reader, folder, encode, **options):
    settings = {"where": "disk", "folder": folder, "encoder_id": "e", "batch": 5, **options}
    return build_features(reader, encode, mean_color, **settings)


@pytest.mark.parametrize("n_extra", [0, 1])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_memory_and_disk_hold_the_encoders_numbers(reader, tmp_path, dtype, n_extra):
    memory = build(reader, tmp_path, Encode(n_extra), where="memory", dtype=dtype)
    disk = build(reader, tmp_path, Encode(n_extra), dtype=dtype)
    again = build(reader, tmp_path, Encode(n_extra), dtype=dtype)
    records = [i for i in range(len(reader)) if reader.has_image(i)][::-1]
    pixels = torch.stack([mean_color(decode(reader.image_bytes(i), "")) for i in records])
    with torch.no_grad():
        direct = Encode(n_extra)(pixels)
    for table in (memory, disk, again):
        found = table.gather(records)
        assert found.grid == (2, 2) and found.patches.dtype == dtype
        assert torch.equal(found.patches, direct.patches.to(dtype))
        assert torch.equal(found.extra, direct.extra.to(dtype))
    size = memory.patches.nbytes + memory.extra.nbytes
    assert estimate_bytes(len(records), (2, 2), n_extra, 3, dtype) == size


def test_each_picture_is_encoded_once_and_never_again(reader, tmp_path):
    encode, done = Encode(), []
    build(reader, tmp_path, encode, progress=lambda n, total: done.append((n, total)))
    n = sum(reader.has_image(i) for i in range(len(reader)))
    assert encode.seen == n
    assert done[-1] == (n, n) and [d for d, _ in done] == sorted(d for d, _ in done)
    build(reader, tmp_path, encode)
    assert encode.seen == n
    build(reader, tmp_path, encode, encoder_id="other")
    assert encode.seen == 2 * n


def test_other_data_has_other_features(reader, tmp_path):
    encode = Encode()
    build(reader, tmp_path / "f", encode)
    first = encode.seen
    build(ShardReader(shard_folder(tmp_path / "s", 6)), tmp_path / "f", encode)
    assert encode.seen == first + 4


def test_an_interrupted_table_is_not_used(reader, tmp_path):
    def stop(done, total):
        if done > 10:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        build(reader, tmp_path, Encode(), progress=stop)
    assert not list(tmp_path.glob("*features*safetensors")) and not list(tmp_path.glob("*.part"))
    encode = Encode()
    build(reader, tmp_path, encode)
    assert encode.seen == 16


def test_a_cut_table_is_named(reader, tmp_path):
    build(reader, tmp_path, Encode())
    (file,) = tmp_path.glob("features-*.safetensors")
    os.truncate(file, file.stat().st_size - 8)
    with pytest.raises(ValueError, match=r"the feature cache .* cannot be read: .*; delete it"):
        build(reader, tmp_path, Encode())


def test_text_only_records_have_no_features(reader, tmp_path):
    table = build(reader, tmp_path, Encode())
    with pytest.raises(ValueError, match=r"record 2 has no picture"):
        table.gather([0, 2])


def test_a_table_on_disk_travels_by_its_path(reader, tmp_path):
    table = build(reader, tmp_path, Encode())
    sent = pickle.dumps(table)
    assert len(sent) < 2000 + table.rows.nbytes
    assert torch.equal(pickle.loads(sent).patches, table.patches)
    memory = pickle.loads(pickle.dumps(build(reader, tmp_path, Encode(), where="memory")))
    assert torch.equal(memory.patches, table.patches)


@pytest.mark.parametrize("workers", [0, 2])
def test_batches_carry_the_features_of_their_pictures(reader, tmp_path, workers):
    table = build(reader, tmp_path, Encode())
    kept = {"prompt": plain_prompt, "tokenizer": Letters(), "n_image": 5, "ctx_len": 64}
    examples = Examples(reader, features=table, **kept)
    for batch in eval_loader(examples, batch=7, workers=workers):
        starts = batch.image_start.tolist()
        records = [
            int(k.split("-")[0]) for k, start in zip(batch.keys, starts, strict=True) if start != NO_IMAGE
        ]
        assert batch.pixels is None
        if not records:
            assert batch.features is None
            continue
        assert torch.equal(batch.features.patches, table.gather(records).patches)
    only_text = [s for s in (examples[j] for j in range(9)) if s.image_start == NO_IMAGE]
    assert collate(only_text, features=table).features is None


def test_drafts_and_tolerance_have_caches_of_their_own(tmp_path):
    meta = {"conversations": conversation("q", "a")}
    large = picture(1, kind="JPEG", size=(64, 64))
    whole = ShardReader(write_shards([(meta, large)], tmp_path / "s", about={}))
    sizes = []

    def seen(image):
        sizes.append(image.size)
        return mean_color(image)

    for options in ({}, {"draft": 16}, {"tolerant": True}, {"draft": 16}):
        build_features(whole, Encode(), seen, where="disk", folder=tmp_path, encoder_id="e", **options)
    assert sizes == [(64, 64), (16, 16), (64, 64)]
    assert len(list(tmp_path.glob("features-*"))) == 3
    examples = Examples(
        whole, transform=seen, prompt=plain_prompt, tokenizer=Letters(), n_image=4, ctx_len=64, draft=32
    )
    assert examples[0].pixels is not None and sizes[-1] == (32, 32)


@pytest.mark.parametrize("where", ["memory", "disk"])
def test_a_damaged_picture_stops_or_is_marked(tmp_path, where):
    meta = {"conversations": conversation("q", "a")}
    cut = picture(1, kind="JPEG", size=(64, 64))[:600]
    made = ShardReader(write_shards([(meta, p) for p in (picture(0), cut)], tmp_path / "s", about={}))
    with pytest.raises(BadPicture, match="00000001: the picture"):
        build(made, tmp_path, Encode(), where=where)
    table = build(made, tmp_path, Encode(), where=where, tolerant=True)
    table.fetch(0)
    with pytest.raises(BadPicture, match="could not be read when its features were computed"):
        table.fetch(1)


def test_wrong_choices_are_refused(reader, tmp_path):
    with pytest.raises(ValueError, match=r"'memory' or on 'disk', not 'gpu'"):
        build(reader, tmp_path, Encode(), where="gpu")
    with pytest.raises(ValueError, match=r"cannot be kept as torch.int8"):
        build(reader, tmp_path, Encode(), dtype=torch.int8)


def test_a_picture_that_was_repaired_gets_its_features(tmp_path):
    folder = shard_folder(tmp_path / "s", 6)
    first = ShardReader(folder)
    bad = next(i for i in range(len(first)) if first.has_image(i))
    shard, span = first.place(bad, image=True)
    flip(folder / shard, span.offset + span.size // 2)
    with pytest.raises(BadPicture, match="could not be read when"):
        build(ShardReader(folder), tmp_path, Encode(), tolerant=True).fetch(bad)
    encode = Encode()
    build(ShardReader(folder), tmp_path, encode, tolerant=True)
    assert not encode.seen  # still damaged: computed once
    flip(folder / shard, span.offset + span.size // 2)
    found = build(ShardReader(folder), tmp_path, Encode(), tolerant=True)
    found.fetch(bad)
    assert torch.equal(found.patches, build(ShardReader(folder), tmp_path, Encode(), where="memory").patches)


def test_a_table_that_was_damaged_is_not_trained_on(reader, tmp_path):
    build(reader, tmp_path, Encode())
    (file,) = tmp_path.glob("features-*")
    flip(file, file.stat().st_size - 20)
    with pytest.raises(
        ValueError, match=r"was damaged after it was written: CRC-32 is .*; delete it to compute"
    ):
        build(reader, tmp_path, Encode())


@pytest.mark.parametrize("where", ["disk", "memory"])
def test_a_split_of_texts_alone(tmp_path, where):
    turns = conversation("q", "a", image=False)
    made = ShardReader(write_shards([({"conversations": turns}, None)] * 3, tmp_path / "s", about={}))
    table = build(made, tmp_path, Encode(), where=where)
    examples = Examples(
        made, prompt=plain_prompt, tokenizer=Letters(), n_image=4, ctx_len=64, features=table, answer=False
    )
    (batch,) = eval_loader(examples, batch=4)
    assert table.grid == (2, 2) and len(batch.keys) == 3 and not list(tmp_path.glob("features-*"))
