"""`python -m toolkit.run recipe=NAME key=value ...`: composes, checks, runs. torch comes after the checks."""

from __future__ import annotations

import argparse
import logging
import os
import re
import sys
import traceback
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from data.cluster import place
from toolkit import compose, estimate, recipes, register, rules
from toolkit.compose import Job, Request
from toolkit.explain import BadRecipe, fail, guarded
from toolkit.layers import scales
from toolkit.rank_group import RankFailed
from toolkit.rundir import run_id
from toolkit.stopping import INTERRUPTED, stoppable

log = logging.getLogger("toolkit.run")

_INFO = ("all", "config", "defaults", "defaults-tree", "plugins", "searchpath")

_EXAMPLES = """\
examples:
  python -m toolkit.run                                       the quick start
  python -m toolkit.run recipe=ablation/scan_2d               one row of a table
  python -m toolkit.run recipe=ablation/scan seed=0,1,2       the whole table, three seeds
  python -m toolkit.run recipe=ablation/scan hardware.parallel=4   four rows side by side; 0: as many as fit
  python -m toolkit.run recipe=quickstart scan=bi scan.PARAMETER=VALUE stages.tune.lr=1e-3
  python -m toolkit.run -m recurrence=rwkv5,rwkv6             a sweep of your own
  python -m toolkit.run recipe=ablation/scan_2d scale=paper_1b6 --check
  python -m toolkit.run plugins=[my_module] scan=my_scan      a component of your own
  python -m toolkit.listing scan                              what a kind offers
"""


def main(argv: Sequence[str] | None = None) -> int:
    """Returns the exit code: 0 done, 1 a run failed, 2 the request cannot be run, 130 after Ctrl-C.

    Raises SystemExit(75) where SIGTERM or SIGUSR1 stopped it.
    """
    words = list(sys.argv[1:] if argv is None else argv)
    try:
        with stoppable():
            return guarded(lambda: _main(words))
    except KeyboardInterrupt:
        print("interrupted; the same command goes on with what is not done", file=sys.stderr)
        return INTERRUPTED


def _main(words: list[str]) -> int:
    args = _parser().parse_intermixed_args(words)
    if args.help:
        print(usage())
        return 0
    configure_logging()
    request = compose.understand(args.overrides, multirun=args.multirun)
    if args.cfg or args.info:
        return _show(args, request)
    if args.check:
        return _check(request)
    if not request.multirun:
        return _single(request.jobs[0])
    from toolkit import rows

    return rows.sweep(request)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m toolkit.run", add_help=False, allow_abbrev=False)
    parser.add_argument("overrides", nargs="*", metavar="key=value")
    parser.add_argument("-h", "--help", action="store_true")
    parser.add_argument("-m", "--multirun", action="store_true")
    parser.add_argument("--check", action="store_true")
    parser.add_argument("-c", "--cfg", choices=("job", "hydra", "all"))
    parser.add_argument("-i", "--info", nargs="?", const="all", choices=_INFO)
    return parser


def configure_logging() -> None:
    """One plain line per message, on stderr; of several processes of a run the first one tells it all."""
    try:
        rank = place().rank
    except ValueError:  # told where it matters: when a run starts
        rank = 0
    who = f"[rank {rank}] " if rank else ""
    logging.basicConfig(level=logging.WARNING, format=f"%(asctime)s {who}%(message)s", datefmt="%H:%M:%S")
    logging.getLogger("toolkit").setLevel(logging.WARNING if rank else logging.INFO)


def usage() -> str:
    """The text of --help."""
    register.discover()
    kinds = [f"  {kind + '=':<13}{', '.join(sorted(register.components(kind)))}" for kind in register.KINDS]
    lines = [
        "usage: python -m toolkit.run [recipe=NAME] [scale=NAME] [key=value ...] [-m] [--check]",
        "",
        "  -m, --multirun   run every combination of values given as key=first,second",
        "  --check          compose, check and count parameters; needs no data",
        "  --cfg job        print the composed recipe;  --info defaults  print how it was composed",
        "  -h, --help       this text",
        "",
        "what a recipe chooses, and `key=value` may choose instead:",
        *kinds,
        f"  {'scale=':<13}{', '.join(scales())}",
        "",
        "recipes:",
        *(f"  {name:<30}{_headline(files[0])}" for name, files in sorted(recipes.names().items())),
        "",
        _EXAMPLES,
    ]
    return "\n".join(lines).rstrip()


