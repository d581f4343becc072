"""The same samples in the peers' own formats, read in the peers' own ways."""

from __future__ import annotations

import importlib
import json
from collections.abc import Callable, Iterator
from io import BytesIO
from itertools import islice
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from PIL import Image

Members = tuple[bytes, bytes]
"""JPEG and JSON of one sample."""

QUALITY = 72


def photographs(n: int, *, seed: int = 0) -> list[Members]:
    """n crops of colored noise whose spectrum falls as a photograph's, with a short conversation each."""
    draw = np.random.default_rng(seed)
    side = 2048
    rows, columns = np.meshgrid(np.fft.fftfreq(side), np.fft.rfftfreq(side), indexing="ij")
    falling = 1 / np.maximum(np.hypot(rows, columns), 1 / side)
    planes = [np.fft.irfft2(np.fft.rfft2(draw.normal(size=(side, side))) * falling) for _ in range(3)]
    canvas = np.stack([np.clip(128 + 45 * plane / plane.std(), 0, 255) for plane in planes], axis=-1)
    return [_sample(canvas.astype(np.uint8), i, draw) for i in range(n)]


def _sample(canvas: Any, i: int, draw: Any) -> Members:
    row, column = draw.integers(0, len(canvas) - 336, 2)
    out = BytesIO()
    Image.fromarray(canvas[row : row + 336, column : column + 336]).save(out, "JPEG", quality=QUALITY)
    said = [("human", f"<image>\nWhat is at row {row}?"), ("gpt", "A patch of noise. " * 12)]
    turns = [{"from": role, "value": text} for role, text in said]
    return out.getvalue(), json.dumps({"id": f"{i:08d}", "conversations": turns}).encode()


def merged(out: Path, parts: list[Path]) -> Path:
    """The first shard of each folder, together in one."""
    out.mkdir()
    manifest, shards = {}, []
    for k, part in enumerate(parts):
        manifest = json.loads((part / "manifest.json").read_text())
        entry = manifest["shardlist"][0]
        names = {"url": f"shard-{k:06d}.tar", "index": f"shard-{k:06d}.index"}
        for kind, name in names.items():
            (part / entry[kind]).rename(out / name)
        shards.append({**entry, **names})
    (out / "manifest.json").write_text(json.dumps({**manifest, "shardlist": shards}))
    return out


def by_pillow(image: bytes) -> Any:
    with Image.open(BytesIO(image)) as opened:
        return np.asarray(opened.convert("RGB"))


class Peer(Protocol):
    """A reader of another project. name: in tables; package: on the package index."""

    name: str
    package: str

    def raw(self) -> Iterator[Members]: ...

    def decoded(self, n: int) -> Iterator[tuple[Any, Any]]: ...


class WebDataset:
    """The same tars, in their order, one process."""

    name, package = "webdataset", "webdataset"

    def __init__(self, samples: list[Members], urls: list[str], folder: Path) -> None:
        self._wds, self._urls = importlib.import_module("webdataset"), urls

    def _opened(self) -> Any:
        return self._wds.WebDataset(self._urls, shardshuffle=False, empty_check=False)

    def raw(self) -> Iterator[Members]:
        for sample in self._opened():
            yield sample["jpg"], sample["json"]

    def decoded(self, n: int) -> Iterator[tuple[Any, Any]]:
        for sample in islice(self._opened().decode("rgb8"), n):
            yield sample["jpg"], sample["json"]


class LitData:
    """Its own chunks of 64 MB with both members as bytes, in order.

    It gives views into a memory map, of which nothing is read before they are used: they are used here.
    """

    name, package = "litdata", "litdata"

    def __init__(self, samples: list[Members], urls: list[str], folder: Path) -> None:
        self._package = importlib.import_module("litdata")
        streaming = importlib.import_module("litdata.streaming.writer")
        self._dir = folder / "litdata"
        self._dir.mkdir()
        writer = streaming.BinaryWriter(str(self._dir), chunk_bytes=64 << 20)
        for i, (image, text) in enumerate(samples):
            writer[i] = {"jpg": image, "json": text}
        writer.done()
        writer.merge()

    def raw(self) -> Iterator[Members]:
        for sample in self._package.StreamingDataset(str(self._dir), shuffle=False):
            yield bytes(sample["jpg"]), bytes(sample["json"])

    def decoded(self, n: int) -> Iterator[tuple[Any, Any]]:
        for image, text in islice(self.raw(), n):
            yield by_pillow(image), json.loads(text)


class Mosaic:
    """MDS shards with both members as bytes, in order."""

    name, package = "mosaicml-streaming", "mosaicml-streaming"

    def __init__(self, samples: list[Members], urls: list[str], folder: Path) -> None:
        self._package = importlib.import_module("streaming")
        self._dir = str(folder / "mds")
        with self._package.MDSWriter(out=self._dir, columns={"jpg": "bytes", "json": "bytes"}) as out:
            for image, text in samples:
                out.write({"jpg": image, "json": text})
        self._opened = self._package.StreamingDataset(local=self._dir, batch_size=1, shuffle=False)

    def raw(self) -> Iterator[Members]:
        for sample in self._opened:
            yield sample["jpg"], sample["json"]

    def decoded(self, n: int) -> Iterator[tuple[Any, Any]]:
        for image, text in islice(self.raw(), n):
            yield by_pillow(image), json.loads(text)


PEERS: list[Callable[[list[Members], list[str], Path], Peer]] = [WebDataset, LitData, Mosaic]
