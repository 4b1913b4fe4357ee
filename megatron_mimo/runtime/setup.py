"""A rank's start and end: device, megatron-core, process group."""

import importlib
import logging
import os
from dataclasses import dataclass
from datetime import timedelta

import torch
import torch.distributed as dist

from megatron_mimo.runtime.device import Device, DeviceChoice, resolve_device
from megatron_mimo.runtime.environment import RankEnvironment, read_environment
from megatron_mimo.runtime.fuser import fuser_of_any_number
from megatron_mimo.runtime.host import install_host_adaptation
from megatron_mimo.runtime.open_files import connect_lazily, raise_limit
from megatron_mimo.runtime.quiet import quiet_upstream
from megatron_mimo.runtime.scratch import ensure_global_memory_buffer
from megatron_mimo.runtime.versions import (
    check_gpu,
    check_imports,
    check_present,
    check_versions,
    require_alike,
)

logger = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True, slots=True)
class RuntimeContext:
    """Rank, world size and device of this process.

    Attributes:
        rank: Global rank.
        local_rank: Rank within its machine.
        world_size: Number of ranks.
        device: Device on which this rank computes.
    """

    rank: int
    local_rank: int
    world_size: int
    device: Device


def initialize(
    device: DeviceChoice | str = "auto",
    *,
    timeout_minutes: float = 10,
    allow_missing_kernels: bool = False,
) -> RuntimeContext:
    """Prepare this process as one rank. Collective over all ranks.

    Call it before importing anything that imports megatron-core.

    Args:
        device: Value of `--device`.
        timeout_minutes: Longest time in minutes that a collective waits, and that ranks wait for
            each other at the start.
        allow_missing_kernels: Whether a GPU may compute without the packages of its kernels.

    Raises:
        ValueError: The device does not exist here or is too old, the launcher's variables are
            incomplete, a package is missing, too old or broken, or ranks have different versions.
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
    if resolved.type == "cuda":
        check_gpu(resolved)
        if not allow_missing_kernels:
            check_present()
    prepare_megatron_core(resolved)
    raise_limit()
    connect_lazily()
    _init_process_group(environment, timedelta(minutes=timeout_minutes))
    if environment.world_size > 1:
        require_alike(resolved)
    return RuntimeContext(
        rank=environment.rank,
        local_rank=environment.local_rank,
        world_size=environment.world_size,
        device=resolved,
    )


def prepare_megatron_core(device: Device) -> None:
    """Make megatron-core usable on `device`; a second call changes nothing.

    `initialize` calls it. A process that imports megatron-core once and then forks ranks calls it
    by itself.

    Raises:
        ValueError: A package that megatron-core uses is too old or broken.
        RuntimeError: megatron-core was imported too early.
    """
    quiet_upstream()
    check_versions()
    if device.type == "cuda":
        check_imports()
        with fuser_of_any_number():
            importlib.import_module("megatron.core")
    install_host_adaptation(device)
    if device.type == "cuda":
        torch.cuda.set_device(device.index)
    ensure_global_memory_buffer()


def shutdown() -> None:
    """Destroy every process group of this process; does nothing where there is none."""
    if dist.is_initialized():
        dist.destroy_process_group()


def _init_process_group(environment: RankEnvironment, timeout: timedelta) -> None:
    """Make the world's own group, which is one of the hosts on a GPU too.

    It is for what ranks tell each other before there is a layout. Tensors of a GPU travel in groups
    of their own, which the topology makes.
    """
    if environment.init_method is None:
        # A store inside the process: no port, no file.
        dist.init_process_group(
            "gloo",
            store=torch._C._distributed_c10d.HashStore(),
            rank=0,
            world_size=1,
            timeout=timeout,
        )
        return
    dist.init_process_group(
        "gloo",
        init_method=environment.init_method,
        rank=environment.rank,
        world_size=environment.world_size,
        timeout=timeout,
    )
