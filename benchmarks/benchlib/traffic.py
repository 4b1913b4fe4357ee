"""Count what a rank sends, by watching torch.distributed."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor


@dataclass
class Traffic:
    """Messages between two ranks, and broadcasts, that a rank has sent.

    Attributes:
        messages: Number of point-to-point messages.
        broadcasts: Number of broadcasts in groups of more than one rank, counted on their source.
        payload: Number of bytes of rows and gradients in both; a broadcast counts once for each
            other rank.
        other: Number of bytes of anything else, such as shapes.
    """

    messages: int = 0
    broadcasts: int = 0
    payload: int = 0
    other: int = 0

    def add(self, tensor: Tensor, copies: int = 1) -> None:
        """Count the bytes of a tensor [...] of any dtype."""
        size = tensor.numel() * tensor.element_size() * copies
        if tensor.dtype.is_floating_point:
            self.payload += size
        else:
            self.other += size

    def over_all_ranks(self) -> "Traffic":
        """The sum over the world."""
        counts = torch.tensor([self.messages, self.broadcasts, self.payload, self.other])
        dist.all_reduce(counts)
        return Traffic(*counts.tolist())


@contextmanager
def counted() -> Iterator[Traffic]:
    """Count what this rank sends inside the block."""
    traffic = Traffic()
    batch, send, broadcast = dist.batch_isend_irecv, dist.send, dist.broadcast

    def counting_batch(operations: list[Any]) -> Any:
        for operation in operations:
            if operation.op is dist.isend:
                traffic.messages += 1
                traffic.add(operation.tensor)
        return batch(operations)

    def counting_send(tensor: Tensor, *args: Any, **kwargs: Any) -> Any:
        traffic.messages += 1
        traffic.add(tensor)
        return send(tensor, *args, **kwargs)

    def counting_broadcast(tensor: Tensor, src: int, group: Any = None, **kwargs: Any) -> Any:
        others = dist.get_world_size(group) - 1
        if others and src == dist.get_rank():
            traffic.broadcasts += 1
            traffic.add(tensor, others)
        return broadcast(tensor, src=src, group=group, **kwargs)

    replaced: dict[str, Callable[..., Any]] = {
        "batch_isend_irecv": counting_batch,
        "send": counting_send,
        "broadcast": counting_broadcast,
    }
    for name, function in replaced.items():
        setattr(dist, name, function)
    try:
        yield traffic
    finally:
        dist.batch_isend_irecv, dist.send, dist.broadcast = batch, send, broadcast
