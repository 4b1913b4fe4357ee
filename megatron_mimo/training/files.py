"""Open files of a run, counted before anything starts."""

import os

from megatron_mimo.config.resolve import Resolved
from megatron_mimo.data.loader.component import components
from megatron_mimo.data.role import data_role
from megatron_mimo.runtime.device import computes_on_gpu
from megatron_mimo.runtime.environment import cores_per_rank
from megatron_mimo.runtime.open_files import check_limit, needed, raise_limit
from megatron_mimo.topology.group_plan import Carries, group_sizes


def check_open_files(resolved: Resolved, rank: int) -> None:
    """Raise the limit of open files, and refuse to start where a rank would need more.

    Raises:
        ValueError: The limit is too low; the message has both numbers and the remedy.
    """
    layout, data = resolved.layout, resolved.data
    roles = [data_role(layout, each) for each in range(layout.world_size)]
    peers = sum(role == roles[rank] for role in roles)
    readers = 0
    if data.provider == "energon":
        wanted = data.loader_processes
        readers = cores_per_rank(os.environ) - 1 if wanted is None else int(wanted)
    serves = layout.world_size if rank == 0 else 0
    sizes = group_sizes(layout, rank, peers)
    hosts, device, messages = (
        sizes[carried] for carried in (Carries.HOST, Carries.DEVICE, Carries.MESSAGES)
    )
    # Groups of those that share out items; contents move between any two of some.
    together = [each for each in components(layout, roles) if rank in each.roles]
    hosts += [len(each.readers) for each in together]
    movers = [len(each.movers) for each in together if rank in each.movers]
    if computes_on_gpu(resolved.runtime.device):
        communicators = len(device) + len(messages)
        needs = needed(
            hosts, meshes=movers, serves=serves, readers=readers, communicators=communicators
        )
    else:
        needs = needed(
            [*hosts, *device], meshes=[*messages, *movers], serves=serves, readers=readers
        )
    what = f"rank {rank} ({layout.describe_rank(rank)}) of {layout.world_size}"
    check_limit(raise_limit(), needs, what)
