"""Writing: bytes, convention, index, manifest, interruptions."""

from __future__ import annotations

import hashlib
import io
import json
import multiprocessing
import os
import signal
import tarfile
from pathlib import Path

import pytest

from data.index import make_manifest, manifest_hash, read_manifest
from data.reader import ShardReader
from data.records import IMAGE_TAG
from data.shards import write_shards
from data.sources.convert import converted

from .helpers import conversation, mixed_records, picture, shard_folder


def digests(folder: Path) -> dict[str, str]:
    return {f.name: hashlib.sha256(f.read_bytes()).hexdigest() for f in sorted(folder.iterdir())}


def test_written_twice_is_the_same_to_the_byte(tmp_path):
    first, second = shard_folder(tmp_path / "a"), shard_folder(tmp_path / "b")
    assert digests(first) == digests(second)
    assert len(list(first.glob("*.tar"))) > 2


def test_what_goes_in_comes_out(tmp_path):
    records = list(mixed_records(12))
    reader = ShardReader(shard_folder(tmp_path / "s"))
    assert len(reader) == 12
    for i, (meta, image) in enumerate(records):
        assert reader.record(i) == meta
        assert reader.image_bytes(i) == image
        assert reader.key(i) == f"{i:08d}"
        assert reader.dialogs(i) == len(meta.get("dialogs", [0]))


def test_tar_members_carry_no_time_and_no_owner(tmp_path):
    folder = shard_folder(tmp_path / "s")
    with tarfile.open(folder / "shard-000000.tar") as tar:
        members = tar.getmembers()
    assert {(m.mtime, m.uid, m.gid, m.uname, m.gname, m.mode) for m in members} == {(0, 0, 0, "", "", 0o644)}
    assert [m.name for m in members[:2]] == ["00000000.png", "00000000.json"]


@pytest.mark.parametrize("n", [1, 7, 12])
def test_shards_are_what_tarfile_would_write(tmp_path, n):
    for shard in shard_folder(tmp_path / "s", n).glob("*.tar"):
        with (
            tarfile.open(shard) as found,
            tarfile.open(tmp_path / "t", "w", format=tarfile.USTAR_FORMAT) as out,
        ):
            for member in found.getmembers():
                info = tarfile.TarInfo(member.name)
                info.size = member.size
                out.addfile(info, found.extractfile(member))
        assert shard.read_bytes() == (tmp_path / "t").read_bytes()


def test_webdataset_reads_the_shards(tmp_path):
    import webdataset

    records = list(mixed_records(12))
    folder = shard_folder(tmp_path / "s")
    urls = sorted(str(f) for f in folder.glob("*.tar"))
    samples = list(webdataset.WebDataset(urls, shardshuffle=False, empty_check=False))
    assert [s["__key__"] for s in samples] == [f"{i:08d}" for i in range(12)]
    for sample, (meta, image) in zip(samples, records, strict=True):
        assert json.loads(sample["json"]) == meta
        found = [sample[kind] for kind in ("png", "jpg", "webp") if kind in sample]
        assert found == ([] if image is None else [image])


def test_the_manifest_counts_and_its_hash_ignores_notes(tmp_path):
    manifest = read_manifest(shard_folder(tmp_path / "s"))
    n_dialogs = sum(len(meta.get("dialogs", [0])) for meta, _ in mixed_records(12))
    assert manifest["totals"]["nsamples"] == 12
    assert manifest["totals"]["dialogs"] == n_dialogs
    assert manifest["totals"]["images"] == 8
    assert manifest["about"] == {"source": "test"}
    assert manifest_hash(manifest) == manifest_hash({**manifest, "about": {}})
    other = make_manifest([{**manifest["shardlist"][0], "nsamples": 99}], {})
    assert manifest_hash(manifest) != manifest_hash(other)


def test_other_content_has_another_hash(tmp_path):
    record = {"id": "x", "conversations": conversation("q", "a")}
    one = write_shards([(record, picture(1))], tmp_path / "a", about={})
    two = write_shards([(record, picture(2))], tmp_path / "b", about={})
    assert ShardReader(one).manifest_hash != ShardReader(two).manifest_hash


def test_an_error_midway_leaves_nothing(tmp_path):
    def failing():
        yield from mixed_records(5)
        raise RuntimeError("the disk of the source failed")

    with pytest.raises(RuntimeError):
        write_shards(failing(), tmp_path / "s", about={})
    assert list(tmp_path.iterdir()) == []


