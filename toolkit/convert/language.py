"""Recognises an RWKV language model by its tensors and reads every size from their shapes."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from toolkit.convert.faults import Shape, cause_of, compare

LAYERS_LIMIT = 512
VOCABULARIES = {65536: "world", 50277: "pile", 50304: "pile", 50432: "pile"}
"""Embedding rows -> vocabulary; some files of the Pile models are padded."""


def is_language_model(shapes: Mapping[str, Shape]) -> bool:
    return any(re.fullmatch(r"blocks\.\d{1,6}\.att\..+", name) for name in shapes)


def version_of(path: object, shapes: Mapping[str, Shape]) -> str:
    """ "4", "5.2" or "6", by the names of the time mix; ValueError for other versions."""
    names = {re.sub(r"^blocks\.\d+\.", "", n): s for n, s in shapes.items() if n.startswith("blocks.")}
    if "att.time_maa_x" in names or "att.time_maa_w1" in names:
        return "6"
    other = cause_of(n for n in names if re.match(r"att\.(x_r|r_k|k_k|w0|a0)$", n))
    if other:
        raise ValueError(f"{path}: is {other}")
    if "att.time_faaaa" in names or "att.gate.weight" in names or "att.ln_x.weight" in names:
        decay = names.get("att.time_decay", (1, 2))
        if len(decay) < 2 or decay[1] == 1 or "att.gate.weight" not in names:
            raise ValueError(
                f"{path}: is RWKV-5.0 or 5.1 (one decay per head, or no gate), which is not offered; use an "
                "RWKV-5 World v2 file, which is 5.2"
            )
        return "5.2"
    if "att.time_first" in names:
        return "4"
    raise ValueError(f"{path}: its blocks have none of the time mixes known (RWKV-4, 5.2, 6)")


def read_sizes(path: object, shapes: Mapping[str, Shape]) -> dict[str, Any]:
    """Version and sizes as config.json keeps them; nothing is guessed from the file's name."""
    version = version_of(path, shapes)
    d_model = (
        _size(shapes, "emb.weight", 1) or _size(shapes, "ln_out.weight", 0) or _in(shapes, "ln1.weight", 0)
    )
    layers = [int(n.split(".")[1]) for n in shapes if re.match(r"blocks\.\d{1,6}\.", n)]
    n_layer = max(layers) + 1
    if n_layer > LAYERS_LIMIT or not d_model:
        raise ValueError(
            f"{path}: {n_layer} layers of width {d_model} is no language model that is read here"
        )
    options: dict[str, Any] = {"name": f"rwkv{version[0]}", "d_ffn": _in(shapes, "ffn.key.weight", 0)}
    if version != "4":
        options["head_size"] = _in(shapes, "att.time_faaaa", 1)
    if version == "6":
        options["shift_rank"] = _in(shapes, "att.time_maa_w2", 1)
        options["decay_rank"] = _in(shapes, "att.time_decay_w2", 0)
    rows = _size(shapes, "emb.weight", 0) or _size(shapes, "head.weight", 0) or 1
    return {
        "version": version,
        "n_layer": n_layer,
        "d_model": d_model,
        "vocab_size": rows,
        "vocabulary": VOCABULARIES.get(rows, "unknown"),
        "recurrence": options,
    }


def check(path: object, shapes: Mapping[str, Shape]) -> dict[str, Any]:
    """The sizes of a language model whose every tensor is there and fits; ValueError listing what is not."""
    from toolkit.pretrained import ghost

    sizes = read_sizes(path, shapes)
    try:
        wanted = {n: tuple(t.shape) for n, t in ghost(sizes).state_dict().items()}
    except ValueError as error:
        raise ValueError(f"{path}: its sizes do not go together ({error})") from error
    faults = compare(shapes, wanted)
    if faults:
        raise ValueError(faults.message(path, f"the released layout of {title(sizes)}"))
    return sizes


def title(sizes: Mapping[str, Any]) -> str:
    """RWKV-6, 24 layers, width 2048."""
    return f"RWKV-{sizes['version']}, {sizes['n_layer']} layers, width {sizes['d_model']}"


def _size(shapes: Mapping[str, Shape], name: str, axis: int) -> int:
    shape = shapes.get(name, ())
    return shape[axis] if len(shape) > axis else 0


def _in(shapes: Mapping[str, Shape], rest: str, axis: int) -> int:
    """A size that most layers agree on; the others are then told as of another shape."""
    pattern = re.compile(rf"blocks\.\d+\.{re.escape(rest)}")
    found = [_size(shapes, n, axis) for n in shapes if pattern.fullmatch(n)]
    return max(set(found), key=found.count) if found else 0
