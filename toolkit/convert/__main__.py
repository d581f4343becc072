"""`python -m toolkit.convert FILE --to FOLDER`, and `--to-pth` back. torch comes after the arguments."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

DESCRIPTION = """\
Converts RWKV-4, 5.2 and 6 models, VisualRWKV v5.x and v6.0 checkpoints and CLIP, SigLIP and DINOv2 towers
(.pth, .pt, .bin, .safetensors) into a folder that recipes name: lm.weights, proj.weights, encoder.weights.
"""

_SHOWN = 4


def main(argv: Sequence[str] | None = None) -> int:
    """Returns the exit code: 0 done, 2 refused."""
    parser = _parser()
    args = parser.parse_args(argv)
    if args.lm_only and not args.to_pth:
        parser.error("--lm-only goes with --to-pth; a folder keeps all that the file holds")
    if args.as_is and args.to_pth:
        parser.error("--as-is goes with --to")
    try:
        return _to_pth(args) if args.to_pth else _convert(args)
    except (OSError, ValueError) as error:
        print(error, file=sys.stderr)
        return 2


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m toolkit.convert",
        description=DESCRIPTION,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("file", type=Path, help="weight file; with --to-pth a converted folder")
    way = parser.add_mutually_exclusive_group(required=True)
    way.add_argument("--to", type=Path, metavar="FOLDER", help="folder to write")
    way.add_argument("--to-pth", type=Path, metavar="FILE", help="write the original's layout instead")
    parser.add_argument("--lm-only", action="store_true", help="with --to-pth: the language model alone")
    parser.add_argument("--as-is", action="store_true", help="keep the tensors of a file that is not known")
    parser.add_argument(
        "--time-limit", type=int, default=0, metavar="S", help="seconds; default 120 and 1 more per 10 MB"
    )
    return parser


def _convert(args: argparse.Namespace) -> int:
    from toolkit.convert.convert import convert
    from toolkit.convert.faults import few

    config = convert(args.file, args.to, seconds=args.time_limit, as_is=args.as_is)
    print(f"{args.to}: {config['found']}")
    left_out = config["source"]["left_out"]
    if left_out["count"]:
        more = " ..." if left_out["count"] > _SHOWN else ""
        print(f"left out {left_out['count']} entries: {few(left_out['names'][:_SHOWN])}{more}")
    for line in usage(args.to, config["parts"]):
        print(f"  {line}")
    return 0


def usage(folder: Path, parts: dict[str, Any]) -> list[str]:
    """What a recipe or a command line says to use the folder."""
    lines = []
    if "rwkv" in parts:
        sizes = parts["rwkv"]
        if sizes["vocabulary"] != "world":
            note = "recipes tokenise with the world vocabulary; this model has another"
            return [f"{note} ({sizes['vocabulary']}, {sizes['vocab_size']:,} tokens)"]
        name = sizes["recurrence"]["name"]
        options = " ".join(f"recurrence.{k}={v}" for k, v in sizes["recurrence"].items() if k != "name")
        lines.append(
            f"lm.weights={folder} model.d_model={sizes['d_model']} model.n_layer={sizes['n_layer']} "
            f"model.vocab=world recurrence={name} {options}"
        )
    if "proj" in parts:
        form = f" projector.form={parts['proj']['form']}" if "form" in parts["proj"] else ""
        lines.append(f"proj.weights={folder} projector={parts['proj']['name']}{form}")
    if "vit" in parts:
        # timm's models take CLIP's tensors too, but the paper's tower is open_clip's.
        library = "open_clip" if "clip" in parts["vit"]["layout"].lower() else "timm"
        lines.append(f"encoder={library} encoder.weights={folder} encoder.model=NAME")
    return lines


def _to_pth(args: argparse.Namespace) -> int:
    from toolkit.convert.convert import to_pth

    count = to_pth(args.file, args.to_pth, lm_only=args.lm_only)
    print(f"{args.to_pth}: {count} tensors")
    return 0


if __name__ == "__main__":
    sys.exit(main())
