"""Shards behind a URL: the same samples, a bounded cache, and a clear end for everything that fails."""

from __future__ import annotations

import errno
import json
import logging
import multiprocessing
import os
import pickle
import re
import shutil
import threading
from collections import Counter

import fsspec
import pytest

from data.loader import train_loader
from data.mirror import mirror
from data.plan import Plan
from data.policy import Guarded
from data.reader import DamagedSample, ShardReader
from data.remote import Origin, RemoteError, Unreachable

from .helpers import mean_color, shard_folder
from .serving import served
from .test_dataset import examples_of

N = 24


@pytest.fixture(scope="module")
def good(tmp_path_factory):
    return shard_folder(tmp_path_factory.mktemp("shards") / "s", N)


@pytest.fixture
def server(good, tmp_path):
    with served(shutil.copytree(good, tmp_path / "served")) as state:
        yield state


@pytest.fixture(autouse=True)
def waits(monkeypatch):
    """No real waiting; the waits asked for."""
    asked = []
    monkeypatch.setattr("data.remote.sleep", asked.append)
    return asked


def reader_of(url, tmp_path, **options):
    settings = {"cache": str(tmp_path / "blocks"), "cache_mb": 4, "block_kb": 4, **options}
    return ShardReader(mirror(Origin(url, **settings), tmp_path))


def everything(reader):
    return [(reader.record(i), reader.images(i)) for i in range(len(reader))]


def reads_of(server, name="shard-"):
    return [read for read in server.reads if read[0].startswith(name) and read[0].endswith(".tar")]


def block_bytes(tmp_path):
    return sum(f.stat().st_size for f in (tmp_path / "blocks").rglob("*") if f.is_file() and "-" in f.stem)


def test_http_gives_what_the_disk_gives(good, server, tmp_path):
    local, remote = ShardReader(good), reader_of(server.url, tmp_path)
    assert everything(remote) == everything(local)
    assert remote.manifest_hash == local.manifest_hash
    ranges = [wanted for _, wanted in reads_of(server)]
    assert ranges and all(re.fullmatch(r"bytes=\d+-\d+", wanted) for wanted in ranges)
    copy = pickle.loads(pickle.dumps(remote))
    assert copy.raw(3) == local.raw(3)


def test_an_fsspec_file_system_gives_what_the_disk_gives(good, tmp_path):
    memory = fsspec.filesystem("memory")
    memory.put(f"{good}/", "/bucket/data/", recursive=True)
    try:
        assert everything(reader_of("memory://bucket/data", tmp_path)) == everything(ShardReader(good))
    finally:
        memory.rm("/bucket", recursive=True)


@pytest.mark.parametrize("workers", [0, 2])
def test_loaders_read_the_same_batches_from_a_url(good, server, tmp_path, workers):
    pairs = []
    for reader in (ShardReader(good), reader_of(server.url, tmp_path)):
        examples = examples_of(reader, transform=mean_color)
        plan = Plan(len(examples), 8, 0, reader.manifest_hash)
        loader = train_loader(examples, plan, start_step=0, end_step=5, workers=workers)
        pairs.append([(batch.keys, batch.pixels.tolist()) for batch in loader])
    assert pairs[0] == pairs[1]


def test_a_second_reader_finds_the_blocks(server, tmp_path):
    everything(reader_of(server.url, tmp_path))
    first = len(reads_of(server))
    everything(reader_of(server.url, tmp_path))
    assert len(reads_of(server)) == first


def test_processes_of_a_node_fetch_each_block_once(server, tmp_path):
    reader = reader_of(server.url, tmp_path)
    with multiprocessing.get_context("fork").Pool(4) as pool:
        pool.map(reader.image_bytes, list(range(N)) * 4, chunksize=1)
    fetched = Counter(reads_of(server))
    assert fetched and set(fetched.values()) == {1}


def test_the_cache_of_a_reader_is_bounded(good, server, tmp_path):
    reader = reader_of(server.url, tmp_path, cache_mb=1, block_kb=2)
    reader._files._cache.limit = 20_000
    assert everything(reader) == everything(ShardReader(good))
    assert 0 < block_bytes(tmp_path) <= 20_000
    assert len(reads_of(server)) * 2048 > 20_000


def test_blocks_of_a_batch_are_fetched_side_by_side(server, tmp_path):
    reader = reader_of(server.url, tmp_path)
    places = {reader.place(i, image=True)[0]: i for i in range(N)}
    chosen = [places[name] for name in sorted(places)[:3]]
    server.together = threading.Barrier(3)
    reader.prefetch(chosen)
    assert server.most_busy >= 3
    server.together = threading.Barrier(1)
    before = len(reads_of(server))
    for i in chosen:
        reader.record(i)
    assert len(reads_of(server)) == before


