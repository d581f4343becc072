"""Steps over a resident data set, uncaptured on the CPU: the numbers that the ordinary loop gives."""

from __future__ import annotations

import csv
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from data.dataset import Sample
from tests.helpers import make_batch, small_model
from toolkit import graphs, resident, run
from toolkit.contracts import IGNORE, NO_IMAGE, Batch, ImageFeatures
from toolkit.loss import lm_loss
from toolkit.schema import HardwareConf, StageConf

TEXTS = [(3, 5, 2), (0, 2, 1), (2, 4, 3), (7, 1, 4)]


def fixed(batch: Batch, *, to: int, weight: list[float]) -> Batch:
    """The batch as a resident data set serves it: longer, answers filled up, so many for each sample."""
    more = to - batch.ids.shape[1]
    ids = torch.nn.functional.pad(batch.ids, (0, more))
    labels = torch.nn.functional.pad(batch.labels, (0, more), value=IGNORE)
    rows = resident.answer_positions(labels) + torch.arange(len(ids)).unsqueeze(1) * to
    return replace(
        batch,
        ids=ids,
        labels=labels,
        weight=torch.tensor(weight),
        answers=rows.flatten(),
        images=torch.arange(len(ids)),
        longest=batch.lengths.max(),
    )


@pytest.mark.parametrize("l2", ["none", "answers", "all"])
@pytest.mark.parametrize("reduction", ["sample", "batch"])
def test_fillers_change_neither_loss_nor_gradients(l2: str, reduction: str) -> None:
    model = small_model().double()
    weight = [1.0, 0.0, 1.0, 1.0]
    batch = replace(make_batch(model, TEXTS, dtype=torch.float64), weight=torch.tensor(weight))
    found = []
    for one_batch in (batch, fixed(batch, to=batch.ids.shape[1] + 5, weight=weight)):
        model.zero_grad()
        loss = lm_loss(model(one_batch, l2=l2), reduction=reduction)
        loss.backward()
        found.append([loss.detach(), *(p.grad for p in model.parameters() if p.grad is not None)])
    for plain, filled in zip(*found, strict=True):
        torch.testing.assert_close(filled, plain, rtol=1e-9, atol=1e-12)


def test_positions_before_labels_are_found_and_filled_with_the_last() -> None:
    no = IGNORE
    labels = torch.tensor([[no, no, 5, 6], [no, 7, no, no], [3, no, no, no]])
    assert resident.answer_positions(labels).tolist() == [[1, 2], [0, 3], [3, 3]]


HERE = torch.device("cpu")


def test_why_a_stage_is_no_graph(caplog: pytest.LogCaptureFixture) -> None:
    stage, there = StageConf(global_batch=8), torch.device("cuda")
    never = None
    assert graphs.obstacle(HardwareConf(graph="never"), stage, never, there) == "asked for"
    assert graphs.obstacle(HardwareConf(), stage, never, HERE) == "on the CPU" and not caplog.messages
    why = graphs.obstacle(HardwareConf(), stage, never, there)
    assert why == "features of pictures are computed in each step"
    assert graphs.obstacle(HardwareConf(), stage, object(), there) == ""
    caplog.clear()
    why = graphs.obstacle(HardwareConf(micro_batch=4), stage, never, there)
    assert why == "gradients of hardware.micro_batch=4 are accumulated"
    assert caplog.messages == [f"training steps are no CUDA graph: {why}"]
    with pytest.raises(ValueError, match=r"hardware\.graph=always.*on the CPU; write auto"):
        graphs.obstacle(HardwareConf(graph="always"), stage, never, HERE)


class Pictures:
    """A table of features: picture i is all i."""

    def gather(self, records: list[int]) -> ImageFeatures:
        rows = torch.tensor(records, dtype=torch.float32).view(-1, 1, 1)
        return ImageFeatures(rows.expand(-1, 4, 3), rows.expand(-1, 1, 3), (2, 2))


class Samples(list[Sample]):
    features = Pictures()


def sample(ids: list[int], labels: list[int], record: int, *, start: int = 0, weight: float = 1.0) -> Sample:
    return Sample(torch.tensor(ids), torch.tensor(labels), start, f"k{record}", record, weight)