def _headline(file: Path) -> str:
    text = next(iter(recipes.header(file)), "")
    return text if len(text) <= 78 else text[:75].rsplit(" ", 1)[0] + " ..."


def _show(args: argparse.Namespace, request: Request) -> int:
    """Hydra's --cfg and --info."""
    with compose.mounted() as hydra, _root_logger_kept():
        if args.cfg:
            hydra.show_cfg("run", request.fixed, args.cfg, None)
        else:
            hydra.show_info(args.info, "run", request.fixed)
    return 0


@contextmanager
def _root_logger_kept() -> Iterator[None]:
    """Takes back the handler on stdout that Hydra's --info leaves on the root logger of the process."""
    root = logging.getLogger()
    handlers, level = root.handlers[:], root.level
    try:
        yield
    finally:
        root.handlers[:] = handlers
        root.setLevel(level)


def _check(request: Request) -> int:
    """Builds every row on the meta device and prints its sizes."""
    composed = [(job, compose.compose(job, complete=False)) for job in request.jobs]
    absent = [
        problem for job, cfg in composed for problem in rules.absent_weights(cfg, job.plan, empty=False)
    ]
    if absent:
        raise BadRecipe(list(dict.fromkeys(absent)))
    from toolkit.job import check

    for job, cfg in composed:
        try:
            facts = check(cfg)
        except ValueError as error:
            key = re.match(r"[\w.]*", str(error))
            raise fail(rules.where(job.plan, key[0] if key else ""), "", str(error)) from error
        print(compose.row_name(job, request))
        print(sizes(facts))
    return 0


def sizes(facts: dict[str, Any]) -> str:
    """Parameters per part, image tokens and what each stage trains, one line each."""
    parts = facts["parameters"]
    lines = [f"  {name:<10}{count:>16,}" for name, count in parts.items()]
    lines.append(f"  {'image':<10}{facts['image_tokens']:>16,} tokens")
    for stage, count in facts["trainable"].items():
        lines.append(f"  {stage:<10}{count:>16,} learn ({count / max(1, parts['total']):.1%})")
    if facts.get("per_vocabulary_entry"):
        lines.append(
            f"  {'vocabulary':<10}{facts['per_vocabulary_entry']:>16,} more for each word of the data set"
        )
    return "\n".join(lines)


def _single(job: Job) -> int:
    cfg = compose.compose(job)
    try:
        _run(cfg, job.recipe, job.overrides)
    except RankFailed as error:
        print(error, file=sys.stderr)
        return error.code
    except ValueError as error:
        if os.environ.get("TOOLKIT_TRACE") == "1":
            raise
        print(f"{told(error)}\nTOOLKIT_TRACE=1 shows where this was found", file=sys.stderr)
        return 1
    return 0


def _run(cfg: dict[str, Any], recipe: str, argv: list[str]) -> None:
    # Read by OpenMP when torch loads. By default waiting threads spin for long: on a machine that is
    # also busy with something else a training step then took up to four times as long.
    os.environ.setdefault("GOMP_SPINCOUNT", "5000")
    if place().world > 1:
        # Else DDP warns at each start that it looked for unused parameters and found none in the first step.
        os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")
    from toolkit.job import run_job

    mine = run_id(cfg)
    estimate.QUEUE[:] = [row for row in estimate.QUEUE if run_id(row) != mine]
    run_job(cfg, recipe=recipe, argv=argv)


def run_row(cfg: Any) -> None:
    """One row of a sweep, as a launcher calls it, perhaps in a process whose registry is still empty."""
    from hydra.core.hydra_config import HydraConfig
    from omegaconf import OmegaConf

    configure_logging()
    values = OmegaConf.to_container(cfg, resolve=True)
    assert isinstance(values, dict)
    register.discover(values["plugins"])
    conf = HydraConfig.get()
    overrides = [str(text) for text in conf.overrides.task]
    log.info("row %s: %s", int(conf.job.num) + 1, " ".join(overrides))
    _run({str(k): v for k, v in values.items()}, str(conf.runtime.choices["recipe"]), overrides)


def told(error: BaseException) -> str:
    """An error on one line, with the place that raised it."""
    frames = traceback.extract_tb(error.__traceback__)
    place = f" ({Path(frames[-1].filename).name}:{frames[-1].lineno})" if frames else ""
    return f"{type(error).__name__}: {' '.join(str(error).split())}{place}"


if __name__ == "__main__":
    sys.exit(main())
