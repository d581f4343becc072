"""What names a run, and that two processes never share its directory."""

from __future__ import annotations

import json
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from toolkit.rundir import RunDir, provenance, run_id, run_name, write_json

CFG: dict[str, Any] = {
    "title": "a",
    "seed": 3,
    "paths": {"runs": "x"},
    "hardware": {"precision": "fp32", "threads": 0},
    "recurrence": {"name": "rwkv6"},
    "scan": {"name": "2d", "columns": True},
    "prompt": {"name": "sandwich"},
}


def changed(**values: Any) -> dict[str, Any]:
    return {**CFG, **values}


def test_names_and_places_do_not_change_the_id_but_numbers_do() -> None:
    same = [
        changed(title="b"),
        changed(paths={"runs": "y"}),
        changed(hardware={"precision": "fp32", "threads": 2}),
    ]
    other = [changed(seed=4), changed(scan={"name": "2d", "columns": False})]
    other.append(changed(hardware={"precision": "bf16", "threads": 0}))
    assert {run_id(cfg) for cfg in same} == {run_id(CFG)}
    assert len({run_id(cfg) for cfg in (CFG, *other)}) == 4
    assert run_name(CFG) == f"rwkv6-2d-sandwich-s3-{run_id(CFG)}"


def test_settings_that_came_later_leave_the_names_of_older_runs() -> None:
    old = changed(eval={"split": "test", "limit": 0})
    new = changed(eval={"split": "test", "limit": 0, "every": 0, "every_limit": 0})
    asked = changed(eval={"split": "test", "limit": 0, "every": 100, "every_limit": 0})
    assert run_id(old) == run_id(new) != run_id(asked)


HOLD = """
import sys, json
from pathlib import Path
from toolkit.rundir import RunDir
with RunDir(Path(sys.argv[1]), json.loads(sys.argv[2])).lock():
    print("held", flush=True)
    sys.stdin.readline()
"""


def test_a_second_process_is_refused_and_a_killed_one_leaves_no_lock(tmp_path: Path) -> None:
    words = [sys.executable, "-c", HOLD, str(tmp_path), json.dumps(CFG)]
    with subprocess.Popen(words, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as holder:
        assert holder.stdout is not None and holder.stdout.readline() == "held\n"
        with pytest.raises(ValueError, match="another process is working on this run"), _lock(tmp_path):
            pass
        holder.kill()
    with _lock(tmp_path):
        pass


def _lock(folder: Path) -> Any:
    return RunDir(folder, CFG).lock()


def test_status_gathers_facts_and_a_torn_write_leaves_the_old_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = RunDir(tmp_path, CFG)
    run.note("failed", error="y")
    run.note("running", command="x")
    run.note("done")
    status = json.loads(run.status.read_text())
    assert status["state"] == "done" and status["command"] == "x" and "error" not in status

    def full(*args: object) -> None:
        raise OSError("no space left on device")

    monkeypatch.setattr("os.fsync", full)
    with pytest.raises(OSError, match="no space"):
        write_json(run.status, {"state": "lost"})
    assert json.loads(run.status.read_text()) == status


def test_a_folder_that_cannot_be_made_is_told_by_its_key(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with (
        pytest.raises(ValueError, match=r"paths\.runs=.*name a folder"),
        RunDir(tmp_path / "file", CFG).lock(),
    ):
        pass


def test_provenance_names_versions_and_no_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SECRET_TOKEN", "do-not-tell")
    found = provenance(["recipe=x", "title='a b'"])
    assert shlex.split(found["command"]) == ["python", "-m", "toolkit.run", "recipe=x", "title='a b'"]
    assert "torch" in found["versions"]
    assert "do-not-tell" not in json.dumps(found)
