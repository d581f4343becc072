"""A sweep, row by row: one after the other by a launcher, or side by side. Imports no torch."""

from __future__ import annotations

import os
import sys
import traceback
from collections.abc import Sequence
from typing import Any

from data.cluster import place
from toolkit import compose, estimate, sweep_layout
from toolkit.compose import Request, row_name
from toolkit.explain import COMMAND_LINE, fail
from toolkit.layers import parse
from toolkit.run import told
from toolkit.rundir import RunDir
from toolkit.sweep import Row, Sweep


def sweep(request: Request) -> int:
    """Runs every row, also after one failed, and tells at the end which did."""
    try:
        found = place()
    except ValueError as wrong:
        raise fail("environment", "", str(wrong)) from wrong
    if found.world > 1:
        what = f"several rows were chosen, and {found.launcher} started {found.world} processes for one run"
        fix = "choose one row, or start them in one process (hardware.parallel=0 uses every GPU of a node)"
        raise fail(COMMAND_LINE, "recipe", what, fix=fix)
    # A row that cannot run is found before the first one starts.
    composed = [compose.compose(job) for job in request.jobs]
    parallel = {cfg["hardware"]["parallel"] for cfg in composed}
    failures = _in_turn(request, composed) if parallel == {1} else _side_by_side(request, composed)
    done = len(request.jobs) - len(failures)
    print(
        f"{done} of {len(request.jobs)} rows done" + (f", {len(failures)} failed:" if failures else ""),
        file=sys.stderr,
    )
    for name, error in failures:
        print(f"  {name}: {error}", file=sys.stderr)
    return 1 if failures else 0


def _in_turn(request: Request, composed: Sequence[dict[str, Any]]) -> list[tuple[str, str]]:
    """Rows one after the other, by the launcher; (row, error) of those that failed."""
    estimate.QUEUE[:] = [cfg for cfg in composed if RunDir.of(cfg).finished() is None]
    try:
        outcomes = _launch(request)
    finally:
        estimate.QUEUE.clear()
    failures = []
    for job, outcome in zip(request.jobs, outcomes, strict=True):
        if outcome.status.name == "FAILED":
            failures.append((row_name(job, request), told(outcome._return_value)))
            if os.environ.get("TOOLKIT_TRACE") == "1":
                traceback.print_exception(outcome._return_value)
    return failures


def _side_by_side(request: Request, composed: Sequence[dict[str, Any]]) -> list[tuple[str, str]]:
    """Rows in processes of this machine; (row, error) of those that failed."""
    named = ("hydra/launcher", "hydra.launcher")
    launcher = next((g for g in parse(request.arguments) if g.key.startswith(named)), None)
    if launcher is not None:
        what = "a launcher of Hydra's and hardware.parallel both say how rows are started"
        raise fail(launcher.place, launcher.key, what, fix="take one of them out")
    for key, value in (("parallel", 0), ("lanes", 4)):
        if len({cfg["hardware"][key] for cfg in composed}) > 1:
            what = "differs between the rows of one sweep"
            raise fail(COMMAND_LINE, f"hardware.{key}", what, fix=f"give it once: hardware.{key}={value}")
    rows = [
        Row(i, row_name(job, request), cfg, job.recipe, job.overrides)
        for i, (job, cfg) in enumerate(zip(request.jobs, composed, strict=True), 1)
    ]
    hardware = composed[0]["hardware"]
    plan = sweep_layout.layout(hardware, len(rows))
    if plan.lanes < hardware["lanes"]:
        _show(f"no GPU is used, so hardware.lanes={hardware['lanes']} counts as 1: each row has a process")
    errors = Sweep(rows, plan, show=_show).run()
    return [(row.label, errors[row.number]) for row in rows if row.number in errors]


def _show(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


def _launch(request: Request) -> Sequence[Any]:
    """Hands the rows to the chosen launcher (in this process, if none is)."""
    from hydra.core.plugins import Plugins
    from hydra.types import HydraContext, RunMode

    # The task must be importable by name in a launcher's worker, which `__main__` is not.
    from toolkit.run import run_row as task

    with compose.mounted() as hydra:
        cfg = hydra.compose_config(
            "run", request.fixed, run_mode=RunMode.MULTIRUN, with_log_configuration=False
        )
        from hydra._internal.callbacks import Callbacks

        context = HydraContext(config_loader=hydra.config_loader, callbacks=Callbacks(cfg))
        launcher = Plugins.instance().instantiate_launcher(context, task, cfg)
        return launcher.launch([job.overrides for job in request.jobs], 0)
