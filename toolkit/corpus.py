"""The data of a run: shards of each split, the tokenizer, a frozen encoder's features."""

from __future__ import annotations

import hashlib
import json
import logging
import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch

from data.features import FeatureTable, build_features, estimate_bytes
from data.policy import readable
from data.reader import ShardReader
from data.tokens import CompactTokenizer, Tokenizer, WorldTokenizer
from toolkit import register
from toolkit.contracts import ImageFeatures, Prompt, Text, mapped
from toolkit.data_stored import stored
from toolkit.explain import closest
from toolkit.model import VisualRWKV
from toolkit.progress import Ticker
from toolkit.schema import RunConf, StageConf

log = logging.getLogger("toolkit.data")


def cache_folder(conf: RunConf) -> Path:
    """Where converted data and features are kept."""
    chosen = conf.paths.cache or os.environ.get("TOOLKIT_CACHE") or "~/.cache/visualrwkv-toolkit"
    return Path(chosen).expanduser()


class Corpus:
    """Readers, prompts and tokenizer of every split that the run uses."""

    def __init__(self, conf: RunConf) -> None:
        self.conf = conf
        self.cache = cache_folder(conf)
        folders = register.bind("data", conf.data)(self.cache)
        self.readers = {
            split: ShardReader(open_split(folders, split, key), whole=self.policy(split) == "strict")
            for key, split in wanted(conf)
        }
        self.prompts = {name: prompt_of(conf, stage.prompt) for name, stage in conf.stages.items()}
        self.prompt = prompt_of(conf, "")
        self.tokenizer = self._tokenizer()

    def _tokenizer(self) -> Tokenizer:
        """The whole world vocabulary, or the ids that occur in the run's splits, renumbered."""
        if self.conf.model.vocab == "world":
            return WorldTokenizer()
        return CompactTokenizer.collect(self._texts(), WorldTokenizer())

    def _texts(self) -> Iterable[str]:
        stages = self.conf.stages.items()
        used = [(split, self.prompts[n]) for n, s in stages for split in (shares(n, s) or [s.split])]
        asked = [split for key, split in wanted(self.conf) if key.startswith("eval.")]
        for split, prompt in [*used, *((split, self.prompt) for split in asked)]:
            for example in readable(self.readers[split], policy=self.policy(split)):
                yield from (s.text for s in prompt(example.turns) if isinstance(s, Text))

    def policy(self, split: str) -> str:
        """`faults` for splits that only train; what is scored must be read whole."""
        scored = {name for key, name in wanted(self.conf) if key.startswith("eval.")}
        return "strict" if split in scored else self.conf.faults

    def features(self, model: VisualRWKV, device: torch.device) -> dict[str, FeatureTable]:
        """Features of every picture of every split, once; empty if they are to be computed each time."""
        made = stored(self.conf, model, self.readers)
        where: Any = "off" if len(made) == len(self.readers) else self._where(model)
        if where == "off":
            return self._complete(made)
        model.eval()
        transform, identity = model.encoder.transform(), encoder_id(model, self.conf.encoder)

        def encode(pixels: Any) -> ImageFeatures:
            return model.encode(mapped(pixels, lambda tensor: tensor.to(device)))

        return made | {
            split: build_features(
                reader,
                encode,
                transform,
                where=where,
                folder=self.cache / "features",
                encoder_id=identity,
                tolerant=self.policy(split) == "tolerant",
                draft=self.conf.features.draft,
                progress=Ticker(f"features {split}", len(reader)),
            )
            for split, reader in self.readers.items()
            if split not in made
        }

    def _complete(self, made: dict[str, FeatureTable]) -> dict[str, FeatureTable]:
        """Tables of every split or of none; ValueError for pictures beside features that nothing encodes."""
        pictures = [split for split in self.readers if split not in made]
        if made and pictures:
            raise ValueError(
                f"split {next(iter(made))!r} holds features and split {pictures[0]!r} pictures; convert both "
                "(python -m toolkit.data features), or write features.cache=disk"
            )
        return made

    def _where(self, model: VisualRWKV) -> Any:
        """ "memory", "disk" or "off", as `features.cache` says; "auto" keeps what fits the limit on disk."""
        wanted = self.conf.features.cache
        learns = any(p.requires_grad for p in model.encoder.parameters())
        if wanted in ("memory", "disk") and learns:
            raise ValueError(
                f"features.cache={wanted} keeps features of a frozen encoder, but "
                f"encoder={self.conf.encoder['name']} learns in this run; write features.cache=off"
            )
        if wanted != "auto":
            return wanted
        if learns:
            return "off"
        encoder = model.encoder
        size = sum(
            estimate_bytes(len(r), encoder.grid, encoder.n_extra, encoder.d_out)
            for r in self.readers.values()
        )
        if size > self.conf.features.limit_mb << 20:
            log.info(
                "features are computed in each step: all of them would take %d MiB, more than "
                "features.limit_mb=%d",
                size >> 20,
                self.conf.features.limit_mb,
            )
            return "off"
        return "disk"


def wanted(conf: RunConf) -> list[tuple[str, str]]:
    """(config key, split) of every split that training and evaluation read."""
    return [
        *((f"stages.{n}.split", s.split) for n, s in conf.stages.items()),
        *((f"stages.{n}.mix", split) for n, s in conf.stages.items() for split in shares(n, s)),
        ("eval.split", conf.eval.split),
        *([("eval.choose", conf.eval.choose)] if conf.eval.choose else []),
    ]


def shares(name: str, stage: StageConf) -> dict[str, float]:
    """Split -> share of a stage's mixture, empty if it reads `split` alone; ValueError naming the key."""
    found: dict[str, float] = {}
    for text in stage.mix:
        split, _, share = text.partition(":")
        try:
            found[split.strip()] = float(share)
        except ValueError as error:
            raise ValueError(
                f"stages.{name}.mix: {text!r} is no split with its share; write {split.strip()}:0.5"
            ) from error
    # Floors of the answers are measured on it.
    if found and stage.split not in found:
        raise ValueError(
            f"stages.{name}.mix has the splits {', '.join(found)}, and stages.{name}.split={stage.split} is "
            f"none of them; write stages.{name}.split={next(iter(found))}"
        )
    return found


def open_split(folders: Mapping[str, Path], split: str, key: str) -> Path:
    """The folder of a split; ValueError with the near names if the source has none of that name."""
    if split not in folders:
        near = closest(split, folders)
        hint = f"; did you mean {near[0]}?" if near else ""
        raise ValueError(f"{key}={split}: this data source has the splits {', '.join(folders)}{hint}")
    return folders[split]


def prompt_of(conf: RunConf, name: str) -> Prompt:
    """The recipe's prompt, or the one a stage names (with that prompt's default options)."""
    return register.bind("prompt", {"name": name} if name else conf.prompt)


def encoder_id(model: VisualRWKV, node: Mapping[str, Any]) -> str:
    """Names the features of an encoder: its options and its very weights."""
    digest = hashlib.sha256(json.dumps(node, sort_keys=True).encode())
    for name, tensor in model.encoder.state_dict().items():
        digest.update(name.encode())
        digest.update(tensor.detach().cpu().reshape(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()[:16]
