"""From a resolved config to a model: the one place where components meet."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from typing import Any

import torch

from toolkit import register
from toolkit.model import VisualRWKV, encoders
from toolkit.pretrained import fill_part
from toolkit.schema import RunConf
from toolkit.trunk import LanguageModel
from toolkit.weights import DOWNLOADS


def build_model(
    conf: RunConf,
    *,
    vocab_size: int,
    device: torch.device | None = None,
    lm_dtype: torch.dtype | str | None = "default",
) -> VisualRWKV:
    """Builds the model that `conf` describes, on torch's default device.

    device: where weights that the recipe names go straight from their file; None is the default device.
    lm_dtype: of the language model's weights if they come from a file, None for the file's own, "default"
    for torch's default type.
    Parts whose weights the recipe names (`lm.weights`, `proj.weights`) are filled from them; on the meta
    device names and shapes are compared with the file's header, if it is there. What really interacts is said
    here, as ValueErrors that name both recipe keys.
    """
    d_model, n_layer = conf.model.d_model, conf.model.n_layer
    encoder = register.bind("encoder", conf.encoder)()
    projector = register.bind("projector", conf.projector)(encoder.d_out, d_model, encoder.grid)
    height, width = projector.grid
    if not height * width and not encoder.n_extra:
        raise ValueError(
            f"projector.tokens={conf.projector.get('tokens')} keeps only the class token, and "
            f"encoder={conf.encoder['name']} gives none; set encoder.class_token=true where there is one, "
            "or projector.tokens=1"
        )
    table = [[int(i) for i in row] for row in register.bind("scan", conf.scan)(n_layer, height, width)]
    check_table(table, n_layer, height * width, name=conf.scan["name"])
    if conf.proj.weights:
        fill_part(
            projector, conf.proj.weights, prefix="proj.", key="proj.weights", download=DOWNLOADS["proj"]
        )
    rwkv = _language_model(conf, vocab_size, device, lm_dtype)
    model = VisualRWKV(encoder, projector, rwkv, table=table)
    if model.n_image >= conf.model.ctx_len:
        raise ValueError(
            f"model.ctx_len={conf.model.ctx_len} leaves no room for text: the image alone takes "
            f"{model.n_image} positions (encoder={conf.encoder['name']}, "
            f"projector.tokens={conf.projector.get('tokens')}); write model.ctx_len={2 * model.n_image} "
            "or pool to fewer tokens"
        )
    return model


def _language_model(
    conf: RunConf, vocab_size: int, device: torch.device | None, dtype: torch.dtype | str | None
) -> LanguageModel:
    """From scratch, or without memory and then filled from `lm.weights`."""
    pretrained = bool(conf.lm.weights)
    with torch.device("meta") if pretrained else contextlib.nullcontext():
        recurrence = register.bind("recurrence", conf.recurrence)(conf.model.d_model, conf.model.n_layer)
        rwkv = LanguageModel(
            recurrence, d_model=conf.model.d_model, n_layer=conf.model.n_layer, vocab_size=vocab_size
        )
    if pretrained:
        fill_part(
            rwkv,
            conf.lm.weights,
            prefix="rwkv.",
            key="lm.weights",
            download=DOWNLOADS["lm"],
            device=device,
            dtype=dtype,
        )
    return rwkv


def check_table(table: list[list[int]], n_layer: int, patches: int, *, name: str) -> None:
    """Refuses a scan that is not one permutation of the patches per layer."""
    if len(table) != n_layer:
        raise ValueError(
            f"scan={name} made {len(table)} rows for model.n_layer={n_layer}; a scan makes one per layer"
        )
    for layer, row in enumerate(table):
        if sorted(row) != list(range(patches)):
            raise ValueError(f"scan={name}: layer {layer} is not a permutation of the {patches} patches")


def count(module: torch.nn.Module) -> int:
    """Number of parameters."""
    return sum(p.numel() for p in module.parameters())


def parameters_by_part(model: VisualRWKV) -> dict[str, int]:
    """Parameters of the encoder, the projector and the language model, and their sum."""
    parts = {"encoder": count(model.encoder), "proj": count(model.proj), "rwkv": count(model.rwkv)}
    return {**parts, "total": sum(parts.values())}


def select_trainable(model: VisualRWKV, train: list[str], freeze: list[str], *, stage: str) -> list[str]:
    """Sets requires_grad by parameter-name prefixes and returns the parts that learn.

    A prefix matches whole name components: `rwkv.blocks.1` is not `rwkv.blocks.10`. An encoder without
    pretrained weights (`learned`), or such a member of a fused one, learns in every stage unless `freeze`
    names it.
    """
    names = [n for n, _ in model.named_parameters()]
    parts = encoders(model.encoder).items()
    wanted = [*train, *(name for name, part in parts if getattr(part, "learned", False))]
    for key, prefixes in (("train", train), ("freeze", freeze)):
        for prefix in prefixes:
            if not any(_under(n, prefix) for n in names):
                top = sorted({n.split(".")[0] for n in names})
                raise ValueError(
                    f"stages.{stage}.{key}: no parameter begins with {prefix!r}; the model's parts are "
                    f"{', '.join(top)} (see `python -m toolkit.run --check`)"
                )
    learning: set[str] = set()
    for name, parameter in model.named_parameters():
        on = any(_under(name, p) for p in wanted) and not any(_under(name, p) for p in freeze)
        parameter.requires_grad_(on)
        if on:
            learning.add(name.split(".")[0])
    if not learning:
        where = f"stages.{stage}"
        raise ValueError(f"{where}.freeze={freeze} takes out all of {where}.train={train}; shorten it")
    return sorted(learning)


def _under(name: str, prefix: str) -> bool:
    return name == prefix or name.startswith(prefix + ".")


@contextlib.contextmanager
def on_meta() -> Iterator[None]:
    """Builds without memory: shapes and parameter counts only."""
    with torch.device("meta"):
        yield


def from_dict(cfg: Mapping[str, Any]) -> RunConf:
    """A resolved plain config -> typed settings; component nodes stay plain dictionaries."""
    conf: RunConf = _fill(RunConf, cfg)
    conf.stages = dict(sorted(conf.stages.items(), key=lambda item: item[1].order))
    return conf


def _fill(kind: Any, values: Mapping[str, Any]) -> Any:
    import dataclasses
    import typing

    hints = typing.get_type_hints(kind)
    made: dict[str, Any] = {}
    for name, value in values.items():
        hint = hints[name]
        if dataclasses.is_dataclass(hint):
            made[name] = _fill(hint, value)
        elif typing.get_origin(hint) is dict and dataclasses.is_dataclass(typing.get_args(hint)[1]):
            made[name] = {k: _fill(typing.get_args(hint)[1], v) for k, v in value.items()}
        else:
            made[name] = value
    return kind(**made)
