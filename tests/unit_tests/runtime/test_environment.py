"""Where launchers' variables put a rank."""

import re

import pytest

from megatron_mimo.runtime import environment
from megatron_mimo.runtime.environment import (
    RankEnvironment,
    cores_per_rank,
    first_node,
    read_environment,
)

TORCHRUN = {
    "RANK": "5",
    "WORLD_SIZE": "8",
    "LOCAL_RANK": "1",
    "MASTER_ADDR": "10.0.0.1",
    "MASTER_PORT": "29500",
}
SLURM = {
    "SLURM_PROCID": "5",
    "SLURM_NTASKS": "8",
    "SLURM_LOCALID": "1",
    "SLURM_NODELIST": "gpu[07-08]",
    "SLURM_JOB_ID": "1234567",
    "SLURM_STEP_ID": "0",
}


def test_nothing_set_is_a_single_process() -> None:
    assert read_environment({}) == RankEnvironment(
        rank=0, world_size=1, local_rank=0, init_method=None
    )


def test_torchrun() -> None:
    assert read_environment(TORCHRUN) == RankEnvironment(
        rank=5, world_size=8, local_rank=1, init_method="env://"
    )


def test_torchrun_wins_inside_a_slurm_job() -> None:
    assert read_environment(SLURM | TORCHRUN | {"SLURM_NTASKS": "2"}).world_size == 8


def test_slurm() -> None:
    place = read_environment(SLURM)
    assert (place.rank, place.world_size, place.local_rank) == (5, 8, 1)
    assert place.init_method is not None
    assert re.fullmatch(r"tcp://gpu07:\d+", place.init_method)


def test_slurm_ranks_agree_on_the_meeting_point_and_jobs_do_not() -> None:
    def meeting_point(**changes: str) -> str | None:
        return read_environment(SLURM | changes).init_method

    assert meeting_point(SLURM_PROCID="0") == meeting_point(SLURM_PROCID="7")
    assert meeting_point() != meeting_point(SLURM_JOB_ID="1234568")


def test_slurm_meeting_point_can_be_set() -> None:
    place = read_environment(SLURM | {"MASTER_ADDR": "login1", "MASTER_PORT": "4242"})
    assert place.init_method == "tcp://login1:4242"


def test_slurm_without_a_node_list_takes_the_launch_address() -> None:
    env = SLURM | {"SLURM_NODELIST": "", "SLURM_LAUNCH_NODE_IPADDR": "10.0.0.9"}
    assert (read_environment(env).init_method or "").startswith("tcp://10.0.0.9:")


def test_a_slurm_allocation_without_srun_is_a_single_process() -> None:
    assert read_environment({"SLURM_JOB_ID": "7", "SLURM_NTASKS": "8"}).world_size == 1


@pytest.mark.parametrize(
    "step",
    [
        {},
        {"SLURM_STEP_ID": "4294967291"},  # a batch script
        {"SLURM_STEP_ID": "4294967290"},  # an interactive shell
    ],
)
def test_the_shell_of_a_slurm_job_is_no_task(step: dict[str, str]) -> None:
    batch = {"SLURM_PROCID": "0", "SLURM_LOCALID": "0", "SLURM_NTASKS": "8", "SLURM_JOB_ID": "7"}
    assert read_environment(batch | step).world_size == 1


@pytest.mark.parametrize(
    ("env", "on_one_host"),
    [
        (TORCHRUN | {"LOCAL_WORLD_SIZE": "8"}, True),
        (TORCHRUN | {"LOCAL_WORLD_SIZE": "4"}, False),
        (TORCHRUN, False),
        (SLURM | {"SLURM_STEP_NUM_NODES": "1"}, True),
        (SLURM | {"SLURM_STEP_NUM_NODES": "2"}, False),
        (SLURM, False),
    ],
)
def test_one_host_is_known_where_the_launcher_says_so(
    env: dict[str, str], on_one_host: bool
) -> None:
    assert read_environment(env).on_one_host is on_one_host


@pytest.mark.parametrize(
    ("nodes", "first"),
    [
        ("node3", "node3"),
        ("node[003-010,012]", "node003"),
        ("a[1,3-4],b[7-9]", "a1"),
        ("rack[2-3]-n[10-11]", "rack2-n10"),
        ("gpu-a-01,gpu-a-02", "gpu-a-01"),
    ],
)
def test_first_node(nodes: str, first: str) -> None:
    assert first_node(nodes) == first


@pytest.mark.parametrize(
    ("env", "message"),
    [
        ({"RANK": "0"}, "RANK set, but not WORLD_SIZE, MASTER_ADDR, MASTER_PORT"),
        ({"WORLD_SIZE": "2"}, "WORLD_SIZE set, but not RANK"),
        (TORCHRUN | {"MASTER_PORT": ""}, "not MASTER_PORT"),
        (TORCHRUN | {"RANK": "one"}, "RANK='one' is not a whole number"),
        (TORCHRUN | {"RANK": "8"}, r"rank 8 is outside \[0, 8\)"),
        (TORCHRUN | {"LOCAL_RANK": "-1"}, "local rank -1"),
        ({k: v for k, v in SLURM.items() if k != "SLURM_LOCALID"}, "not SLURM_LOCALID.*srun"),
        (SLURM | {"SLURM_NODELIST": ""}, "where rank 0 runs.*MASTER_ADDR"),
        (SLURM | {"SLURM_NTASKS": "many"}, "SLURM_NTASKS='many' is not a whole number"),
    ],
)
def test_incomplete_variables_are_named(env: dict[str, str], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        read_environment(env)


@pytest.mark.parametrize(
    ("env", "cores"),
    [
        ({}, 24),
        ({"LOCAL_WORLD_SIZE": "8"}, 3),
        ({"LOCAL_WORLD_SIZE": "100"}, 1),
        ({"LOCAL_WORLD_SIZE": "4", "SLURM_CPUS_PER_TASK": "9"}, 6),
        ({"SLURM_CPUS_PER_TASK": "9", "SLURM_NTASKS_PER_NODE": "8"}, 9),
        ({"SLURM_NTASKS_PER_NODE": "12"}, 2),
    ],
)
def test_ranks_of_a_machine_share_its_cores(
    env: dict[str, str], cores: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(environment.sys, "platform", "linux")
    monkeypatch.setattr(
        environment.os, "sched_getaffinity", lambda pid: set(range(24)), raising=False
    )
    assert cores_per_rank(env) == cores
