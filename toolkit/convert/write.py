"""Writes safetensors tensor by tensor, so that no second copy of the weights is ever in memory."""

from __future__ import annotations

import hashlib
import json
import os
import struct
from collections.abc import Callable, Mapping
from pathlib import Path

import torch
from torch import Tensor

from toolkit.weights import DTYPES

NAMES = {getattr(torch, name): (short, size) for short, (name, size) in DTYPES.items()}
CHUNK = 16 << 20


def write_safetensors(
    path: Path, tensors: Mapping[str, Tensor], *, release: Callable[[str, Tensor], None] = lambda n, t: None
) -> str:
    """Writes `tensors` (each fetched when its turn comes) and returns the file's SHA-256.

    The header lists them in the order given, the data by falling size of the type, so that every tensor
    is aligned. release: called with name and tensor when it has been written.
    """
    header = _header({name: (t.dtype, tuple(t.shape)) for name, t in tensors.items()})
    digest = hashlib.sha256(header)
    with path.open("wb") as file:
        file.write(header)
        for name in _order({name: t.dtype for name, t in tensors.items()}):
            tensor = tensors[name]
            flat = tensor.contiguous().reshape(-1).view(torch.uint8).numpy()
            for begin in range(0, len(flat), CHUNK):
                chunk = flat[begin : begin + CHUNK].data
                digest.update(chunk)
                file.write(chunk)
            del flat
            release(name, tensor)
        file.flush()
        os.fsync(file.fileno())
    return digest.hexdigest()


def _order(dtypes: Mapping[str, torch.dtype]) -> list[str]:
    return sorted(dtypes, key=lambda name: -NAMES[dtypes[name]][1])


def _header(facts: Mapping[str, tuple[torch.dtype, tuple[int, ...]]]) -> bytes:
    begin, offsets = 0, {}
    for name in _order({name: dtype for name, (dtype, _) in facts.items()}):
        dtype, shape = facts[name]
        end = begin + torch.Size(shape).numel() * NAMES[dtype][1]
        offsets[name] = [begin, end]
        begin = end
    listed = {
        name: {"dtype": NAMES[dtype][0], "shape": list(shape), "data_offsets": offsets[name]}
        for name, (dtype, shape) in facts.items()
    }
    text = json.dumps({"__metadata__": {"format": "pt"}, **listed}, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return struct.pack("<Q", len(text)) + text
