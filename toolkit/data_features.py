"""`python -m toolkit.data features [FOLDER] [key=value ...] --out FOLDER`: an encoder's features."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from toolkit import compose, register
from toolkit.data_bar import Bar
from toolkit.explain import COMMAND_LINE, fail

if TYPE_CHECKING:
    from toolkit.contracts import ImageFeatures


def main(words: list[str]) -> int:
    """Returns the exit code; raises BadRecipe or ValueError for a request that cannot be run."""
    parser = argparse.ArgumentParser(
        prog="python -m toolkit.data features", description=__doc__, allow_abbrev=False
    )
    parser.add_argument(
        "overrides", nargs="*", metavar="FOLDER|key=value", help="shards, or a recipe's settings"
    )
    parser.add_argument(
        "--out", type=Path, required=True, metavar="FOLDER", help="a folder per split goes here"
    )
    parser.add_argument(
        "--whole", action="store_true", help="the encoder's whole grid, though the projector pools"
    )
    parser.add_argument("--batch", type=int, default=64, metavar="N", help="pictures encoded at once")
    args = parser.parse_intermixed_args(words)
    from toolkit.data_inspect import settings

    request = compose.understand([word for given in args.overrides for word in settings(given)])
    if request.multirun:
        what = "a table was chosen; its rows may have several encoders"
        raise fail(COMMAND_LINE, "recipe", what, fix="leave recipe= out, or name one row")
    made = convert(
        compose.compose(request.jobs[0], complete=True), args.out, pool=not args.whole, batch=args.batch
    )
    keys = register.components("data")["shards"].parameters
    usable = " ".join(f"data.{split}={folder}" for split, folder in made.items() if split in keys)
    print(f"train on them with: data=shards {usable}")
    return 0


def convert(config: Mapping[str, Any], out: Path, *, pool: bool = True, batch: int = 64) -> dict[str, Path]:
    """Split -> folder with the features of its pictures, by the encoder that `config` names.

    pool: average the grid first as the config's projector does, where it does. Raises ValueError for an
    encoder that learns.
    """
    from data.feature_shards import write_features
    from data.reader import ShardReader
    from toolkit.build import from_dict, on_meta
    from toolkit.corpus import cache_folder
    from toolkit.data_stored import identity
    from toolkit.train import device_of

    conf = from_dict(config)
    encoder = register.bind("encoder", conf.encoder)().to(device_of(conf.hardware)).eval()
    if getattr(encoder, "learned", False):
        raise ValueError(
            f"encoder={conf.encoder['name']} learns from scratch, so it has no features to keep; choose a "
            "frozen one"
        )
    grid = encoder.grid
    if pool:
        with on_meta():
            grid = register.bind("projector", conf.projector)(encoder.d_out, 8, encoder.grid).grid
    sizes = {"grid": list(grid), "n_extra": encoder.n_extra, "width": encoder.d_out}
    draft = conf.features.draft
    facts = {**identity(encoder, conf.encoder), **sizes, "draft": draft}
    encode = _encode(encoder, grid, device_of(conf.hardware))
    made = {}
    folders = register.bind("data", conf.data)(cache_folder(conf))
    streams = [split for split, folder in folders.items() if not isinstance(folder, Path)]
    if streams:
        raise ValueError(
            f"split {streams[0]!r} is streamed, and features are kept by the number of a picture; write "
            "python -m toolkit.data index TARS --out FOLDER, then python -m toolkit.data features FOLDER"
        )
    for split, folder in folders.items():
        with Bar(f"features {split}") as bar:
            made[split] = write_features(
                ShardReader(folder),
                out / split,
                encode,
                encoder.transform(),
                facts=facts,
                batch=batch,
                draft=draft,
                progress=bar,
            )
        print(
            f"{made[split]}: features on a grid of {grid[0]} x {grid[1]} + {encoder.n_extra}, width "
            f"{encoder.d_out}"
        )
    return made


def _encode(encoder: Any, grid: tuple[int, int], device: Any) -> Callable[[Any], ImageFeatures]:
    from data.feature_shards import pooled
    from toolkit.contracts import mapped

    def encode(pixels: Any) -> ImageFeatures:
        return pooled(encoder(mapped(pixels, lambda tensor: tensor.to(device))), grid)

    return encode