def test_a_folder_is_not_overwritten(tmp_path):
    folder = shard_folder(tmp_path / "s")
    before = digests(folder)
    with pytest.raises(ValueError, match=r"holds converted data already; delete it"):
        write_shards(mixed_records(3), folder, about={})
    assert digests(folder) == before


@pytest.mark.parametrize(("other", "fails"), [(6, False), (5, True)])
def test_a_race_is_noticed(tmp_path, other, fails):
    """While one writer goes through its records, another one finishes first."""
    out = tmp_path / "s"

    def raced():
        yield from mixed_records(6)
        write_shards(mixed_records(other), out, about={})

    if fails:
        with pytest.raises(ValueError, match=r"filled with other data meanwhile"):
            write_shards(raced(), out, about={})
    else:
        assert write_shards(raced(), out, about={}) == out
    assert len(ShardReader(out)) == other
    assert [p.name for p in tmp_path.iterdir()] == ["s"]


def _convert(out: Path, log: Path) -> None:
    def records():
        with log.open("a") as opened:
            opened.write("x")
        return mixed_records(30)

    converted(out, records, {})


def test_concurrent_conversions_do_the_work_once(tmp_path):
    context = multiprocessing.get_context("fork")
    out, log = tmp_path / "cache" / "train", tmp_path / "log"
    leftover = out.parent / ".train.1-dead.part"
    leftover.mkdir(parents=True)
    workers = [context.Process(target=_convert, args=(out, log)) for _ in range(4)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join(30)
    assert [worker.exitcode for worker in workers] == [0] * 4
    assert log.read_text() == "x"
    assert len(ShardReader(out)) == 30
    assert not leftover.exists()


def _convert_and_die(out: Path) -> None:
    def records():
        yield from mixed_records(20)
        os.kill(os.getpid(), signal.SIGKILL)

    converted(out, records, {})


def test_a_killed_conversion_leaves_nothing_half_made(tmp_path):
    out = tmp_path / "cache" / "train"
    worker = multiprocessing.get_context("fork").Process(target=_convert_and_die, args=(out,))
    worker.start()
    worker.join(30)
    assert worker.exitcode == -signal.SIGKILL
    assert not out.exists()
    assert list(out.parent.glob("*.part"))
    converted(out, lambda: mixed_records(20), {})
    assert digests(out) == digests(write_shards(mixed_records(20), tmp_path / "other", about={}))
    assert not list(out.parent.glob("*.part"))


@pytest.mark.parametrize(
    ("meta", "image", "message"),
    [
        ({"id": 1}, None, "record 0: a record has either 'conversations' or 'dialogs'"),
        ({"dialogs": []}, None, "'dialogs' must be a list with at least one dialog"),
        (
            {"conversations": [{"from": "bot", "value": "x"}]},
            None,
            "turn 0 is from 'bot'; known speakers: human, gpt",
        ),
        (
            {"conversations": [{"from": [], "value": "x"}]},
            None,
            r"turn 0 is from \[\]; known speakers: human, gpt",
        ),
        (
            {"conversations": [{"from": "gpt", "value": 3}]},
            None,
            "the value of turn 0 must be text, it is int",
        ),
        ({"conversations": conversation("q", "a")}, b"GIF89a..", "the image is no JPEG, PNG or WebP"),
        ({"conversations": conversation("q" * (1 << 20), "a")}, None, "at most 1,048,576 can be read back"),
        ({"conversations": conversation("q", "a"), "n": float("nan")}, None, "Out of range float"),
    ],
)
def test_malformed_records_are_refused(tmp_path, meta, image, message):
    with pytest.raises(ValueError, match=message):
        write_shards([(meta, image)], tmp_path / "s", about={})


def test_no_records_is_an_error(tmp_path):
    with pytest.raises(ValueError, match=r"no records to write"):
        write_shards([], tmp_path / "s", about={})


def test_text_keeps_its_characters(tmp_path):
    text = f'{IMAGE_TAG}\n什么\u2028 \U0001f600 "quoted"'
    record = {"id": "ü", "conversations": [{"from": "human", "value": text}, {"from": "gpt", "value": "é"}]}
    reader = ShardReader(write_shards([(record, picture(0))], tmp_path / "s", about={}))
    assert reader.record(0) == record
    assert io.BytesIO(reader.image_bytes(0)).read() == picture(0)
