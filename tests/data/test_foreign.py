"""Tars that others wrote: indexed as they are, every fault by name, nothing hostile."""

from __future__ import annotations

import hashlib
import io
import json
import tarfile
from pathlib import Path

import pytest

from data.foreign import index_shards
from data.index import MANIFEST
from data.members import MAX_FAULTS, members, split_name
from data.reader import ShardReader
from data.tar import Damage, Member, scan
from data.verify import verify

from .faulty import bomb
from .helpers import conversation, picture


def tar(path: Path, files: list[tuple[str, bytes]], *, form: int = tarfile.USTAR_FORMAT) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w", format=form) as out:
        for name, data in files:
            info = tarfile.TarInfo(name)
            info.size = len(data)
            out.addfile(info, io.BytesIO(data))
    return path


def llava(i: int, **more) -> bytes:
    return json.dumps({"id": i, "conversations": conversation(f"q{i}", f"a{i}"), **more}).encode()


def img2dataset(i: int) -> list[tuple[str, bytes]]:
    facts = {"caption": f"in json {i}", "url": "x", "status": "success", "width": 8}
    return [
        (f"{i:09d}.jpg", picture(i, kind="JPEG")),
        (f"{i:09d}.txt", f" caption {i}\n".encode()),
        (f"{i:09d}.json", json.dumps(facts).encode()),
    ]


def test_img2datasets_layout_is_read_without_touching_a_tar(tmp_path):
    shards = [
        tar(tmp_path / f"{s:05d}.tar", [m for i in range(3) for m in img2dataset(3 * s + i)])
        for s in range(2)
    ]
    (tmp_path / "00000_stats.json").write_text("{}")
    before = [hashlib.sha256(s.read_bytes()).hexdigest() for s in shards]
    assert index_shards(shards, tmp_path, ask="What is it?") == []
    assert [hashlib.sha256(s.read_bytes()).hexdigest() for s in shards] == before
    reader = ShardReader(tmp_path)
    assert [reader.key(i) for i in range(6)] == [f"{i:09d}" for i in range(6)]
    example = reader.example(4)
    assert (example.question, example.gold) == ("What is it?", "caption 4")
    assert example.turns[0].text == "<image>\nWhat is it?"
    assert reader.image_bytes(5) == picture(5, kind="JPEG")
    assert not list(verify(tmp_path, full=True))


@pytest.mark.parametrize(("text", "caption"), [("json:caption", "in json 1"), ("txt", "caption 1")])
def test_where_the_caption_lies_can_be_said(tmp_path, text, caption):
    shard = tar(tmp_path / "a.tar", [m for i in range(2) for m in img2dataset(i)])
    index_shards([shard], tmp_path / "out", text=text)
    reader = ShardReader(tmp_path / "out")
    assert reader.example(1).gold == caption
    assert reader.manifest["shardlist"][0]["url"] == str(shard.resolve())


def test_a_json_caption_is_found_without_a_txt(tmp_path):
    shard = tar(tmp_path / "a.tar", [m for m in img2dataset(0) if not m[0].endswith("txt")])
    index_shards([shard], tmp_path)
    assert ShardReader(tmp_path).example(0).gold == "in json 0"


def test_half_a_character_in_a_caption_is_a_fault(tmp_path):
    files = [("0.jpg", picture(0, kind="JPEG")), ("0.json", b'{"caption": "cut \\ud83d"}')]
    (fault,) = index_shards(
        [tar(tmp_path / "a.tar", [*files, *img2dataset(1)])], tmp_path, text="json:caption"
    )
    assert (fault.key, fault.field) == ("0", "json") and "half a surrogate pair" in fault.cause


def test_another_question_gives_another_hash(tmp_path):
    shard = tar(tmp_path / "a.tar", img2dataset(0))
    index_shards([shard], tmp_path / "x", ask="one")
    index_shards([shard], tmp_path / "y", ask="two")
    assert ShardReader(tmp_path / "x").manifest_hash != ShardReader(tmp_path / "y").manifest_hash


def test_dots_folders_and_members_that_lie_apart(tmp_path):
    """What webdataset merges or tears apart: each sample comes once and whole."""
    names = ["img.v1.0001", "img.v1.0002", "sub/dir.x/7", "ü"]
    files = [(f"{n}.JPG", picture(i, kind="JPEG")) for i, n in enumerate(names)]
    files += [("notes.cls", b"3"), *((f"{n}.json", llava(i)) for i, n in enumerate(names))]
    index_shards([tar(tmp_path / "a.tar", files, form=tarfile.PAX_FORMAT)], tmp_path)
    reader = ShardReader(tmp_path)
    assert [reader.key(i) for i in range(4)] == names
    assert [reader.image_bytes(i) for i in range(4)] == [picture(i, kind="JPEG") for i in range(4)]
    assert [reader.example(i).gold for i in range(4)] == ["a0", "a1", "a2", "a3"]
    assert not list(verify(tmp_path, full=True))


