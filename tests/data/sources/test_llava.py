"""LLaVA JSON: what is accepted, and every reason to reject."""

from __future__ import annotations

import json
import re

import pytest

from data import sources
from data.images import decode
from data.reader import ShardReader
from data.sources.from_llava import Checks, prepare
from tests.data.helpers import conversation, picture


@pytest.fixture
def root(tmp_path):
    folder = tmp_path / "pictures"
    (folder / "sub").mkdir(parents=True)
    for i, kind in enumerate(("PNG", "JPEG", "WEBP")):
        (folder / f"{i}.jpg").write_bytes(picture(i, kind=kind))
    (folder / "sub" / "3.png").write_bytes(picture(3))
    return folder


def good(i: int, **changes):
    return {"id": f"id{i}", "image": f"{i}.jpg", "conversations": conversation(f"q{i}", f"a{i}"), **changes}


def convert(tmp_path, root, records, *, lines=False, **options):
    file = tmp_path / "data.json"
    text = (
        "\n".join(json.dumps(r) if not isinstance(r, str) else r for r in records)
        if lines
        else json.dumps(records)
    )
    file.write_text(text)
    return sources.llava(tmp_path / "cache", train=str(file), images=str(root), **options)


@pytest.mark.parametrize("lines", [False, True])
def test_pictures_and_text_are_kept_as_they_are(tmp_path, root, lines):
    text_only = {"id": "t", "conversations": conversation("q", "a", image=False)}
    listed = good(3, image=["sub/3.png"])
    records = [good(0), good(1), text_only, good(2), listed]
    reader = ShardReader(convert(tmp_path, root, records, lines=lines)["train"])
    assert len(reader) == 5
    assert reader.record(0) == {**good(0), "w": 8, "h": 6}
    assert reader.record(2) == text_only
    assert reader.record(4)["image"] == ["sub/3.png"]
    files = [root / "0.jpg", root / "1.jpg", None, root / "2.jpg", root / "sub" / "3.png"]
    assert [reader.image_bytes(i) for i in range(5)] == [f and f.read_bytes() for f in files]
    assert [reader._index.image_kind[i] for i in range(5)] == [1, 2, 0, 3, 1]
    assert decode(reader.image_bytes(3), "x").size == (8, 6)


def test_splits_are_found_again_by_content(tmp_path, root):
    first = convert(tmp_path, root, [good(0)])
    assert convert(tmp_path, root, [good(0)]) == first
    assert convert(tmp_path, root, [good(1)]) != first
    both = convert(tmp_path, root, [good(0)], test=str(tmp_path / "data.json"))
    assert both["train"] == first["train"] and set(both) == {"train", "test"}


def turns(*pairs):
    return [{"from": role, "value": text} for role, text in pairs]


REJECTS = {
    "tags": ({"conversations": conversation("q", "a", image=False)}, "0 <image> tags for 1 images"),
    "tags_twice": ({"conversations": conversation("<image>", "a")}, "2 <image> tags for 1 images"),
    "tag_without_image": ({"image": None}, "1 <image> tags for 0 images"),
    "gpt_first": (
        {"conversations": turns(("gpt", "<image>"), ("human", "a"))},
        "turn 0 is from gpt, expected human",
    ),
    "not_alternating": (
        {"conversations": turns(("human", "<image>"), ("human", "a"))},
        "turn 1 is from human, expected gpt: turns alternate",
    ),
    "empty_answer": ({"conversations": conversation("q", " \n")}, "turn 1, an answer, is empty"),
    "no_answer": ({"conversations": conversation("q", "a")[:1]}, "ends with a human turn"),
    "speaker": ({"conversations": turns(("system", "<image>"))}, "turn 0 is from 'system'"),
    "structure": ({"conversations": "hello"}, "'conversations' must be a list"),
    "missing_file": ({"image": "none.jpg"}, "image 'none.jpg' cannot be read: No such file or directory"),
    "outside": ({"image": "../secret.png"}, "image '../secret.png' lies outside of the folder of pictures"),
    "link": ({"image": "link.png"}, "image 'link.png' lies outside of the folder of pictures"),
    "absolute": ({"image": "/etc/passwd"}, "image '/etc/passwd' lies outside"),
    "no_path": ({"image": "a\0b"}, "cannot be read: "),
    "several": (
        {"image": ["0.jpg", "1.jpg"]},
        "the record has 2 images; one picture per record is supported",
    ),
    "video": ({"video": "x.mp4"}, "the record has a video"),
    "path_type": ({"image": 7}, "'image' must be the path of a file, it is 7"),
    "gif": ({"image": "anim.gif"}, "no JPEG, PNG or WebP picture"),
    "header": ({"image": "broken.png"}, "the picture's header cannot be read"),
    "repeated": ({"id": "id0"}, "the id was used before, in record 0"),
    "too_long": ({"conversations": conversation("q" * (1 << 20), "a")}, "at most 1,047,552 are possible"),
}


