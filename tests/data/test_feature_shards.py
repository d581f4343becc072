"""Features in place of pictures: the same numbers, the same samples, damage by name."""

from __future__ import annotations

import json
import pickle

import pytest
import torch

from data.dataset import Examples
from data.export import export
from data.feature_shards import FeatureShards, features_of, pooled, stored_features, write_features
from data.images import BadPicture, decode
from data.loader import eval_loader
from data.policy import Guarded, reported
from data.reader import DamagedSample, ShardReader
from data.shards import write_shards
from data.verify import verify
from toolkit.contracts import NO_IMAGE, ImageFeatures

from .faulty import flip
from .helpers import Letters, conversation, mean_color, picture, plain_prompt, shard_folder

FACTS = {"grid": [2, 2], "n_extra": 1, "width": 3, "encoder": {"name": "x"}}


def encode(pixels):
    assert not torch.is_grad_enabled()
    patches = pixels.flatten(2).transpose(1, 2)  # [B, 4, 3]
    return ImageFeatures(patches, patches[:, :1] * 2, (2, 2))


@pytest.fixture
def source(tmp_path):
    return ShardReader(shard_folder(tmp_path / "pictures", 24))


def write(source, out, **options):
    return ShardReader(write_features(source, out, encode, mean_color, facts=FACTS, batch=5, **options))


def test_features_stand_where_the_pictures_stood(source, tmp_path):
    done = []
    reader = write(source, tmp_path / "f", progress=lambda *n: done.append(n))
    assert done[-1] == (24, 24) and len(done) == 5
    assert features_of(reader) == FACTS and features_of(source) is None
    assert [reader.record(i) for i in range(24)] == [source.record(i) for i in range(24)]
    assert [reader.key(i) for i in range(24)] == [source.key(i) for i in range(24)]
    assert reader.manifest_hash == source.manifest_hash
    records = [i for i in range(24) if source.has_image(i)][::-1]
    pixels = torch.stack([mean_color(decode(source.image_bytes(i), "")) for i in records])
    with torch.no_grad():
        direct = encode(pixels)
    for keep in (0, 1 << 20):
        table = stored_features(reader, keep_bytes=keep)
        assert isinstance(table, FeatureShards) == table.streamed == (keep == 0)
        for found in (table.gather(records), pickle.loads(pickle.dumps(table)).gather(records)):
            assert found.patches.dtype == torch.bfloat16 and found.grid == (2, 2)
            assert torch.equal(found.patches, direct.patches.bfloat16())
            assert torch.equal(found.extra, direct.extra.bfloat16())
        with pytest.raises(ValueError, match="record 2 has no picture"):
            table.gather([2])
    assert table.patches.nbytes + table.extra.nbytes == stored_features(reader, keep_bytes=0).n_bytes
    assert not list(verify(reader.folder, full=True))


def test_written_twice_is_the_same_and_is_found_again(source, tmp_path):
    first, second = write(source, tmp_path / "a"), write(source, tmp_path / "b")
    for file in first.folder.iterdir():
        assert file.read_bytes() == (second.folder / file.name).read_bytes()
    calls = []
    write_features(source, tmp_path / "a", calls.append, mean_color, facts=FACTS)
    assert not calls


def test_a_folder_of_other_features_is_not_taken_for_these(source, tmp_path):
    write(source, tmp_path / "f")
    other = ShardReader(shard_folder(tmp_path / "others", 12))
    with pytest.raises(ValueError, match="holds something else"):
        write_features(other, tmp_path / "f", encode, mean_color, facts=FACTS)
    with pytest.raises(ValueError, match="holds something else"):
        write_features(source, tmp_path / "f", encode, mean_color, facts={**FACTS, "encoder": {"name": "y"}})
    with pytest.raises(ValueError, match="holds features already"):
        write(ShardReader(tmp_path / "f"), tmp_path / "g")


def test_features_are_not_exported_though_the_first_record_is_a_text(tmp_path):
    records = [
        ({"conversations": conversation("q", "a", image=False)}, None),
        ({"conversations": conversation("q", "a")}, picture(0)),
    ]
    source = ShardReader(write_shards(records, tmp_path / "s", about={}))
    with pytest.raises(ValueError, match="holds features, not pictures"):
        export(write(source, tmp_path / "f").folder, tmp_path / "back")


