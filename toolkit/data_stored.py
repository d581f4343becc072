"""Training on stored features: which encoder made them, and that it is the run's."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping
from typing import Any

import torch
from PIL import Image

from data.feature_shards import features_of, stored_features
from data.features import FeatureTable
from data.reader import ShardReader
from toolkit.model import VisualRWKV
from toolkit.schema import RunConf


def identity(encoder: Any, node: Mapping[str, Any]) -> dict[str, Any]:
    """What names an encoder's features: its options but for where weights lie, its weights, its transform.

    `transform` holds values of a fixed picture after the transform, as libraries resize differently.
    """
    digest = hashlib.sha256()
    for name, tensor in encoder.state_dict().items():
        digest.update(f"{name} {tensor.dtype} {list(tensor.shape)}".encode())
        digest.update(tensor.detach().cpu().reshape(-1).contiguous().view(torch.uint8).numpy().tobytes())
    named = {"encoder": _without_places(node), "weights": digest.hexdigest()[:16]}
    return {**named, "transform": _probe(encoder.transform())}


def _without_places(node: Any) -> Any:
    """An encoder's options without the paths of weights, also those of its members."""
    if isinstance(node, Mapping):
        return {str(key): _without_places(value) for key, value in node.items() if key != "weights"}
    return [_without_places(item) for item in node] if isinstance(node, (list, tuple)) else node


def _probe(transform: Callable[[Any], Any]) -> list[float]:
    """Sixteen values of a picture of gradients after the transform."""
    picture = Image.new("RGB", (96, 64))
    picture.putdata([(x * 2, y * 3, (x * y) % 256) for y in range(64) for x in range(96)])
    flat = torch.cat([part.reshape(-1).float() for part in _parts(transform(picture))])
    return [round(float(value), 5) for value in flat[:: max(1, len(flat) // 16)][:16]]


def _parts(pixels: Any) -> list[Any]:
    return [part for one in pixels for part in _parts(one)] if isinstance(pixels, tuple) else [pixels]


def stored(conf: RunConf, model: VisualRWKV, readers: Mapping[str, ShardReader]) -> dict[str, FeatureTable]:
    """Tables of the splits that hold features in place of pictures; ValueError if others made them."""
    found = {split: facts for split, reader in readers.items() if (facts := features_of(reader)) is not None}
    if not found:
        return {}
    own = identity(model.encoder, conf.encoder)
    for split, facts in found.items():
        _check(f"split {split!r} ({readers[split].folder})", facts, own, conf, model)
    keep = (conf.features.limit_mb << 20) // len(found)
    return {split: stored_features(readers[split], keep_bytes=keep) for split in found}


def _check(
    where: str, facts: Mapping[str, Any], own: Mapping[str, Any], conf: RunConf, model: VisualRWKV
) -> None:
    if any(parameter.requires_grad for parameter in model.encoder.parameters()):
        raise ValueError(
            f"{where} holds features of a frozen encoder, but encoder={conf.encoder['name']} learns in this "
            "run; take encoder out of stages.*.train, or train on the pictures"
        )
    differs = [key for key in ("encoder", "weights") if facts[key] != own[key]]
    if differs or not _near(facts["transform"], own["transform"]):
        what = differs[0] if differs else "transform"
        raise ValueError(
            f"{where} holds features of encoder={facts['encoder']['name']} with {_DIFFERS[what]} than this "
            f"run's encoder={conf.encoder['name']} ({facts[what]} there, {own[what]} here); use that one, "
            "or make features with this one: python -m toolkit.data features"
        )
    grid = tuple(facts["grid"])
    if grid not in (tuple(model.encoder.grid), tuple(model.proj.grid)):
        raise ValueError(
            f"{where} holds features on a grid of {grid[0]} x {grid[1]}, pooled for another projector.tokens "
            f"than this run's {conf.projector['tokens']}; set projector.tokens={grid[0] * grid[1]}, or make "
            "them again with --whole"
        )


_DIFFERS = {"encoder": "other options", "weights": "other weights", "transform": "another transform"}


def _near(one: list[float], other: list[float]) -> bool:
    """Equal up to what libraries round differently: about one step of 8 bits."""
    return len(one) == len(other) and all(abs(a - b) < 0.03 for a, b in zip(one, other, strict=True))
