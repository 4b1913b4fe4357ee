"""Correspondence of one weight here with one or several elsewhere: entries of a table of names."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from einops import rearrange
from torch import Tensor


def _only(tensors: Sequence[Tensor]) -> Tensor:
    (tensor,) = tensors
    return tensor


def _alone(tensor: Tensor) -> tuple[Tensor, ...]:
    return (tensor,)


@dataclass(frozen=True, slots=True)
class Entry:
    """A weight of ours, and its names and form elsewhere.

    Attributes:
        ours: Name here, with layers counted over all pipeline stages.
        theirs: Names in the other format.
        join: Function that maps their whole tensors [...] to our whole tensor. For a sharded weight
            it also maps a rank's shards of theirs to its shard of ours; both are sharded along the
            same axis.
        split: Inverse of `join`, for whole tensors.
        blocks: Number of equal weights that each of theirs holds end to end, each of which is
            sharded by itself.
    """

    ours: str
    theirs: tuple[str, ...]
    join: Callable[[Sequence[Tensor]], Tensor] = _only
    split: Callable[[Tensor], tuple[Tensor, ...]] = _alone
    blocks: int = 1


type Tables = Mapping[str, Sequence[Entry]]
"""Part of a module -> its weights, with their names in another format."""


def interleaved_qkv(ours: str, theirs: tuple[str, ...], *, groups: int, head_dim: int) -> Entry:
    """Query, key and value of a projection, which megatron-core interleaves by group.

    Args:
        ours: Name here, of a weight [groups * (queries of a group + 2) * head_dim, ...].
        theirs: Names of query, key and value; or one name of a weight that holds the three end to
            end, each with as many heads.
        groups: Number of key-value heads.
        head_dim: Width of a head.
    """

    def join(tensors: Sequence[Tensor]) -> Tensor:
        parts = tensors if len(tensors) > 1 else tensors[0].chunk(3)
        # All groups, or those of a rank.
        held = len(parts[1]) // head_dim
        if parts[1].shape != parts[2].shape or len(parts[1]) != held * head_dim:
            raise ValueError("keys and values are not whole heads, as many of each")
        by_group = [rearrange(part, "(g d) ... -> g d ...", g=held) for part in parts]
        joined: Tensor = rearrange(torch.cat(by_group, dim=1), "g d ... -> (g d) ...")
        return joined

    def split(tensor: Tensor) -> tuple[Tensor, ...]:
        by_group = rearrange(tensor, "(g d) ... -> g d ...", g=groups)
        queries = by_group.size(1) - 2 * head_dim
        parts = [
            rearrange(part, "g d ... -> (g d) ...")
            for part in by_group.split([queries, head_dim, head_dim], dim=1)
        ]
        return tuple(parts) if len(theirs) > 1 else (torch.cat(parts),)

    return Entry(ours, theirs, join, split, blocks=1 if len(theirs) > 1 else 3)
