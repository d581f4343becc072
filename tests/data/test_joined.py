"""Several data sets as one."""

from __future__ import annotations

from collections import Counter
from typing import Any

import pytest
import torch

from data.features import build_features
from data.joined import Joined
from data.loader import train_loader
from data.mixture import Mixture, Source
from data.policy import Guarded, reported
from data.reader import ShardReader
from toolkit.contracts import NO_IMAGE, ImageFeatures

from .helpers import mean_color, shard_folder
from .test_dataset import examples_of
from .test_reader import flip


@pytest.fixture(scope="module")
def readers(tmp_path_factory):
    folder = tmp_path_factory.mktemp("shards")
    return {name: ShardReader(shard_folder(folder / name, n)) for name, n in (("a", 24), ("b", 9), ("c", 15))}


def features_of(reader, tmp_path, grid=(1, 1)):
    def encode(pixels):
        flat = pixels.flatten(1)[:, None, : 4 * grid[0]].reshape(len(pixels), grid[0], -1)
        return ImageFeatures(flat, flat[:, :0], grid)

    return build_features(reader, encode, mean_color, where="memory", folder=tmp_path, encoder_id="e")


def test_samples_are_those_of_their_part(readers):
    parts = {name: examples_of(reader, transform=mean_color) for name, reader in readers.items()}
    joined = Joined(parts)
    assert len(joined) == sum(len(part) for part in parts.values())
    j = 0
    for name, part in parts.items():
        for k in range(len(part)):
            ours, theirs = joined[(j, 1.0)], part[(k, 1.0)]
            assert ours.key == f"{name}/{theirs.key}" and torch.equal(ours.ids, theirs.ids)
            assert ours.pixels is theirs.pixels
            j += 1


def test_a_mixture_through_a_loader_has_its_shares(readers):
    parts = {name: examples_of(reader) for name, reader in readers.items()}
    shares = {"a": 0.5, "b": 0.2, "c": 0.3}
    sources = [Source(n, len(parts[n]), readers[n].manifest_hash, shares[n]) for n in parts]
    plan, joined = Mixture(tuple(sources), 20, 0), Joined(parts)
    batches = train_loader(joined, plan, start_step=0, end_step=50, workers=1)
    counts = Counter(key.split("/")[0] for batch in batches for key in batch.keys)
    assert counts == {"a": 500, "b": 200, "c": 300}


def test_feature_caches_are_joined(readers, tmp_path):
    tables = {name: features_of(reader, tmp_path) for name, reader in readers.items()}
    parts = {name: examples_of(readers[name], features=tables[name]) for name in readers}
    joined = Joined(parts)
    n = len(joined)
    order = [n - 3, 3, n - 20, 0, 47, n - 9, 1]
    samples = [s for s in (joined[(j, 1.0)] for j in order) if s.image_start != NO_IMAGE]
    found = joined.features.gather([s.record for s in samples])
    for row, sample in zip(found.patches, samples, strict=True):
        name, key = sample.key.split("/")
        record = int(key.split("-")[0])
        assert torch.equal(row, tables[name].gather([record]).patches[0])
    assert len({s.key[0] for s in samples}) == 3


def test_what_does_not_go_together_is_refused(readers, tmp_path):
    parts = {name: examples_of(reader) for name, reader in readers.items()}
    parts["b"] = examples_of(readers["b"], features=features_of(readers["b"], tmp_path))
    with pytest.raises(ValueError, match=r"b has cached features and a has none; write features.cache=off"):
        Joined(parts)
    for name, grid in (("a", (1, 1)), ("b", (2, 1)), ("c", (1, 1))):
        parts[name] = examples_of(readers[name], features=features_of(readers[name], tmp_path, grid))
    with pytest.raises(ValueError, match=r"the feature caches have different grids: .*--whole"):
        Joined(parts)


def test_overlong_samples_are_counted_over_all_parts(readers):
    parts = {name: examples_of(reader, ctx_len=7, overlong="cut") for name, reader in readers.items()}
    joined = Joined(parts)
    weights = [joined[(j, 1.0)].weight for j in range(len(joined))]
    assert joined.left_out == weights.count(0.0) > max(part.left_out for part in parts.values())


def test_damage_in_a_part_is_reported_with_its_folder(tmp_path):
    folders = [shard_folder(tmp_path / name, 12) for name in "ab"]
    readers = {folder.name: ShardReader(folder) for folder in folders}
    offset = flip(folders[1], "png", readers["b"], 6)
    joined: Any = Joined({n: examples_of(reader, transform=mean_color) for n, reader in readers.items()})
    guarded = Guarded(joined, policy="tolerant", report=tmp_path / "report.jsonl")
    weights = [guarded[(j, 1.0)].weight for j in range(len(guarded))]
    (row,) = reported(tmp_path / "report.jsonl").values()
    assert weights.count(0.0) == 1 and weights.index(0.0) == row["example"]
    assert (row["key"], row["offset"]) == ("00000006", offset)
    shard, _ = joined.reader.place(12 + 6, image=True)
    assert shard == f"{folders[1]}/{readers['b'].place(6, image=True)[0]}"
    assert joined.reader.key(12 + 6) == "00000006"
    record = joined.reader.examples.record
    assert len(record) == len(joined) and record[row["example"]] == 12 + 6
