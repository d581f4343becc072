"""Times whole runs from a cold cache, as a newcomer starts them: `python -m benchmarks.quickstart`.

Each recipe runs in a process of its own with an empty cache; the wall time includes imports,
conversion, features, training and evaluation. Writes benchmarks/results/quickstart.json and
benchmarks/quickstart.md.
"""

from __future__ import annotations

import json
import os
import platform
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from toolkit.rundir import versions

HERE = Path(__file__).parent
RECIPES = ("quickstart", "ablation/scan_2d scale=quick", "blind")


def one(recipe: str) -> dict[str, Any]:
    """Runs a recipe from a cold cache; its result with the wall seconds of the whole process."""
    with tempfile.TemporaryDirectory() as folder:
        command = [
            sys.executable,
            "-m",
            "toolkit.run",
            *f"recipe={recipe}".split(),
            f"paths.runs={folder}/runs",
        ]
        began = time.monotonic()
        subprocess.run(command, check=True, env={**os.environ, "TOOLKIT_CACHE": f"{folder}/cache"})
        wall = time.monotonic() - began
        (path,) = Path(folder, "runs").glob("*/result.json")
        return {**json.loads(path.read_text(encoding="utf-8")), "wall_seconds": round(wall, 1)}


def processor() -> str:
    """The CPU's name, as Linux tells it."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text(encoding="utf-8").splitlines() if info.exists() else []
    return next(
        (line.split(":")[1].strip() for line in lines if line.startswith("model name")), platform.machine()
    )


def markdown(facts: dict[str, Any]) -> str:
    """The table of the results."""
    lines = [
        "# Whole runs from a cold cache",
        "",
        "`python -m benchmarks.quickstart`: imports, conversion, features, training and evaluation",
        "on all 9,673 test questions of easy-VQA. One run each, seed 0.",
        "",
        f"{facts['date']}, {facts['cores']} cores of {facts['processor']}, "
        + ", ".join(f"{k} {facts['versions'][k]}" for k in ("python", "torch", "lightning", "timm")),
        "",
        "Seconds: the whole process, and of these training, features and evaluation.",
        "",
        "| recipe | steps | accuracy (%) | question only (%) | all | training | features | evaluation |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for r in facts["results"]:
        numbers = (r["wall_seconds"], r["train_seconds"], r["feature_seconds"], r["eval_seconds"])
        lines.append(
            f"| {r['recipe']} | {r['steps']:,} | {100 * r['accuracy']:.2f} | {100 * r['blind']:.2f} | "
            + " | ".join(f"{n:.0f}" for n in numbers)
            + " |"
        )
    return "\n".join(lines) + "\n"


def main() -> None:
    facts = {
        "date": time.strftime("%F"),
        "cores": os.cpu_count(),
        "processor": processor(),
        "versions": versions(),
        "results": [one(recipe) for recipe in sys.argv[1:] or RECIPES],
    }
    (HERE / "results").mkdir(exist_ok=True)
    (HERE / "results" / "quickstart.json").write_text(json.dumps(facts, indent=2) + "\n", encoding="utf-8")
    text = markdown(facts)
    (HERE / "quickstart.md").write_text(text, encoding="utf-8")
    print(text)


if __name__ == "__main__":
    main()
