"""`python -m toolkit.data convert|index|verify|inspect|export|features`: data sets on disk."""

from __future__ import annotations

import argparse
import importlib
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from toolkit.data_bar import Bar
from toolkit.explain import COMMAND_LINE, BadRecipe, closest, fail, guarded

if TYPE_CHECKING:
    from data.faults import Fault

USAGE = """\
python -m toolkit.data ACTION ...   (ACTION --help says more)

  convert   LLaVA JSON and a folder of pictures -> shards with an index and a manifest
  index     tars of others (webdataset, img2dataset) as they are, here or behind a URL -> an index, a manifest
  verify    every fault of a folder of shards, here or behind a URL, by shard, key, field and byte
  inspect   what a data source holds: counts, floors, samples as the model reads them, a contact sheet
  export    shards -> LLaVA JSON and pictures, with the bytes they had
  features  a frozen encoder's features of every picture -> shards that train in place of the pictures
            (also: convert --features)

Exit codes: 0 done, 2 the request cannot be run, 3 the data have faults."""

EXIT_FAULTS = 3
_ELSEWHERE = {
    "index": "toolkit.data_tars:index",
    "verify": "toolkit.data_tars:verify",
    "inspect": "toolkit.data_inspect:main",
    "features": "toolkit.data_features:main",
}
_SHOWN = 20
"""Faults printed; all are in the report."""


def main(argv: Sequence[str] | None = None) -> int:
    """Returns the exit code, see USAGE."""
    words = list(sys.argv[1:] if argv is None else argv)
    return guarded(lambda: _main(words))


def _main(words: list[str]) -> int:
    if not words or words[0] in ("-h", "--help"):
        print(USAGE)
        return 0
    action, rest = words[0], words[1:]
    if action == "convert" and "--features" in rest:
        action, rest = "features", [word for word in rest if word != "--features"]
    here = {"convert": _convert, "export": _export}
    known = [*here, *_ELSEWHERE]
    if action not in known:
        what = f"no action {action!r}; known: {', '.join(known)}"
        raise fail(
            COMMAND_LINE, "", what, matches=closest(action, known), fix="python -m toolkit.data --help"
        )
    try:
        if action in here:
            return here[action](rest)
        module, _, function = _ELSEWHERE[action].partition(":")
        done: int = getattr(importlib.import_module(module), function)(rest)
        return done
    except BadRecipe:
        raise
    except (OSError, ValueError) as error:
        if os.environ.get("TOOLKIT_TRACE") == "1":
            raise
        raise fail(f"toolkit.data {action}", "", str(error)) from error


def parser(action: str, description: str) -> argparse.ArgumentParser:
    """An argument parser of one action."""
    return argparse.ArgumentParser(
        prog=f"python -m toolkit.data {action}", description=description, allow_abbrev=False
    )


def count(text: str) -> int:
    """A whole number that is not negative."""
    value = int(text)
    if value < 0:
        raise ValueError
    return value


def _convert(words: list[str]) -> int:
    asked = parser("convert", "LLaVA JSON, or one JSON a line, and a folder of pictures -> shards.")
    asked.add_argument("--json", type=Path, required=True, metavar="FILE")
    asked.add_argument(
        "--images", type=Path, required=True, metavar="FOLDER", help="where picture paths begin"
    )
    asked.add_argument("--out", type=Path, required=True, metavar="FOLDER")
    asked.add_argument(
        "--shard-mb", type=count, default=256, metavar="N", help="size of a shard; default 256"
    )
    asked.add_argument(
        "--allow-rejects", type=count, default=0, metavar="N", help="unusable records left out"
    )
    asked.add_argument("--repeated-ids", choices=("refuse", "keep"), default="refuse")
    asked.add_argument("--decode", action="store_true", help="decode every picture, not only its header")
    args = asked.parse_args(words)
    from data.sources.from_llava import Checks, TooManyRejects, convert

    checks = Checks(args.images, args.allow_rejects, args.repeated_ids == "keep", args.decode, several=True)
    try:
        with Bar("convert") as bar:
            fresh = convert(args.json, args.out, checks, shard_bytes=args.shard_mb << 20, progress=bar)
    except TooManyRejects as error:
        for reject in error.rejects[:_SHOWN]:
            print(f"{reject['place']} (id {reject['id']}): {reject['reason']}")
        _more(len(error.rejects))
        print(f"{len(error.rejects):,} records are unusable, listed in {error.file}; nothing was written.")
        print(f"repair them, or leave them out with --allow-rejects {len(error.rejects)}")
        return EXIT_FAULTS
    left_out = told(args.out, "" if fresh else " (converted before)")
    if left_out > args.allow_rejects:
        print(f"records were left out when it was converted; that is allowed with --allow-rejects {left_out}")
        return EXIT_FAULTS
    return 0


def told(folder: Path, note: str = "", *, name: str = "") -> int:
    """Prints what a folder of shards, called `name`, holds; returns how many samples were left out of it."""
    from data.index import manifest_hash, read_manifest

    manifest = read_manifest(folder)
    totals, left_out = manifest["totals"], int(manifest["about"].get("rejects", 0))
    print(
        f"{name or folder}: {totals['nsamples']:,} samples, {totals['images']:,} pictures in "
        f"{totals['shards']:,} shards, {totals['filesize'] / 1e6:,.1f} MB, {left_out:,} left out{note}"
    )
    print(f"manifest hash {manifest_hash(manifest)}")
    return left_out


def printed(faults: Sequence[Fault]) -> None:
    """Prints the first faults and how many more there are."""
    for fault in faults[:_SHOWN]:
        print(fault)
    _more(len(faults))


def _more(n: int) -> None:
    if n > _SHOWN:
        print(f"... and {n - _SHOWN:,} more")


def _export(words: list[str]) -> int:
    asked = parser("export", "Shards -> data.json in LLaVA's form and images/, with the bytes they had.")
    asked.add_argument("folder", type=Path, metavar="FOLDER")
    asked.add_argument("--out", type=Path, required=True, metavar="FOLDER")
    args = asked.parse_args(words)
    from data.export import export

    with Bar("export") as bar:
        count = export(args.folder, args.out, progress=bar)
    print(f"{args.out / 'data.json'}: {count:,} records, pictures in {args.out / 'images'}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