@pytest.mark.parametrize("form", [tarfile.USTAR_FORMAT, tarfile.PAX_FORMAT, tarfile.GNU_FORMAT])
def test_long_names_and_every_tar_format(tmp_path, form):
    stem = "d" * 60 + "/" + "n" * 70 + ("" if form == tarfile.USTAR_FORMAT else "m" * 90)
    files = [(f"{stem}{i}{e}", d) for i in range(2) for e, d in ((".png", picture(i)), (".json", llava(i)))]
    index_shards([tar(tmp_path / "a.tar", files, form=form)], tmp_path)
    assert [ShardReader(tmp_path).key(i) for i in range(2)] == [f"{stem}0", f"{stem}1"]


def test_several_pictures_and_none(tmp_path):
    two = {"conversations": conversation("<image> q", "a")}
    none = {"conversations": conversation("q", "a", image=False)}
    files = [
        ("1.1.png", picture(1)),
        ("1.json", json.dumps(two).encode()),
        ("1.0.webp", picture(0, kind="WEBP")),
    ]
    index_shards([tar(tmp_path / "a.tar", [*files, ("2.json", json.dumps(none).encode())])], tmp_path)
    reader = ShardReader(tmp_path)
    assert reader.images(0) == [("webp", picture(0, kind="WEBP")), ("png", picture(1))]
    assert reader.images(1) == []


def test_a_picture_is_known_by_its_bytes_not_by_its_name(tmp_path):
    index_shards([tar(tmp_path / "a.tar", [("1.jpg", picture(1)), ("1.json", llava(1))])], tmp_path)
    assert ShardReader(tmp_path).images(0) == [("png", picture(1))]


def deep(levels: int) -> bytes:
    return b'{"conversations": ' + b"[" * levels + b"]" * levels + b"}"


TEXT = ("1.json", llava(1))
BAD = {
    "bad json": ([("1.jpg", picture(1)), ("1.json", b'{"a": ')], "json", "not valid JSON"),
    "nan": ([("1.jpg", picture(1)), ("1.json", llava(1, w=float("nan")))], "json", "NaN is no JSON number"),
    "deep json": ([("1.jpg", picture(1)), ("1.json", deep(100_000))], "json", "not valid JSON"),
    "rather deep json": ([("1.jpg", picture(1)), ("1.json", deep(40))], "json", "more than 32 levels deep"),
    "half a character": ([("1.jpg", picture(1)), ("1.json", json.dumps(
        {"conversations": conversation("q", "a \ud83d")}).encode())], "json", "half a surrogate pair"),
    "huge json": ([("1.jpg", picture(1)), ("1.json", b" " * (1 << 20) + llava(1))], "json", "to 1,048,576"),
    "no text": ([("1.jpg", picture(1))], "jpg", "a picture without a text"),
    "no picture": ([TEXT], "json", "1 <image> tags for 0 pictures"),
    "two pictures": ([("1.0.jpg", picture(1)), ("1.1.jpg", picture(2)), TEXT], "json", "1 <image> tags"),
    "text twice": ([("1.jpg", picture(1)), TEXT, ("1.JSON", llava(2))], "json", "in other case"),
    "same name twice": ([("1.jpg", picture(1)), ("1.jpg", picture(2)), TEXT], "jpg", "comes twice"),
    "empty picture": ([("1.jpg", b""), TEXT], "jpg", "the member has 0 bytes"),
    "gif": ([("1.jpg", picture(1, kind="GIF")), TEXT], "jpg", "no JPEG, PNG or WebP picture"),
    "tiff": ([("1.png", picture(1, kind="TIFF")), TEXT], "png", "no JPEG, PNG or WebP picture"),
    "bomb": ([("1.png", bomb()), TEXT], "png", "at most 64,000,000 are decoded"),
    "absolute name": ([("/1.jpg", picture(1)), TEXT], "jpg", "leads out of the folder"),
    "name upwards": ([("a/../../1.jpg", picture(1)), TEXT], "jpg", "leads out of the folder"),
}  # fmt: skip


