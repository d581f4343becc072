"""What a stage trains on: shares of splits, shuffle and buckets as the config says, and as a run does it."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from data.packing import Bucketed
from data.plan import Plan
from data.reader import ShardReader
from tests.data.helpers import shard_folder
from toolkit import plans
from toolkit.corpus import shares, wanted
from toolkit.rundir import run_id
from toolkit.schema import RunConf, StageConf

from .test_job import cache, launch, only, read

__all__ = ["cache"]


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    folder = tmp_path_factory.mktemp("shards")
    readers = {name: ShardReader(shard_folder(folder / name, n)) for name, n in (("a", 90), ("b", 30))}
    return SimpleNamespace(readers=readers)


def conf(**stage):
    return RunConf(seed=3, stages={"tune": StageConf(split="a", global_batch=10, **stage)})


def order(corpus, **stage):
    return plans.order(conf(**stage), corpus, "tune", n_image=4)


def test_a_split_alone_is_shuffled_fully(corpus):
    reader = corpus.readers["a"]
    plan = order(corpus)
    assert plan == Plan(len(reader.examples.record), 10, 3, reader.manifest_hash, block=1)
    assert order(corpus, block=64, window=4) == replace(plan, block=64, window=4)


def test_shares_reach_the_plan(corpus):
    plan = order(corpus, mix=["a:3", "b:1"])
    n = len(corpus.readers["a"].examples.record)
    items = np.concatenate([plan.step(t)[0] for t in range(100)])
    assert plan.n == n + len(corpus.readers["b"].examples.record)
    assert (items < n).sum() == 750


@pytest.mark.parametrize("mix", [[], ["b:1", "a:1"]])
def test_buckets_sort_by_the_texts_of_the_index(corpus, mix):
    plan = order(corpus, bucket=4, mix=mix)
    assert isinstance(plan, Bucketed) and plan.steps == 4
    parts = [corpus.readers[name] for name in (["b", "a"] if mix else ["a"])]
    lengths = [r.text_sizes // 4 + 4 * (r._index.image_kind > 0)[r.examples.record] for r in parts]
    assert plan.lengths.tolist() == np.concatenate(lengths).tolist()


@pytest.mark.parametrize(
    ("mix", "message"),
    [
        (["a:0.5", "b"], r"stages.tune.mix: 'b' is no split with its share; write b:0.5"),
        (["a:1", "a:2"], r"stages.tune.mix: a comes twice"),
        (["b:1"], r"stages.tune.mix has the splits b, and stages.tune.split=a is none of them"),
        (["a:1", "b:-1"], r"stages.tune.mix: the share of b is -1"),
    ],
)
def test_wrong_shares_are_named(corpus, mix, message):
    with pytest.raises(ValueError, match=message):
        order(corpus, mix=mix)


def test_all_splits_of_a_mixture_are_opened():
    settings = conf(mix=["a:1", "c:2"])
    assert ("stages.tune.mix", "c") in wanted(settings)
    assert shares("tune", settings.stages["tune"]) == {"a": 1.0, "c": 2.0}
    assert plans.splits(settings, "tune") == ["a", "c"]


def test_a_run_keeps_its_name_where_nothing_new_is_asked():
    stage = {"split": "train", "steps": 10}
    new = {"mix": [], "block": 1, "window": 8, "bucket": 0}
    made = [{"stages": {"tune": s}, "hardware": {"precision": "fp32"}} for s in (stage, {**stage, **new})]
    assert run_id(made[0]) == run_id(made[1])
    for name, value in (("mix", ["a:1"]), ("block", 64), ("window", 4), ("bucket", 8)):
        asked = {**made[0], "stages": {"tune": {**stage, **new, name: value}}}
        assert run_id(asked) != run_id(made[0])


def test_a_run_trains_on_a_mixture(tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: Counter[str] = Counter()
    from data import loader

    def noting(samples, **options):
        seen.update(sample.key.split("/")[0] for sample in samples)
        return collate(samples, **options)

    collate = loader.collate
    monkeypatch.setattr(loader, "collate", noting)
    mix = "stages.tune.mix=[train:0.75,test:0.25]"
    assert launch(tmp_path, cache, "hardware.device=cpu", mix, "stages.tune.global_batch=16") == 0
    assert read(only(tmp_path / "runs") / "result.json")["steps"] == 3
    assert seen["train"] == 3 * seen["test"] > 0
