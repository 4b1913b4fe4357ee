"""Python objects of all ranks on one, over few connections."""

import pickle
from typing import Any

import torch
import torch.distributed as dist


def gather_to_first(value: Any, group: dist.ProcessGroup) -> list[Any]:
    """Collect a value of every rank of a group on its first one, through a binomial tree.

    torch's `gather_object` has every rank connect to the first one; here no rank talks to more than
    log2 of the number of ranks. Collective over the group, which is one of the hosts.

    Args:
        value: Value of this rank, which can be pickled.
        group: gloo group.

    Returns:
        Values by rank of the group; an empty list on all but the first.
    """
    rank, size = dist.get_rank(group), dist.get_world_size(group)
    found = {rank: value}
    step = 1
    while step < size:
        if rank % (2 * step):
            _send(found, rank - step, group)
            return []
        if rank + step < size:
            found |= _receive(rank + step, group)
        step *= 2
    return [found[i] for i in range(size)]


def _send(value: Any, rank: int, group: dist.ProcessGroup) -> None:
    data = torch.frombuffer(bytearray(pickle.dumps(value)), dtype=torch.uint8)
    peer = dist.get_global_rank(group, rank)
    dist.send(torch.tensor([data.numel()]), peer, group=group)
    dist.send(data, peer, group=group)


def _receive(rank: int, group: dist.ProcessGroup) -> Any:
    peer = dist.get_global_rank(group, rank)
    size = torch.zeros(1, dtype=torch.int64)
    dist.recv(size, peer, group=group)
    data = torch.zeros(int(size), dtype=torch.uint8)
    dist.recv(data, peer, group=group)
    return pickle.loads(data.numpy().tobytes())  # noqa: S301 - of a rank of this run
