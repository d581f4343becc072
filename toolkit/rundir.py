"""A run's directory: its name from what was asked, its lock, its files written whole or not at all."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import platform
import shlex
import subprocess
import time
from collections.abc import Iterator, Mapping
from importlib import metadata
from pathlib import Path
from typing import Any

NOT_IDENTITY = ("paths", "hardware", "title", "report", "plugins", "log", "checkpoint")
"""Keys that say where, how fast or under which name, but not what."""

FROM_SCRATCH = {"weights": ""}
"""A part without weights: as if not asked, so that runs keep the names they had before it could be."""

LATER = {"every": 0, "every_limit": 0}
"""Settings of `eval` that came later, at the values that ask for nothing, for the same reason."""

LATER_IN_STAGES: dict[str, Any] = {"mix": [], "block": 1, "window": 8, "bucket": 0, "tokens": 0}
"""The same of a stage."""

PACKAGES = (
    "torch",
    "lightning",
    "hydra-core",
    "omegaconf",
    "timm",
    "open_clip_torch",
    "webdataset",
    "triton",
)


def run_id(cfg: Mapping[str, Any]) -> str:
    """Ten hex digits that name what was asked: the resolved config without NOT_IDENTITY.

    The precision is kept although it is set under `hardware`: it changes the numbers.
    """
    asked = {k: v for k, v in cfg.items() if k not in NOT_IDENTITY and v != FROM_SCRATCH}
    if "eval" in asked:
        asked["eval"] = {k: v for k, v in asked["eval"].items() if k not in LATER or v != LATER[k]}
    if "stages" in asked:
        asked["stages"] = {name: _without_later(stage) for name, stage in asked["stages"].items()}
    asked["precision"] = cfg["hardware"]["precision"]
    return hashlib.sha256(json.dumps(asked, sort_keys=True).encode()).hexdigest()[:10]


def _without_later(stage: Mapping[str, Any]) -> dict[str, Any]:
    return {k: v for k, v in stage.items() if k not in LATER_IN_STAGES or v != LATER_IN_STAGES[k]}


def run_name(cfg: Mapping[str, Any]) -> str:
    """`<recurrence>-<scan>-<prompt>-s<seed>-<id>`."""
    parts = [cfg[kind]["name"] for kind in ("recurrence", "scan", "prompt")]
    return "-".join([*parts, f"s{cfg['seed']}", run_id(cfg)])


def write_json(path: Path, value: Any) -> None:
    """Writes JSON by rename, so that a reader never sees half a file."""
    write_text(path, json.dumps(value, indent=2, ensure_ascii=False) + "\n")


def write_text(path: Path, text: str) -> None:
    """Writes text to a temporary sibling, flushes it to the disk and renames it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    with temporary.open("w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    temporary.replace(path)


class RunDir:
    """The directory of one run: config.yaml, status.json, metrics.csv, result.json, and two folders."""

    def __init__(self, root: Path, cfg: Mapping[str, Any]) -> None:
        self.path = root / run_name(cfg)
        self.config = self.path / "config.yaml"
        self.result = self.path / "result.json"
        self.status = self.path / "status.json"
        self.weights = self.path / "checkpoints" / "last"
        self.curve = self.path / "accuracy.jsonl"
        self.waits = self.path / "waits.csv"
        self.predictions = self.path / "predictions"

    @classmethod
    def of(cls, cfg: Mapping[str, Any]) -> RunDir:
        """The directory of a config, below its `paths.runs`."""
        return cls(Path(cfg["paths"]["runs"]).expanduser(), cfg)

    def finished(self) -> dict[str, Any] | None:
        """The result of an earlier run of the same config, or None."""
        if not self.result.exists():
            return None
        found: dict[str, Any] = json.loads(self.result.read_text(encoding="utf-8"))
        return found

    def note(self, state: str, **facts: Any) -> None:
        """Merges facts into status.json and sets its state: running, failed or done."""
        before = json.loads(self.status.read_text(encoding="utf-8")) if self.status.exists() else {}
        before.pop("error", None)  # of a run that failed and now goes on
        write_json(self.status, {**before, "state": state, "time": time.strftime("%FT%T%z"), **facts})

    @contextlib.contextmanager
    def lock(self) -> Iterator[None]:
        """Holds the directory for this process; a second one is refused. Freed by the system on any end."""
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            file = (self.path / ".lock").open("w")
        except OSError as error:
            what = f"paths.runs={self.path.parent}: {error.strerror}: {error.filename}"
            raise ValueError(f"{what}; name a folder that can be written") from error
        with file:
            if not _try_lock(file.fileno()):
                raise ValueError(
                    f"{self.path}: another process is working on this run; wait for it, or change the seed"
                )
            yield


def _try_lock(fileno: int) -> bool:
    try:
        import fcntl
    except ImportError:  # Windows has no flock; two processes on one run id are then not kept apart
        return True
    try:
        fcntl.flock(fileno, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def provenance(argv: list[str]) -> dict[str, Any]:
    """What re-creating a run needs to know of code, packages and machine; never environment values."""
    return {
        "command": shlex.join(["python", "-m", "toolkit.run", *argv]),
        "commit": _git("rev-parse", "HEAD"),
        "dirty": bool(_git("status", "--porcelain")),
        "versions": versions(),
        "machine": {"platform": platform.platform(), "cores": os.cpu_count()},
    }


def versions() -> dict[str, str]:
    """Versions of Python, the toolkit and the packages that decide numbers."""
    from toolkit import __version__

    found = {"python": platform.python_version(), "toolkit": __version__}
    for name in PACKAGES:
        with contextlib.suppress(metadata.PackageNotFoundError):
            found[name] = metadata.version(name)
    return found


def _git(*arguments: str) -> str:
    """A git fact of the checkout that the code runs from; empty outside one."""
    here = Path(__file__).resolve().parent.parent
    if not (here / ".git").exists():
        return ""
    done = subprocess.run(["git", *arguments], cwd=here, capture_output=True, text=True, check=False)
    return done.stdout.strip() if done.returncode == 0 else ""
