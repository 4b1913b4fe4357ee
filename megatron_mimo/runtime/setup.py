"""A rank's start and end: device, megatron-core, process group."""

import logging
import os
from dataclasses import dataclass
from datetime import timedelta

import torch
import torch.distributed as dist

from megatron_mimo.runtime.device import Device, DeviceChoice, resolve_device
from megatron_mimo.runtime.environment import RankEnvironment, read_environment
from megatron_mimo.runtime.host import install_host_adaptation
from megatron_mimo.runtime.memory import ensure_global_memory_buffer
from megatron_mimo.runtime.quiet import quiet_upstream

logger = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True, slots=True)
class RuntimeContext:
    """What a rank knows about itself.

    Attributes:
        rank: Global rank.
        local_rank: Rank within its machine.
        world_size: Number of ranks.
        device: Where this rank computes.
    """

    rank: int
    local_rank: int
    world_size: int
    device: Device


def initialize(
    device: DeviceChoice | str = "auto", *, timeout_minutes: float = 10
) -> RuntimeContext:
    """Prepare this process as one rank. Collective over all ranks.

    Call it before importing anything that imports megatron-core.

    Args:
        device: The value of `--device`.
        timeout_minutes: Longest wait of a collective, and for the other ranks to appear.

    Raises:
        ValueError: The device does not exist here, or the launcher's variables are incomplete.
        RuntimeError: A process group exists already, or megatron-core was imported too early.
    """
    if timeout_minutes <= 0:
        raise ValueError(
            f"--distributed-timeout-minutes {timeout_minutes}: expected a positive number"
        )
    if dist.is_initialized():
        raise RuntimeError(
            "a default process group exists already: call shutdown() before initialize()"
        )
    environment = read_environment(os.environ)
    resolved = resolve_device(device, local_rank=environment.local_rank)
    prepare_engine(resolved)
    _init_process_group(environment, resolved, timedelta(minutes=timeout_minutes))
    return RuntimeContext(
        rank=environment.rank,
        local_rank=environment.local_rank,
        world_size=environment.world_size,
        device=resolved,
    )


def prepare_engine(device: Device) -> None:
    """Make megatron-core usable on `device`; a second call changes nothing.

    `initialize` does this. On its own it serves a process that starts ranks later, such as a
    parent that imports once and forks.
    """
    quiet_upstream()
    install_host_adaptation(device)
    if device.type == "cuda":
        torch.cuda.set_device(device.index)
    ensure_global_memory_buffer()


def shutdown() -> None:
    """Destroy every process group of this process; does nothing where there is none."""
    if dist.is_initialized():
        dist.destroy_process_group()


def _init_process_group(environment: RankEnvironment, device: Device, timeout: timedelta) -> None:
    if environment.init_method is None:
        # A store inside the process: no port, no file.
        dist.init_process_group(
            device.backend,
            store=torch._C._distributed_c10d.HashStore(),
            rank=0,
            world_size=1,
            timeout=timeout,
        )
        return
    dist.init_process_group(
        device.backend,
        init_method=environment.init_method,
        rank=environment.rank,
        world_size=environment.world_size,
        timeout=timeout,
    )
