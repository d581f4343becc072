"""Reading: examples, forks, pickles, and every fault by name."""

from __future__ import annotations

import json
import multiprocessing
import os
import pickle
import re
import shutil

import pytest

from data.index import read_manifest
from data.reader import DamagedSample, ShardReader
from toolkit.contracts import Turn

from .helpers import mixed_records, shard_folder


@pytest.fixture(scope="module")
def good(tmp_path_factory):
    return shard_folder(tmp_path_factory.mktemp("shards") / "s")


@pytest.fixture
def folder(good, tmp_path):
    return shutil.copytree(good, tmp_path / "s")


def test_examples_are_all_dialogs_in_order(good):
    reader = ShardReader(good)
    expected = [
        (i, d) for i, (meta, _) in enumerate(mixed_records(12)) for d in range(len(meta.get("dialogs", [0])))
    ]
    assert list(zip(*(column.tolist() for column in reader.examples), strict=True)) == expected
    examples = [reader.example(j) for j in range(len(expected))]
    assert examples == list(reader.all_examples())
    assert len({e.key for e in examples}) == len(examples)


def test_an_example_carries_turns_kind_and_gold(good):
    reader = ShardReader(good)
    second = next(e for e in reader.all_examples() if e.key == "00000001-1")
    assert second.turns == (Turn("human", "<image>\nq1 1"), Turn("gpt", "a1"))
    assert (second.kind, second.record, second.has_image) == ("type1", 1, True)
    assert (second.question, second.gold) == ("q1 1", "a1")
    text_only = next(e for e in reader.all_examples() if e.key == "00000002")
    assert (text_only.kind, text_only.has_image) == ("", False)
    assert reader.image_bytes(2) is None


def test_pickled_and_forked_readers_read_the_same(good):
    reader = ShardReader(good)
    everything = [(reader.record(i), reader.image_bytes(i)) for i in range(len(reader))]
    copy = pickle.loads(pickle.dumps(reader))
    assert [(copy.record(i), copy.image_bytes(i)) for i in range(len(copy))] == everything
    with multiprocessing.get_context("fork").Pool(3) as pool:
        found = pool.map(reader.image_bytes, list(range(len(reader))) * 5)
    assert found == [image for _, image in everything] * 5
    assert reader.record(3) == everything[3][0]


def test_few_files_stay_open(tmp_path, monkeypatch):
    monkeypatch.setattr("data.files._MAX_OPEN", 2)
    folder = shard_folder(tmp_path / "s", 20, shard_bytes=1 << 11)
    assert len(list(folder.glob("*.tar"))) > 5
    before = len(os.listdir("/proc/self/fd"))
    reader = ShardReader(folder)
    records = [reader.record(i) for i in range(20)]
    assert records == [meta for meta, _ in mixed_records(20)]
    assert len(os.listdir("/proc/self/fd")) == before + 2


def test_records_are_forgotten_within_a_limit(good, monkeypatch):
    monkeypatch.setattr("data.reader._KEPT_JSON", 200)
    reader = ShardReader(good)
    assert list(reader.all_examples()) == list(ShardReader(good).all_examples())
    assert len(reader._kept) < 4


def flip(folder, member: str, reader: ShardReader, i: int) -> int:
    """Changes one bit in the middle of a member's data; returns the data's offset."""
    index = reader._index
    start, size = (
        (index.json_offset, index.json_size) if member == "json" else (index.image_offset, index.image_size)
    )
    offset = int(start[i])
    file = folder / reader._shard(i)
    data = bytearray(file.read_bytes())
    data[offset + int(size[i]) // 2] ^= 4
    file.write_bytes(data)
    return offset


def test_a_flipped_bit_in_a_picture_is_named(folder):
    reader = ShardReader(folder)
    offset = flip(folder, "png", reader, 6)
    shard = reader._shard(6)
    expected = f"{shard}: key 00000006: member 00000006.png at byte {offset:,}: damaged data: CRC-32 is "
    with pytest.raises(
        DamagedSample, match=r"^" + re.escape(expected) + "[0-9a-f]{8}, the index says [0-9a-f]{8};"
    ) as e:
        reader.image_bytes(6)
    again = pickle.loads(pickle.dumps(e.value))
    assert (str(again), again.key, again.offset) == (str(e.value), "00000006", offset)
    assert reader.record(6)["id"] == "p6"


def test_a_flipped_bit_in_the_text_is_named(folder):
    reader = ShardReader(folder)
    offset = flip(folder, "json", reader, 5)
    with pytest.raises(DamagedSample, match=rf"member 00000005.json at byte {offset:,}: damaged data"):
        reader.record(5)


def test_a_missing_shard_is_named(folder):
    (folder / "shard-000001.tar").unlink()
    with pytest.raises(
        ValueError, match=r"^shard-000001.tar is missing in .*: No such file.*; copy it again"
    ):
        ShardReader(folder)


@pytest.mark.parametrize("cut", [512, 10_000])
def test_a_cut_shard_is_named_with_both_sizes(folder, cut):
    file = folder / "shard-000000.tar"
    full = file.stat().st_size
    os.truncate(file, full - cut)
    message = (
        f"shard-000000.tar in {folder} has {full - cut:,} bytes, the manifest says {full:,}: the file was cut"
    )
    with pytest.raises(ValueError, match=r"^" + re.escape(message)):
        ShardReader(folder)


def test_a_shard_that_shrinks_later_is_named(folder):
    reader = ShardReader(folder)
    os.truncate(folder / "shard-000000.tar", 540)
    with pytest.raises(
        DamagedSample, match=r"member 00000000.png at byte 512: only 28 of \d+ bytes are there"
    ):
        reader.image_bytes(0)


def test_an_unreadable_shard_is_named(folder):
    reader = ShardReader(folder)
    (folder / "shard-000000.tar").unlink()
    with pytest.raises(DamagedSample, match=r"key 00000000: .*cannot be read: No such file or directory"):
        reader.image_bytes(0)


def test_a_changed_index_is_named(folder):
    file = folder / "shard-000000.index"
    file.write_bytes(file.read_bytes()[:-1] + b"\x07")
    with pytest.raises(
        ValueError, match=r"shard-000000.index is not the index that the manifest was written with"
    ):
        ShardReader(folder)


def test_a_missing_index_is_named(folder):
    (folder / "shard-000000.index").unlink()
    with pytest.raises(ValueError, match=r"the index .*shard-000000.index cannot be read: No such file"):
        ShardReader(folder)


def test_another_format_and_no_manifest(folder, tmp_path):
    manifest = read_manifest(folder)
    (folder / "manifest.json").write_text(json.dumps({**manifest, "format": 99}))
    with pytest.raises(ValueError, match=r"format 99, this version reads format 1; convert the data again"):
        ShardReader(folder)
    (folder / "manifest.json").write_text("{")
    with pytest.raises(ValueError, match=r"manifest.json cannot be read"):
        ShardReader(folder)
    with pytest.raises(ValueError, match=r"is no shard folder: it has no manifest.json"):
        ShardReader(tmp_path)
