"""A foreign file to a folder of model.safetensors and config.json, and back to the original's layout."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from toolkit.convert.source import SAFETENSORS, kind_of, open_source
from toolkit.rundir import versions, write_json
from toolkit.weights import CONFIG, WEIGHTS, Weights, config_of, sync_folder

FORMAT = 1
BYTES_A_SECOND = 10_000_000
"""Slowest disk that is waited for."""


def convert(path: Path, to: Path, *, seconds: int = 0, as_is: bool = False) -> dict[str, Any]:
    """Converts a weight file into the new folder `to` and returns its config.json.

    seconds: time limit for a file that is unpickled, 0 for 120 s and 1 s more per 10 MB. as_is: keeps the
    tensors of a file that is nothing known. Raises ValueError, naming the file, for what is refused;
    `to` then does not exist.
    """
    kind = kind_of(path)
    if to.exists():
        raise ValueError(f"{to}: exists; give the folder to be written another name, or delete it")
    size = path.stat().st_size
    temporary = to.with_name(f".{to.name}.{os.getpid()}.tmp")
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir(parents=True)
    try:
        with path.open("rb") as file:
            digest = hashlib.file_digest(file, "sha256").hexdigest()
        if kind == SAFETENSORS:
            facts = write_folder(path, temporary, as_is=as_is)
        else:
            facts = _in_a_child(path, temporary, seconds or 120 + size // BYTES_A_SECOND, as_is=as_is)
        Weights(temporary / WEIGHTS)  # what was written is whole, whoever wrote it
        source = {"file": path.name, "bytes": size, "sha256": digest, **facts.pop("source")}
        config = {"format": FORMAT, **facts, "source": source, "converter": versions()}
        write_json(temporary / CONFIG, config)
        sync_folder(temporary)
        temporary.replace(to)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    return config


def write_folder(path: Path, folder: Path, *, as_is: bool) -> dict[str, Any]:
    """Recognises the tensors of a file and writes model.safetensors; returns what config.json tells.

    Unpickles, unless the file is safetensors: the child process calls it then.
    """
    source = open_source(path)
    # Only now: a file that is refused, is refused without the seconds that these take.
    from toolkit.convert import plan as plans
    from toolkit.convert.write import write_safetensors

    weights = source.tensors
    shapes = (
        weights.shapes() if isinstance(weights, Weights) else {n: tuple(t.shape) for n, t in weights.items()}
    )
    known = None if as_is else plans.understand(path, shapes)
    plan = known or plans.Plan("as it was", {n: n for n in shapes}, {})
    named = _Renamed(weights, plan.names)
    digest = write_safetensors(
        folder / WEIGHTS, named, release=lambda name, tensor: source.release(plan.names[name], tensor)
    )
    left_out = [*plan.left_out, *source.left_out]
    return {
        "parts": plan.parts,
        "dtypes": _dtypes(folder / WEIGHTS),
        "files": {WEIGHTS: {"bytes": (folder / WEIGHTS).stat().st_size, "sha256": digest}},
        "source": {
            "layout": plan.layout,
            "kind": source.kind,
            "wrapper": source.wrapper,
            "prefix": source.prefix,
            "left_out": {"count": len(left_out), "names": left_out[:20]},
        },
        "found": plans.told(plan) or f"{len(shapes)} tensors, kept as they are",
    }


class _Renamed(Mapping[str, Any]):
    """Tensors under other names, fetched when asked for."""

    def __init__(self, tensors: Mapping[str, Any], names: Mapping[str, str]) -> None:
        self.tensors, self.names = tensors, names

    def __getitem__(self, name: str) -> Any:
        return self.tensors[self.names[name]]

    def __iter__(self) -> Any:
        return iter(self.names)

    def __len__(self) -> int:
        return len(self.names)


def _dtypes(path: Path) -> dict[str, list[str]]:
    """Part -> types of its tensors."""
    found: dict[str, set[str]] = {}
    for name, entry in Weights(path).entries.items():
        found.setdefault(name.split(".")[0], set()).add(entry.dtype)
    return {part: sorted(dtypes) for part, dtypes in found.items()}


def _in_a_child(path: Path, folder: Path, seconds: int, *, as_is: bool) -> dict[str, Any]:
    home = Path(__file__).resolve().parent.parent.parent
    # Of the environment only what finding Python's and torch's files takes: no keys, no tokens.
    kept = ("PATH", "HOME", "LD_LIBRARY_PATH", "SYSTEMROOT", "TMPDIR", "LANG", "VIRTUAL_ENV")
    env = {k: os.environ[k] for k in kept if k in os.environ}
    env["PYTHONPATH"] = os.pathsep.join([str(home), *filter(None, [os.environ.get("PYTHONPATH")])])
    env |= {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    command = [sys.executable, "-P", "-m", "toolkit.convert.child"]
    command += [str(path.resolve()), str(folder.resolve()), str(seconds), str(int(as_is))]
    try:
        done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=seconds, check=False)
    except subprocess.TimeoutExpired as error:
        raise ValueError(f"{path}: not converted within {seconds} s; --time-limit gives it longer") from error
    lines = done.stdout.strip().splitlines()
    if done.returncode in (-signal.SIGXCPU, -signal.SIGKILL, 128 + signal.SIGKILL):
        raise ValueError(
            f"{path}: used up its {seconds} s of processor time, or the machine's memory; refused"
        )
    if done.returncode or not lines:
        last = (done.stderr.strip().splitlines() or [f"exit code {done.returncode}"])[-1]
        raise ValueError(f"{path}: the process that read it ended without an answer ({last[:200]})")
    facts = json.loads(lines[-1])
    if "error" in facts:
        raise ValueError(str(facts["error"]).replace(str(path.resolve()), str(path)))
    return dict(facts)


def to_pth(folder: Path, to: Path, *, lm_only: bool = False) -> int:
    """Writes the weights of a folder as one .pth in the original's names and order; returns the tensors.

    lm_only: the language model alone, without `rwkv.`, as the `rwkv` package and RWKV-LM read it. A file
    converted from a language model or a tower alone goes back without the prefix that it was given.
    """
    import torch

    file = folder / WEIGHTS if folder.is_dir() else folder
    if not file.is_file():
        raise ValueError(
            f"{folder}: no folder with {WEIGHTS}, as toolkit.convert and a run's checkpoints have"
        )
    if to.exists():
        raise ValueError(f"{to}: exists; give the file to be written another name, or delete it")
    weights = Weights(file)
    source = config_of(str(folder)).get("source")
    layout = source.get("layout") if isinstance(source, dict) else ""
    prefix = {"RWKV": "rwkv.", "tower": "vit."}.get(str(layout), "")
    prefix = "rwkv." if lm_only else prefix
    state = {n.removeprefix(prefix): weights[n] for n in weights if n.startswith(prefix)}
    if not state:
        raise ValueError(f"{file}: holds no {prefix}* tensors")
    to.parent.mkdir(parents=True, exist_ok=True)
    temporary = to.with_name(f".{to.name}.{os.getpid()}.tmp")
    try:
        torch.save(state, temporary)
        temporary.replace(to)
    finally:
        temporary.unlink(missing_ok=True)
    return len(state)
