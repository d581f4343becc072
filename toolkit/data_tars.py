"""`python -m toolkit.data index|verify`: tars here or behind a URL, read from end to end."""

from __future__ import annotations

import argparse
import os
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from toolkit.data import EXIT_FAULTS, count, parser, printed, told
from toolkit.data_bar import Bar

if TYPE_CHECKING:
    from data.remote import Origin


def _tars(given: Sequence[str]) -> list[Path]:
    """The tars that paths name; a folder stands for those in it. ValueError for anything else."""
    found: list[Path] = []
    for word in given:
        path = Path(word)
        if path.is_dir():
            found += sorted(p for p in path.iterdir() if p.suffix == ".tar")
        elif path.suffix == ".tar" and path.is_file():
            found.append(path)
        else:
            raise ValueError(f"{word!r} is neither a folder nor a .tar file on this machine")
    return found


def _remote_options(asked: argparse.ArgumentParser) -> None:
    remote = asked.add_argument_group("behind a URL")
    remote.add_argument("--anonymous", action="store_true", help="read without credentials")
    remote.add_argument("--endpoint", default="", metavar="URL", help="of an S3-compatible store")
    remote.add_argument("--retries", type=count, metavar="N", help="after a failed read; default 5")


def _origin(url: str, args: argparse.Namespace) -> Origin:
    from data.remote import Origin

    cache = os.environ.get("TOOLKIT_CACHE") or "~/.cache/visualrwkv-toolkit"
    retries = 5 if args.retries is None else args.retries
    return Origin(url, f"{cache}/blocks", retries=retries, anonymous=args.anonymous, endpoint=args.endpoint)


def _refuse_remote_options(what: str, args: argparse.Namespace) -> None:
    given = {
        "--anonymous": args.anonymous,
        "--endpoint": args.endpoint,
        "--retries": args.retries is not None,
    }
    named = next((option for option, value in given.items() if value), None)
    if named is not None:
        raise ValueError(f"{named} is for URLs, and {what} is none; leave it out")


def _found(args: argparse.Namespace) -> tuple[list[Path], Path, Origin | None]:
    """(tars, where the index goes, where the tars lie if not here)."""
    urls = [word for word in args.shards if "://" in word]
    if urls:
        from data.fetched import tars_at

        if len(urls) < len(args.shards):
            raise ValueError("some tars are behind URLs and some are here; index them one by one")
        if args.out is None:
            raise ValueError(f"{urls[0]} is behind a URL; say with --out FOLDER where the index goes")
        origin, names = tars_at(urls, _origin(urls[0], args))
        return [Path(name) for name in names], args.out, origin
    _refuse_remote_options(args.shards[0], args)
    shards = _tars(args.shards)
    folders = {path.resolve().parent for path in shards}
    if args.out is None and len(folders) > 1:
        raise ValueError(f"the tars lie in {len(folders)} folders; say with --out where the index goes")
    return shards, args.out or (shards[0].parent if shards else Path()), None


def index(words: list[str]) -> int:
    """The action `index`; returns the exit code."""
    asked = parser("index", "Makes tars that others wrote readable as they are.")
    asked.add_argument("shards", nargs="+", metavar="TAR|FOLDER|URL", help="in a URL also {000..123} and *")
    asked.add_argument(
        "--out", type=Path, metavar="FOLDER", help="for index and manifest; default: beside the tars"
    )
    asked.add_argument(
        "--text", default="auto", metavar="auto|json|txt|json:FIELD", help="where the text lies"
    )
    asked.add_argument("--ask", default="Describe the image briefly.", help="question that a caption answers")
    asked.add_argument("--decode", action="store_true", help="decode every picture, not only its header")
    asked.add_argument("--allow-rejects", type=count, default=0, metavar="N", help="faulty samples left out")
    _remote_options(asked)
    args = asked.parse_args(words)
    from data.foreign import index_shards
    from data.members import GIVEN_UP, MAX_FAULTS

    shards, out, origin = _found(args)
    with Bar("index") as bar:
        faults = index_shards(
            shards,
            out,
            text=args.text,
            ask=args.ask,
            full=args.decode,
            allow=args.allow_rejects,
            origin=origin,
            progress=bar,
        )
    printed(faults)
    if any(fault.cause == GIVEN_UP for fault in faults):
        print(f"more than {MAX_FAULTS:,} faults in a shard; nothing was written: repair it or leave it out")
        return EXIT_FAULTS
    if len(faults) > args.allow_rejects:
        print(
            f"{len(faults):,} faults; nothing was written. Leave them out with --allow-rejects {len(faults)}"
        )
        return EXIT_FAULTS
    told(out)
    return 0


def verify(words: list[str]) -> int:
    """The action `verify`; returns the exit code."""
    asked = parser("verify", "Every fault of a folder of shards, by shard, key, field and byte.")
    asked.add_argument("folder", metavar="FOLDER|URL")
    asked.add_argument("--decode", action="store_true", help="decode every picture, not only its header")
    asked.add_argument("--report", type=Path, metavar="FILE", help="all faults as JSON lines")
    _remote_options(asked)
    args = asked.parse_args(words)
    if "://" not in args.folder:
        _refuse_remote_options(args.folder, args)
        return _verified(Path(args.folder), args.folder, args)
    from data.mirror import mirror

    with tempfile.TemporaryDirectory(prefix="toolkit-data-") as indexes:
        return _verified(mirror(_origin(args.folder, args), Path(indexes)), args.folder, args)


def _verified(folder: Path, name: str, args: argparse.Namespace) -> int:
    from data.records import dump_json
    from data.verify import verify as faults_of

    with Bar("verify") as bar:
        faults = list(faults_of(folder, full=args.decode, progress=bar))
    if args.report is not None:
        args.report.write_bytes(b"".join(dump_json(fault.row()) + b"\n" for fault in faults))
    printed(faults)
    if faults:
        print(f"{name}: {len(faults):,} faults")
        return EXIT_FAULTS
    told(folder, "; no faults", name=name)
    return 0
