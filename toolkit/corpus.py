"""The data of a run: shards of each split, the tokenizer, a frozen encoder's features."""

from __future__ import annotations

import hashlib
import json
import logging
import os
from collections.abc import Iterable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from data.features import FeatureTable, build_features, estimate_bytes
from data.policy import readable
from data.reader import ShardReader
from data.records import Different
from data.streamed import Streamed
from data.tokens import CompactTokenizer, Tokenizer, WorldTokenizer
from toolkit import kept, register
from toolkit.contracts import DataSource, ImageFeatures, Prompt, Text, Unindexed, mapped
from toolkit.data_stored import stored
from toolkit.explain import closest
from toolkit.model import VisualRWKV
from toolkit.progress import Ticker
from toolkit.schema import RunConf, StageConf

log = logging.getLogger("toolkit.data")

_TURN, _EXAMPLE = 250, 500  # bytes that an object of each kind takes, its text apart


def cache_folder(conf: RunConf) -> Path:
    """Where converted data and features are kept."""
    chosen = conf.paths.cache or os.environ.get("TOOLKIT_CACHE") or "~/.cache/visualrwkv-toolkit"
    folder = Path(chosen).expanduser()
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        what = f"paths.cache={folder}: {error.strerror}"
        raise ValueError(f"{what}; name a folder that can be written") from error
    return folder


def _bytes(found: Different) -> int:
    """About what the dialogs take in memory."""
    turns = [turn for example in found.examples for turn in example.turns]
    return sum(len(turn.text) for turn in turns) + _TURN * len(turns) + _EXAMPLE * len(found.examples)


class Corpus:
    """Readers, prompts and tokenizer of every split that the run uses."""

    def __init__(self, conf: RunConf) -> None:
        self.conf = conf
        self.cache = cache_folder(conf)
        folders = register.bind("data", conf.data)(self.cache)
        found = {split: open_split(folders, split, key) for key, split in wanted(conf)}
        self.streams = {
            split: replace(tars, seed=conf.seed)
            for split, tars in found.items()
            if isinstance(tars, Streamed)
        }
        for split in self.streams:
            refuse_stream(conf, split)
        self.readers = {
            split: ShardReader(folder, whole=self.policy(split) == "strict")
            for split, folder in found.items()
            if isinstance(folder, Path)
        }
        self.prompts = {name: prompt_of(conf, stage.prompt) for name, stage in conf.stages.items()}
        self.prompt = prompt_of(conf, "")
        self.tokenizer = self._tokenizer()

    def _tokenizer(self) -> Tokenizer:
        """The whole world vocabulary, or the ids that occur in the run's splits, renumbered."""
        world = kept.once("world vocabulary", WorldTokenizer)
        if self.conf.model.vocab == "world":
            return world
        used = self._prompted()
        key = ("vocabulary", *((self.identity(split), kept.named(prompt)) for split, prompt in used))
        return kept.once(key, lambda: CompactTokenizer.collect(self._texts(used), world))

    def _prompted(self) -> list[tuple[str, Prompt]]:
        """Every split that is read, with the prompt that its dialogs are put into."""
        stages = self.conf.stages.items()
        used = [(split, self.prompts[n]) for n, s in stages for split in (shares(n, s) or [s.split])]
        asked = [split for key, split in wanted(self.conf) if key.startswith("eval.")]
        return [*used, *((split, self.prompt) for split in asked)]

    def _texts(self, used: Iterable[tuple[str, Prompt]]) -> Iterable[str]:
        for split, prompt in used:
            for example in self.different(split).examples:
                yield from (s.text for s in prompt(example.turns) if isinstance(s, Text))

    def identity(self, split: str) -> tuple[str, str]:
        """What tells the texts of a split that is read by an index from others: (manifest hash, policy)."""
        return self.readers[split].manifest_hash, self.policy(split)

    @property
    def hashes(self) -> dict[str, str | None]:
        """Split -> what names its data; None for one that is streamed, whose data nothing names."""
        return {
            **{split: reader.manifest_hash for split, reader in self.readers.items()},
            **dict.fromkeys(self.streams),
        }

    def different(self, split: str) -> Different:
        """The dialogs that can be read of a split that is read by an index, without repeats."""

        def read() -> Different:
            return Different.of(readable(self.readers[split], policy=self.policy(split)))

        return kept.once(("dialogs", self.identity(split)), read, size=_bytes)

    def policy(self, split: str) -> str:
        """`faults` for splits that only train; what is scored must be read whole."""
        scored = {name for key, name in wanted(self.conf) if key.startswith("eval.")}
        return "strict" if split in scored else self.conf.faults

    def features(self, model: VisualRWKV, device: torch.device) -> dict[str, FeatureTable]:
        """Features of every picture of every split, once; empty if they are to be computed each time."""
        made = stored(self.conf, model, self.readers)
        if made and self.streams:
            raise ValueError(
                f"split {next(iter(made))!r} holds features, and split {next(iter(self.streams))!r} streams "
                "pictures; name a folder of pictures for both"
            )
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
        if self.streams:
            if wanted == "auto":
                log.info(
                    "features are computed in each step: a stream's pictures have no number to keep them by"
                )
            return "off"
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


