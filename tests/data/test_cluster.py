"""Reading the variables of launchers."""

from __future__ import annotations

import pytest

from data.cluster import Place, first_host, place


def torchrun(rank=3, world=8, local=1, **more):
    found = {"RANK": rank, "WORLD_SIZE": world, "LOCAL_RANK": local, "MASTER_ADDR": "a", "MASTER_PORT": 29500}
    return {name: str(value) for name, value in {**found, "TORCHELASTIC_RUN_ID": "x", **more}.items()}


def srun(rank=3, world=16, local=1, **more):
    found = {"SLURM_PROCID": rank, "SLURM_NTASKS": world, "SLURM_LOCALID": local, "SLURM_STEP_ID": 0}
    found |= {"SLURM_JOB_ID": 4711, "SLURM_JOB_NODELIST": "gpu[007-008]"}
    return {name: str(value) for name, value in {**found, **more}.items()}


def without(environ, *names):
    return {name: value for name, value in environ.items() if name not in names}


def test_one_process():
    assert place({}) == Place(0, 1, 0, "none", None)


def test_torchrun():
    assert place(torchrun()) == Place(3, 8, 1, "torchrun", ("a", 29500))


def test_slurm():
    assert place(srun()) == Place(3, 16, 1, "slurm", ("gpu007", 24711))
    assert place(srun(MASTER_ADDR="b", MASTER_PORT="1234")).master == ("b", 1234)
    assert place(srun(0, 1, 0)) == Place(0, 1, 0, "slurm", None)


def test_torchrun_under_srun_with_one_launcher_a_node():
    assert place({**srun(1, 2, 0), **torchrun(9, 16, 1)}) == Place(9, 16, 1, "torchrun", ("a", 29500))


def test_launchers_that_agree():
    both = {**srun(3, 8, 1), **without(torchrun(3, 8, 1), "TORCHELASTIC_RUN_ID")}
    assert place(both).launcher == "torchrun"


@pytest.mark.parametrize(
    ("environ", "message"),
    [
        ({**srun(3, 16), **without(torchrun(0, 1, 0), "TORCHELASTIC_RUN_ID")}, "two launchers disagree"),
        (
            {**srun(3, 3), **torchrun(1, 8, 1)},
            r"RANK=1 of WORLD_SIZE=8, but SLURM_PROCID=3|ranks count from 0",
        ),
        ({**srun(2, 3), **torchrun(1, 8, 1)}, "RANK=1 of WORLD_SIZE=8, but SLURM_PROCID=2 of SLURM_NTASKS=3"),
        (without(torchrun(), "LOCAL_RANK"), "RANK=3 is set and LOCAL_RANK is not: start with torchrun"),
        (without(torchrun(), "RANK"), "WORLD_SIZE=8 is set and RANK is not"),
        (without(torchrun(), "MASTER_PORT"), "WORLD_SIZE=8 and no MASTER_PORT"),
        (torchrun(rank=8), "RANK=8, WORLD_SIZE=8, LOCAL_RANK=1: ranks count from 0"),
        (torchrun(rank="first"), "RANK='first' is not a whole number"),
        (torchrun(rank=-1), "RANK='-1' is not a whole number"),
        (without(srun(), "SLURM_STEP_ID"), "SLURM_NTASKS=16, but this process was not started by srun"),
        (
            without(srun(), "SLURM_LOCALID"),
            "SLURM_PROCID=3 is set and SLURM_LOCALID is not: start with SLURM",
        ),
        (without(srun(), "SLURM_JOB_NODELIST"), "SLURM_JOB_NODELIST is empty"),
    ],
)
def test_what_does_not_fit_is_refused(environ, message):
    with pytest.raises(ValueError, match=message):
        place(environ)


def test_a_batch_script_may_say_that_it_is_one_process():
    assert place({**without(srun(), "SLURM_STEP_ID"), "SLURM_NTASKS": "1"}) == Place()


@pytest.mark.parametrize(
    ("nodes", "first"),
    [
        ("gpu[003-010,12]", "gpu003"),
        ("gpu[7,9]", "gpu7"),
        ("node1,node2", "node1"),
        ("alone", "alone"),
        ("a-b[1-2].cluster,c[4]", "a-b1.cluster"),
    ],
)
def test_the_first_host(nodes, first):
    assert first_host(nodes) == first
