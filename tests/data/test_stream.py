"""Streaming without an index: equal steps, both ways to take shards, what is refused, what is left out."""

from __future__ import annotations

import json
import os
import random
import re
import shutil
import tarfile
from collections import Counter
from io import BytesIO

import pytest
import torch

from data.failed import passed
from data.reader import ShardReader
from data.records import BadRecord
from data.remote import Origin, Remote
from data.stream import Streamed, stream_loader
from data.stream_shards import LostShard, Steady

from .helpers import Letters, mean_color, picture, plain_prompt, shard_folder
from .serving import served

OPTIONS = {
    "prompt": plain_prompt,
    "tokenizer": Letters(),
    "n_image": 4,
    "ctx_len": 64,
    "transform": mean_color,
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return shard_folder(tmp_path_factory.mktemp("shards") / "s", 60, shard_bytes=1 << 13)


@pytest.fixture(scope="module")
def expected(folder):
    """How often each record of the folder has an example."""
    reader = ShardReader(folder)
    return Counter(reader.key(int(i)) for i in reader.examples.record)


def tars(folder):
    return (f"{folder}/shard-*.tar",)


def loaded(source, *, steps=4, options=OPTIONS, **more):
    settings = {"start_step": 0, "end_step": steps, "global_batch": 12, **more}
    return list(stream_loader(source, options, **settings))


def keys_of(batches):
    return [key for batch in batches for key in batch.keys]


def test_a_pass_over_all_shards_has_each_sample_once(folder, expected):
    """One process that does not resample and does not shuffle: the tars from front to back."""
    n = sum(expected.values())
    batches = loaded(Streamed(tars(folder), shuffle=0, resample=False), steps=n, global_batch=1)
    assert Counter(keys_of(batches)) == expected
    assert {batch.pixels.shape for batch in batches if batch.pixels is not None} == {(1, 3, 2, 2)}


@pytest.mark.parametrize("resample", [True, False])
@pytest.mark.parametrize("workers", [0, 2])
def test_ranks_end_together_with_batches_of_one_size(folder, resample, workers):
    source = Streamed(tars(folder), resample=resample, shuffle=10)
    for rank in range(3):
        batches = loaded(source, steps=5, rank=rank, world=3, micro=2, workers=workers)
        assert [len(batch.keys) for batch in batches] == [2] * 10


def test_ranks_and_workers_walk_shards_of_their_own(folder):
    source = Streamed(tars(folder), resample=False, shuffle=0)
    shards = len(source.shards())
    seen = [set(keys_of(loaded(source, steps=6, rank=rank, world=2, global_batch=12))) for rank in range(2)]
    assert shards > 3 and not seen[0] & seen[1]


def test_resampling_gives_ranks_samples_of_all_shards(folder):
    seen = [set(keys_of(loaded(Streamed(tars(folder)), steps=30, rank=rank, world=2))) for rank in range(2)]
    assert len(seen[0] & seen[1]) > 20


def test_order_is_a_matter_of_seed_and_step(folder):
    def keys(seed=0, start=0):
        return keys_of(loaded(Streamed(tars(folder), seed=seed), start_step=start, steps=start + 6))

    state = random.getstate()
    assert keys() == keys() and keys() != keys(seed=1) and keys() != keys(start=3)
    assert random.getstate() == state


def test_fewer_shards_than_processes_are_refused(folder):
    source = Streamed((f"{folder}/shard-000000.tar",), resample=False)
    with pytest.raises(ValueError, match=r"1 shards for 6 reading processes \(2 ranks with 3 each\)"):
        loaded(source, world=2, workers=3)
    assert loaded(Streamed(source.urls), world=2)


def test_patterns_are_expanded(folder):
    source = Streamed((f"{folder}/shard-{{000000..000002}}.tar",))
    assert [os.path.basename(s) for s in source.shards()] == [f"shard-00000{k}.tar" for k in range(3)]
    assert Streamed(("http://h/{a,b}-{8..10}.tar",)).shards()[3] == "http://h/b-8.tar"
    with pytest.raises(ValueError, match=r"no file is called /nowhere/x.tar"):
        Streamed(("/nowhere/x.tar",)).shards()


def test_a_url_is_streamed(folder, expected):
    names = [s["url"] for s in ShardReader(folder).manifest["shardlist"]]
    with served(folder) as server:
        source = Streamed(tuple(f"{server.url}/{name}" for name in names), shuffle=0, resample=False)
        assert Counter(keys_of(loaded(source, steps=sum(expected.values()), global_batch=1))) == expected


@pytest.mark.parametrize("url", ["pipe:touch /tmp/never", "file:///etc/passwd", "ftp://host/x.tar"])
def test_commands_and_other_schemes_are_refused(url):
    with pytest.raises(ValueError, match=r"cannot be read: a URL here begins with"):
        loaded(Streamed((url,)))


def test_webdataset_is_secured(folder):
    import webdataset

    webdataset.utils.enforce_security = False
    loaded(Streamed(tars(folder)), steps=1)
    assert webdataset.utils.enforce_security and os.environ["WDS_SECURE"] == "1"
    with pytest.raises(ValueError, match="unsafe_gopen is False"):
        webdataset.gopen("pipe:true")


def damaged(folder, tmp_path):
    """The first shard with a record that has no text and one whose picture is cut."""
    out = tmp_path / "damaged.tar"
    with tarfile.open(folder / "shard-000000.tar") as old, tarfile.open(out, "w") as new:
        for member in old:
            data = old.extractfile(member).read()
            if member.name == "00000000.json":
                continue
            if member.name == "00000003.png":
                data = data[:40]
            member.size = len(data)
            new.addfile(member, BytesIO(data))
    return out


def test_strict_stops_at_a_bad_sample_and_tolerant_leaves_it_out(folder, tmp_path):
    source = Streamed((str(damaged(folder, tmp_path)),), shuffle=0, resample=False)
    with pytest.raises(BadRecord, match=r"damaged.tar: key 00000000: there is no member 00000000.json"):
        loaded(source)
    report = tmp_path / "report.jsonl"
    keys = keys_of(loaded(source, steps=1, policy="tolerant", report=report))
    assert "00000000" not in keys and "00000003" not in keys
    rows = [json.loads(line) for line in report.read_text().splitlines()]
    assert [row["key"] for row in rows[:2]] == ["00000000", "00000003"]


def test_an_error_of_a_worker_arrives_as_it_was_raised(folder, tmp_path):
    source = Streamed((str(damaged(folder, tmp_path)),), shuffle=0, resample=False)
    with pytest.raises(BadRecord) as alone:
        loaded(source)
    with pytest.raises(BadRecord) as sent:
        loaded(source, workers=1)
    assert str(sent.value) == str(alone.value)
    assert sent.value.__notes__[0].startswith("in a loader worker:")


@pytest.mark.parametrize("workers", [0, 1])
def test_a_cut_shard_is_told(folder, tmp_path, workers):
    cut = tmp_path / "cut.tar"
    shutil.copy(folder / "shard-000000.tar", cut)
    os.truncate(cut, 700)
    with pytest.raises(LostShard) as told:
        loaded(Streamed((str(cut),), shuffle=0, resample=False), workers=workers)
    wanted = r"[^(]*cut.tar: the rest of the shard is lost: .*read with data=shards"
    assert re.fullmatch(wanted, str(told.value))


def test_an_error_that_cannot_travel_is_raised_where_it_is(monkeypatch):
    monkeypatch.setattr("data.failed.get_worker_info", lambda: "a worker")

    def fails():
        raise ValueError("with an open file", file)

    with open(os.devnull) as file, pytest.raises(ValueError, match="with an open file"):
        passed(fails)


def test_captions_of_foreign_shards(tmp_path):
    with tarfile.open(tmp_path / "f.tar", "w") as out:
        for k in range(4):
            for name, data in (
                (f"{k:05d}.jpg", picture(k, kind="JPEG")),
                (f"{k:05d}.txt", f"caption {k}".encode()),
            ):
                info = tarfile.TarInfo(name)
                info.size = len(data)
                out.addfile(info, BytesIO(data))
    layout = {"text": "txt", "ask": "Describe it."}
    source = Streamed((str(tmp_path / "f.tar"),), shuffle=0, resample=False, layout=layout)
    (batch,) = loaded(source, steps=1, global_batch=4)
    said = Letters().decode(batch.ids[2].tolist())
    assert "Describe it." in said and "caption 2" in said


def test_what_does_not_divide_is_refused(folder):
    with pytest.raises(ValueError, match=r"hardware.micro_batch=5 does not divide the 12 samples"):
        loaded(Streamed(tars(folder)), micro=5)


@pytest.mark.parametrize("failures", [(503,), ("hang up", 503, 503)])
def test_a_broken_connection_is_tried_again_where_it_stood(folder, failures, monkeypatch, caplog):
    monkeypatch.setattr("data.remote.sleep", lambda seconds: None)
    quiet = {"shuffle": 0, "resample": False}
    with served(folder) as server:
        source = Streamed((f"{server.url}/shard-000000.tar",), **quiet)
        whole = keys_of(loaded(source, steps=1))
        server.failures = list(failures)
        with caplog.at_level("WARNING"):
            assert keys_of(loaded(source, steps=1)) == whole
    assert not server.failures and sum("; try " in m for m in caplog.messages) == failures.count(503)


@pytest.mark.parametrize("ranges", [True, False])
def test_a_connection_that_breaks_in_the_middle_goes_on_there(folder, ranges, monkeypatch):
    """6 MiB are fetched for the first read; what comes after the failures continues them."""
    monkeypatch.setattr("data.remote.sleep", lambda seconds: None)
    shard = random.Random(0).randbytes(8 << 20)
    (folder.parent / "long.bin").write_bytes(shard)
    with served(folder.parent) as server:
        server.ranges = ranges
        file = Steady(Remote(Origin(server.url, "")), "long.bin")
        read = [file.read(1 << 20), file.read(1 << 20)]
        server.failures = ["hang up", 503]
        if not ranges:
            file._file = None  # as after an error; a stream that is open needs no further request
        with file:
            read += iter(lambda: file.read(1 << 20), b"")
        assert b"".join(read) == shard and not server.failures


def test_a_shard_that_is_gone_is_named_or_left_out(folder, tmp_path):
    with served(folder) as server:
        urls = (f"{server.url}/gone.tar", f"{server.url}/shard-000000.tar")
        source = Streamed(urls, shuffle=0, resample=False)
        with pytest.raises(ValueError, match=r"gone.tar: the rest of the shard is lost: .*gone.tar is gone"):
            loaded(source, steps=4)
        report = tmp_path / "report.jsonl"
        assert len(loaded(source, steps=4, policy="tolerant", report=report)) == 4
    # Read in each of several rounds, told once.
    (row,) = map(json.loads, report.read_text().splitlines())
    assert row["shard"] == urls[0]


def test_a_stream_of_which_nothing_can_be_read_ends(folder, tmp_path):
    cut = tmp_path / "cut.tar"
    shutil.copy(folder / "shard-000000.tar", cut)
    os.truncate(cut, 700)
    with pytest.raises(ValueError, match=r"no sample came of 14 shards in a row, .*cut.tar the last"):
        loaded(Streamed((str(cut),), shuffle=0), policy="tolerant")


def test_a_buffer_larger_than_the_data_is_filled(folder):
    """Many rounds over the shards before the first sample: no sign that nothing can be read."""
    batches = loaded(Streamed((f"{folder}/shard-000000.tar",), shuffle=500), steps=1, policy="tolerant")
    assert len(batches) == 1


def tar_of(path, members):
    with tarfile.open(path, "w") as out:
        for name, data in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            out.addfile(info, BytesIO(data))
    return Streamed((str(path),), shuffle=0, resample=False, layout={"text": "auto", "ask": "Say."})


CONVERSATION = {
    "conversations": [{"from": "human", "value": "<image>\nqq"}, {"from": "gpt", "value": "said"}]
}


@pytest.mark.parametrize(
    ("texts", "shown"),
    [
        ({"json": json.dumps(CONVERSATION), "txt": "other"}, "said"),
        ({"json": '{"caption": "third"}', "txt": "second"}, "second"),
        ({"json": '{"caption": "third", "url": "u"}'}, "third"),
    ],
)
def test_where_the_text_lies_is_found_as_index_finds_it(tmp_path, texts, shown):
    members = {f"a.{kind}": text.encode() for kind, text in texts.items()}
    source = tar_of(tmp_path / "a.tar", {"a.jpg": picture(0, kind="JPEG"), **members})
    (batch,) = loaded(source, steps=1, global_batch=1)
    assert shown in Letters().decode(batch.ids[0].tolist()) and batch.pixels is not None


def test_records_that_are_no_text_and_picture_are_named(tmp_path):
    nothing = tar_of(tmp_path / "n.tar", {"a.jpg": picture(0, kind="JPEG"), "a.json": b'{"width": 3}'})
    with pytest.raises(
        BadRecord, match=r"n.tar: key a: .*fields of its JSON: width\); say .*data.text=json:"
    ):
        loaded(nothing, steps=1)
    features = {"a.safetensors": b"x", "a.json": json.dumps(CONVERSATION).encode()}
    with pytest.raises(BadRecord, match=r"it holds features of an encoder, .*data=shards"):
        loaded(tar_of(tmp_path / "f.tar", features), steps=1)


@pytest.mark.parametrize("workers", [0, 2])
def test_samples_that_a_cut_leaves_nothing_of_are_counted(folder, workers):
    options = {**OPTIONS, "ctx_len": 7, "overlong": "cut"}
    loader = stream_loader(
        Streamed(tars(folder)), options, start_step=0, end_step=3, global_batch=12, workers=workers
    )
    weights = [w for batch in loader for w in batch.weight.tolist()]
    assert 0 < weights.count(0.0) <= loader.left_out and len(weights) == 36


def test_an_iterator_draws_no_random_numbers(folder):
    before = torch.random.get_rng_state()
    loaded(Streamed(tars(folder)), steps=1)
    assert torch.equal(before, torch.random.get_rng_state())
