"""The world of a paper rank: process groups that send nothing."""

from typing import Any

import torch.distributed as dist
from torch import Tensor

from megatron_mimo.runtime.device import Device

PAPER = Device("meta")
"""The device of a paper rank."""
# torch's own backend for tests, for host tensors and for those without content.
_BACKEND = "cpu:fake,meta:fake"


def open_world(rank: int, world_size: int) -> None:
    """Create the default process group of a rank of a world that is not there.

    Every group that is created later sends nothing either, whatever backend it asks for.

    Args:
        rank: Global rank that this process stands for.
        world_size: Number of ranks of the world.
    """
    # Registers the backend too.
    from torch.testing._internal.distributed.fake_pg import FakeStore

    dist.init_process_group(_BACKEND, store=FakeStore(), rank=rank, world_size=world_size)
    new_group, all_reduce = dist.new_group, dist.all_reduce

    def new_paper_group(*args: Any, **kwargs: Any) -> Any:
        # gloo would look for the peers.
        return new_group(*args, **kwargs | {"backend": _BACKEND})

    def all_reduce_on_paper(
        tensor: Tensor, op: Any = dist.ReduceOp.SUM, group: Any = None, async_op: bool = False
    ) -> Any:
        work = all_reduce(tensor, op=op, group=group, async_op=async_op)
        if not tensor.is_meta and op == dist.ReduceOp.SUM:
            # Sums on the host are those of an agreement, where every rank adds what it alone knows,
            # such as the gradient norm of a module: of other ranks' parts, each is one.
            tensor += dist.get_world_size(group) - 1
        return work

    dist.new_group, dist.all_reduce = new_paper_group, all_reduce_on_paper
