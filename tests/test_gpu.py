"""The model on a CUDA device: the CPU's numbers, the same bits twice, a whole run."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from tests.helpers import make_batch, small_model
from toolkit import register, run
from toolkit.lit import to_device
from toolkit.loss import lm_loss

pytestmark = pytest.mark.gpu
register.discover()
TEXTS = [(3, 5, 2), (0, 2, 1), (-1, 4, 3), (7, 1, 4)]


@pytest.mark.parametrize("recurrence", sorted(register.components("recurrence")))
@pytest.mark.parametrize("scan", ["uni", "2d", "hilbert"])
def test_logits_and_gradients_equal_the_cpu(recurrence: str, scan: str) -> None:
    model = small_model(recurrence=recurrence, scan=scan)
    batch = make_batch(model, TEXTS)
    expected = model.logits(batch).detach()
    lm_loss(model(batch, l2="answers"), reduction="sample").backward()
    gradients = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    model.cuda()
    there = to_device(batch, torch.device("cuda"))
    torch.testing.assert_close(model.logits(there).detach().cpu(), expected, rtol=1e-3, atol=1e-4)
    lm_loss(model(there, l2="answers"), reduction="sample").backward()
    for name, parameter in model.named_parameters():
        if name in gradients:
            error = (parameter.grad.cpu() - gradients[name]).norm() / gradients[name].norm().clamp(min=1e-6)
            assert float(error) < 2e-3, name


@pytest.mark.parametrize("recurrence", sorted(register.components("recurrence")))
def test_the_same_bits_twice_in_bf16(recurrence: str) -> None:
    model = small_model(recurrence=recurrence).cuda()
    batch = to_device(make_batch(model, TEXTS), torch.device("cuda"))
    found = []
    for _ in range(2):
        model.zero_grad()
        with torch.autocast("cuda", torch.bfloat16):
            loss = lm_loss(model(batch, l2="answers"), reduction="sample")
        loss.backward()
        found.append([loss.detach(), *(p.grad for p in model.parameters() if p.grad is not None)])
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))


def test_a_whole_run_on_the_gpu(tmp_path: Path) -> None:
    pytest.importorskip("easy_vqa", reason="easy-VQA comes with the demo extra")
    words = ["data.limit=12", "stages.tune.steps=5", "stages.tune.warmup=0", "eval.limit=20"]
    paths = [f"paths.runs={tmp_path / 'runs'}", f"paths.cache={tmp_path / 'cache'}"]
    assert run.main(["scale=small", "hardware.device=cuda", *words, *paths]) == 0
    (result,) = (tmp_path / "runs").glob("*/result.json")
    assert json.loads(result.read_text())["device"] == "cuda"
