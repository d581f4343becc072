"""`python -m toolkit.data convert, index, verify, export`: files, messages, exit codes, interruptions."""

from __future__ import annotations

import hashlib
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from data.reader import ShardReader
from tests.data.helpers import conversation, picture
from tests.data.test_foreign import img2dataset, tar
from toolkit import data

ROOT = Path(__file__).parents[1]


def digests(folder: Path) -> dict[str, str]:
    files = (f for f in sorted(folder.rglob("*")) if f.is_file())
    return {str(f.relative_to(folder)): hashlib.sha256(f.read_bytes()).hexdigest() for f in files}


@pytest.fixture
def source(tmp_path) -> Path:
    """LLaVA data: a picture in a sub-folder, two pictures, none, a list of one, all three formats."""
    images = tmp_path / "images"
    (images / "a" / "b").mkdir(parents=True)
    for i, kind in enumerate(("PNG", "JPEG", "WEBP", "JPEG")):
        (images / f"{i}.jpg").write_bytes(picture(i, kind=kind))
    (images / "a" / "b" / "x.v1.png").write_bytes(picture(7))
    records = [
        {"id": "one", "image": "0.jpg", "conversations": conversation("q0", "a0")},
        {"id": "several", "image": ["1.jpg", "2.jpg"], "conversations": conversation("<image>\nq1", "a1")},
        {
            "id": "text",
            "conversations": conversation("q2", "a2", image=False),
            "kept": {"x": [1.5, None, "ü"]},
        },
        {"id": "deep", "image": "a/b/x.v1.png", "conversations": conversation("q3", "a3") * 1},
        {"id": "list", "image": ["3.jpg"], "conversations": conversation("q4", "a4")},
        {"id": "again", "image": "0.jpg", "conversations": conversation("q5", "a5")},
    ]
    (tmp_path / "d.json").write_text(json.dumps(records))
    return tmp_path


def convert(source: Path, out: str, *more: str) -> int:
    words = ["--json", str(source / "d.json"), "--images", str(source / "images"), "--out", str(source / out)]
    return data.main(["convert", *words, *more])


def test_convert_and_export_are_a_round_trip(source, capsys):
    assert convert(source, "shards") == 0
    assert "6 samples, 6 pictures in 1 shards" in capsys.readouterr().out
    reader = ShardReader(source / "shards")
    assert [reader.n_images(i) for i in range(6)] == [1, 2, 0, 1, 1, 1]
    assert all("." not in reader.key(i) for i in range(6))
    assert data.main(["export", str(source / "shards"), "--out", str(source / "back")]) == 0
    assert json.loads((source / "back" / "data.json").read_text()) == json.loads(
        (source / "d.json").read_text()
    )
    assert digests(source / "back" / "images") == digests(source / "images")
    assert "6 records" in capsys.readouterr().out


def test_converting_again_gives_the_same_bytes(source, capsys):
    assert convert(source, "one", "--shard-mb", "1") == convert(source, "two", "--shard-mb", "1") == 0
    assert digests(source / "one") == digests(source / "two")
    before = digests(source / "one")
    assert convert(source, "one", "--shard-mb", "1") == 0
    assert "(converted before)" in capsys.readouterr().out
    assert digests(source / "one") == before
    assert convert(source, "one", "--shard-mb", "2") == 2
    assert "holds other converted data; delete it or name another --out" in capsys.readouterr().err


def test_rejects_are_listed_with_reasons_and_exit_code_3(source, capsys):
    records = json.loads((source / "d.json").read_text())
    records[1]["image"] = ["1.jpg", "gone.jpg"]
    records[4]["conversations"] = conversation("q4", " ")
    (source / "d.json").write_text(json.dumps(records))
    assert convert(source, "s") == 3
    out = capsys.readouterr().out
    assert (
        "d.json: record 1 (id several): image 'gone.jpg' cannot be read: No such file or directory\n" in out
    )
    assert "d.json: record 4 (id list): turn 1, an answer, is empty\n" in out
    assert "2 records are unusable" in out and "--allow-rejects 2" in out
    assert not (source / "s").exists()
    assert convert(source, "s", "--allow-rejects", "1") == 3
    assert convert(source, "s", "--allow-rejects", "2") == 0
    assert "4 samples" in capsys.readouterr().out
    assert convert(source, "s", "--allow-rejects", "1") == 3
    assert "left out when it was converted" in capsys.readouterr().out
    rows = [json.loads(line) for line in (source / "s.rejects.jsonl").read_text().splitlines()]
    assert [row["id"] for row in rows] == ["several", "list"]


