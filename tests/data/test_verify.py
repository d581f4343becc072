"""Every fault by shard, key, field and byte offset: what `verify` says, and what a reader does."""

from __future__ import annotations

import os

import pytest

from data.index import parse_index
from data.reader import ShardReader
from data.shards import write_shards
from data.verify import verify

from .faulty import BAD, CONTENT, STRUCTURE, N, records
from .helpers import shard_folder

SHARD = "shard-000000.tar"


@pytest.fixture
def folder(tmp_path):
    return write_shards(records(), tmp_path / "s", about={})


def index_of(folder):
    return parse_index((folder / "shard-000000.index").read_bytes(), "")


def test_whole_shards_have_no_faults(tmp_path):
    done = []
    assert not list(verify(shard_folder(tmp_path / "s", 24), full=True, progress=lambda *n: done.append(n)))
    assert done == [(i + 1, len(done)) for i in range(len(done))] and len(done) > 2


@pytest.mark.parametrize("name", STRUCTURE)
def test_damaged_structure_is_found_where_it_is(folder, name):
    fault, index = STRUCTURE[name], index_of(folder)
    fault.do(folder / SHARD, index)
    found = list(verify(folder))
    keyed = [f for f in found if f.key]
    assert keyed, found
    first = next(f for f in found if f.cause.startswith(fault.cause))
    assert (first.shard, first.key, first.field) == (SHARD, fault.key, fault.field)
    assert first.offset == fault.at(index)
    lost = {f.key for f in keyed}
    assert lost == {f"{i:08d}" for i in fault.bad or (BAD,)}
    assert len(keyed) == len({(f.key, f.field) for f in keyed})
    assert str(first).startswith(f"{SHARD}: key {fault.key}: field {fault.field}: byte {first.offset:,}: ")


@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
@pytest.mark.parametrize("name", CONTENT)
def test_damaged_content_is_found_where_it_is(tmp_path, name):
    made, field, cause = CONTENT[name]
    folder = write_shards(made, tmp_path / "s", about={})
    (fault,) = verify(folder, full=True)
    index = index_of(folder)
    at = index.text(BAD).offset if field == "json" else index.images(BAD)[0].offset
    assert (fault.shard, fault.key, fault.field, fault.offset) == (SHARD, f"{BAD:08d}", field, at)
    assert cause in fault.cause


def test_without_decoding_only_headers_are_looked_at(tmp_path):
    folder = write_shards(CONTENT["truncated JPEG"][0], tmp_path / "s", about={})
    assert not list(verify(folder))


def test_a_missing_shard_and_one_of_another_size(tmp_path):
    folder = shard_folder(tmp_path / "s", 24)
    first, second = sorted(folder.glob("*.tar"))[:2]
    first.unlink()
    with second.open("ab") as file:
        file.write(bytes(512))
    gone, longer = verify(folder)
    assert (gone.shard, gone.cause) == (
        first.name,
        "cannot be read: No such file or directory; copy the shard again",
    )
    assert longer.shard == second.name and "the manifest says" in longer.cause


def test_a_shard_that_may_not_be_read(folder, monkeypatch):
    def refuse(path, flags, *rest):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr("data.verify.os.open", refuse)
    (fault,) = verify(folder)
    assert str(fault) == f"{SHARD}: byte 0: cannot be read: Permission denied; copy the shard again"


def test_a_shard_replaced_by_another_one(tmp_path, folder):
    other = write_shards([(m, i) for m, i in reversed(records())], tmp_path / "t", about={})
    os.replace(other / SHARD, folder / SHARD)
    found = list(verify(folder))
    assert {f.key for f in found if f.key} >= {f"{i:08d}" for i in range(N)}


def test_a_changed_index_is_said(folder):
    file = folder / "shard-000000.index"
    file.write_bytes(file.read_bytes() + b" ")
    (fault,) = verify(folder)
    assert (fault.shard, fault.cause.split(";")[0]) == (
        "shard-000000.index", "not the index that the manifest was written with",
    )  # fmt: skip


def test_a_member_that_nobody_indexed(folder):
    """Written behind the last record in place of the end of the tar."""
    import io
    import tarfile

    with tarfile.open(folder / SHARD, "a") as tar:
        info = tarfile.TarInfo("extra.json")
        info.size = 2
        tar.addfile(info, io.BytesIO(b"{}"))
    causes = {(f.key, f.field): f.cause for f in verify(folder)}
    assert causes["extra", "json"] == "the member is not in the index"


def test_headers_that_were_exchanged_are_found(folder):
    import tarfile

    with tarfile.open(folder / SHARD) as tar:
        by_size = {}
        one, other = next(
            (by_size[m.size], m) for m in tar.getmembers() if by_size.setdefault(m.size, m) is not m
        )
    data = bytearray((folder / SHARD).read_bytes())
    first, second = (slice(m.offset, m.offset + 512) for m in (one, other))
    data[first], data[second] = data[second], data[first]
    (folder / SHARD).write_bytes(data)
    found = {f.offset: f.cause for f in verify(folder)}
    assert {*found} == {one.offset_data, other.offset_data}
    assert "headers were exchanged" in found[one.offset_data]


def test_a_folder_without_manifest_is_refused(tmp_path):
    with pytest.raises(ValueError, match=r"is no shard folder: it has no manifest.json"):
        list(verify(tmp_path))


def test_the_good_folder_reads(folder):
    assert len(ShardReader(folder)) == N
