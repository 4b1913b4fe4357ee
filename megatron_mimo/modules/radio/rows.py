"""Rows of all context-parallel ranks of a replica, on each of them."""

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_mimo.modules.radio.part import ImagesPart


def all_rows(rows: Tensor, part: ImagesPart, group: dist.ProcessGroup) -> Tensor:
    """Rows of all ranks in the order of items, equal on each: [r, H] -> [R, H], same dtype.

    Collective over the group, in forward only: a bridge gives every rank the gradients of all rows,
    of which each keeps those of its own.

    Args:
        rows: This rank's rows, [r, H]; any further ones are dropped.
        part: What this rank computes.
        group: Context-parallel ranks of the replica.
    """
    gathered: Tensor = _AllRows.apply(rows, part, group)  # type: ignore[no-untyped-call]
    return gathered


class _AllRows(torch.autograd.Function):
    """Gathers rows; backward takes the gradients of a rank's own rows."""

    @staticmethod
    def forward(ctx: Any, rows: Tensor, part: ImagesPart, group: dist.ProcessGroup) -> Tensor:
        ctx.own_rows, ctx.given = part.own_rows, len(rows)
        # Ranks have different numbers of rows, and collectives equal sizes.
        padded = rows.new_zeros(part.most_rows, rows.size(1))
        padded[: len(part.own_rows)] = rows[: len(part.own_rows)]
        every = rows.new_empty(part.ranks * part.most_rows, rows.size(1))
        dist.all_gather_into_tensor(every, padded, group=group)
        return every.index_select(0, part.gathered_rows)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None]:
        own: Tensor = gradient.index_select(0, ctx.own_rows)
        if len(own) < ctx.given:
            own = torch.cat([own, own.new_zeros(ctx.given - len(own), own.size(1))])
        return own, None, None