def test_records_that_could_not_be_read_back_are_rejects(source, capsys, monkeypatch):
    monkeypatch.setattr(
        "data.sources.from_llava.MAX_PICTURE", (source / "images" / "1.jpg").stat().st_size - 1
    )
    deep = {"id": "deep", "conversations": conversation("q", "a", image=False)}
    inner = deep
    for _ in range(40):
        inner["x"] = inner = {}
    half = {"id": "half \ud800", "image": "gone.jpg", "conversations": conversation("q", "a")}
    large = {"id": "large", "image": "1.jpg", "conversations": conversation("q", "a")}
    (source / "d.json").write_text(json.dumps([deep, half, large]))
    assert convert(source, "shards") == 3
    told = capsys.readouterr().out
    assert "more than 32 levels deep" in told and "half \\ud800" in told and "bytes, at most" in told


def test_a_folder_with_other_files_is_refused_before_the_work(source, capsys):
    (source / "mine").mkdir()
    (source / "mine" / "notes.txt").write_text("x")
    assert convert(source, "mine") == 2
    assert "is not empty; delete it or name another --out" in capsys.readouterr().err


def test_repeated_ids_and_a_truncated_picture(source, capsys):
    records = json.loads((source / "d.json").read_text())
    records[5]["id"] = "one"
    (source / "d.json").write_text(json.dumps(records))
    whole = picture(9, kind="JPEG", size=(200, 200))
    (source / "images" / "3.jpg").write_bytes(whole[: len(whole) // 2])
    assert convert(source, "s") == 3
    assert "the id was used before, in record 0" in capsys.readouterr().out
    assert convert(source, "s", "--repeated-ids", "keep") == 0
    assert convert(source, "t", "--repeated-ids", "keep", "--decode") == 3
    assert "3.jpg: the picture cannot be decoded" in capsys.readouterr().out


def test_killed_and_run_again_gives_the_same_bytes(tmp_path):
    """kill -9 while the draft is being written."""
    (tmp_path / "images").mkdir()
    for i in range(5):
        (tmp_path / "images" / f"{i}.png").write_bytes(picture(i, size=(64, 64)))
    records = [
        {"id": i, "image": f"{i % 5}.png", "conversations": conversation(f"q{i}", "a")} for i in range(3000)
    ]
    (tmp_path / "d.json").write_text(json.dumps(records))
    command = [sys.executable, "-m", "toolkit.data", "convert", "--json", str(tmp_path / "d.json")]
    command += ["--images", str(tmp_path / "images"), "--shard-mb", "1", "--out"]
    running = subprocess.Popen([*command, str(tmp_path / "cut")], cwd=ROOT)
    end = time.monotonic() + 60
    while not list(tmp_path.glob(".cut.*.part/shard-000001.tar")) and time.monotonic() < end:
        assert running.poll() is None, "the conversion ended before it could be killed"
    running.send_signal(signal.SIGKILL)
    assert running.wait() == -signal.SIGKILL
    assert not (tmp_path / "cut").exists()
    assert list(tmp_path.glob(".cut.*.part"))
    for out in ("cut", "whole"):
        words = ["--json", str(tmp_path / "d.json"), "--images", str(tmp_path / "images"), "--shard-mb", "1"]
        assert data.main(["convert", *words, "--out", str(tmp_path / out)]) == 0
    assert digests(tmp_path / "cut") == digests(tmp_path / "whole")
    assert not list(tmp_path.glob(".cut.*.part"))


def test_foreign_tars_are_indexed_verified_and_exported(tmp_path, capsys):
    tar(tmp_path / "t" / "00000.tar", [m for i in range(3) for m in img2dataset(i)])
    assert data.main(["index", str(tmp_path / "t"), "--ask", "What is there?"]) == 0
    assert "3 samples, 3 pictures in 1 shards" in capsys.readouterr().out
    assert data.main(["verify", str(tmp_path / "t"), "--decode"]) == 0
    assert "; no faults" in capsys.readouterr().out
    assert data.main(["export", str(tmp_path / "t"), "--out", str(tmp_path / "back")]) == 0
    first = json.loads((tmp_path / "back" / "data.json").read_text())[0]
    assert first == {
        "conversations": [
            {"from": "human", "value": "<image>\nWhat is there?"},
            {"from": "gpt", "value": "caption 0"},
        ],
        "id": "000000000",
        "image": "000000000.0.jpg",
    }
    assert (tmp_path / "back" / "images" / "000000000.0.jpg").read_bytes() == picture(0, kind="JPEG")


def test_faults_of_foreign_tars_end_with_3(tmp_path, capsys):
    files = [m for i in range(3) for m in img2dataset(i)]
    files[4] = (files[4][0], b"")
    shard = tar(tmp_path / "00000.tar", files)
    assert data.main(["index", str(shard)]) == 3
    out = capsys.readouterr().out
    assert "00000.tar: key 000000001: field txt: byte" in out and "--allow-rejects 1" in out
    assert data.main(["index", str(shard), "--allow-rejects", "1"]) == 0
    assert "2 samples" in capsys.readouterr().out


def test_verify_lists_faults_and_writes_them(source, capsys):
    convert(source, "s")
    shard = source / "s" / "shard-000000.tar"
    content = bytearray(shard.read_bytes())
    content[520] ^= 1
    shard.write_bytes(content)
    assert data.main(["verify", str(source / "s"), "--report", str(source / "faults.jsonl")]) == 3
    out = capsys.readouterr().out
    assert "shard-000000.tar: key 00000000: field png: byte 512: damaged data: CRC-32 is" in out
    assert out.endswith("1 faults\n")
    (row,) = [json.loads(line) for line in (source / "faults.jsonl").read_text().splitlines()]
    assert (row["shard"], row["key"], row["field"], row["offset"]) == (shard.name, "00000000", "png", 512)
    assert data.main(["export", str(source / "s"), "--out", str(source / "back")]) == 2
    assert "member 00000000.png at byte 512: damaged data" in capsys.readouterr().err
    assert not (source / "back").exists()


def test_export_keeps_pictures_inside_and_apart(tmp_path):
    from data.export import export
    from data.shards import write_shards

    paths = ["../up.jpg", "/abs.jpg", "C:\\x.jpg", "same.jpg", "same.jpg", "same.jpg", 7]
    pictures = [picture(i) for i in (0, 1, 2, 3, 3, 4, 5)]
    records = [
        ({"id": i, "image": p, "conversations": conversation("q", "a")}, d)
        for i, (p, d) in enumerate(zip(paths, pictures, strict=True))
    ]
    export(write_shards(records, tmp_path / "s", about={}), tmp_path / "deep" / "out")
    items = json.loads((tmp_path / "deep" / "out" / "data.json").read_text())
    names = [item["image"] for item in items]
    assert names == [
        "00000000.0.png", "00000001.0.png", "00000002.0.png", "same.jpg", "same.jpg",
        "other/00000005.0.png", "00000006.0.png",
    ]  # fmt: skip
    stored = [(tmp_path / "deep" / "out" / "images" / n).read_bytes() for n in names]
    assert stored == pictures
    assert sorted(p.name for p in tmp_path.rglob("*") if p.parent == tmp_path) == ["deep", "s"]


def test_independent_dialogs_become_records_of_their_own(tmp_path):
    from data.export import export
    from tests.data.helpers import shard_folder

    folder = shard_folder(tmp_path / "s", 5)
    n = export(folder, tmp_path / "out")
    items = json.loads((tmp_path / "out" / "data.json").read_text())
    assert n == len(items) == len(ShardReader(folder).examples.record) == 6
    assert [(i["id"], i.get("type")) for i in items[1:4]] == [
        ("d1-0", "type0"),
        ("d1-1", "type1"),
        ("t2", None),
    ]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["convret"], "did you mean: convert"),
        (["verify", "."], "is no shard folder: it has no manifest.json"),
        (["index", "pipe:cat x.tar"], "'pipe:cat x.tar' is neither a folder nor a .tar file on this machine"),
        (["convert", "--json", "no.json", "--images", ".", "--out", "x"], "--json no.json is no file"),
        (["convert", "--json", "no.json", "--images", "none", "--out", "x"], "--images none is no folder"),
        (["export", ".", "--out", "x"], "is no shard folder"),
    ],
)
def test_wrong_requests_end_with_2_and_a_sentence(words, message, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert data.main(words) == 2
    assert message in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def test_export_refuses_to_mix(source, capsys):
    convert(source, "s")
    (source / "back").mkdir()
    (source / "back" / "mine.txt").write_text("x")
    assert data.main(["export", str(source / "s"), "--out", str(source / "back")]) == 2
    assert "is not empty; delete it or name another --out" in capsys.readouterr().err
    assert os.listdir(source / "back") == ["mine.txt"]


def test_plain_lines_say_how_far_it_is(capsys, monkeypatch):
    from toolkit import data_bar

    monkeypatch.setattr(data_bar, "INTERVAL", 0)
    with data_bar.Bar("convert") as bar:
        bar(1000, 2500)
    assert capsys.readouterr().err == "convert: 1,000/2,500\n"
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    with data_bar.Bar("convert") as bar:
        bar(1000, 2500)
    assert "convert" in capsys.readouterr().err


def test_help_names_every_action(capsys):
    assert data.main([]) == 0
    out = capsys.readouterr().out
    for action in ("convert", "index", "verify", "inspect", "export", "features"):
        assert f"\n  {action} " in out