@pytest.mark.parametrize("name", REJECTS)
def test_each_reason_to_reject(tmp_path, root, name):
    changes, reason = REJECTS[name]
    (tmp_path / "secret.png").write_bytes(picture(9))
    (root / "link.png").symlink_to(tmp_path / "secret.png")
    (root / "anim.gif").write_bytes(picture(9, kind="GIF"))
    (root / "broken.png").write_bytes(picture(9)[:20])
    records = [good(0), good(1, **changes), good(2)]
    with pytest.raises(
        ValueError, match=r"^1 records are unusable, data.allow_rejects=0. First: data.json: record 1"
    ):
        convert(tmp_path, root, records)
    assert not list((tmp_path / "cache").rglob("manifest.json"))
    folder = convert(tmp_path, root, records, allow_rejects=1)["train"]
    reader = ShardReader(folder)
    assert [reader.record(i)["id"] for i in range(len(reader))] == ["id0", "id2"]
    (line,) = (folder.parent / "train.rejects.jsonl").read_text().splitlines()
    reject = json.loads(line)
    assert reason in reject["reason"]
    assert reject["place"] == "data.json: record 1"
    assert reader.manifest["about"]["rejects"] == 1


def test_the_first_three_rejects_are_named(tmp_path, root):
    records = [good(i, image=f"gone{i}.jpg") for i in range(5)]
    with pytest.raises(ValueError, match=r"^5 records are unusable") as error:
        convert(tmp_path, root, records)
    assert [f"gone{i}.jpg" in str(error.value) for i in range(5)] == [True] * 3 + [False] * 2
    listed = re.search(
        r"listed in (\S+\.rejects\.jsonl); repair them or set data.allow_rejects=5", str(error.value)
    )
    with open(listed[1]) as file:
        assert len(file.readlines()) == 5


def test_repeated_ids_can_be_kept(tmp_path, root):
    folder = convert(tmp_path, root, [good(0), good(0)], repeated_ids="keep")["train"]
    assert len(ShardReader(folder)) == 2


def test_a_full_check_finds_damaged_pixels(tmp_path, root):
    whole = picture(9, kind="JPEG", size=(200, 200))
    (root / "1.jpg").write_bytes(whole[: len(whole) // 2])
    assert len(ShardReader(convert(tmp_path, root, [good(1)])["train"])) == 1
    with pytest.raises(ValueError, match=r"1\.jpg: the picture cannot be decoded"):
        convert(tmp_path, root, [good(1)], verify="full")


def test_a_bad_line_is_a_reject_and_a_bad_list_an_error(tmp_path, root):
    with pytest.raises(ValueError, match=r"First: data.json: line 2 .*not valid JSON"):
        convert(tmp_path, root, [good(0), '{"id": NaN}'], lines=True)
    (tmp_path / "bad.json").write_text('[{"id": 1},')
    with pytest.raises(ValueError, match=r"bad.json: not valid JSON"):
        sources.llava(tmp_path / "cache", train=str(tmp_path / "bad.json"), images=str(root))


def test_missing_files_and_folders_are_named(tmp_path, root):
    with pytest.raises(ValueError, match=r"data.train=.*none.json is no file"):
        sources.llava(tmp_path, train=str(tmp_path / "none.json"), images=str(root))
    with pytest.raises(ValueError, match=r"data.images=.*none is no folder"):
        sources.llava(tmp_path, train=str(tmp_path / "none.json"), images=str(tmp_path / "none"))


@pytest.mark.parametrize("text", ["[]", "\n"])
def test_a_file_without_records_is_named(tmp_path, root, text):
    file = tmp_path / "none.json"
    file.write_text(text)
    checks = Checks(root, 0, keep_repeated_ids=False, full=False)
    with pytest.raises(ValueError, match=r"none\.json holds no records; give a list of them"):
        prepare(tmp_path / "cache", {"train": file}, checks)