def test_batches_of_a_resident_data_set() -> None:
    no = IGNORE
    first, second = sample([1, 2, 3], [no, 2, no], 7), sample([4, 5, 6, 7], [no, no, 6, 7], 3, start=1)
    again = replace(second, record=7)
    data = resident.load(Samples([first, second, again]), HERE)
    assert len(data.ids) == 2 and len(data.features.patches) == 2  # equal texts and pictures are kept once
    batch = data.batch(torch.tensor([1, 0, 2]), torch.tensor([1.0, 1.0, 0.0]))
    assert batch.ids.tolist() == [[4, 5, 6, 7], [1, 2, 3, 0], [4, 5, 6, 7]]
    assert batch.labels.tolist() == [[no, no, 6, 7], [no, 2, no, no], [no, no, 6, 7]]
    assert batch.lengths.tolist() == [4, 3, 4] and batch.image_start.tolist() == [1, 0, 1]
    assert batch.features is not None and batch.features.patches[:, 0, 0].tolist() == [3, 7, 7]
    assert batch.features.extra.shape == (3, 1, 3) and batch.features.grid == (2, 2)
    assert batch.answers is not None and batch.answers.tolist() == [1, 2, 4, 7, 9, 10]
    assert batch.weight.tolist() == [1, 1, 0] and batch.longest is not None and int(batch.longest) == 4


@pytest.mark.parametrize("changed", [{"image_start": NO_IMAGE}, {"weight": 0.0}])
def test_samples_that_fixed_shapes_cannot_hold(changed: dict[str, Any]) -> None:
    whole = sample([1, 2], [IGNORE, 2], 5)
    with pytest.raises(resident.Unfit, match="sample k5 has no picture, is damaged, or is cut"):
        resident.load(Samples([whole, replace(whole, **changed)]), HERE)


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    pytest.importorskip("easy_vqa", reason="easy-VQA comes with the demo extra")
    return tmp_path_factory.mktemp("cache")


TINY = [
    "data.limit=12",
    "stages.tune.steps=7",
    "stages.tune.warmup=2",
    "stages.tune.global_batch=24",
    "log.every=2",
    "eval.limit=20",
    "eval.every=3",
    "eval.every_limit=4",
]


def only(folder: Path) -> Path:
    (found,) = folder.glob("*-s0-*")
    return found


def test_resident_steps_train_as_the_trainer_does(
    tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whole runs: the same batches, losses, rates, points and weights, to rounding."""
    paths = [f"paths.cache={cache}", "hardware.threads=1"]
    assert run.main([*TINY, *paths, f"paths.runs={tmp_path / 'trainer'}"]) == 0
    monkeypatch.setattr(graphs, "obstacle", lambda *arguments, **options: "")
    monkeypatch.setattr(graphs.Steps, "capture", lambda self: 0.01)
    assert run.main([*TINY, *paths, f"paths.runs={tmp_path / 'steps'}"]) == 0
    trainer, steps = only(tmp_path / "trainer"), only(tmp_path / "steps")
    told = [json.loads((f / "result.json").read_text())["training"] for f in (trainer, steps)]
    assert told == [{"tune": "eager: on the CPU"}, {"tune": "graph"}]
    rows = [list(csv.DictReader((f / "metrics.csv").open())) for f in (trainer, steps)]
    assert len(rows[0]) == len(rows[1]) == 3
    for mine, wanted in zip(rows[1], rows[0], strict=True):
        assert float(mine["step"]) == float(wanted["step"])
        assert float(mine["lr"]) == pytest.approx(float(wanted["lr"]), rel=1e-6)
        assert float(mine["loss"]) == pytest.approx(float(wanted["loss"]), rel=1e-5)
    points = [json.loads((f / "result.json").read_text())["curve"] for f in (trainer, steps)]
    assert [p["step"] for p in points[1]] == [p["step"] for p in points[0]] == [3, 6]
    weights = [load_file(f / "checkpoints" / "last" / "model.safetensors") for f in (trainer, steps)]
    for name, wanted_tensor in weights[0].items():
        torch.testing.assert_close(weights[1][name], wanted_tensor, rtol=1e-3, atol=2e-5, msg=name)
