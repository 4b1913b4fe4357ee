"""One weight here, one or several elsewhere: the lines of a table of names."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


def _only(tensors: Sequence[Tensor]) -> Tensor:
    (tensor,) = tensors
    return tensor


def _alone(tensor: Tensor) -> tuple[Tensor, ...]:
    return (tensor,)


@dataclass(frozen=True, slots=True)
class Entry:
    """A weight of ours, and what it is called and looks like elsewhere.

    Attributes:
        ours: Name here, layers counted over all pipeline stages.
        theirs: Names there.
        join: Their whole tensors to our whole tensor; also, of a weight that is sharded, a rank's
            shards of theirs to its shard of ours. Both are sharded along the same axis.
        split: The reverse, of whole tensors.
        blocks: Equal weights that each of theirs holds end to end, each of which is sharded by
            itself.
    """

    ours: str
    theirs: tuple[str, ...]
    join: Callable[[Sequence[Tensor]], Tensor] = _only
    split: Callable[[Tensor], tuple[Tensor, ...]] = _alone
    blocks: int = 1


def interleaved_qkv(ours: str, theirs: tuple[str, ...], *, groups: int, head_dim: int) -> Entry:
    """Query, key and value of a projection; megatron-core holds them group by group.

    Args:
        ours: Name here: [groups * (queries of a group + 2) * head_dim, ...].
        theirs: Query, key and value; or one weight that holds the three end to end, each with as
            many heads.
        groups: Key-value heads.
        head_dim: Width of a head.
    """

    def join(tensors: Sequence[Tensor]) -> Tensor:
        parts = tensors if len(tensors) > 1 else tensors[0].chunk(3)
        # All groups, or those of a rank.
        held = len(parts[1]) // head_dim
        if parts[1].shape != parts[2].shape or len(parts[1]) != held * head_dim:
            raise ValueError("keys and values are not whole heads, as many of each")
        by_group = [part.view(held, -1, *part.shape[1:]) for part in parts]
        return torch.cat(by_group, dim=1).flatten(0, 1)

    def split(tensor: Tensor) -> tuple[Tensor, ...]:
        by_group = tensor.view(groups, -1, *tensor.shape[1:])
        queries = by_group.size(1) - 2 * head_dim
        parts = [
            part.flatten(0, 1) for part in by_group.split([queries, head_dim, head_dim], dim=1)
        ]
        return tuple(parts) if len(theirs) > 1 else (torch.cat(parts),)

    return Entry(ours, theirs, join, split, blocks=1 if len(theirs) > 1 else 3)
