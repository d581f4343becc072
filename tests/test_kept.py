"""What runs of one process share: worked out once, and only where everything it depends on is the same."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import pytest

from components.prompts import prefix, sandwich
from toolkit import compose, kept, resident
from toolkit.build import build_model, from_dict
from toolkit.corpus import Corpus
from toolkit.feed import feed
from toolkit.scoring import floors_of


@pytest.fixture(autouse=True)
def empty(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kept, "_VALUES", {})


def test_a_value_is_made_once_and_a_failure_is_not_kept() -> None:
    calls: list[int] = []

    def make() -> int:
        calls.append(len(calls))
        if len(calls) == 1:
            raise ValueError("the first one fails")
        return len(calls)

    with pytest.raises(ValueError, match="first"):
        kept.once("key", make)
    assert [kept.once("key", make) for _ in range(3)] == [2, 2, 2]
    assert len(calls) == 2


def test_what_is_large_is_not_kept() -> None:
    assert kept.once("key", lambda: "large", size=lambda value: kept._LARGEST + 1) == "large"
    assert kept.once("key", lambda: "small", size=lambda value: kept._LARGEST) == "small"
    assert kept.once("key", lambda: "again") == "small"


def test_what_was_used_last_stays() -> None:
    for key in range(kept._MOST):
        kept.once(key, lambda: "before")
    kept.once(0, lambda: "again")
    kept.once("one more", lambda: "before")
    assert kept.once(0, lambda: "again") == "before"
    assert kept.once(1, lambda: "again") == "again"


def test_components_are_told_apart_by_factory_and_values() -> None:
    assert kept.named(partial(prefix, a=1, b=[2])) == kept.named(partial(prefix, b=[2], a=1))
    names = [partial(prefix), partial(sandwich), partial(prefix, a=1), partial(prefix, a=2)]
    assert len({kept.named(one) for one in names}) == 4
    assert kept.named(partial(max, [partial(prefix)])) != kept.named(partial(max, [partial(sandwich)]))


class Read:
    """What a run of the quick start reads before it trains."""

    def __init__(self, folder: Path, *words: str) -> None:
        asked = ["scale=quick", "encoder=patch", "encoder.patch=32", "data.limit=12", "hardware.device=cpu"]
        request = compose.understand([*asked, f"paths.cache={folder}", f"paths.runs={folder}", *words])
        conf = from_dict(compose.compose(request.jobs[0]))
        self.corpus = Corpus(conf)
        model = build_model(conf, vocab_size=self.corpus.tokenizer.size, device=None)  # type: ignore[arg-type]
        (name,) = conf.stages
        self.feed: Any = feed(conf, self.corpus, name, model, {}, folder)
        self.floors = floors_of(conf, self.corpus, conf.stages[name].split)


def test_runs_share_what_their_data_and_prompt_give(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("easy_vqa", reason="easy-VQA comes with the demo extra")
    first = Read(tmp_path)
    kept.once(first.feed.key, lambda: "texts")
    monkeypatch.setattr("toolkit.corpus.CompactTokenizer.collect", None)  # nothing is collected again
    monkeypatch.setattr("toolkit.corpus.Different.of", None)  # nor read
    same = Read(tmp_path, "seed=1", "scan=uni", "stages.tune.lr=1e-4")
    assert same.corpus.tokenizer is first.corpus.tokenizer and same.feed.key == first.feed.key
    assert same.floors == first.floors and same.floors is not first.floors
    same.floors["floors"].clear()  # a run's own
    assert Read(tmp_path).floors == first.floors
    monkeypatch.undo()
    for word in ("prompt=suffix", "data.limit=13", "model.ctx_len=64", "model.vocab=world"):
        other = Read(tmp_path, word)
        assert other.feed.key != first.feed.key, word
    assert Read(tmp_path, "data.limit=13").floors != first.floors
    assert Read(tmp_path, "eval.limit=3").floors != first.floors


def test_texts_under_a_key_are_read_once(monkeypatch: pytest.MonkeyPatch) -> None:
    from tests.test_graphs import HERE, Samples, sample

    data = Samples([sample([1, 2], [-100, 2], 7), sample([3], [3], 5)])
    first = resident.load(data, HERE, key="these")
    data.clear()  # read again, it would be empty
    second = resident.load(data, HERE, key="these")
    for name in ("text", "ids", "labels", "lengths", "image_start", "answers", "row"):
        assert getattr(first, name).tolist() == getattr(second, name).tolist(), name
    assert second.features.patches[:, 0, 0].tolist() == [7, 5]
    with pytest.raises(ValueError):
        resident.load(data, HERE)
