"""From a run's directory, or converted weights, to a model that can be asked."""

from __future__ import annotations

import dataclasses
import json
import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from data.tokens import WorldTokenizer, load_tokenizer
from toolkit import checkpoint, register
from toolkit.build import build_model, from_dict
from toolkit.explain import fail
from toolkit.pretrained import load_language_model
from toolkit.rundir import run_id
from toolkit.runs import CONFIG, VOCABULARY, WEIGHTS, read_config
from toolkit.schema import RunConf
from toolkit.session import Answerer
from toolkit.weights import config_of

log = logging.getLogger("toolkit.generate")

PRECISIONS = ("fp32", "bf16")


def load(
    path: str | Path, *, device: str = "auto", precision: str = "", plugins: Sequence[str] = ()
) -> Answerer:
    """The model of a finished run, or of a folder that `toolkit.convert` wrote, ready to be asked.

    device: auto, cpu or cuda. precision: fp32 or bf16; empty is the run's own. plugins: modules that
    register the run's own components; they are imported because you name them, never because a run does.
    Raises ValueError for what is no finished run, with what to do.
    """
    folder, place = Path(path).expanduser(), device_of(device)
    if precision not in ("", *PRECISIONS):
        raise ValueError(f"precision={precision}: write precision=fp32 or precision=bf16")
    if (folder / CONFIG).exists():
        return _run(folder, place, precision, plugins)
    return converted(folder, place, precision)


def device_of(name: str) -> torch.device:
    """The device of that name; asking for an absent one is an error."""
    if name not in ("auto", "cpu", "cuda"):
        raise ValueError(f"device={name}: write device=auto, device=cpu or device=cuda")
    available = torch.cuda.is_available()
    if name == "cuda" and not available:
        raise ValueError("device=cuda, but torch sees no CUDA device here; write device=cpu")
    return torch.device("cuda" if available and name != "cpu" else "cpu")


def _run(folder: Path, device: torch.device, precision: str, plugins: Sequence[str]) -> Answerer:
    register.discover(plugins)
    cfg = read_config(folder, plugins)
    weights = folder / WEIGHTS
    if not (weights / checkpoint.FACTS).exists():
        raise ValueError(f"{folder}: holds no {WEIGHTS}, its training has not ended; run it again to go on")
    learned = json.loads((weights / checkpoint.FACTS).read_text(encoding="utf-8"))["parts"]
    try:
        conf = _without_start(from_dict(cfg), learned)
    except KeyError as error:
        what, fix = "no such key in a run's config", "load it with the version that wrote it"
        raise fail(str(folder / CONFIG), str(error.args[0]), what, fix=fix) from error
    tokenizer = load_tokenizer(folder / VOCABULARY)
    model = build_model(conf, vocab_size=tokenizer.size)
    checkpoint.load(weights, model)
    model.to(device).eval().requires_grad_(False)
    bf16 = (precision or conf.hardware.precision) == "bf16"
    prompt = register.bind("prompt", conf.prompt)
    name = f"run {run_id(cfg)}"
    return Answerer(model.rwkv, tokenizer, prompt, model, name, bf16, conf.model.ctx_len)


def _without_start(conf: RunConf, learned: Sequence[str]) -> RunConf:
    """The same without the weights that training began with, for parts that the checkpoint holds."""
    sections: dict[str, Any] = {"rwkv": "lm", "proj": "proj"}
    begun = {
        section: dataclasses.replace(getattr(conf, section), weights="")
        for part, section in sections.items()
        if part in learned
    }
    return dataclasses.replace(conf, **begun)


def converted(folder: Path, device: torch.device, precision: str) -> Answerer:
    """A language model from a folder that `toolkit.convert` wrote; all layouts ask text alone alike."""
    register.discover()
    parts = config_of(str(folder)).get("parts", {})
    if "rwkv" not in parts:
        raise ValueError(
            f"{folder}: neither a run's directory nor a converted language model; "
            "`python -m toolkit.generate` lists the runs, "
            "`python -m toolkit.convert FILE --to FOLDER` makes the latter"
        )
    aside = sorted(set(parts) - {"rwkv"})
    if aside:
        log.warning("%s: %s are left aside, the language model alone is asked", folder, ", ".join(aside))
    dtype = None if device.type == "cuda" and not precision else torch.float32
    dtype = torch.bfloat16 if precision == "bf16" else dtype
    rwkv, sizes = load_language_model(str(folder), dtype=dtype, device=device)
    rwkv.requires_grad_(False)
    tokenizer = WorldTokenizer() if sizes["vocabulary"] == "world" else None
    prompt = register.bind("prompt", {"name": "prefix"})
    return Answerer(rwkv, tokenizer, prompt, None, f"model {folder.name}")
