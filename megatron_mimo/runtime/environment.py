"""Rank, world size and meeting point of a process, read from the launcher's variables."""

import os
import re
import sys
from collections.abc import Mapping
from dataclasses import dataclass

_TORCHRUN = ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
_SLURM = ("SLURM_PROCID", "SLURM_NTASKS", "SLURM_LOCALID")

# Ports for Slurm jobs that name none, below the range that systems hand out to clients.
_FIRST_PORT = 15000
_NUM_PORTS = 10000

# Batch scripts, interactive shells and Slurm's own steps have numbers from here on.
_FIRST_RESERVED_STEP = 0xFFFF_FFF0


@dataclass(frozen=True, kw_only=True, slots=True)
class RankEnvironment:
    """Rank of a process in its job, and how to reach the other ranks.

    Attributes:
        rank: Global rank.
        world_size: Number of ranks.
        local_rank: Rank within its machine.
        init_method: URL for `init_process_group`, at which ranks meet; None for a single process,
            which needs no process group.
        on_one_host: Whether all ranks are known to be on one machine.
    """

    rank: int
    world_size: int
    local_rank: int
    init_method: str | None
    on_one_host: bool = False

    def __post_init__(self) -> None:
        if not 0 <= self.rank < self.world_size:
            raise ValueError(
                f"rank {self.rank} is outside [0, {self.world_size}): "
                f"check the launcher's rank and world size variables"
            )
        if self.local_rank < 0:
            raise ValueError(f"local rank {self.local_rank} is negative: check LOCAL_RANK")


def read_environment(env: Mapping[str, str]) -> RankEnvironment:
    """Read torchrun's variables; without RANK, Slurm's; without either, a single process.

    A shell inside a Slurm allocation starts a single process, see `_is_task`.

    Raises:
        ValueError: Variables are missing or are not numbers; the message names them.
    """
    if "RANK" in env or "WORLD_SIZE" in env:
        return _torchrun(env)
    if _is_task(env) and env.get("SLURM_NTASKS") != "1":
        return _slurm(env)
    return RankEnvironment(rank=0, world_size=1, local_rank=0, init_method=None)


def cores_per_rank(env: Mapping[str, str]) -> int:
    """Number of cores for a rank: as Slurm states it, or this process's cores per local rank."""
    if env.get("SLURM_CPUS_PER_TASK", "").isdigit() and "LOCAL_WORLD_SIZE" not in env:
        return int(env["SLURM_CPUS_PER_TASK"])
    cores = len(os.sched_getaffinity(0)) if sys.platform == "linux" else os.cpu_count() or 1
    # Slurm without a setting for cores binds each task to its own, or says how many share them.
    peers = env.get("LOCAL_WORLD_SIZE") or env.get("SLURM_NTASKS_PER_NODE", "")
    return max(1, cores // (int(peers) if peers.isdigit() and int(peers) else 1))


def _is_task(env: Mapping[str, str]) -> bool:
    """Whether srun started this process as one of its tasks.

    The shell of a batch job has `SLURM_PROCID` and the number of tasks too, though it is none of
    them and nobody starts the others. It is no step, or has one of Slurm's reserved numbers, as has
    the shell of an interactive job.
    """
    if env.get("SLURM_PROCID") != "0":
        return "SLURM_PROCID" in env
    step = env.get("SLURM_STEP_ID", "")
    if step:
        return step.isdigit() and int(step) < _FIRST_RESERVED_STEP
    # Without a job, programs that imitate srun.
    return "SLURM_STEP_NODELIST" in env or "SLURM_JOB_ID" not in env


def _torchrun(env: Mapping[str, str]) -> RankEnvironment:
    _require(env, _TORCHRUN, "start with torchrun or `megatron-mimo train --nproc N`")
    return RankEnvironment(
        rank=_integer(env, "RANK"),
        world_size=_integer(env, "WORLD_SIZE"),
        local_rank=_integer(env, "LOCAL_RANK") if "LOCAL_RANK" in env else 0,
        init_method="env://",
        on_one_host=bool(env.get("LOCAL_WORLD_SIZE"))
        and env["LOCAL_WORLD_SIZE"] == env["WORLD_SIZE"],
    )


def _slurm(env: Mapping[str, str]) -> RankEnvironment:
    _require(env, _SLURM, "start with srun")
    return RankEnvironment(
        rank=_integer(env, "SLURM_PROCID"),
        world_size=_integer(env, "SLURM_NTASKS"),
        local_rank=_integer(env, "SLURM_LOCALID"),
        init_method=f"tcp://{_slurm_master(env)}:{_slurm_port(env)}",
        on_one_host=env.get("SLURM_STEP_NUM_NODES") == "1",
    )


def _slurm_master(env: Mapping[str, str]) -> str:
    """Name of the machine of rank 0: the first in the step's list of nodes.

    The address from which the step was launched is the last resort, since that may be a login node.
    """
    if env.get("MASTER_ADDR"):
        return env["MASTER_ADDR"]
    for name in ("SLURM_STEP_NODELIST", "SLURM_NODELIST", "SLURM_JOB_NODELIST"):
        if env.get(name):
            return first_node(env[name])
    if env.get("SLURM_LAUNCH_NODE_IPADDR"):
        return env["SLURM_LAUNCH_NODE_IPADDR"]
    raise ValueError(
        "cannot tell where rank 0 runs: SLURM_NODELIST and SLURM_LAUNCH_NODE_IPADDR are unset; "
        "set MASTER_ADDR"
    )


def _slurm_port(env: Mapping[str, str]) -> int:
    if env.get("MASTER_PORT"):
        return _integer(env, "MASTER_PORT")
    # The same on every rank, and different for two jobs that share a machine.
    job = _integer(env, "SLURM_JOB_ID") if env.get("SLURM_JOB_ID") else 0
    return _FIRST_PORT + job % _NUM_PORTS


def first_node(nodelist: str) -> str:
    """First machine of a Slurm list: `gpu[007-010,12],cpu3` gives `gpu007`."""
    name = re.match(r"(?:[^,\[]|\[[^\]]*\])+", nodelist)
    if name is None:
        raise ValueError(f"no machine in the Slurm node list {nodelist!r}: set MASTER_ADDR")
    return re.sub(r"\[([^\],-]+)[^\]]*\]", r"\1", name.group())


def _require(env: Mapping[str, str], names: tuple[str, ...], remedy: str) -> None:
    missing = [name for name in names if not env.get(name)]
    if missing:
        present = [name for name in names if env.get(name)]
        raise ValueError(
            f"{', '.join(present) or names[0]} set, but not {', '.join(missing)}: "
            f"{remedy}, or set all of {', '.join(names)}"
        )


def _integer(env: Mapping[str, str], name: str) -> int:
    try:
        return int(env[name])
    except ValueError:
        raise ValueError(f"{name}={env[name]!r} is not a whole number") from None