@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
@pytest.mark.parametrize("name", BAD)
def test_faults_are_named_and_left_out(tmp_path, name):
    files, field, cause = BAD[name]
    good = [("0.jpg", picture(0, kind="JPEG")), ("0.json", llava(0))]
    more = [("2.jpg", picture(2, kind="JPEG")), ("2.json", llava(2))]
    shard = tar(tmp_path / "a.tar", [*good, *files, *more])
    faults = index_shards([shard], tmp_path)
    (fault,) = [f for f in faults if cause in f.cause]
    assert (fault.shard, fault.field) == ("a.tar", field)
    with tarfile.open(shard) as opened:
        starts = {m.offset: m.offset_data for m in opened.getmembers()}
    assert fault.offset in {*starts, *starts.values()} and fault.offset > 0
    assert not (tmp_path / MANIFEST).exists()
    assert index_shards([shard], tmp_path, allow=len(faults)) == faults
    reader = ShardReader(tmp_path)
    assert [reader.key(i) for i in range(len(reader))] == ["0", "2"]
    assert reader.manifest["about"]["rejects"] == len(faults)


@pytest.mark.parametrize(
    ("kind", "words"),
    [(tarfile.SYMTYPE, "a symbolic link"), (tarfile.LNKTYPE, "a hard link"), (tarfile.CHRTYPE, "a device"),
     (tarfile.FIFOTYPE, "a pipe"), (tarfile.GNUTYPE_SPARSE, "an entry of kind b'S'")],
)  # fmt: skip
def test_links_and_devices_are_faults(tmp_path, kind, words):
    path = tmp_path / "a.tar"
    with tarfile.open(path, "w") as out:
        info = tarfile.TarInfo("0.jpg")
        info.type, info.linkname = kind, "/etc/passwd"
        out.addfile(info)
        info = tarfile.TarInfo("0.json")
        info.size = len(llava(0))
        out.addfile(info, io.BytesIO(llava(0)))
    _, (fault,) = members(path)
    assert str(fault) == f"a.tar: key 0: field jpg: byte 0: {words}, no file"


@pytest.mark.parametrize("kind", [tarfile.DIRTYPE, tarfile.SYMTYPE, tarfile.LNKTYPE])
def test_a_size_of_what_has_no_data_hides_no_member(tmp_path, kind):
    path = tmp_path / "a.tar"
    with tarfile.open(path, "w", format=tarfile.USTAR_FORMAT) as out:
        info = tarfile.TarInfo("x")
        info.type, info.size = kind, 2 * 512
        out.addfile(info)
        for name, data in img2dataset(0):
            info = tarfile.TarInfo(name)
            info.size = len(data)
            out.addfile(info, io.BytesIO(data))
    with path.open("rb") as opened:
        found = [item.name for item in scan(opened.fileno(), path.stat().st_size) if isinstance(item, Member)]
    assert found == [name for name, _ in img2dataset(0)]


def test_values_of_a_pax_entry_may_hold_lines(tmp_path):
    path = tmp_path / "a.tar"
    with tarfile.open(path, "w", format=tarfile.PAX_FORMAT) as out:
        for name, data in img2dataset(0):
            info = tarfile.TarInfo(name)
            info.size, info.pax_headers = len(data), {"comment": "x\n9 path=other.jpg"}
            out.addfile(info, io.BytesIO(data))
    samples, faults = members(path)
    assert [sample.key for sample in samples] == ["000000000"] and not faults


def header(size: str | bytes, name: str = "0.jpg") -> bytes:
    block = bytearray(tarfile.TarInfo(name).tobuf(tarfile.USTAR_FORMAT))
    block[124:136] = (size if isinstance(size, bytes) else size.encode()).ljust(12, b"\0")
    block[148:156] = b" " * 8
    block[148:156] = f"{sum(block):06o}\0 ".encode()
    return bytes(block)


@pytest.mark.parametrize(
    ("size", "cause"),
    [
        ("100000000000", "the file was cut in this member: 1,024 of 8,589,934,592 bytes are there"),
        (b"\x80" + (1 << 70).to_bytes(11, "big"), "the file was cut in this member: 1,024 of 1,180,591,620,"),
        ("-0000000100", "its size b'-0000000100"),
        ("hello", "its size b'hello"),
    ],
)
def test_sizes_that_are_not_there(tmp_path, size, cause):
    path = tmp_path / "a.tar"
    path.write_bytes(header(size) + bytes(1024))
    samples, faults = members(path)
    assert not samples and len(faults) == 1 and cause in faults[0].cause


