"""The index: columns in and out, several pictures in a record, and its size in memory."""

from __future__ import annotations

import hashlib
import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load, save

from data.index import MANIFEST, Index, Span, index_bytes, joined, make_manifest, parse_index
from data.reader import ShardReader
from data.shards import write_shards

from .helpers import conversation, picture

ROOT = Path(__file__).parents[2]


def columns(n: int, *, first: int = 512, more: tuple[int, ...] = ()) -> dict[str, list[int]]:
    """n records of a picture and a JSON each; `more` numbers those with a second picture."""
    rows = range(n)
    return {
        "json_offset": [first + 2048 * i for i in rows],
        "json_size": [100 + i for i in rows],
        "json_crc": [7 * i for i in rows],
        "image_offset": [first + 2048 * i + 1024 if i % 3 else -1 for i in rows],
        "image_size": [900 + i for i in rows],
        "image_crc": [11 * i for i in rows],
        "image_kind": [2 if i % 3 else 0 for i in rows],
        "dialogs": [1 + i % 2 for i in rows],
        "more_record": list(more),
        "more_offset": [512 * (9000 + i) for i in more],
        "more_size": [50 + i for i in more],
        "more_crc": [13 * i for i in more],
        "more_kind": [1 for _ in more],
    }


def test_what_goes_in_comes_out():
    index = parse_index(index_bytes(["a", "bü", "c"], columns(3, more=(1, 1, 2))), "x")
    assert [index.key(i) for i in range(3)] == ["a", "bü", "c"]
    assert index.text(2) == Span("json", 512 + 4096, 102, 14)
    assert index.images(0) == []
    again = Span("png", 512 * 9001, 51, 13)
    assert index.images(1) == [Span("jpg", 512 + 3072, 901, 11), again, again]
    assert index.images(2) == [Span("jpg", 512 + 5120, 902, 22), Span("png", 512 * 9002, 52, 26)]
    assert [index.n_images(i) for i in range(3)] == [0, 3, 2]
    assert [index.image_offset[i] for i in range(3)] == [-1, 3584, 5632]
    assert [index.json_offset[i] for i in range(3)] == [512, 2560, 4608]


def test_shards_are_joined_in_order():
    parts = [
        parse_index(
            index_bytes([f"{p}{i}" for i in range(4)], columns(4, first=512 * (p + 1), more=(p + 1,))), "x"
        )
        for p in range(3)
    ]
    whole = joined(iter(parts), 12)
    for p, part in enumerate(parts):
        for i in range(4):
            assert whole.key(4 * p + i) == part.key(i)
            assert whole.images(4 * p + i) == part.images(i) and whole.text(4 * p + i) == part.text(i)
    assert whole.dialogs.tolist() == [1, 2] * 6


def test_a_shard_without_several_pictures_has_no_columns_for_them():
    assert not any(name.startswith("more_") for name in load(index_bytes(["a"], columns(1))))


def changed(**columns_: np.ndarray) -> bytes:
    return save({**load(index_bytes(["a", "b"], columns(2, more=(1,)))), **columns_})


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"nothing", "not an index of this toolkit"),
        (save({"a": np.zeros(1)}), "it has the columns a, more_crc"),
        (changed(json_size=np.zeros(2)), "column 'json_size' is not what it should be"),
        (changed(json_size=np.zeros(3, np.uint32)), "column 'json_size' is not"),
        (changed(more_kind=np.zeros(3, np.uint8)), "column 'more_kind' is not"),
        (changed(json_offset=np.array([512, 1000])), "column 'json_offset' is not"),
        (changed(image_offset=np.array([-1, -512])), "column 'image_offset' is not"),
        (changed(json_offset=np.array([512, 512 << 32])), "column 'json_offset' is not"),
    ],
)
def test_other_content_is_refused_by_name(content, message):
    with pytest.raises(ValueError, match=f"^here: .*{message}"):
        parse_index(content, "here")


def test_an_index_with_nothing_changed_is_accepted():
    assert isinstance(parse_index(changed(), "x"), Index)


def test_several_pictures_are_written_and_read(tmp_path):
    pictures = [picture(1), picture(2, kind="JPEG"), picture(3, kind="WEBP")]
    meta = {"conversations": conversation("<image>\n<image>\nq", "a")}
    one = {"conversations": conversation("q", "a")}
    reader = ShardReader(write_shards([(one, pictures[0]), (meta, pictures)], tmp_path / "s", about={}))
    assert [reader.n_images(i) for i in range(2)] == [1, 3]
    assert reader.images(1) == list(zip(("png", "jpg", "webp"), pictures, strict=True))
    assert reader.image_bytes(1) == pictures[0] and reader.record(1) == meta
    assert reader.images(0) == [("png", pictures[0])]
    assert reader.manifest["totals"]["images"] == 4


_MEASURE = """
import resource, sys
from data.reader import ShardReader
def held(name):
    return next(int(l.split()[1]) for l in open("/proc/self/status") if l.startswith(name)) >> 10
before, began = held("VmHWM"), resource.getrusage(resource.RUSAGE_SELF).ru_utime
reader = ShardReader(sys.argv[1])
assert len(reader) == len(reader.examples.record) == 1_000_000
print(held("VmHWM") - before, resource.getrusage(resource.RUSAGE_SELF).ru_utime - began)
"""


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="reads memory from /proc")
def test_a_million_samples_take_little_memory(tmp_path):
    """Target: 64 MB and 2 s, of which the suite asserts the memory (measured: 44 MiB, 0.1 s)."""
    shards, n = [], 10_000
    for s in range(100):
        content = index_bytes([f"{s * n + i:08d}" for i in range(n)], {k: v for k, v in _columns_of(n)})
        name = f"shard-{s:06d}"
        (tmp_path / f"{name}.index").write_bytes(content)
        with (tmp_path / f"{name}.tar").open("wb") as file:
            file.truncate(512)
        digest = hashlib.sha256(content).hexdigest()
        shards.append({"url": f"{name}.tar", "nsamples": n, "filesize": 512, "dialogs": n, "images": n})
        shards[-1] |= {"index": f"{name}.index", "index_sha256": digest}
    (tmp_path / MANIFEST).write_text(json.dumps(make_manifest(shards, {})))
    command = [sys.executable, "-c", _MEASURE, str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, check=True, cwd=ROOT)
    mib, _ = done.stdout.split()
    assert 30 < int(mib) <= 61  # 64 MB


def _columns_of(n: int) -> list[tuple[str, list[int]]]:
    if not _KEPT:
        _KEPT.extend({**columns(n), "dialogs": [1] * n, "image_kind": [2] * n}.items())
    return _KEPT


_KEPT: list[tuple[str, list[int]]] = []