def test_several_pictures_of_a_record(tmp_path):
    meta = {"conversations": conversation("<image>\nq", "a")}
    source = ShardReader(write_shards([(meta, [picture(0), picture(1)])], tmp_path / "s", about={}))
    assert write(source, tmp_path / "f").n_images(0) == 2


@pytest.mark.parametrize("workers", [0, 2])
def test_batches_read_them_from_the_shards(source, tmp_path, workers):
    reader = write(source, tmp_path / "f")
    table = stored_features(reader, keep_bytes=0)
    kept = {"prompt": plain_prompt, "tokenizer": Letters(), "n_image": 5, "ctx_len": 64}
    for batch in eval_loader(Examples(reader, features=table, **kept), batch=7, workers=workers):
        starts = batch.image_start.tolist()
        records = [int(k.split("-")[0]) for k, s in zip(batch.keys, starts, strict=True) if s != NO_IMAGE]
        assert bool(records) == (batch.features is not None)
        if records:
            assert torch.equal(batch.features.patches, table.gather(records).patches)


def damaged(source, tmp_path):
    reader = write(source, tmp_path / "f")
    shard, span = reader.place(3, image=True)
    flip(reader.folder / shard, span.offset + span.size - 1)
    return reader


def test_damage_is_named_under_either_policy(source, tmp_path):
    reader = damaged(source, tmp_path)
    with pytest.raises(DamagedSample, match=r"member 00000003.safetensors at byte"):
        stored_features(reader, keep_bytes=0).gather([0, 3])
    kept = {"prompt": plain_prompt, "tokenizer": Letters(), "n_image": 5, "ctx_len": 64}
    examples = Examples(reader, features=stored_features(reader, keep_bytes=0), **kept)
    report = tmp_path / "r.jsonl"
    guarded = Guarded(examples, policy="tolerant", report=report)
    lost = [j for j in range(len(examples)) if examples.reader.examples.record[j] == 3]
    weights = [w for batch in eval_loader(guarded, batch=4) for w in batch.weight.tolist()]
    assert [j for j, w in enumerate(weights) if w == 0] == lost == list(reported(report))
    with pytest.raises(DamagedSample, match=r"member 00000003.safetensors at byte"):
        list(eval_loader(Guarded(examples, policy="strict", report=report), batch=4))


def test_other_content_is_refused(source, tmp_path):
    def narrow(pixels):
        made = encode(pixels)
        return ImageFeatures(made.patches[..., :2], made.extra[..., :2], made.grid)

    folder = write_features(source, tmp_path / "f", narrow, mean_color, facts=FACTS)
    with pytest.raises(
        BadPicture, match=r"of shape \[4, 2\] and \[1, 2\], the manifest says \[4, 3\] and \[1, 3\]"
    ):
        stored_features(ShardReader(folder), keep_bytes=0).gather([0])
    with pytest.raises(ValueError, match="holds no features"):
        FeatureShards(source)
    with pytest.raises(
        ValueError, match="holds features, not pictures; export the folder they were made from"
    ):
        from data.export import export

        export(folder, tmp_path / "out")


@pytest.mark.parametrize(("grid", "tokens"), [((2, 2), 4), ((4, 4), -1), ((1, 1), 1), ((0, 0), 0)])
def test_pooling_is_the_projectors(grid, tokens):
    from components.projectors.pool import pool, pooled_grid

    torch.manual_seed(0)
    features = ImageFeatures(torch.randn(2, 16, 3), torch.randn(2, 1, 3), (4, 4))
    assert pooled_grid((4, 4), tokens) == grid
    ours, theirs = pooled(features, grid), pool(features, grid)
    assert torch.equal(ours.patches, theirs.patches) and torch.equal(ours.extra, theirs.extra)
    assert ours.grid == theirs.grid


def test_the_manifest_says_what_it_stands_for(source, tmp_path):
    manifest = json.loads((write(source, tmp_path / "f").folder / "manifest.json").read_text())
    assert manifest["stands_for"] == source.manifest_hash
    assert {s["images"] for s in manifest["shardlist"]} != {0}