def test_long_names_are_limited(tmp_path):
    path = tmp_path / "a.tar"
    block = bytearray(header(f"{1 << 20:011o}"))
    block[156:157] = b"L"
    block[148:156] = b" " * 8
    block[148:156] = f"{sum(block):06o}\0 ".encode()
    path.write_bytes(bytes(block) + bytes((1 << 20) + 1024))
    _, (fault,) = members(path)
    assert "an entry of 1,048,576 bytes for a long name; at most 65,536 are read" in fault.cause


def test_many_faults_end_the_search(tmp_path):
    """A tar of a million members of one name is given up after the first thousand."""
    path = tmp_path / "a.tar"
    path.write_bytes(header("0", "0.json") * 3 * MAX_FAULTS + bytes(1024))
    _, faults = members(path)
    assert len(faults) == MAX_FAULTS + 1
    assert faults[-1].cause == "too many faults; the rest is not looked at"
    assert faults[-1].offset == 512 * (MAX_FAULTS + 1)


def test_a_shard_that_was_given_up_is_not_indexed(tmp_path, monkeypatch, capsys):
    from toolkit import data

    monkeypatch.setattr("data.foreign.MAX_FAULTS", 2)
    files = [("0.png", picture(0)), ("0.json", llava(0))]
    shard = tar(tmp_path / "a.tar", files + [(f"{i}.json", llava(i)) for i in range(1, 6)])
    faults = index_shards([shard], tmp_path, allow=99)
    assert [f.key for f in faults] == ["1", "2", ""] and "too many faults" in faults[-1].cause
    assert data.main(["index", str(shard), "--allow-rejects", "99"]) == 3
    assert "faults in a shard; nothing was written" in capsys.readouterr().out
    assert not (tmp_path / MANIFEST).exists()


def test_an_empty_shard_is_one_of_the_shards(tmp_path):
    empty = tar(tmp_path / "a.tar", [])
    full = tar(tmp_path / "b.tar", img2dataset(0))
    assert index_shards([empty, full], tmp_path) == []
    reader = ShardReader(tmp_path)
    assert len(reader) == 1 and reader.example(0).gold == "caption 0"
    assert not list(verify(tmp_path))


def test_after_damage_the_walk_goes_on(tmp_path):
    path = tar(tmp_path / "a.tar", [m for i in range(4) for m in img2dataset(i)])
    with tarfile.open(path) as opened:
        at = opened.getmember("000000001.txt").offset
    content = bytearray(path.read_bytes())
    content[at + 3] ^= 1
    path.write_bytes(content)
    with path.open("rb") as file:
        found = list(scan(file.fileno(), len(content)))
    assert [(d.offset, d.cause) for d in found if isinstance(d, Damage)] == [
        (at, "damaged header: its checksum does not fit")
    ]
    assert len(found) == 12
    faults = index_shards([path], tmp_path)
    assert {f.key for f in faults} == {"", "000000001"}


@pytest.mark.parametrize(
    ("name", "parts"),
    [
        ("a.jpg", ("a", "jpg")),
        ("d.x/a.b.JPG", ("d.x/a.b", "jpg")),
        ("a", ("a", "")),
        ("d.x/a", ("d.x/a", "")),
    ],
)
def test_names_are_cut_at_their_last_dot(name, parts):
    assert split_name(name) == parts


def test_what_cannot_be_indexed_is_said(tmp_path):
    shard = tar(tmp_path / "a.tar", [("0.jpg", picture(0)), ("0.json", b'{"label": 3, "x": 1}')])
    with pytest.raises(
        ValueError, match=r"a.tar: sample 0 has no conversations.*label, x.*--text json:FIELD"
    ):
        index_shards([shard], tmp_path)
    with pytest.raises(ValueError, match=r"two shards are called a.tar"):
        index_shards([shard, tmp_path / "b" / "a.tar"], tmp_path)
    with pytest.raises(ValueError, match=r"no shards to index"):
        index_shards([], tmp_path)
    with pytest.raises(ValueError, match=r"--text 'csv' is unknown; use auto"):
        index_shards([shard], tmp_path, text="csv")
    with pytest.raises(ValueError, match=r"no samples in 1 shards.*No such file"):
        index_shards([tmp_path / "none.tar"], tmp_path)
    (tmp_path / MANIFEST).write_text("{}")
    with pytest.raises(ValueError, match=r"is there already; delete it"):
        index_shards([shard], tmp_path)