def refuse_stream(conf: RunConf, split: str) -> None:
    """ValueError naming the first setting that asks of a streamed split what only an index gives."""
    for key, name in wanted(conf):
        if name == split and key.startswith("eval."):
            raise ValueError(
                f"{key}={split}: this split is streamed, and what is scored is read by an index, each sample "
                f"once; write python -m toolkit.data index TARS --out FOLDER, data.test=FOLDER and {key}=test"
            )
        if name == split and key.endswith(".mix"):
            raise ValueError(
                f"{key}: split {split!r} is streamed, and shares need splits that are read by an index; "
                f"write {key}=[] and join the tars of both by :: in data.{split}"
            )
    if conf.model.vocab == "dataset":
        raise ValueError(
            f"model.vocab=dataset numbers the tokens of all texts before training, and split {split!r} is "
            "streamed; write model.vocab=world"
        )
    if conf.features.cache in ("memory", "disk"):
        raise ValueError(
            f"features.cache={conf.features.cache} keeps features by the number of a picture, and split "
            f"{split!r} is streamed; write features.cache=off"
        )
    asked = {"block": 1, "window": 8, "bucket": 0, "tokens": 0}
    for name, stage in conf.stages.items():
        for key, default in asked.items():
            if stage.split == split and getattr(stage, key, default) != default:
                raise ValueError(
                    f"stages.{name}.{key}={getattr(stage, key)} is an order by index, and split {split!r} is "
                    f"streamed through a buffer (data.shuffle); write stages.{name}.{key}={default}"
                )


def shares(name: str, stage: StageConf) -> dict[str, float]:
    """Split -> share of a stage's mixture, empty if it reads `split` alone; ValueError naming the key."""
    found: dict[str, float] = {}
    for text in stage.mix:
        split, _, share = text.partition(":")
        if split.strip() in found:
            raise ValueError(f"stages.{name}.mix: {split.strip()} comes twice; write it once, with one share")
        try:
            found[split.strip()] = float(share)
        except ValueError as error:
            raise ValueError(
                f"stages.{name}.mix: {text!r} is no split with its share; write {split.strip()}:0.5"
            ) from error
    # Floors of the answers are measured on it.
    if found and stage.split not in found:
        near = closest(stage.split, found)
        fix = f"{stage.split} for {near[0]}" if near else f"stages.{name}.split={next(iter(found))}"
        raise ValueError(
            f"stages.{name}.mix has the splits {', '.join(found)}, and stages.{name}.split={stage.split} is "
            f"none of them; write {fix}"
        )
    return found


def open_split(folders: DataSource, split: str, key: str) -> Path | Unindexed:
    """The folder or the tars of a split; ValueError with the near names if the source has no such split."""
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