def test_a_failed_read_is_tried_again_with_growing_waits(good, server, tmp_path, waits, caplog):
    reader = reader_of(server.url, tmp_path)
    server.failures = [503, 500, 429]
    with caplog.at_level(logging.WARNING, "toolkit.data"):
        assert reader.image_bytes(0) == ShardReader(good).image_bytes(0)
    assert len(waits) == 3
    assert 0.25 <= waits[0] <= 0.5 and 0.5 <= waits[1] <= 1 and 1 <= waits[2] <= 2
    assert "try 2 of 6" in caplog.text and "try 4 of 6" in caplog.text


def test_the_end_of_trying_names_file_tries_and_cause(server, tmp_path, waits):
    reader = reader_of(server.url, tmp_path, retries=2)
    server.failures = [503] * 20
    shard = reader.place(0, image=True)[0]
    with pytest.raises(
        Unreachable, match=rf"{server.url}/{shard} cannot be read, tried 3 times: .*503"
    ) as told:
        reader.image_bytes(0)
    assert len(waits) == 2
    assert str(told.value).endswith("when it can be read again, the same command goes on")


def test_an_outage_leaves_no_sample_out(server, tmp_path):
    examples = examples_of(reader_of(server.url, tmp_path, retries=0), transform=mean_color)
    guarded = Guarded(examples, policy="tolerant", report=tmp_path / "left_out.jsonl")
    server.failures = [503] * 20
    with pytest.raises(Unreachable, match="tried 1 times"):
        guarded[0]
    assert not guarded.report.exists()
    server.failures = []
    assert guarded[0].weight == 1


@pytest.mark.parametrize("failures", [[], [416]])
def test_a_shard_that_is_cut_after_its_first_read(server, tmp_path, failures):
    files = reader_of(server.url, tmp_path, retries=0)._files
    file = server.folder / "shard-000000.tar"
    size = file.stat().st_size
    assert files.read(file.name, 0, 1)[1] == ""
    file.write_bytes(file.read_bytes()[:512])
    server.failures = failures
    cause = files.read(file.name, size - 100, 50)[1]
    assert f"has 512 bytes, the manifest says {size:,}: it was cut or replaced" in cause


def test_a_full_disk_under_the_cache_stops_with_the_fix(server, tmp_path, monkeypatch):
    examples = examples_of(reader_of(server.url, tmp_path), transform=mean_color)
    guarded = Guarded(examples, policy="tolerant", report=tmp_path / "left_out.jsonl")

    def full(path, data):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr("pathlib.Path.write_bytes", full)
    with pytest.raises(
        ValueError, match=r"blocks, the cache of blocks, cannot be written: No space left.*cache_mb"
    ):
        guarded[0]
    monkeypatch.undo()
    assert guarded[0].weight == 1


@pytest.mark.parametrize("status", [401, 403])
def test_a_refusal_is_not_tried_again(server, tmp_path, waits, status):
    reader = reader_of(server.url, tmp_path)
    server.failures = [status] * 20
    with pytest.raises(DamagedSample, match=r"may not be read: .*; check the credentials in the environment"):
        reader.image_bytes(0)
    assert waits == []


@pytest.mark.parametrize("failure", [503, "hang up"])
def test_a_failure_while_its_size_is_asked_is_no_missing_shard(good, server, tmp_path, waits, failure):
    reader = reader_of(server.url, tmp_path)
    server.status_failures = [failure] * 2
    assert reader.image_bytes(0) == ShardReader(good).image_bytes(0)
    assert waits  # aiohttp asks once more by itself after a lost connection
    waits.clear()
    server.status_failures = [403]
    with pytest.raises(DamagedSample, match=r"may not be read: .*check the credentials"):
        reader_of(server.url, tmp_path, cache=str(tmp_path / "other")).image_bytes(0)
    assert waits == []


def test_a_shard_that_is_gone(server, tmp_path, waits):
    reader = reader_of(server.url, tmp_path)
    shard = reader.place(0, image=True)[0]
    (server.folder / shard).unlink()
    with pytest.raises(DamagedSample, match=rf"key 00000000: .*{shard} is gone; put it back"):
        reader.image_bytes(0)
    assert waits == []


def test_a_shard_replaced_by_one_of_another_size(server, tmp_path):
    reader = reader_of(server.url, tmp_path)
    shard = reader.place(0, image=True)[0]
    file = server.folder / shard
    size = file.stat().st_size
    file.write_bytes(file.read_bytes() + b"more")
    with pytest.raises(
        DamagedSample, match=rf"has {size + 4:,} bytes, the manifest says {size:,}: it was cut or"
    ):
        reader.image_bytes(0)


def test_a_shard_replaced_by_one_of_equal_size(server, tmp_path):
    reader = reader_of(server.url, tmp_path)
    reader.record(0)
    shard = reader.place(0, image=True)[0]
    file = server.folder / shard
    file.write_bytes(bytes(b ^ 1 for b in file.read_bytes()))
    for block in (tmp_path / "blocks").rglob(f"{shard}/*"):
        block.unlink()
    with pytest.raises(DamagedSample, match=r"was replaced since it was first read \(ETag .*\): CRC-32 is"):
        reader.image_bytes(0)


