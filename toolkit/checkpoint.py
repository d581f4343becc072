"""Weights of a run on disk: safetensors plus JSON in a directory that appears whole or not at all."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import Any

from safetensors.torch import load_file, save_file

from toolkit.model import VisualRWKV

WEIGHTS = "model.safetensors"
FACTS = "checkpoint.json"


def save(folder: Path, model: VisualRWKV, *, parts: list[str], facts: dict[str, Any]) -> None:
    """Writes the weights of `parts` (what ever learned; frozen towers are left out) and `facts`.

    Everything goes to a temporary sibling, is flushed to the disk and renamed, so that a checkpoint
    that exists is complete.
    """
    temporary = folder.with_name(f".{folder.name}.{os.getpid()}.tmp")
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir(parents=True)
    weights = {
        name: tensor.detach().cpu().contiguous()
        for name, tensor in model.state_dict().items()
        if name.split(".")[0] in parts
    }
    save_file(weights, temporary / WEIGHTS)
    (temporary / FACTS).write_text(json.dumps({"parts": parts, **facts}, indent=2) + "\n", encoding="utf-8")
    for path in temporary.iterdir():
        with path.open("rb") as file:
            os.fsync(file.fileno())
    shutil.rmtree(folder, ignore_errors=True)
    temporary.replace(folder)


def load(folder: Path, model: VisualRWKV) -> dict[str, Any]:
    """Loads the weights of a checkpoint strictly into the parts it holds; returns its facts."""
    facts: dict[str, Any] = json.loads((folder / FACTS).read_text(encoding="utf-8"))
    weights = load_file(folder / WEIGHTS)
    wanted = {n for n in model.state_dict() if n.split(".")[0] in facts["parts"]}
    missing, surplus = sorted(wanted - weights.keys()), sorted(weights.keys() - wanted)
    if missing or surplus:
        raise ValueError(
            f"{folder / WEIGHTS}: does not fit this model; missing {missing[:3]}, "
            f"not in the model {surplus[:3]}"
        )
    model.load_state_dict(weights, strict=False)
    return facts
