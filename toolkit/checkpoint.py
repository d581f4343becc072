"""Weights and state of a run on disk: safetensors plus JSON in a folder that appears whole or not at all."""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from data.atomic import draft_of, publish
from toolkit.model import VisualRWKV

WEIGHTS = "model.safetensors"
FACTS = "checkpoint.json"
MANIFEST = "manifest.json"


def weights_of(model: VisualRWKV, parts: Iterable[str]) -> dict[str, Tensor]:
    """Parameters and buffers of some parts by name, on the CPU."""
    wanted = set(parts)
    return {
        name: tensor.detach().cpu().contiguous()
        for name, tensor in model.state_dict().items()
        if name.split(".")[0] in wanted
    }


def write(
    folder: Path,
    tensors: Mapping[str, Mapping[str, Tensor]],
    facts: Mapping[str, Any],
    *,
    files: Mapping[str, bytes] | None = None,
) -> None:
    """Writes files of tensors, `facts` as JSON, other files by their content, and last the hashes of all.

    Everything goes to a hidden sibling, is flushed to the disk and renamed, so that a checkpoint that exists
    is complete. A folder of that name is replaced. Raises OSError where that cannot be, and leaves what was.
    """
    try:
        with draft_of(folder) as draft:
            for name, named in tensors.items():
                save_file(dict(named), draft / name)
            (draft / FACTS).write_text(json.dumps(facts, indent=2) + "\n", encoding="utf-8")
            for name, content in (files or {}).items():
                (draft / name).write_bytes(content)
            entries = {file.name: _entry(file) for file in sorted(draft.iterdir())}
            text = json.dumps({"format": 1, "files": entries}, indent=2) + "\n"
            (draft / MANIFEST).write_text(text, encoding="utf-8")
            if not publish(draft, folder):
                shutil.rmtree(folder)
                publish(draft, folder)
    except SafetensorError as error:  # its way to say that a file cannot be written
        raise OSError(str(error)) from error


def _entry(file: Path) -> dict[str, Any]:
    with file.open("rb") as stream:
        return {"bytes": file.stat().st_size, "sha256": hashlib.file_digest(stream, "sha256").hexdigest()}


def fault(folder: Path) -> str:
    """What is wrong with a checkpoint's files; "" for one that is as it was written."""
    try:
        files = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))["files"]
        for name, entry in files.items():
            if _entry(folder / name) != entry:
                return f"{name} is not as it was written"
    except (OSError, ValueError, LookupError, TypeError) as error:
        return f"{type(error).__name__}: {error}"
    return ""


def load(folder: Path, model: VisualRWKV) -> dict[str, Any]:
    """Loads the weights of a checkpoint strictly into the parts it holds; returns its facts.

    Raises ValueError for weights that do not fit, and where the other parts are not those of the training.
    """
    facts, parts = facts_of(folder), parts_of(folder)
    try:
        weights = load_file(folder / WEIGHTS)
    except (OSError, SafetensorError) as error:
        raise ValueError(f"{folder / WEIGHTS}: no whole weights can be read from it: {error}") from error
    wanted = {n: t.shape for n, t in model.state_dict().items() if n.split(".")[0] in parts}
    missing, surplus = sorted(wanted.keys() - weights.keys()), sorted(weights.keys() - wanted.keys())
    other = [
        f"{n} {list(weights[n].shape)} for {list(shape)}"
        for n, shape in wanted.items()
        if n in weights and weights[n].shape != shape
    ]
    if missing or surplus or other:
        raise ValueError(
            f"{folder / WEIGHTS}: does not fit this model; missing {missing[:3]}, "
            f"not in the model {surplus[:3]}, of another shape {other[:3]}"
        )
    _check_frozen(folder, facts, model)
    model.load_state_dict(weights, strict=False)
    return facts


def fingerprint(tensors: Mapping[str, Tensor]) -> str:
    """Names weights: their names, shapes and 64 values of each tensor."""
    digest = hashlib.sha256()
    for name, weight in tensors.items():
        flat = weight.detach().reshape(-1)
        some = flat[:: max(1, len(flat) // 64)][:64].double().cpu()
        digest.update(f"{name} {list(weight.shape)}".encode() + some.numpy().tobytes())
    return digest.hexdigest()[:16]


def frozen_of(model: VisualRWKV, parts: Iterable[str]) -> dict[str, str]:
    """Fingerprints of the parts that a checkpoint of `parts` does not hold."""
    held = set(parts)
    return {
        part: fingerprint(module.state_dict()) for part, module in model.named_children() if part not in held
    }


def _check_frozen(folder: Path, facts: Mapping[str, Any], model: VisualRWKV) -> None:
    """Refuses a model whose frozen parts are not those beside which the checkpoint's were trained."""
    told = facts.get("frozen")
    if not isinstance(told, dict):  # checkpoints of earlier versions tell none
        return
    now = frozen_of(model, facts["parts"])
    for part in sorted(told.keys() & now.keys()):
        if told[part] != now[part]:
            key = {"rwkv": "lm.weights", "proj": "proj.weights"}.get(part, "encoder.weights")
            raise ValueError(
                f"{folder}: was trained beside a frozen {part} whose weights ({key}) were others: "
                f"fingerprint {told[part]}, now {now[part]}; put those back that the run began with"
            )


def facts_of(folder: Path) -> dict[str, Any]:
    """What a checkpoint tells beside its tensors. Raises ValueError naming the file if it tells nothing."""
    try:
        found: dict[str, Any] = json.loads((folder / FACTS).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ValueError(f"{folder / FACTS}: not what a checkpoint holds: {error}") from error
    return found


def parts_of(folder: Path) -> list[str]:
    """The parts whose weights a checkpoint holds. Raises ValueError naming the file if it tells none."""
    facts: Any = facts_of(folder)
    parts = facts.get("parts") if isinstance(facts, dict) else None
    if not isinstance(parts, list):
        raise ValueError(f"{folder / FACTS}: not what a checkpoint holds: it lists no parts")
    return parts