def test_a_damaged_block_in_the_cache_is_fetched_again(good, server, tmp_path):
    reader = reader_of(server.url, tmp_path)
    expected = everything(reader)
    for block in (tmp_path / "blocks").rglob("4-*"):
        block.write_bytes(bytes(b ^ 1 for b in block.read_bytes()))
    before = len(reads_of(server))
    assert everything(reader_of(server.url, tmp_path)) == expected == everything(ShardReader(good))
    assert len(reads_of(server)) > before


def test_a_server_without_byte_ranges_is_refused(server, tmp_path, waits):
    reader = reader_of(server.url, tmp_path)
    server.ranges = False
    with pytest.raises(DamagedSample, match=r"does not serve byte ranges; use another server"):
        reader.image_bytes(0)
    assert waits == []


def test_another_manifest_is_another_folder(server, tmp_path):
    options = {"cache": str(tmp_path / "blocks")}
    first = mirror(Origin(server.url, **options), tmp_path)
    assert mirror(Origin(server.url, block_kb=64, **options), tmp_path) == first
    manifest = json.loads((server.folder / "manifest.json").read_text())
    (server.folder / "manifest.json").write_text(json.dumps({**manifest, "about": {"again": 1}}))
    assert mirror(Origin(server.url, **options), tmp_path) != first


def test_a_changed_index_is_named(server, tmp_path):
    index = server.folder / "shard-000000.index"
    index.write_bytes(index.read_bytes()[:-1] + b"\x07")
    with pytest.raises(
        ValueError, match=r"shard-000000.index is not the index that the manifest was written"
    ):
        reader_of(server.url, tmp_path)
    assert not list((tmp_path / "remote").glob("*/manifest.json"))


@pytest.mark.parametrize("name", ["../../etc/passwd", "/etc/passwd", ".hidden", "a/b.tar"])
def test_names_that_lead_elsewhere_are_refused(server, tmp_path, name):
    file = server.folder / "manifest.json"
    manifest = json.loads(file.read_text())
    manifest["shardlist"][0]["index"] = name
    file.write_text(json.dumps(manifest))
    with pytest.raises(ValueError, match=rf"names '{re.escape(name)}', which is no plain file name"):
        reader_of(server.url, tmp_path)


def test_a_folder_without_manifest(server, tmp_path):
    with pytest.raises(RemoteError, match=r"nowhere/manifest.json is gone"):
        reader_of(f"{server.url}/nowhere", tmp_path)


@pytest.mark.parametrize(
    "url",
    ["pipe:cat /etc/passwd", "file:///data", "/data", "ftp://host/data", "simplecache::http://host/x", ""],
)
def test_other_schemes_never_reach_fsspec(url, monkeypatch):
    monkeypatch.setattr("fsspec.filesystem", lambda *a, **k: pytest.fail("was asked"))
    with pytest.raises(ValueError, match=r"cannot be read: a URL here begins with http://, https://, s3://"):
        Origin(url, "cache")


def test_a_missing_package_is_named(monkeypatch):
    monkeypatch.setattr("fsspec.filesystem", lambda *a, **k: (_ for _ in ()).throw(ImportError("s3fs")))
    with pytest.raises(ValueError, match=r"s3:// needs the package s3fs: pip install s3fs"):
        Origin("s3://bucket/data", "cache").filesystem()


def test_store_options_reach_the_store(monkeypatch):
    asked = {}
    monkeypatch.setattr("fsspec.filesystem", lambda kind, **options: asked.update({"kind": kind, **options}))
    Origin("s3://b/d", "cache", anonymous=True, endpoint="https://store.example").filesystem()
    assert (asked["kind"], asked["anon"], asked["endpoint_url"]) == ("s3", True, "https://store.example")
    asked.clear()
    Origin("gs://b/d", "cache", anonymous=True).filesystem()
    assert (asked["kind"], asked["token"]) == ("gs", "anon")


def test_a_cache_of_few_blocks_is_refused():
    with pytest.raises(ValueError, match=r"cache_mb=1 holds less than 16 blocks of block_kb=1024"):
        Origin("http://host/data", "cache", cache_mb=1)


def test_the_data_source_opens_urls(good, server, tmp_path):
    from toolkit import register

    register.discover()
    node = {"name": "remote", "train": server.url, "cache_mb": 16, "block_kb": 4}
    folders = register.bind("data", node)(tmp_path)
    assert list(folders) == ["train"]
    assert everything(ShardReader(folders["train"])) == everything(ShardReader(good))
    assert list((tmp_path / "blocks").glob("*/shard-000000.tar"))
